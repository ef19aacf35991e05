"""Denoising losses: which noise levels a network is trained at, and how much each of them counts.

Every loss here is one squared error, that of the predicted noise,

    loss(x0) = E_t w(t) |eps - eps_hat|^2,      x_t = alpha x0 + sigma eps,      t ~ times,

whatever the network predicts. Its target F* = a x0 + b eps and its output F give the error without cancellation,

    eps - eps_hat = (alpha/det) (F* - F),       det = alpha b - sigma a,

so the error of the data is rho = sigma/alpha times it, and no quantity is formed and subtracted again.
The weights in use, as multiples of |eps - eps_hat|^2 (lambda = log alpha/sigma):

    uniform      1                                  "simple", and score matching weighted by sigma^2
    likelihood   -d lambda/dt = g^2/(2 sigma^2)     the bound on -log p, for t uniform
    edm          (rho^2 + sd^2)/sd^2                (Karras et al. 2022)
    min_snr      min(1, gamma/SNR)                  SNR = alpha^2/sigma^2
    native       (det/alpha)^2                      the plain |F - F*|^2 of a parameterization

A weight belongs to the times it is used with: `uniform` at uniform half_log_snr is the likelihood's loss too. With
`importance=True` the density of the times is divided out and the loss is the integral of w over t, for any times.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ._checks import require_batch, require_count, require_positive
from ._tensor import column, dot
from .model.parameterization import Parameterization
from .model.score_model import ScoreModel
from .sde.base import SDE

Weight: TypeAlias = Callable[[SDE, Tensor], Tensor]


def uniform(sde: SDE, t: Tensor) -> Tensor:
    """The weight 1: DDPM's simple loss, (B,) float64."""
    return torch.ones_like(t)


def likelihood(sde: SDE, t: Tensor) -> Tensor:
    """The weight -d lambda/dt = g^2/(2 sigma^2), (B,) float64: the integral over t bounds -log p from above.

    Source: Song et al. 2021, maximum likelihood training of score-based diffusion models.
    """
    return -sde.dhalf_log_snr(t)


@dataclass(frozen=True)
class EDMWeight:
    """The weight (rho^2 + sd^2)/sd^2 of Karras et al. 2022, meant for `LogNormalSigma` times.

    Attributes:
        sigma_data: The data's standard deviation sd, > 0.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        require_positive("sigma_data", self.sigma_data)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return 1.0 + torch.exp(-2.0 * sde.half_log_snr(t)) / self.sigma_data**2


@dataclass(frozen=True)
class MinSNR:
    """The weight min(1, gamma/SNR): the data's error is weighted by min(SNR, gamma).

    Attributes:
        gamma: Where the weight starts to fall, > 0.

    Source: Hang et al. 2023, efficient diffusion training via min-SNR weighting strategy.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        require_positive("gamma", self.gamma)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return (self.gamma * torch.exp(-2.0 * sde.half_log_snr(t))).clamp(max=1.0)


@dataclass(frozen=True)
class Native:
    """The weight (det/alpha)^2, which makes the loss the plain |F - F*|^2 of a parameterization.

    `Native(velocity())` is flow matching's loss, `Native(v())` that of progressive distillation.

    Attributes:
        parameterization: The quantity whose squared error is meant; need not be the network's own.
    """

    parameterization: Parameterization

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return noise_error_factor(sde, self.parameterization, t).square().reciprocal()


class Draw(NamedTuple):
    """Times and how likely they were.

    Attributes:
        t: (B,) float64 in [t_min, t_max].
        density: (B,) float64, their probability density per unit of t.
    """

    t: Tensor
    density: Tensor


@dataclass(frozen=True)
class Times(ABC):
    """A distribution of training times.

    Attributes:
        low_discrepancy: One time from each of B equal parts of the distribution, all shifted by one uniform number:
            each time alone has the same law, and their mean varies less (Kingma et al. 2021, variational diffusion
            models). False: independent times.
    """

    low_discrepancy: bool = field(default=True, kw_only=True)

    @abstractmethod
    def at(self, sde: SDE, u: Tensor) -> Draw:
        """The times at the quantiles `u`, (B,) float64 in [0, 1)."""

    def heaviest(self, sde: SDE) -> float:
        """The largest weight that dividing by the density gives a level next to an end, in that of uniform levels."""
        drawn = self.at(sde, torch.tensor([1e-9, 1.0 - 1e-9], dtype=torch.float64))
        span = sde.half_log_snr(sde.t_min) - sde.half_log_snr(sde.t_max)
        return float((-sde.dhalf_log_snr(sde.clamp(drawn.t)) / drawn.density).max() / span)

    def draw(self, sde: SDE, batch: int, generator: torch.Generator) -> Draw:
        """`batch` times and their density.

        Args:
            sde: The forward process.
            batch: How many, at least 1.
            generator: The source of the draws; the times are on its device.
        """
        require_count("batch", batch)
        count = 1 if self.low_discrepancy else batch
        u = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
        if self.low_discrepancy:
            u = (u + torch.arange(batch, dtype=torch.float64, device=u.device) / batch) % 1.0
        drawn = self.at(sde, u)
        return Draw(sde.clamp(drawn.t), drawn.density)


@dataclass(frozen=True)
class UniformTime(Times):
    """Times uniform in [t_min, t_max]."""

    def at(self, sde: SDE, u: Tensor) -> Draw:
        span = sde.t_max - sde.t_min
        return Draw(sde.t_min + span * u, torch.full_like(u, 1.0 / span))


@dataclass(frozen=True)
class UniformHalfLogSNR(Times):
    """Times at which half_log_snr is uniform: importance sampling for `likelihood`, whose weight becomes constant."""

    def at(self, sde: SDE, u: Tensor) -> Draw:
        noisy, clean = (float(sde.half_log_snr(t)) for t in (sde.t_max, sde.t_min))
        t = sde.clamp(sde.time_at(noisy + (clean - noisy) * u))
        return Draw(t, -sde.dhalf_log_snr(t) / (clean - noisy))


@dataclass(frozen=True)
class LogNormalSigma(Times):
    """Times at which log(sigma/alpha) is normal, cut off at t_min and t_max.

    Attributes:
        mean: Of log(sigma/alpha).
        std: Of log(sigma/alpha), > 0.

    Source: Karras et al. 2022, elucidating the design space of diffusion-based generative models.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        require_positive("std", self.std)

    def at(self, sde: SDE, u: Tensor) -> Draw:
        ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64, device=u.device)
        low, high = torch.special.ndtr((-sde.half_log_snr(ends) - self.mean) / self.std).unbind()
        z = torch.special.ndtri(low + (high - low) * u)
        t = sde.clamp(sde.time_at(-(self.mean + self.std * z)))
        in_log_sigma = torch.exp(-0.5 * z.square()) / (math.sqrt(2.0 * math.pi) * self.std * (high - low))
        return Draw(t, in_log_sigma * -sde.dhalf_log_snr(t))


@dataclass(frozen=True)
class CauchyLogSigma(Times):
    """Times at which log(sigma/alpha) is Cauchy distributed, cut off at t_min and t_max.

    Its tails are heavy: with `importance=True` no level has more than some ten times the weight it has among uniform
    levels.

    Attributes:
        center: Where log(sigma/alpha) is likeliest.
        scale: Half of its width at half the height, > 0.
    """

    center: float = -2.0
    scale: float = 1.5

    def __post_init__(self) -> None:
        require_positive("scale", self.scale)

    def at(self, sde: SDE, u: Tensor) -> Draw:
        ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64, device=u.device)
        low, high = torch.atan((-sde.half_log_snr(ends) - self.center) / self.scale).unbind()
        z = torch.tan(low + (high - low) * u)
        t = sde.clamp(sde.time_at(-(self.center + self.scale * z)))
        return Draw(t, -sde.dhalf_log_snr(t) / ((high - low) * self.scale * (1.0 + z.square())))


def noise_error_factor(sde: SDE, parameterization: Parameterization, t: Tensor) -> Tensor:
    """alpha/det, (B,) float64: the error of the noise per unit of error of the network's output."""
    weights = parameterization.mix(sde, t)
    alpha = sde.alpha(t)
    return alpha / (alpha * weights.noise - sde.sigma(t) * weights.data)


def denoising_loss(
    model: ScoreModel,
    x0: Tensor,
    *,
    weight: Weight = uniform,
    times: Times = UniformHalfLogSNR(),
    importance: bool = False,
    generator: torch.Generator,
) -> Tensor:
    """The loss w(t) |eps - eps_hat|^2 of each sample at one random time, (B,) float64, with gradients.

    Args:
        model: The network, its SDE and parameterization, with any condition bound.
        x0: Data, (B, *event).
        weight: w; takes (sde, t) and returns (B,) float64.
        times: The distribution of t.
        importance: Divide by the density of `times`: the expectation is the integral of w(t) |eps - eps_hat|^2 over
            t in [t_min, t_max], whatever `times` is.
        generator: The source of times and noise, on the device of `x0`.

    Returns:
        (B,) float64; `.mean()` is what is minimised.

    Raises:
        TypeError, ValueError: `x0` is not a floating tensor (B, *event), or is on another device than `generator`.
    """
    require_batch("x0", x0)
    if generator.device.type != x0.device.type:
        raise ValueError(
            f"generator.device={str(generator.device)!r}, x0.device={str(x0.device)!r}; one device is needed: "
            "torch.Generator(x0.device)."
        )
    t, density = times.draw(model.sde, x0.shape[0], generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
    loss = denoising_error(model, x0, t, noise) * weight(model.sde, t)
    return loss / density if importance else loss


def denoising_error(model: ScoreModel, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The squared error |eps - eps_hat|^2 of each sample at a given time and noise, (B,) float64, with gradients.

    Args:
        model: The network, its SDE and parameterization, with any condition bound.
        x0: Data, (B, *event).
        t: Times, (B,) float64.
        noise: eps, the shape of `x0`.
    """
    weights = model.parameterization.mix(model.sde, t)
    target = column(weights.data, x0) * x0 + column(weights.noise, x0) * noise
    residual = model.output(model.sde.perturb(x0, t, noise), t) - target
    return dot(residual, residual) * noise_error_factor(model.sde, model.parameterization, t).square()

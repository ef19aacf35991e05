"""What a network's output means: one affine map, and conversions any to any.

With x = alpha x0 + sigma eps, every output in use is a combination of the data and the noise,

    F = a(t) x0 + b(t) eps

            a                               b
    noise   0                               1
    score   0                               -1 / sigma
    data    1                               0
    v       -sigma                          alpha                            (Salimans and Ho 2022)
    u       alpha'                          sigma'                           (velocity of the flow)
    edm     rho / (sd sqrt(rho^2 + sd^2))   -sd / sqrt(rho^2 + sd^2)         (rho = sigma/alpha; Karras et al. 2022)

Two of them determine x0 and eps, so any G = a' x0 + b' eps follows from x and F without passing through a third:

    G = A x + B F,   A = (a' b - b' a) / det,   B = (b' alpha - a' sigma) / det,   det = alpha b - sigma a.

Nothing cancels: from a noise network (a = 0) the noise is F itself, never (x - alpha x0)/sigma.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._checks import require_positive
from .._numbers import exp, full_like, hypot, ones_like, zeros_like
from .._tensor import constant
from ..sde.base import SDE

Label: TypeAlias = Callable[[SDE, Tensor], Tensor]


class Mix(NamedTuple):
    """The weights of a quantity a x0 + b eps, each (B,) float64."""

    data: Tensor
    noise: Tensor


@dataclass(frozen=True)
class TimeLabel:
    """The label scale * t + shift that a network is given as its time.

    `TimeLabel()` is t itself, `TimeLabel(999.0)` score_sde's for VP networks, `TimeLabel(N, -1.0)` the step index
    i - 1 = 0..N-1 of a chain of N steps whose levels lie at t = i/N (`table_label(N)`).
    """

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return self.scale * t + self.shift

    def time_of(self, sde: SDE, label: Tensor) -> Tensor:
        """The time that has this label."""
        return (label - self.shift) / self.scale


@dataclass(frozen=True)
class LogSigmaLabel:
    """The label scale * log(sigma/alpha); EDM's has scale 1/4."""

    scale: float = 0.25

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return -self.scale * sde.half_log_snr(t)

    def time_of(self, sde: SDE, label: Tensor) -> Tensor:
        """The time that has this label."""
        return sde.time_at(-label / self.scale)


@dataclass(frozen=True)
class SigmaLabel:
    """The label sigma(t), score_sde's for VE networks."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.sigma(t)


def table_label(steps: int) -> TimeLabel:
    """The label of a network trained on the steps 0..steps-1 of a discrete chain: 0 at t = 1/N, N - 1 at t = 1."""
    return TimeLabel(float(steps), -1.0)


def time_of_label(meaning: Label, sde: SDE, label: Tensor) -> Tensor:
    """(B,) float64 time of a label: in closed form where the label knows it, else by bisection (labels are monotone).

    Args:
        meaning: Takes (sde, t) and returns the label.
        sde: The forward process.
        label: What a network was given, (B,).
    """
    if isinstance(meaning, (TimeLabel, LogSigmaLabel)):
        return sde.clamp(meaning.time_of(sde, label.double()))
    ends = constant((sde.t_min, sde.t_max), torch.float64, label.device)
    first, last = meaning(sde, ends)
    low, high = (sde.half_log_snr(end).expand_as(label) for end in ends)
    for _ in range(60):
        middle = 0.5 * (low + high)
        before = (meaning(sde, sde.clamp(sde.time_at(middle))) < label) == (first < last)
        low, high = torch.where(before, middle, low), torch.where(before, high, middle)
    return sde.clamp(sde.time_at(0.5 * (low + high)))


@dataclass(frozen=True)
class Parameterization(ABC):
    """The meaning of a network's output, F = a x0 + b eps, and what the network is given.

    The network is called `net(input_scale(t) x, label(t), **condition)`. To write one, subclass as a frozen dataclass
    and state `mix`.

    Attributes:
        label: Takes (sde, t) with t of shape (B,) float64 and returns the network's time label, (B,).
    """

    label: Label = TimeLabel()

    def __post_init__(self) -> None:
        if not callable(self.label):
            raise TypeError(f"label={self.label!r}; a function of (sde, t) is needed, for example TimeLabel(1000.0).")

    @abstractmethod
    def mix(self, sde: SDE, t: Tensor) -> Mix:
        """The weights (a, b) of F = a x0 + b eps at times `t`, float64, the shape of `t`."""

    def input_scale(self, sde: SDE, t: Tensor) -> Tensor | None:
        """The factor by which x is multiplied before the network sees it; None for 1."""
        return None


@dataclass(frozen=True)
class Noise(Parameterization):
    """The network predicts the noise eps."""

    def mix(self, sde: SDE, t: Tensor) -> Mix:
        return Mix(zeros_like(t), ones_like(t))


@dataclass(frozen=True)
class Score(Parameterization):
    """The network predicts the score grad log p_t(x) = -eps / sigma."""

    def mix(self, sde: SDE, t: Tensor) -> Mix:
        return Mix(zeros_like(t), -exp(-sde.log_sigma(t)))


@dataclass(frozen=True)
class Data(Parameterization):
    """The network predicts the denoised data x0."""

    def mix(self, sde: SDE, t: Tensor) -> Mix:
        return Mix(ones_like(t), zeros_like(t))


@dataclass(frozen=True)
class Velocity(Parameterization):
    """The network predicts the drift u = alpha' x0 + sigma' eps of the probability flow (flow matching)."""

    def mix(self, sde: SDE, t: Tensor) -> Mix:
        return Mix(sde.alpha(t) * sde.dlog_alpha(t), sde.sigma(t) * sde.dlog_sigma(t))


@dataclass(frozen=True)
class V(Parameterization):
    """The network predicts v = alpha eps - sigma x0 (Salimans and Ho 2022)."""

    def mix(self, sde: SDE, t: Tensor) -> Mix:
        return Mix(-sde.sigma(t), sde.alpha(t))


@dataclass(frozen=True)
class EDM(Parameterization):
    """The network is preconditioned as by Karras et al. 2022: x0 = c_skip y + c_out F(c_in y, label), y = x / alpha.

    Attributes:
        sigma_data: The data's standard deviation, > 0.
    """

    label: Label = LogSigmaLabel()
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("sigma_data", self.sigma_data)

    def mix(self, sde: SDE, t: Tensor) -> Mix:
        rho = exp(-sde.half_log_snr(t))
        norm = hypot(rho, full_like(rho, self.sigma_data))
        return Mix(rho / (self.sigma_data * norm), -self.sigma_data / norm)

    def input_scale(self, sde: SDE, t: Tensor) -> Tensor:
        return 1.0 / hypot(sde.sigma(t), self.sigma_data * sde.alpha(t))


def noise(label: Label = TimeLabel()) -> Noise:
    """The parameterization of a network that predicts the noise eps; `label` is what it is given as time."""
    return Noise(label)


def score(label: Label = TimeLabel()) -> Score:
    """The parameterization of a network that predicts the score."""
    return Score(label)


def data(label: Label = TimeLabel()) -> Data:
    """The parameterization of a network that predicts the denoised data x0."""
    return Data(label)


def velocity(label: Label = TimeLabel()) -> Velocity:
    """The parameterization of a network that predicts the flow's drift u, as flow matching trains it."""
    return Velocity(label)


def v(label: Label = TimeLabel()) -> V:
    """The parameterization of a network that predicts v = alpha eps - sigma x0."""
    return V(label)


def edm(sigma_data: float = 0.5, label: Label = LogSigmaLabel()) -> EDM:
    """The parameterization of a network preconditioned as in EDM, for data of standard deviation `sigma_data`."""
    return EDM(label, sigma_data)


class Affine(NamedTuple):
    """The coefficients of G = A x + B F, each (B,) float64."""

    x: Tensor
    output: Tensor


def conversion(alpha: Tensor, sigma: Tensor, source: Mix, target: Mix) -> Affine:
    """The coefficients that turn x and a network's output into another quantity.

    Args:
        alpha: alpha(t), (B,) float64.
        sigma: sigma(t), (B,) float64.
        source: The meaning of F.
        target: The meaning of G.

    Returns:
        A and B with G = A x + B F, exact and free of cancellation.
    """
    det = alpha * source.noise - sigma * source.data
    return Affine(
        (target.data * source.noise - target.noise * source.data) / det,
        (target.noise * alpha - target.data * sigma) / det,
    )

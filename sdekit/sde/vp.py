"""Variance-preserving processes: linear, sub-VP, cosine, and any table of DDPM betas.

With B(t) = int_0^t beta, log alpha = -B/2, and

    VP       sigma^2 = 1 - alpha^2 = -expm1(-B)
    sub-VP   sigma   = 1 - alpha^2 = -expm1(-B)
    cosine   alpha = cos u / cos u_0, u = (t + s)/(1 + s) pi/2
    table    log alpha(i/N) = 1/2 sum_{j <= i} log(1 - beta_j), linear in between

`-expm1(-B)` and not `1 - exp(-B)`: the latter is 2.4% off in float32 at t = 1e-5. Every inverse is rationalised for
the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .._checks import require_count, require_times
from .._numbers import (
    asinh,
    atan,
    beside,
    between,
    exp,
    expm1,
    floor,
    log,
    log1p,
    logaddexp,
    searchsorted,
    sin,
    sqrt,
    tan,
    whole,
    zeros_like,
)
from .base import SDE, check_beta_range, time_or_array


def _log_sigma_vp(log_alpha: Tensor) -> Tensor:
    return 0.5 * log(-expm1(2.0 * log_alpha))


def _log_alpha_at(half_log_snr: Tensor) -> Tensor:
    """log alpha of a variance-preserving process: alpha^2 = sigmoid(2 lambda)."""
    return -0.5 * logaddexp(zeros_like(half_log_snr), -2.0 * half_log_snr)


@dataclass(frozen=True)
class _LinearBeta(SDE):
    """The rate beta(t) = beta_min + (beta_max - beta_min) t shared by VP and sub-VP."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_beta_range(self.beta_min, self.beta_max)
        require_times(self.t_min, self.t_max)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _time_of_integral(self, integral: Tensor) -> Tensor:
        # The rationalised root: (-b0 + sqrt(..)) / (b1 - b0) cancels where the integral is small.
        root = sqrt(self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * integral)
        return 2.0 * integral / (self.beta_min + root)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return -0.5 * self._integral(time_or_array(t))

    def dlog_alpha(self, t: Tensor | float) -> Tensor:
        return -0.5 * self._beta(time_or_array(t))


@dataclass(frozen=True)
class VPSDE(_LinearBeta):
    """The variance-preserving SDE with linear beta: alpha^2 + sigma^2 = 1.

    Args:
        beta_min: beta(0), > 0.
        beta_max: beta(1), > beta_min.
        t_min: The data's end of time, > 0.
        t_max: The noise's end of time.

    Source: Song et al. 2021, score-based generative modeling through SDEs.
    """

    def log_sigma(self, t: Tensor | float) -> Tensor:
        return _log_sigma_vp(self.log_alpha(t))

    def dlog_sigma(self, t: Tensor | float) -> Tensor:
        time = time_or_array(t)
        return 0.5 * self._beta(time) / expm1(self._integral(time))

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        return self._time_of_integral(-2.0 * _log_alpha_at(time_or_array(half_log_snr)))


@dataclass(frozen=True)
class SubVPSDE(_LinearBeta):
    """The sub-VP SDE with linear beta: sigma = 1 - alpha^2, a variance below VP's at every time.

    Args:
        beta_min: beta(0), > 0.
        beta_max: beta(1), > beta_min.
        t_min: The data's end of time, > 0.
        t_max: The noise's end of time.

    Source: Song et al. 2021, score-based generative modeling through SDEs.
    """

    def log_sigma(self, t: Tensor | float) -> Tensor:
        return log(-expm1(2.0 * self.log_alpha(t)))

    def dlog_sigma(self, t: Tensor | float) -> Tensor:
        time = time_or_array(t)
        return self._beta(time) / expm1(self._integral(time))

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        # sigma/alpha = e^{B/2} - e^{-B/2} = 2 sinh(B/2)
        return self._time_of_integral(2.0 * asinh(0.5 * exp(-time_or_array(half_log_snr))))


@dataclass(frozen=True)
class CosineVPSDE(SDE):
    """The continuous cosine schedule: alpha = cos u / cos u_0, u = (t + s)/(1 + s) pi/2, sigma^2 = 1 - alpha^2.

    Args:
        s: The offset, >= 0 (0 is the trigonometric interpolant).
        t_min: The data's end of time, > 0.
        t_max: The noise's end of time, < 1: at 1 alpha vanishes and f and g are infinite.

    Source: Nichol and Dhariwal 2021, improved denoising diffusion probabilistic models.
    """

    s: float = 0.008
    t_min: float = 1e-5
    t_max: float = 1.0 - 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.s) and self.s >= 0):
            raise ValueError(f"s={self.s!r}; a finite number of at least 0 is needed.")
        require_times(self.t_min, self.t_max)
        if self.t_max >= 1:
            raise ValueError(f"t_max={self.t_max!r}; t_max < 1 is needed: at 1 alpha is 0 and the drift infinite.")

    @property
    def _start(self) -> float:
        return 0.5 * math.pi * self.s / (1.0 + self.s)

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1.0 + self.s)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        # cos u / cos u_0 by its logarithm; near t = 0 log1p of the difference keeps the digits that log loses.
        turn = self._rate * time_or_array(t)
        drop = -2.0 * sin(0.5 * turn) * sin(self._start + 0.5 * turn) / math.cos(self._start)
        return log1p(drop)

    def log_sigma(self, t: Tensor | float) -> Tensor:
        # sigma^2 cos^2 u_0 = sin(u - u_0) sin(u + u_0)
        turn = self._rate * time_or_array(t)
        squared = sin(turn) * sin(turn + 2.0 * self._start)
        return 0.5 * log(squared) - math.log(math.cos(self._start))

    def dlog_alpha(self, t: Tensor | float) -> Tensor:
        return -self._rate * tan(self._start + self._rate * time_or_array(t))

    def dlog_sigma(self, t: Tensor | float) -> Tensor:
        # alpha alpha' + sigma sigma' = 0
        return -exp(2.0 * self.half_log_snr(t)) * self.dlog_alpha(t)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        # u - u_0 by the addition theorem: arccos would lose half the digits where t is small.
        snr = time_or_array(half_log_snr)
        start_sin, start_cos = math.sin(self._start), math.cos(self._start)
        excess = start_cos**2 * exp(2.0 * _log_alpha_at(-snr))  # sin^2 u - sin^2 u_0
        sin_u, cos_u = sqrt(start_sin**2 + excess), exp(_log_alpha_at(snr)) * start_cos
        sin_turn = excess / (sin_u * start_cos + cos_u * start_sin)
        return 2.0 * atan(sin_turn / (1.0 + cos_u * start_cos + sin_u * start_sin)) / self._rate


@dataclass(frozen=True)
class TableVPSDE(SDE):
    """The continuous process through a table of DDPM betas, log alpha interpolated linearly in t.

    t_i = i/N for i = 1..N, alpha(t_i)^2 = prod_{j <= i} (1 - beta_j): the discrete chain's own levels, so half_log_snr
    is matched at every t_i. `t_min` = 1/N is the smallest legal time. `sdekit.table_label` gives a network trained on
    the steps i - 1 = 0..N-1 its label at any t.

    Args:
        betas: N variances in (0, 1), N >= 2.
        t_min: Default 1/N.
        t_max: Default 1.

    Source: the interpolation is that of Lu et al. 2022 (DPM-Solver).
    """

    betas: tuple[float, ...] = ()
    t_min: float = 0.0
    t_max: float = 1.0
    _knots: Tensor = field(init=False, repr=False, compare=False)

    def __init__(self, betas: Sequence[float] | Tensor, t_min: float | None = None, t_max: float = 1.0) -> None:
        values = tuple(float(beta) for beta in betas)
        if len(values) < 2 or not all(0.0 < beta < 1.0 for beta in values):
            bad = [beta for beta in values if not 0.0 < beta < 1.0][:3]
            raise ValueError(
                f"betas: {len(values)} values, outside (0, 1): {bad}; at least 2, all in (0, 1), are needed "
                "(tables for other than 1000 steps are scaled by 1000/steps)."
            )
        if values[0] > 0.9 and all(a >= b for a, b in pairwise(values)):
            raise ValueError(
                f"betas fall from {values[0]:.4g} to {values[-1]:.4g}, and the first step drowns the data: these look "
                "like alphas_cumprod. Their betas are 1 - a[i] / a[i - 1], with a[-1] = 1."
            )
        first = 1.0 / len(values)
        start = first if t_min is None else t_min
        if start < first:
            raise ValueError(f"t_min={start!r}; at least 1/N = {first!r} is needed, the first level of the table.")
        require_times(start, t_max, upper=1.0)
        table = torch.log1p(-torch.tensor(values, dtype=torch.float64)).cumsum(0) * 0.5
        object.__setattr__(self, "betas", values)
        object.__setattr__(self, "t_min", start)
        object.__setattr__(self, "t_max", float(t_max))
        object.__setattr__(self, "_knots", table)

    @classmethod
    def linear(cls, steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> TableVPSDE:
        """DDPM's linear table; for `steps` != 1000 the end points are scaled by 1000/steps."""
        require_count("steps", steps, 2)
        scale = 1000.0 / steps
        return cls(torch.linspace(beta_min * scale, beta_max * scale, steps, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, steps: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012) -> TableVPSDE:
        """The table of linear square roots ("scaled linear", "quadratic"); the defaults are Stable Diffusion's."""
        require_count("steps", steps, 2)
        scale = 1000.0 / steps
        ends = math.sqrt(beta_min * scale), math.sqrt(beta_max * scale)
        return cls(torch.linspace(*ends, steps, dtype=torch.float64).square())

    @classmethod
    def cosine(cls, steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> TableVPSDE:
        """iDDPM's cosine table, betas clipped at `max_beta`."""
        require_count("steps", steps, 2)
        u = (torch.arange(steps + 1, dtype=torch.float64) / steps + s) / (1.0 + s) * (0.5 * math.pi)
        level = torch.cos(u).square()
        return cls((1.0 - level[1:] / level[:-1]).clamp(max=max_beta))

    @classmethod
    def from_stds(cls, betas_std: Sequence[float] | Tensor) -> TableVPSDE:
        """The table of a chain x_i = alpha_i x_{i-1} + beta_i eps with alpha_i^2 + beta_i^2 = 1: variances beta_i^2.

        Args:
            betas_std: N standard deviations in (0, 1). Never guessed from magnitude: pass variances to `TableVPSDE`.
        """
        return cls([float(std) ** 2 for std in betas_std])

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Interpolated log alpha and its slope in t."""
        knots = beside(self._knots, t)
        place = t * len(self.betas) - 1.0
        left = whole(between(floor(place), 0, len(self.betas) - 2))
        slope = knots[left + 1] - knots[left]
        return knots[left] + (place - left) * slope, slope * len(self.betas)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return self._at(time_or_array(t))[0]

    def dlog_alpha(self, t: Tensor | float) -> Tensor:
        return self._at(time_or_array(t))[1]

    def log_sigma(self, t: Tensor | float) -> Tensor:
        return _log_sigma_vp(self.log_alpha(t))

    def dlog_sigma(self, t: Tensor | float) -> Tensor:
        value, slope = self._at(time_or_array(t))
        return slope * -1.0 / expm1(-2.0 * value)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        target = _log_alpha_at(time_or_array(half_log_snr))
        knots = beside(self._knots, target)
        right = between(searchsorted(-knots, -target), 1, len(self.betas) - 1)
        span = knots[right] - knots[right - 1]
        return (right + (target - knots[right - 1]) / span) / len(self.betas)

"""Forward processes: how data turn into noise.

An SDE here is linear and scalar in its coefficients,

    dx = f(t) x dt + g(t) dw,        x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I),

so two functions of time fix everything else:

    f(t)      = d/dt log alpha(t)
    g(t)^2    = 2 sigma(t)^2 d/dt [log sigma(t) - log alpha(t)]
    lambda(t) = log alpha(t) - log sigma(t)          half the log signal-to-noise ratio

A subclass states log alpha, log sigma and their derivatives. Nothing else may restate a schedule: two copies of
one formula are two formulas. The only requirement is that lambda strictly decreases, which is the same as g^2 > 0.
Time runs from `t_min` (data) to `t_max` (noise), in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .._checks import require_batch, require_positive
from .._numbers import between, exp, sqrt
from .._tensor import column, flatten


def as_time(t: Tensor | float) -> Tensor:
    """`t` as a float64 tensor of the same shape.

    Raises:
        TypeError: `t` is no number and no tensor of numbers.
    """
    try:
        return torch.as_tensor(t, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"t={t!r}; a number or a tensor of times is needed.") from error


def time_or_array(t: Tensor | float) -> Tensor:
    """`t` as a float64 tensor of the same shape; float64 arrays, of numbers on the host (_numbers.py), stay arrays."""
    given: Any = t
    if isinstance(given, np.ndarray) and given.ndim and given.dtype == np.float64:
        return cast(Tensor, given)
    return as_time(t)


class SDE(ABC):
    """A forward process, fixed by log alpha(t) and log sigma(t).

    To write one, subclass as a frozen dataclass with fields `t_min` and `t_max` and state:

    1. `log_alpha(t)` and `log_sigma(t)`, accurate where alpha is near 1 or sigma near 0 (`expm1`, `log1p`);
    2. `dlog_alpha(t)` and `dlog_sigma(t)`, their derivatives in closed form;
    3. `time_at(half_log_snr)`, the inverse of log_alpha - log_sigma, which must strictly decrease in t.

    All take and return float64 tensors of any shape (those of this package, of float64 arrays, arrays).
    """

    t_min: float
    t_max: float

    @abstractmethod
    def log_alpha(self, t: Tensor | float) -> Tensor:
        """log alpha(t), float64, the shape of `t`."""

    @abstractmethod
    def log_sigma(self, t: Tensor | float) -> Tensor:
        """log sigma(t), float64, the shape of `t`."""

    @abstractmethod
    def dlog_alpha(self, t: Tensor | float) -> Tensor:
        """d log alpha / dt, float64, the shape of `t`."""

    @abstractmethod
    def dlog_sigma(self, t: Tensor | float) -> Tensor:
        """d log sigma / dt, float64, the shape of `t`."""

    @abstractmethod
    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        """The time t at which log alpha - log sigma equals `half_log_snr`, float64, the same shape."""

    def alpha(self, t: Tensor | float) -> Tensor:
        """The scale alpha(t) of the data in x_t, float64, the shape of `t`."""
        return exp(self.log_alpha(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        """The standard deviation sigma(t) of the noise in x_t, float64, the shape of `t`."""
        return exp(self.log_sigma(t))

    def half_log_snr(self, t: Tensor | float) -> Tensor:
        """lambda(t) = log(alpha/sigma), float64: half of Kingma's log signal-to-noise ratio."""
        return self.log_alpha(t) - self.log_sigma(t)

    def dhalf_log_snr(self, t: Tensor | float) -> Tensor:
        """d lambda / dt, float64, negative everywhere."""
        return self.dlog_alpha(t) - self.dlog_sigma(t)

    def drift_rate(self, t: Tensor | float) -> Tensor:
        """f(t) of the drift f(t) x, float64, the shape of `t`."""
        return self.dlog_alpha(t)

    def diffusion(self, t: Tensor | float) -> Tensor:
        """g(t) > 0 of the noise g(t) dw, float64, the shape of `t`."""
        return self.sigma(t) * sqrt(-2.0 * self.dhalf_log_snr(t))

    def perturb(self, x0: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
        """A sample of x_t given x_0: alpha(t) x0 + sigma(t) noise.

        Args:
            x0: Data, (B, *event).
            t: Time, (B,) or a number, in [t_min, t_max].
            noise: Standard normal, the shape of `x0`.

        Returns:
            (B, *event), in the dtype of `x0`.

        Raises:
            ValueError: Shapes that do not fit.
        """
        require_batch("x0", x0)
        if noise.shape != x0.shape:
            raise ValueError(f"noise.shape={tuple(noise.shape)}; x0.shape={tuple(x0.shape)} is needed.")
        time = as_time(t).to(x0.device).expand(x0.shape[0])
        return column(self.alpha(time), x0) * x0 + column(self.sigma(time), x0) * noise

    @property
    def prior_std(self) -> float:
        """The standard deviation of the prior N(0, prior_std^2 I) that stands for p(x at t_max).

        1 where alpha vanishes at t_max (VP, sub-VP, flow), sigma(t_max) where alpha stays 1 (VE).
        """
        return 1.0

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """(B,) float64 log density, nats, of `x` (B, *event) under the prior N(0, prior_std^2 I)."""
        require_batch("x", x)
        scaled = flatten(x).double() / self.prior_std
        return -0.5 * scaled.square().sum(1) - scaled.shape[1] * (
            math.log(self.prior_std) + 0.5 * math.log(2 * math.pi)
        )

    def sample_prior(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws of the prior, of shape `shape`.

        Args:
            shape: (B, *event).
            generator: Source of the draws. None: a fresh one seeded with 0, so that *every call returns the same*
                (the global generator is never used).
            dtype: Default: torch's default.
            device: Default: the generator's, else the CPU.
        """
        where = torch.device(device) if device is not None else (generator.device if generator else torch.device("cpu"))
        source = generator if generator is not None else torch.Generator(where).manual_seed(0)
        return torch.randn(shape, generator=source, dtype=dtype, device=where) * self.prior_std

    def clamp(self, t: Tensor) -> Tensor:
        """`t` within [t_min, t_max]: rounding must not carry a network outside of the times it knows."""
        return between(t, self.t_min, self.t_max)


def check_beta_range(beta_min: float, beta_max: float) -> None:
    """Raises ValueError unless 0 < beta_min < beta_max."""
    require_positive("beta_min", beta_min)
    require_positive("beta_max", beta_max)
    if not beta_min < beta_max:
        raise ValueError(f"beta_min={beta_min!r}, beta_max={beta_max!r}; beta_min < beta_max is needed.")

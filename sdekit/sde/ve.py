"""Variance-exploding processes: alpha = 1, only sigma grows.

VESDE       sigma(t) = sigma_min (sigma_max / sigma_min)^t     (the kernel's standard deviation; x(0) counts as
                                                                already noised by sigma_min)
KarrasSDE   sigma(t) = t
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .._checks import require_positive, require_times
from .._numbers import exp, full_like, log, zeros_like
from .base import SDE, time_or_array


@dataclass(frozen=True)
class VESDE(SDE):
    """The variance-exploding SDE with a geometric sigma.

    Args:
        sigma_min: sigma(0), in units of the data, > 0.
        sigma_max: sigma(1), > sigma_min.
        t_min: The data's end of time, > 0.
        t_max: The noise's end of time.

    Source: Song et al. 2021, score-based generative modeling through SDEs.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        require_positive("sigma_min", self.sigma_min)
        require_positive("sigma_max", self.sigma_max)
        if not self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min={self.sigma_min!r}, sigma_max={self.sigma_max!r}; sigma_min < sigma_max is needed."
            )
        require_times(self.t_min, self.t_max)

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @property
    def prior_std(self) -> float:
        return self.sigma_min * math.exp(self._rate * self.t_max)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return zeros_like(time_or_array(t))

    def dlog_alpha(self, t: Tensor | float) -> Tensor:
        return zeros_like(time_or_array(t))

    def log_sigma(self, t: Tensor | float) -> Tensor:
        return math.log(self.sigma_min) + self._rate * time_or_array(t)

    def dlog_sigma(self, t: Tensor | float) -> Tensor:
        return full_like(time_or_array(t), self._rate)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        return (-time_or_array(half_log_snr) - math.log(self.sigma_min)) / self._rate


@dataclass(frozen=True)
class KarrasSDE(SDE):
    """The process whose time is its noise level: sigma(t) = t, alpha = 1.

    Args:
        sigma_min: t_min, in units of the data, > 0.
        sigma_max: t_max, > sigma_min.

    Source: Karras et al. 2022, elucidating the design space of diffusion-based generative models.
    """

    t_min: float = 0.002
    t_max: float = 80.0

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        require_positive("sigma_min", sigma_min)
        require_positive("sigma_max", sigma_max)
        if not sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min!r}, sigma_max={sigma_max!r}; sigma_min < sigma_max is needed.")
        object.__setattr__(self, "t_min", float(sigma_min))
        object.__setattr__(self, "t_max", float(sigma_max))

    @property
    def sigma_min(self) -> float:
        """The smallest noise level, t_min."""
        return self.t_min

    @property
    def sigma_max(self) -> float:
        """The largest noise level, t_max."""
        return self.t_max

    @property
    def prior_std(self) -> float:
        return self.t_max

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return zeros_like(time_or_array(t))

    def dlog_alpha(self, t: Tensor | float) -> Tensor:
        return zeros_like(time_or_array(t))

    def log_sigma(self, t: Tensor | float) -> Tensor:
        return log(time_or_array(t))

    def dlog_sigma(self, t: Tensor | float) -> Tensor:
        return 1.0 / time_or_array(t)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        return exp(-time_or_array(half_log_snr))

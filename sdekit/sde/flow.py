"""The linear path of rectified flow: x_t = (1 - t) x_0 + t eps.

f and g are infinite at t = 1 although the flow itself is regular there; time therefore stops at t_max < 1. What that
costs: for data of mean 0 and variance v, x at t_max has variance V = (1 - t_max)^2 v + t_max^2, not the prior's 1. In
each dimension log p is off by (1 - V)(z^2 - 1)/2 nats, z standard normal: 1e-3 (z^2 - 1) at the default t_max, 1e-6 on
average. `data_moments` in `log_likelihood` removes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._checks import require_times
from .._numbers import log, log1p, sigmoid
from .base import SDE, time_or_array


@dataclass(frozen=True)
class RectifiedFlow(SDE):
    """The linear path: alpha = 1 - t, sigma = t.

    Args:
        t_min: The data's end of time, > 0.
        t_max: The noise's end of time, < 1.

    Source: Liu et al. 2023, flow straight and fast.
    """

    t_min: float = 1e-5
    t_max: float = 1.0 - 1e-3

    def __post_init__(self) -> None:
        require_times(self.t_min, self.t_max)
        if self.t_max >= 1:
            raise ValueError(f"t_max={self.t_max!r}; t_max < 1 is needed: at 1 alpha is 0 and the drift infinite.")

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return log1p(-time_or_array(t))

    def dlog_alpha(self, t: Tensor | float) -> Tensor:
        return -1.0 / (1.0 - time_or_array(t))

    def log_sigma(self, t: Tensor | float) -> Tensor:
        return log(time_or_array(t))

    def dlog_sigma(self, t: Tensor | float) -> Tensor:
        return 1.0 / time_or_array(t)

    def time_at(self, half_log_snr: Tensor | float) -> Tensor:
        return sigmoid(-time_or_array(half_log_snr))

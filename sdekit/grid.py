"""Variables of integration and grids of time.

What a solver steps in decides its cost. With rho = sigma/alpha, q = log rho and sd the data's standard deviation,

    mixed   s = 1/2 N[q] + 1/2 N[-log(1 + 2 sd / (rho + 0.02 sd))]

where N[.] maps its range over [t_min, t_max] onto [0, 1]: s runs from 0 (data) to 1 (noise). Half of it is log rho,
which resolves whatever a learned network does at any noise level; the other half saturates where rho leaves the data's
scale, where exact scores need no steps. Exact scores alone prefer the second half only, and a learned noise network is
then 200 times worse.

Grids are float64, of shape (n + 1,), from t_max to t_min with exact ends; `.flip(0)` runs the other way.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache

import torch
from torch import Tensor

from ._checks import is_own, require_count, require_positive
from ._numbers import beside, between, exp, log1p, searchsorted, square
from ._tensor import there
from .sde.base import SDE

_SPREAD = 2.0  # the saturating half turns at sigma/alpha = 2 sd ...
_FLOOR = 0.02  # ... and at 0.02 sd; both from the measurements in docs/decisions
_TABLE = 8193  # a linear guess is then good to 1e-6 and one Newton step to rounding


class MixedTime:
    """The map between the mixed variable s in [0, 1] and log(sigma/alpha), and its derivative.

    Args:
        sde: The forward process.
        data_std: The data's standard deviation, > 0.
        downward: s runs from 0 (noise) to 1 (data) instead, so that a solve from noise to data has increasing s.
    """

    def __init__(self, sde: SDE, data_std: float, downward: bool = False) -> None:
        require_positive("data_std", data_std)
        self.sde = sde
        self.data_std = data_std
        self.downward = downward
        ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
        low, high = (float(q) for q in -sde.half_log_snr(ends))
        self._low, self._scale_log = low, 0.5 / (high - low)
        base, top = (float(w) for w in self._saturating(torch.tensor([low, high], dtype=torch.float64)))
        self._base, self._scale_sat = base, 0.5 / (top - base)
        self._table_q = torch.linspace(low, high, _TABLE, dtype=torch.float64)
        self._table_s = self.position(self._table_q)
        self._spacing = (high - low) / (_TABLE - 1)
        self._guide: Tensor | None = None
        self._steps = 0

    def _saturating(self, q: Tensor) -> Tensor:
        return -torch.log1p(_SPREAD * self.data_std / (q.exp() + _FLOOR * self.data_std))

    def _both(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """s and ds/dq at q; d/dq of -log(1 + a/r), r = rho + b, is a rho / (r (r + a))."""
        rho, ratio = self._ratio(q)
        position = self._scale_log * (q - self._low) - self._scale_sat * (log1p(ratio) + self._base)
        return position, self._slope(rho, ratio)

    def _ratio(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """rho and a/r."""
        rho = exp(q)
        return rho, _SPREAD * self.data_std / (rho + _FLOOR * self.data_std)

    def _slope(self, rho: Tensor, ratio: Tensor) -> Tensor:
        return self._scale_log + self._scale_sat / (_SPREAD * self.data_std) * rho * square(ratio) / (1.0 + ratio)

    def position(self, q: Tensor) -> Tensor:
        """s in [0, 1], upward, at q = log(sigma/alpha), float64, the shape of `q`."""
        return self._both(q)[0]

    def slope(self, q: Tensor) -> Tensor:
        """ds/dq > 0, upward, at q = log(sigma/alpha)."""
        return self._slope(*self._ratio(q))

    def log_ratio(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """q = log(sigma/alpha) at `s` and dq/ds there, by a table and one Newton step, without a branch."""
        s = 1.0 - s if self.downward else s
        table_s, table_q = beside(self._table_s, s), beside(self._table_q, s)
        right = between(
            searchsorted(table_s, s) if self._guide is None else self._guided(self._guide, s), 1, _TABLE - 1
        )
        left_s = table_s[right - 1]
        q = table_q[right - 1] + self._spacing * (s - left_s) / (table_s[right] - left_s)
        here, slope = self._both(q)
        q = q - (here - s) / slope
        rate = 1.0 / self.slope(q)
        return q, -rate if self.downward else rate

    def for_compiler(self) -> MixedTime:
        """The same map, its table searched by operations that a compiler fuses with their neighbours."""
        other = copy.copy(self)
        low = torch.arange(_TABLE, dtype=torch.float64, device="cpu") / _TABLE
        first = torch.searchsorted(self._table_s, torch.cat((low, low.new_ones(1))))
        other._guide = (first[:-1] - 1).clamp(min=0)  # s * _TABLE may be rounded up to the next cell's edge
        other._steps = 1 + int((first[1:] - other._guide).max())
        return other

    def _guided(self, guide: Tensor, s: Tensor) -> Tensor:
        """What searchsorted says of `s` (of what lies beyond the table, as good as that), without a search."""
        table, guide = there(self._table_s, s.device), there(guide, s.device)
        place = guide[(s * _TABLE).long().clamp(0, _TABLE - 1)]
        for _ in range(self._steps):
            place = (place + (table[place] < s).long()).clamp(max=_TABLE - 1)
        return place

    def coordinate(self, t: Tensor) -> Tensor:
        """s at time `t`, float64, the shape of `t`; exactly 0 at t_min and 1 at t_max (downward: 1 and 0)."""
        s = self.position(-self.sde.half_log_snr(t))
        s = torch.where(t <= self.sde.t_min, 0.0, torch.where(t >= self.sde.t_max, 1.0, s))
        return 1.0 - s if self.downward else s

    def time(self, s: Tensor) -> Tensor:
        """t in [t_min, t_max] at `s`, float64, the shape of `s`; exact at both ends."""
        t = self.sde.clamp(self.sde.time_at(-self.log_ratio(s)[0]))
        first, last = (self.sde.t_max, self.sde.t_min) if self.downward else (self.sde.t_min, self.sde.t_max)
        return torch.where(s <= 0.0, first, torch.where(s >= 1.0, last, t))


@lru_cache(maxsize=64)
def _made(sde: SDE, data_std: float, downward: bool) -> MixedTime:
    return MixedTime(sde, data_std, downward)


def mixed_time(sde: SDE, data_std: float, downward: bool = False) -> MixedTime:
    """The mixed variable of an SDE, made once for one of this package (others may keep a state)."""
    return (_made if is_own(sde) else MixedTime)(sde, data_std, downward)


def _with_exact_ends(times: Tensor, sde: SDE) -> Tensor:
    times = sde.clamp(times)
    times[0], times[-1] = sde.t_max, sde.t_min
    return times


def uniform_time(sde: SDE, n: int) -> Tensor:
    """(n + 1,) float64 times from t_max to t_min, equally spaced in t.

    Args:
        sde: The forward process.
        n: Number of steps, >= 1.
    """
    require_count("n", n)
    return _with_exact_ends(torch.linspace(sde.t_max, sde.t_min, n + 1, dtype=torch.float64), sde)


def uniform_half_log_snr(sde: SDE, n: int) -> Tensor:
    """(n + 1,) float64 times from t_max to t_min, equally spaced in half_log_snr."""
    require_count("n", n)
    first, last = float(sde.half_log_snr(sde.t_max)), float(sde.half_log_snr(sde.t_min))
    return _with_exact_ends(sde.time_at(torch.linspace(first, last, n + 1, dtype=torch.float64)), sde)


def karras(sde: SDE, n: int, rho: float = 7.0) -> Tensor:
    """(n + 1,) float64 times from t_max to t_min, equally spaced in (sigma/alpha)^(1/rho).

    Args:
        sde: The forward process.
        n: Number of steps, >= 1.
        rho: > 0; larger puts more steps at low noise.

    Source: Karras et al. 2022, elucidating the design space of diffusion-based generative models, without its last
        step to sigma = 0.
    """
    require_count("n", n)
    require_positive("rho", rho)
    first, last = (math.exp(-float(sde.half_log_snr(t)) / rho) for t in (sde.t_max, sde.t_min))
    ratio = torch.linspace(first, last, n + 1, dtype=torch.float64).log() * rho
    return _with_exact_ends(sde.time_at(-ratio), sde)


def likelihood(sde: SDE, n: int, data_std: float = 0.5) -> Tensor:
    """(n + 1,) float64 times from t_max to t_min, equally spaced in the mixed variable of this module.

    Args:
        sde: The forward process.
        n: Number of steps, >= 1.
        data_std: The data's standard deviation, > 0 (`model.data_std`).
    """
    require_count("n", n)
    require_positive("data_std", data_std)
    return _likelihood(sde, n, data_std).clone() if is_own(sde) else _likelihood.__wrapped__(sde, n, data_std)


@lru_cache(maxsize=64)
def _likelihood(sde: SDE, n: int, data_std: float) -> Tensor:
    times = mixed_time(sde, data_std).time(torch.linspace(1.0, 0.0, n + 1, dtype=torch.float64))
    return _with_exact_ends(times, sde)

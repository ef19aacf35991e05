"""A Brownian path of time, one a sample, that can be asked for any interval.

It is one path W on [start, end], given by a series, so that a step can be divided. Were W known at the ends of an
interval of length h together with its integral J, the best guess of J within would be a cubic, and what is unknown at
the middle would be two independent normals, of J with variance h^3/192 and of W with variance h/16. So, on [0, 1],
with independent normals Z,

    J(u) = u^2/2 Z_0 + (3 u^2 - 2 u^3) Z_1 / sqrt(12)
           + sum over dyadic intervals of length h of  sqrt(h^3/192) E Z_E + sqrt(h/16) O Z_O,       W(u) = J'(u),

where E and O are the cubic Hermite functions of the interval's middle (E of its value, O of its slope), which vanish
with their slopes at its ends. One interval a level holds u, so W(u) needs two normals a level, named by their interval
and found without walking a tree; and the integral of the same path, which the area is made of, needs no others. (The
hat functions of Levy's construction give W with one normal a level, but the integral over a step takes every interval
within it.)
"""

from __future__ import annotations

import math
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from . import _random
from ._checks import require_count
from ._random import Stream
from .brownian import Draws
from .sde.base import as_time

_DEPTH = 24
_DEEPEST = 45  # beyond, float64 does not tell the intervals' points apart
_AT_ONCE = {"cpu": 1 << 16}  # normals to draw at once: on a CPU what fits its cache (measured), ...
_AT_ONCE_ELSEWHERE = 1 << 24  # ... on a device what fills it: 128 MB


class BrownianMotion(Draws):
    """A path over [start, end] that can be asked for any interval, in any order, and divided.

    W(s) - W(start) is one function of (seed, index, start, end, depth, s), to the bit; the number and the lane of a
    step say nothing here. At the points that divide [start, end] into 2^depth cells its law is exact. Between them the
    path is smooth: a step of n cells lacks up to 1 / (6 n) of its variance, 2 / (15 n) on average, and below the length
    of a cell there is no noise to find. The default of 24 takes at most 1e-5 from a step of a thousandth of the path,
    1e-3 from one of 1e-5; a greater depth refines the same path. An increment takes 4 (depth + 1) normals per number of
    the state: where a fixed grid is all that is wanted, `IndependentIncrements` is cheaper.

    Times beyond [start, end] count as its nearer end: rounding does no harm there, and beyond it the path stands still.

    Args:
        seed: 0 <= seed < 2^63.
        indices: (B,) int64 global sample numbers.
        start: Where the path begins, in the term's coordinate (-t_max for a ReverseSDE): a number or (B,).
        end: Where it ends, >= start: a number or (B,).
        depth: Levels of division, 1 to 45.

    Raises:
        ValueError, TypeError: Arguments out of range, not finite or of the wrong shape, or start > end.

    Source: After Levy 1948 and Ciesielski 1961, with cubic Hermite functions in place of their hats.
    """

    refinable = True

    def __init__(
        self, seed: int, indices: Tensor, start: Tensor | float, end: Tensor | float, depth: int = _DEPTH
    ) -> None:
        super().__init__(seed, indices)
        require_count("depth", depth)
        if depth > _DEEPEST:
            raise ValueError(f"depth={depth}; at most {_DEEPEST} is needed: float64 has no finer points.")
        self.start, self.end = _bound("start", start, indices), _bound("end", end, indices)
        if not bool((self.start <= self.end).all()):
            raise ValueError(f"start={start}, end={end}; start <= end is needed: for s = -t that is -t_max and -t_min.")
        self.depth = depth
        self._keys = _random.sample_keys(seed, Stream.BROWNIAN, indices)
        length = (self.end - self.start)[:, None]
        self._length, self._size = torch.where(length > 0.0, length, 1.0), length.sqrt()
        cells = torch.exp2(torch.arange(-1, depth, dtype=torch.float64, device=indices.device))
        cells[0] = 0.0
        self._cells, self._last = cells[:, None, None], (cells - 1.0).clamp_min(0.0)[:, None, None]
        root_h = torch.where(cells > 0.0, cells.rsqrt(), 0.0)
        self._scale = torch.stack((0.5 * math.sqrt(3.0) * root_h, 0.25 * root_h), 1)[:, None, None]

    def increment(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        place = self._place(s0, s1)
        values = self._sum(place.nodes, self._values(place)[:, None], like)[0]
        return self._scaled(values[:, 1] - values[:, 0], like)

    def levy(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        place = self._place(s0, s1)
        weights = torch.stack((self._values(place), _areas(place, self._cells, self._scale)), 1)
        values, areas = self._sum(place.nodes, weights, like)
        return self._scaled(values[:, 1] - values[:, 0], like), self._scaled(areas[:, 0] + areas[:, 1], like)

    def take(self, rows: Tensor) -> BrownianMotion:
        return self.having(tuple(part[rows] for part in self.parts()))

    def parts(self) -> tuple[Tensor, ...]:
        return self.indices, self._chain, self._keys, self.start, self.end, self._length, self._size

    def having(self, parts: tuple[Tensor, ...]) -> BrownianMotion:
        other = copy(self)
        other.indices, other._chain, other._keys, other.start, other.end, other._length, other._size = parts
        return other

    def _place(self, s0: Tensor, s1: Tensor) -> _Place:
        """Where the two ends lie."""
        first = self.start[:, None]
        u = (torch.clamp(torch.stack((s0, s1), 1), first, self.end[:, None]) - first) / self._length
        scaled = u * self._cells
        cell = torch.minimum(scaled.floor(), self._last)
        return _Place(u, (self._cells + cell).long(), scaled - cell)

    def _values(self, place: _Place) -> Tensor:
        """(depth + 1, B, 2, 2): what the two normals of each node weigh in W at the points."""
        u, rho = place.u, 1.0 - 2.0 * place.x
        y = 1.0 - rho.abs()
        weights = torch.stack((y * rho, y * (3.0 * y - 2.0)), -1) * self._scale
        weights[0] = torch.stack((u, math.sqrt(3.0) * u * (1.0 - u)), -1)
        return weights

    def _sum(self, nodes: Tensor, weights: Tensor, like: Tensor) -> Tensor:
        """(R, B, 2, D): the sum over the nodes (n, B, 2) of their normals times `weights` (n, R, B, 2, 2).

        Node after node, so that the bits depend neither on how many are drawn at once nor on the batch.
        """
        (count, batch, _), size = nodes.shape, like.shape[1:].numel()
        total = torch.zeros(weights.shape[1], batch, 2, size, dtype=torch.float64, device=like.device)
        dtype = _random.computed_in(like.dtype)
        together = count
        if isinstance(batch, int):  # in a trace the batch's size is open
            together = max(1, _AT_ONCE.get(like.device.type, _AT_ONCE_ELSEWHERE) // max(1, 4 * batch * size))
        for first in range(0, count, together):
            here = nodes[first : first + together]
            keys = self._keys[:, None].expand_as(here).flatten()
            # Counters -1 - node: those of IndependentIncrements, on the same stream, are not negative.
            drawn = _random.normal(keys, ~here.flatten(), 2 * size, dtype)
            products = weights[first : first + together, ..., None] * drawn.reshape(len(here), 1, batch, 2, 2, size)
            for term in (products[..., 0, :] + products[..., 1, :]).unbind():
                total += term
        return total

    def _scaled(self, drawn: Tensor, like: Tensor) -> Tensor:
        return (self._size * drawn).reshape(like.shape).to(like.dtype)


class _Place(NamedTuple):
    """Where two points are: u (B, 2) in [0, 1], and of the depth + 1 nodes, (depth + 1, B, 2) each, their numbers (0 is
    the root; 2^l + k interval k of level l) and x, the point's place in the interval, in [0, 1].
    """

    u: Tensor
    nodes: Tensor
    x: Tensor


def _areas(place: _Place, cells: Tensor, scale: Tensor) -> Tensor:
    """(depth + 1, B, 2, 2): what the normals weigh in H = (J(u1) - J(u0)) / (u1 - u0) - (W(u0) + W(u1)) / 2.

    The differences cancel for short steps, so each level has its own form: points in one half of an interval share
    one quadratic of W, of which H is -(u1 - u0)^2 W'' / 12; in two halves of it, both quadratics, simplified; in two
    intervals, the definition, for then each term is as small as H. Joint weights stand with the first point.
    """
    x, rho = place.x, 1.0 - 2.0 * place.x
    (x0, x1), (rho0, rho1) = x.unbind(2), rho.unbind(2)
    length = place.u[:, 1] - place.u[:, 0]

    squares, product = (rho0 - rho1).square(), rho0 * rho1
    over = 1.0 / (rho0 - rho1).abs().clamp_min(torch.finfo(torch.float64).tiny)
    halves = (x0 < 0.5) != (x1 < 0.5)
    one_sided = torch.where(x0 < 0.5, squares, -squares)
    even = torch.where(halves, (rho0 + rho1) * (squares - 2.0 * product) * over, one_sided)
    odd = -0.5 * squares - torch.where(halves, 4.0 * product * over, 0.0)
    joint = torch.stack((even / 6.0, odd), -1)
    joint = torch.stack((joint, torch.zeros_like(joint)), 2)

    y, signed = 2.0 * torch.minimum(x, 1.0 - x), torch.stack((-length, length), 1) * cells
    slope = 0.25 * y / torch.where(signed == 0.0, 1.0, signed)
    apart = torch.stack((y * (slope * (1.0 - y / 1.5) - 0.5 * rho), y * (1.0 - 1.5 * y - 2.0 * slope * rho)), -1)

    nodes = place.nodes
    weights = torch.where((nodes[..., :1] == nodes[..., 1:])[..., None], joint, apart) * scale
    weights[0, :, 0, 1] = length.square() / math.sqrt(12.0)
    return weights


def _bound(name: str, value: Tensor | float, indices: Tensor) -> Tensor:
    """(B,) float64: an end of the path, checked."""
    end = as_time(value).to(indices.device)
    if end.dim() > 1 or (end.dim() == 1 and end.shape != indices.shape):
        raise ValueError(f"{name}.shape={tuple(end.shape)}; a number or shape {tuple(indices.shape)} is needed.")
    if not bool(torch.isfinite(end).all()):
        raise ValueError(f"{name}={value}; finite numbers are needed.")
    return end.expand(indices.shape).contiguous()

"""Paths that measure a solver instead of driving it.

Recorder     is zero, and writes down which draws a solve asks for, and at what times
UnitDraws    one draw is a standard deviation in each row, all others are zero: a solve's response to its noise
SharedPath   one Brownian path and its time integral at given times, the same for every grid through them
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _random
from .._random import Stream
from .._tensor import column, flatten

_INCREMENT, _AREA, _NORMAL, _KINDS = 0, 1, 2, 3
_LANES = 4096  # more than any solver takes within a step

NONE, ALL = -2, -1  # codes of a row that hears no draw, or every one


def _code(kind: int, step: Tensor, lane: int) -> Tensor:
    """(B,) int64 the number of a draw: what IndependentIncrements keys it by."""
    return (step * _LANES + lane) * _KINDS + kind


class _NoUniform:
    """Part of a path that has no uniform draws to give."""

    refinable = False

    def uniform(self, step: Tensor, lane: int = 0) -> Tensor:
        """Raises ValueError: a step that is accepted at random has neither a law in closed form nor a strong order."""
        raise ValueError("the solver draws uniforms (acceptance at random); its order cannot be measured this way.")


class Recorder(_NoUniform):
    """A path of zeros for one sample; it remembers what it was asked.

    Attributes:
        draws: The codes of the draws asked for, each once, in their order.
        times: Every time at which the path was asked for.
    """

    def __init__(self) -> None:
        self.draws: dict[int, None] = {}
        self.times: set[float] = set()

    def _note(self, kind: int, step: Tensor, lane: int) -> None:
        self.draws.update(dict.fromkeys(_code(kind, step, lane).tolist()))

    def increment(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        self._note(_INCREMENT, step, lane)
        self.times.update(s0.tolist(), s1.tolist())
        return torch.zeros_like(like)

    def levy(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        self._note(_AREA, step, 0)
        return self.increment(s0, s1, step, like), torch.zeros_like(like)

    def normal(self, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        self._note(_NORMAL, step, lane)
        return torch.zeros_like(like)

    def take(self, rows: Tensor) -> Recorder:
        return self

    def __len__(self) -> int:
        return 1


class UnitDraws(_NoUniform):
    """A path whose row b hears the draw `codes[b]` alone, as one standard deviation in every coordinate.

    Args:
        codes: (B,) int64 of `Recorder.draws`, or NONE or ALL.
    """

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def _unit(self, kind: int, step: Tensor, lane: int, std: Tensor, like: Tensor) -> Tensor:
        heard = (_code(kind, step, lane) == self.codes) | (self.codes == ALL)
        return column(torch.where(heard, std, 0.0), like).expand_as(like)

    def increment(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        return self._unit(_INCREMENT, step, lane, (s1 - s0).abs().sqrt(), like)

    def levy(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        area = self._unit(_AREA, step, 0, ((s1 - s0).abs() / 12.0).sqrt(), like)
        return self.increment(s0, s1, step, like), area

    def normal(self, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        return self._unit(_NORMAL, step, lane, torch.ones_like(step, dtype=torch.float64), like)

    def take(self, rows: Tensor) -> UnitDraws:
        return UnitDraws(self.codes[rows])

    def __len__(self) -> int:
        return self.codes.shape[0]


class SharedPath(_NoUniform):
    """A Brownian path W and its integral J at given times, exactly: every interval between two of them is known.

    Of an interval [a, c] the area follows from I = J(c) - J(a) - (c - a) W(a), H = I / (c - a) - (W(c) - W(a)) / 2.

    Args:
        nodes: (M + 1,) float64 times, increasing.
        path: (B, M + 1, D) float64 W there, 0 at the first.
        integral: (B, M + 1, D) float64 the integral of W up to there.
    """

    def __init__(self, nodes: Tensor, path: Tensor, integral: Tensor) -> None:
        self.nodes = nodes
        self.path = path
        self.integral = integral

    @classmethod
    def draw(cls, seed: int, nodes: Tensor, like: Tensor) -> SharedPath:
        """A path through `nodes` for every sample of `like` (B, *event), from the draws of `seed`."""
        batch, size, count = like.shape[0], flatten(like).shape[1], nodes.shape[0] - 1
        nodes = nodes.to(like.device)
        keys = _random.sample_keys(seed, Stream.BROWNIAN, torch.arange(batch, device=like.device))
        drawn = _random.normal(keys, torch.zeros_like(keys), 2 * count * size, torch.float64)
        z, y = drawn.reshape(batch, 2, count, size).unbind(1)
        h = nodes.diff()[:, None]
        moves = h.sqrt() * z
        start = torch.zeros(batch, 1, size, dtype=torch.float64, device=like.device)
        path = torch.cat((start, moves.cumsum(1)), 1)
        areas = h * (0.5 * moves + (h / 12.0).sqrt() * y) + h * path[:, :-1]
        return cls(nodes, path, torch.cat((start, areas.cumsum(1)), 1))

    def _place(self, s: Tensor) -> Tensor:
        """(B,) the node at each `s`, within rounding.

        Raises:
            ValueError: No node is there.
        """
        right = torch.searchsorted(self.nodes, s.contiguous()).clamp(1, self.nodes.shape[0] - 1)
        left = right - 1
        nearest = torch.where((s - self.nodes[left]).abs() <= (s - self.nodes[right]).abs(), left, right)
        away = (s - self.nodes[nearest]).abs()
        if bool((away > 1e-9 * (self.nodes[-1] - self.nodes[0])).any()):
            raise ValueError(f"the path was asked for s={float(s[away.argmax()])!r}, which is none of its nodes.")
        return nearest

    def _at(self, values: Tensor, place: Tensor) -> Tensor:
        return torch.take_along_dim(values, place[:, None, None].expand(-1, 1, values.shape[2]), 1)[:, 0]

    def increment(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        moved = self._at(self.path, self._place(s1)) - self._at(self.path, self._place(s0))
        return moved.reshape(like.shape).to(like.dtype)

    def levy(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        first, last = self._place(s0), self._place(s1)
        h = (self.nodes[last] - self.nodes[first])[:, None]
        w = self._at(self.path, last) - self._at(self.path, first)
        whole = self._at(self.integral, last) - self._at(self.integral, first) - h * self._at(self.path, first)
        area = torch.where(h != 0, whole / torch.where(h != 0, h, 1.0) - 0.5 * w, 0.0)
        return w.reshape(like.shape).to(like.dtype), area.reshape(like.shape).to(like.dtype)

    def normal(self, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        """Raises ValueError: a path says nothing of them, so a solver that draws them has no strong order."""
        raise ValueError("the solver draws normals that no path determines; it has no strong order.")

    def take(self, rows: Tensor) -> SharedPath:
        return SharedPath(self.nodes, self.path[rows], self.integral[rows])

    def __len__(self) -> int:
        return self.path.shape[0]

"""Paths of the driving noise, keyed per sample.

A path gives each sample the same increments in any batch and on any machine: they are functions of (seed, sample index)
and of where they are asked, never of what was asked before.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Protocol

import torch
from torch import Tensor

from . import _random
from ._checks import require_seed
from ._random import Stream
from ._tensor import column, sent

_LANES = 16  # independent draws within one accepted step


class BrownianPath(Protocol):
    """One fixed path a sample, and draws besides that are no part of it.

    A step is numbered by how many steps of the sample were accepted before it; several draws within one step differ by
    their `lane`, 0 <= lane < 16.

    Attributes:
        refinable: Whether an interval can be divided later and still be the same path. Without that a rejected step
            would bias the law, so adaptive controllers refuse the path.
    """

    refinable: bool

    def increment(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        """W(s1) - W(s0), the shape and dtype of `like` (B, *event); s0, s1 and step are (B,)."""
        ...

    def levy(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """W(s1) - W(s0), and H with int_{s0}^{s1} (W(s) - W(s0)) ds = (s1 - s0) (W/2 + H); each like `like`."""
        ...

    def normal(self, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        """Standard normals like `like` that no path depends on, for correctors and churn."""
        ...

    def uniform(self, step: Tensor, lane: int = 0) -> Tensor:
        """(B,) float64, uniform on (0, 1], that no path depends on: for acceptance tests."""
        ...

    def take(self, rows: Tensor) -> BrownianPath:
        """This path for the samples `rows` only."""
        ...

    def __len__(self) -> int:
        """How many samples it is for."""
        ...


class Draws:
    """What every path draws besides itself, keyed by (seed, index, step, lane).

    Args:
        seed: 0 <= seed < 2^63.
        indices: (B,) int64 global sample numbers.

    Raises:
        ValueError, TypeError: Arguments out of range or of the wrong kind.
    """

    def __init__(self, seed: int, indices: Tensor) -> None:
        require_seed(seed)
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
            raise TypeError(f"indices={indices!r}; an int64 tensor of shape (B,) is needed, e.g. torch.arange(B).")
        self.seed = seed
        self.indices = indices
        self._chain = _random.sample_keys(seed, Stream.CHAIN, indices)

    def normal(self, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        """Standard normals like `like` that no path depends on, for correctors and churn."""
        return _normal(self._chain, step * _LANES + lane, like).to(like.dtype)

    def uniform(self, step: Tensor, lane: int = 0) -> Tensor:
        """(B,) float64, uniform on (0, 1], that no path depends on: for acceptance tests."""
        return _random.uniform(self._chain, step * _LANES + lane)

    def __len__(self) -> int:
        return self.indices.shape[0]


class IndependentIncrements(Draws):
    """Increments drawn step by step: all that a fixed grid needs.

    Args:
        seed: 0 <= seed < 2^63.
        indices: (B,) int64 global sample numbers.
    """

    refinable = False

    def __init__(self, seed: int, indices: Tensor) -> None:
        super().__init__(seed, indices)
        self._keys = _random.sample_keys(seed, Stream.BROWNIAN, indices)
        self._areas = _random.sample_keys(seed, Stream.LEVY, indices)

    def increment(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        drawn = _normal(self._keys, step * _LANES + lane, like)
        return (column((s1 - s0).abs().sqrt(), drawn) * drawn).to(like.dtype)

    def levy(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        drawn = _normal(self._areas, step * _LANES, like)
        area = column(((s1 - s0).abs() / 12.0).sqrt(), drawn) * drawn
        return self.increment(s0, s1, step, like), area.to(like.dtype)

    def block(self, asked: Sequence[tuple[str, float, float, int, int]], like: Tensor) -> Tensor:
        """(n, *like.shape): several answers at once, to the bit those of one by one.

        Args:
            asked: For each "increment", "levy" (its W), "area" (its H) or "normal"; s0, s1, step and lane.
            like: (B, *event).
        """
        keys = {"increment": self._keys, "levy": self._keys, "area": self._areas, "normal": self._chain}
        parts = {"increment": 1.0, "levy": 1.0, "area": 12.0}
        each = torch.cat([keys[kind] for kind, *_ in asked])
        counters = [step * _LANES + lane for *_, step, lane in asked]
        sizes = [(abs(s1 - s0) / parts[kind]) ** 0.5 if kind in parts else 1.0 for kind, s0, s1, *_ in asked]
        counter = sent(counters, torch.int64, each.device).repeat_interleave(len(self))
        drawn = _normal(each, counter, like).reshape(len(asked), *like.shape)
        return drawn.mul_(column(sent(sizes, torch.float64, each.device), drawn)).to(like.dtype)

    def take(self, rows: Tensor) -> IndependentIncrements:
        return self.having(tuple(part[rows] for part in self.parts()))

    def parts(self) -> tuple[Tensor, ...]:
        return self.indices, self._chain, self._keys, self._areas

    def having(self, parts: tuple[Tensor, ...]) -> IndependentIncrements:
        other = copy(self)
        other.indices, other._chain, other._keys, other._areas = parts
        return other


def _normal(keys: Tensor, counter: Tensor, like: Tensor) -> Tensor:
    """(N, *event) standard normals for events of `like`, in what they are computed in: they are multiplied yet."""
    drawn = _random.normal(keys, counter, like.shape[1:].numel(), _random.computed_in(like.dtype))
    return drawn.reshape(keys.shape[0], *like.shape[1:])

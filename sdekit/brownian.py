"""Paths of the driving noise, keyed per sample.

A path gives each sample the same increments in any batch and on any machine: they are functions of (seed, sample index,
number of the accepted step).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import _random
from ._random import Stream
from ._tensor import column


class BrownianPath(Protocol):
    """The increments of one fixed path a sample.

    Attributes:
        refinable: Whether an interval can be divided later and still be the same path. Without that a rejected step
            would bias the law, so adaptive controllers refuse the path.
    """

    refinable: bool

    def increment(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor) -> Tensor:
        """W(s1) - W(s0), the shape and dtype of `like` (B, *event); `step` (B,) numbers the accepted steps."""
        ...

    def take(self, rows: Tensor) -> BrownianPath:
        """This path for the samples `rows` only."""
        ...

    def __len__(self) -> int:
        """How many samples it is for."""
        ...


class IndependentIncrements:
    """Increments drawn step by step: all that a fixed grid needs.

    Args:
        seed: 0 <= seed < 2^63.
        indices: (B,) int64 global sample numbers.
    """

    refinable = False

    def __init__(self, seed: int, indices: Tensor) -> None:
        self.seed = seed
        self.indices = indices

    def increment(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor) -> Tensor:
        keys = _random.sample_keys(self.seed, Stream.BROWNIAN, self.indices)
        drawn = _random.normal(keys, step, like.shape[1:].numel(), torch.float64)
        return (column((s1 - s0).abs().sqrt(), drawn) * drawn).reshape(like.shape).to(like.dtype)

    def take(self, rows: Tensor) -> IndependentIncrements:
        return IndependentIncrements(self.seed, self.indices[rows])

    def __len__(self) -> int:
        return self.indices.shape[0]

"""Where sampling begins: draws of the prior, keyed per sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _random
from ._checks import require_floating
from ._random import Stream
from .model.score_model import ScoreModel


def draw_prior(model: ScoreModel, shape: tuple[int, ...], seed: int, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Draws of the prior keyed by (seed, index): (n, *event) in `dtype`, on the device of `indices`."""
    require_floating("dtype", dtype)
    size, std = math.prod(shape[1:]), model.sde.prior_std
    drawn = _random.first_normal(seed, Stream.PRIOR, indices, size, torch.float64 if std != 1.0 else dtype)
    return (drawn if std == 1.0 else (drawn * std).to(dtype)).reshape(shape)

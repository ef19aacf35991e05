"""Units: the affine map between a user's data and the model's, and bits per dimension.

A density changes with the units of its argument by the Jacobian of the map: log p_user(x) = log p_model(a x + b) +
log |a| per dimension. Bits per dimension compare a density with a code for quantised data: they need a bin's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import require_count


@dataclass(frozen=True)
class Affine:
    """The map between a user's units and the model's: model = scale * user + shift.

    Args:
        scale: Nonzero; a number, or a tensor of the event's shape.
        shift: A number, or a tensor of the event's shape.
    """

    scale: float | Tensor = 1.0
    shift: float | Tensor = 0.0

    def __post_init__(self) -> None:
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        if not bool((torch.isfinite(scale) & (scale != 0)).all()):
            raise ValueError(f"scale={self.scale!r}; finite and nonzero is needed.")
        if not bool(torch.isfinite(torch.as_tensor(self.shift, dtype=torch.float64)).all()):
            raise ValueError(f"shift={self.shift!r}; finite is needed.")

    def check(self, event: torch.Size) -> None:
        """Raises ValueError unless scale and shift are numbers or broadcast to the event's shape."""
        for name, value in (("scale", self.scale), ("shift", self.shift)):
            shape = torch.as_tensor(value).shape
            tail = event[len(event) - len(shape) :] if len(shape) <= len(event) else None
            if tail is None or any(mine not in (1, theirs) for mine, theirs in zip(shape, tail, strict=True)):
                raise ValueError(
                    f"{name}.shape={tuple(shape)}; a number or the event's shape {tuple(event)} is needed."
                )

    def forward(self, x: Tensor) -> Tensor:
        """`x` of the user in the model's units, in the dtype of `x`."""
        return x * torch.as_tensor(self.scale).to(x) + torch.as_tensor(self.shift).to(x)

    def inverse(self, x: Tensor) -> Tensor:
        """`x` of the model in the user's units, in the dtype of `x`."""
        return (x - torch.as_tensor(self.shift).to(x)) / torch.as_tensor(self.scale).to(x)

    def log_det(self, event: torch.Size) -> float:
        """log |det| of the forward map for one sample of shape `event`, nats."""
        scale = torch.as_tensor(self.scale, dtype=torch.float64).abs().log()
        return float(scale.expand(event).sum())


def bits_per_dim(log_prob: Tensor, dims: int, levels: int, low: float, high: float) -> Tensor:
    """Bits per dimension, -log2 p / D - log2((high - low)/levels), the shape of `log_prob`.

    Args:
        log_prob: Log densities of dequantised data, nats.
        dims: Dimensions D of a sample.
        levels: Number of equal bins, >= 2.
        low: Lower edge of the first bin, in the units of the density.
        high: Upper edge of the last bin.

    Raises:
        ValueError: Fewer than 2 levels, or low >= high.
    """
    require_count("levels", levels, 2)
    if not low < high:
        raise ValueError(f"low={low!r}, high={high!r}; low < high is needed.")
    return -log_prob / (dims * math.log(2.0)) - math.log2((high - low) / levels)

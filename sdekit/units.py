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


@dataclass(frozen=True)
class Levels:
    """Data that are integers 0..count-1, each standing for a bin of [low, high], all bins equally wide.

    Level k stands for the bin from low + k width to low + (k + 1) width, width = (high - low)/count.

    Args:
        count: Number of levels, >= 2.
        low: Lower edge of the first bin.
        high: Upper edge of the last bin.
    """

    count: int
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        require_count("levels", self.count, 2)
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise ValueError(f"low={self.low!r}, high={self.high!r}; finite numbers with low < high are needed.")

    @property
    def width(self) -> float:
        """The width of a bin."""
        return (self.high - self.low) / self.count

    def check(self, x: Tensor, name: str = "the array") -> None:
        """Raises ValueError unless `x`, called `name` in the message, holds integers of these levels only."""
        whole = x if x.is_floating_point() else x.long()  # torch finds no least of unsigned numbers of 16 bits
        if x.is_floating_point() or (x.numel() and not 0 <= int(whole.min()) <= int(whole.max()) < self.count):
            found = f"{float(whole.min()):g} to {float(whole.max()):g}" if x.numel() else "nothing"
            raise ValueError(f"{name} holds {x.dtype} from {found}; integers 0..{self.count - 1} are needed.")

    def place(self, x: Tensor, within: Tensor | float = 0.5) -> Tensor:
        """The point at the share `within` (0 the lower edge, 0.5 the centre) of each level's bin, the shape of `x`."""
        return self.low + self.width * (x + within)

    def dequantise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A uniform point of each level's bin, the lower edge included, the upper one not; the shape of `x`.

        float32 for up to 4,096 levels, the nearest number that is still in the bin; float64 beyond, and for bins so far
        from zero that they hold hardly a float32 number.

        Args:
            x: Levels, 0..count - 1.
            generator: Of the draws, on the device of `x`.
        """
        k = x.double()
        point = self.place(k, torch.rand(x.shape, generator=generator, device=x.device).double())
        lower, upper = self.place(k, 0.0), self.place(k, 1.0)
        if self._coarse():
            return torch.minimum(point, _before(upper))
        point = point.float()
        point = torch.where(point.double() >= upper, _before(point), point)
        return torch.where(point.double() < lower, _after(point), point)

    def _coarse(self) -> bool:
        """Whether float32 is too coarse for these bins."""
        return self.count > _SINGLE_LEVELS or self.width < 4.0 * _EPS * max(abs(self.low), abs(self.high))


_SINGLE_LEVELS = 1 << 12  # up to there float32 has at least a thousand numbers in a bin of [-1, 1]
_EPS = torch.finfo(torch.float32).eps


def _before(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, -math.inf))


def _after(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, math.inf))


def on_levels(x: Tensor) -> Tensor:
    """(B,) bool, whether every value of a sample of `x` (B, *event) is an integer, or one over 255 (8-bit images).

    Of a continuous law a value lies so near one of the latter once in 4,000 times in single precision.
    """
    whole = (x == x.round()).flatten(1).all(1)
    if torch.finfo(x.dtype).eps > 1e-6:  # too coarse to tell
        return whole
    levels = 255.0 * x.double()
    near = (levels - levels.round()).abs() <= 4.0 * torch.finfo(x.dtype).eps * levels.abs().clamp(min=255.0)
    return whole | near.flatten(1).all(1)


def require_dequantized(x: Tensor, levels: Levels | None = None, name: str = "x") -> None:
    """Raises ValueError where floating `x` still holds quantised values: their bits/dim would mean nothing.

    Dequantised values come from a continuous law: that all of them are integers, or all lie on a lattice, is then no
    chance. At least four values are needed to say so of a lattice, one of integers.

    Args:
        x: (B, *event), floating.
        levels: What the levels stand for, if it is known: then edges and centres of bins are looked for too, and
            levels spread from end to end as in 2 k/255 - 1.
        name: What to call `x` in the message.

    Raises:
        ValueError: Every value is an integer, or on such a lattice.
    """
    found = _lattice(x.detach().double(), levels, 4.0 * torch.finfo(x.dtype).eps) if x.numel() else None
    if found is not None:
        raise ValueError(
            f"every value of {name} {found}: these are levels that were not dequantised. They have probabilities, "
            "not densities, and bits/dim of their density means nothing. Add noise within each level's bin first, or "
            "pass the integers themselves to what evaluates integers (sdekit.discrete_log_likelihood)."
        )


def _lattice(x: Tensor, levels: Levels | None, precision: float) -> str | None:
    """What lattice all values of `x` are on, to a rounding of `precision`, in words; None for none."""
    if bool((x == x.round()).all()):
        return "is an integer"
    if levels is None or x.numel() < 4:
        return None
    step = (levels.high - levels.low) / (levels.count - 1)
    for words, spacing in (("is the edge or the centre of a bin", 0.5 * levels.width), ("is a multiple of", step)):
        place = (x - levels.low) / spacing
        size = max(abs(levels.low), abs(levels.high)) / spacing  # the subtraction rounds by this many steps' share
        if bool(((place - place.round()).abs() <= precision * (size + place.abs())).all()):
            return words if spacing != step else f"{words} {step:g} above {levels.low:g}"
    return None


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
    return -log_prob / (dims * math.log(2.0)) - math.log2(Levels(levels, low, high).width)

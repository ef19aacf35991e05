"""Two small reference networks to train, test and measure with: `MLP` for any event shape, `UNet` for images.

Both are called net(x, label, y=None) and treat every sample by itself (no batch normalisation): a likelihood needs
the Jacobian of one sample, not of a batch. The time label enters through sines and cosines,

    (sin(w_k label), cos(w_k label)),      w_k = 2 pi k / period,   k = 1..n,

so choose `period` at least the range of labels (1 for t itself, 999 for labels 999 t, about 4 for EDM's log(rho)/4).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import require_count, require_positive
from .._tensor import flatten


class LabelFeatures(nn.Module):
    """Sines and cosines of the time label: (B,) -> (B, 2 count).

    Args:
        count: Number of frequencies.
        period: Of the slowest of them, in units of the label.
    """

    frequencies: Tensor

    def __init__(self, count: int = 16, period: float = 2.0) -> None:
        super().__init__()
        require_count("count", count)
        require_positive("period", period)
        steps = torch.arange(1, count + 1, dtype=torch.float64)
        self.register_buffer("frequencies", (2.0 * math.pi / period * steps).float())

    def forward(self, label: Tensor) -> Tensor:
        """The features of `label`, (B,), in single precision, or in double of a double label."""
        exact = torch.promote_types(label.dtype, torch.float32)  # in half precision neighbouring labels are one
        phase = label[:, None].to(exact) * self.frequencies.to(exact)
        return torch.cat((phase.sin(), phase.cos()), 1)

    def _apply(self, fn: Any, recurse: bool = True) -> LabelFeatures:
        """Moves the frequencies and leaves them in single precision: rounded ones are others."""
        exact = self.frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.frequencies
        self.frequencies = moved.float() if exact.is_meta or moved.is_meta else exact.to(moved.device)
        return self


def as_weighed(features: Tensor, layer: nn.Module) -> Tensor:
    """The features in the type that a layer's weights are in; as they are where those are quantised."""
    weight = layer.weight
    return features.to(weight.dtype) if isinstance(weight, Tensor) and weight.is_floating_point() else features


class Conditioning(nn.Module):
    """Time label and class, if any, as one vector: (B,), (B,) -> (B, width).

    Args:
        width: Of the vector.
        classes: Number of classes; 0 for none.
        period: See `LabelFeatures`.
    """

    def __init__(self, width: int, classes: int, period: float) -> None:
        super().__init__()
        require_count("classes", classes, 0)
        self.features = LabelFeatures(16, period)
        self.first, self.second = nn.Linear(32, width), nn.Linear(width, width)
        # One row more than there are classes: the last stands for "no class given".
        self.table = nn.Embedding(classes + 1, width) if classes else None
        self.classes = classes

    def forward(self, label: Tensor, y: Tensor | None) -> Tensor:
        """The vector for time labels (B,) and classes (B,) of integers, or None."""
        vector: Tensor = self.second(F.silu(self.first(as_weighed(self.features(label), self.first))))
        if self.table is None:
            if y is not None:
                raise ValueError("y is given but the network has no classes: build it with classes=<their number>.")
            return vector
        absent = torch.full(label.shape, self.classes, dtype=torch.int64, device=label.device)
        row: Tensor = self.table(absent if y is None else y)
        return vector + row


class MLP(nn.Module):
    """A multilayer perceptron on the flattened event, called net(x, label, y=None); the output has the shape of x.

    Args:
        event: The event shape, for example (2,) or (1, 8, 8).
        width: Of the hidden layers.
        depth: Number of hidden layers, at least 1.
        residual: Add each hidden layer to its input, after layer normalisation. Better from depth 3 on.
        dropout: Probability, within hidden layers.
        classes: Number of classes that `y` may name; 0: unconditional.
        period: Of the slowest time feature, in units of the label.
    """

    def __init__(
        self,
        event: tuple[int, ...],
        width: int = 128,
        depth: int = 3,
        *,
        residual: bool = False,
        dropout: float = 0.0,
        classes: int = 0,
        period: float = 2.0,
    ) -> None:
        super().__init__()
        require_count("width", width)
        require_count("depth", depth)
        size = math.prod(event)
        self.event, self.residual = tuple(event), residual
        self.enter = nn.Linear(size, width)
        self.conditioning = Conditioning(width, classes, period)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if residual else nn.Identity() for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.leave = nn.Linear(width, size)

    def forward(self, x: Tensor, label: Tensor, y: Tensor | None = None) -> Tensor:
        """The output for states (B, *event), time labels (B,) and classes (B,), the shape of `x`."""
        _require_event(x, self.event)
        vector = self.conditioning(label, y)
        h = self.enter(flatten(x)) + vector
        for norm, layer in zip(self.norms, self.hidden, strict=True):
            new = self.dropout(layer(F.silu(norm(h) + vector)))
            h = h + new if self.residual else new
        out: Tensor = self.leave(F.silu(h))
        return out.reshape(x.shape)


class _Block(nn.Module):
    """Two convolutions with group normalisation, the conditioning added in between, around a skip."""

    def __init__(self, channels: int, out: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(math.gcd(8, c), c) for c in (channels, out))
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.enter = nn.Linear(width, out)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.enter(F.silu(vector))[:, :, None, None]
        out: Tensor = self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))
        return out


class _Attention(nn.Module):
    """Self-attention over the pixels of an image, around a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.leave = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Written out: the fused kernel has no batched or forward-mode derivative, which exact traces need.
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), 2)
        out: Tensor = x + self.leave((v @ weights.transpose(1, 2)).reshape(x.shape))
        return out


class UNet(nn.Module):
    """A small U-Net for images (C, H, W), called net(x, label, y=None); the output has the shape of x.

    Args:
        channels: C of the images.
        width: Channels at full resolution; doubled at each level below.
        levels: Resolutions, at least 1; H and W must be multiples of 2^(levels - 1).
        dropout: Probability, within blocks.
        attention: Self-attention at the lowest resolution.
        classes: Number of classes that `y` may name; 0: unconditional.
        period: Of the slowest time feature, in units of the label.
    """

    def __init__(
        self,
        channels: int,
        width: int = 32,
        levels: int = 2,
        *,
        dropout: float = 0.0,
        attention: bool = False,
        classes: int = 0,
        period: float = 2.0,
    ) -> None:
        super().__init__()
        require_count("channels", channels)
        require_count("width", width)
        require_count("levels", levels)
        self.factor = 2 ** (levels - 1)
        self.channels = channels
        sizes = [width * 2**level for level in range(levels)]
        vector = 4 * width
        self.conditioning = Conditioning(vector, classes, period)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        before = [width, *sizes[:-1]]
        self.down = nn.ModuleList(_Block(a, b, vector, dropout) for a, b in zip(before, sizes, strict=True))
        self.middle = _Block(sizes[-1], sizes[-1], vector, dropout)
        self.attention = _Attention(sizes[-1]) if attention else nn.Identity()
        self.up = nn.ModuleList(_Block(2 * b, a, vector, dropout) for a, b in zip(before, sizes, strict=True))
        self.norm = nn.GroupNorm(math.gcd(8, width), width)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, label: Tensor, y: Tensor | None = None) -> Tensor:
        """The output for images (B, C, H, W), time labels (B,) and classes (B,), the shape of `x`."""
        if x.dim() != 4 or x.shape[1] != self.channels or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"x.shape={tuple(x.shape)}; (B, {self.channels}, H, W) is needed, H and W multiples of {self.factor}: "
                "pad the images, or build the network with fewer levels."
            )
        vector = self.conditioning(label, y)
        h = self.enter(x)
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if level else h, vector)
            kept.append(h)
        h = self.attention(self.middle(h, vector))
        for level in reversed(range(len(self.up))):
            h = self.up[level](torch.cat((h, kept[level]), 1), vector)
            h = F.interpolate(h, scale_factor=2.0) if level else h
        out: Tensor = self.leave(F.silu(self.norm(h)))
        return out


def _require_event(x: Tensor, event: tuple[int, ...]) -> None:
    """Raises ValueError unless `x` is a batch of this event shape."""
    if tuple(x.shape[1:]) != event:
        raise ValueError(
            f"x.shape={tuple(x.shape)}; (B, {', '.join(map(str, event))}) is needed: the network was built for it."
        )

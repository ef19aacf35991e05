"""A small network of scikit-learn's handwritten digits (8x8 pixels, 17 grey levels) that knows its data are quantised.

An image of levels k = 0..16 is dequantised to x = 2 (k + u)/17 - 1, u ~ U[0, 1), so that its bits per dimension are
-log2 p(x)/64 - log2(2/17). A pixel is uniform within one of 17 known cells; all that has to be learned is which one.
`CellNet` is a residual network that moves the log-probabilities of a pixel's cells away from the pixel's histogram,

    l_k + a_1 c_k + a_2 c_k^2 + a_3 c_k^3 + a_4 [k = 0] + a_5 [k = 1] + a_6 [k = 16],    c_k the cell's centre,

by six coefficients a(x_t, t) a pixel, and its noise prediction is the exact posterior mean for these probabilities
(`_cells.py`). Before training it is the histogram's exact model. Training shifts 4 in 9 images by a pixel
and tells the network so; at test time the shift is zero.

`python -m sdekit.zoo.digits` trains it again and prints what it reaches.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import require_count, require_seed
from .._tensor import digest
from ..likelihood import log_likelihood
from ..loss import LogNormalSigma
from ..model.nets import LabelFeatures, as_weighed
from ..model.score_model import ScoreModel
from ..sde.vp import VPSDE
from ..training import Batch, Batches, Recipe
from ..training import train as run
from ._baselines import Baselines, fit_baselines
from ._cells import CellHead, Cells, cell_noise

LEVELS = 17
SHAPE = (1, 8, 8)
WEIGHTS = Path(__file__).with_name("digits.safetensors")
_SIZE = 64
_STEPS, _BATCH, _SHIFTED = 8000, 128, 0.5
# Half_log_snr normal about 1.9. Below -1.5 the histogram is exact already, above 5 a pixel's cell is plain to see, so
# uniform half_log_snr spends many steps on little: 0.03 bits/dim worse on 144 images held out of the training split.
_TIMES = LogNormalSigma(mean=-1.9, std=1.7)


class Split(NamedTuple):
    """The data, quantised.

    Attributes:
        train: (1437, 1, 8, 8) int64 levels 0..16.
        test: (360, 1, 8, 8) int64 levels 0..16.
        train_labels: (1437,) int64 digits 0..9.
        test_labels: (360,) int64 digits 0..9.
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor


def load_split(seed: int = 0) -> Split:
    """The 1797 digits as 1437 to train on and 360 to test on, stratified by digit.

    Args:
        seed: Of the split; the shipped weights never saw the test images of seed 0.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    require_seed(seed)
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'sdekit[demo]'.") from error
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=360, random_state=seed, stratify=labels)
    first, second = (torch.as_tensor(part).long().reshape(-1, *SHAPE) for part in parts[:2])
    return Split(first, second, *(torch.as_tensor(part).long() for part in parts[2:]))


def dequantise(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Images in [-1, 1], float32: each level k a uniform point 2 (k + u)/17 - 1 of its cell.

    Args:
        levels: Integers 0..16, any shape.
        generator: The source of u.

    Raises:
        ValueError: Not integers, or out of range.
    """
    if levels.is_floating_point() or (levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < LEVELS):
        raise ValueError(f"levels: {levels.dtype}; integers from 0 to {LEVELS - 1} are needed.")
    u = torch.rand(levels.shape, generator=generator, device=levels.device)
    return 2.0 * (levels + u) / LEVELS - 1.0


def shift(levels: Tensor, by: Tensor) -> Tensor:
    """Images (B, 1, 8, 8) moved by `by` (B, 2) pixels down and right, each -1, 0 or 1; level 0 comes in."""
    batch = torch.arange(levels.shape[0], device=levels.device)[:, None, None]
    here = torch.arange(8, device=levels.device) + 1
    padded = F.pad(levels, (1, 1, 1, 1))[:, 0]
    return padded[batch, (here - by[:, :1])[:, :, None], (here - by[:, 1:])[:, None, :]][:, None]


def histogram(levels: Tensor, weight: float = 1.0) -> Tensor:
    """(17, 64) float64 log-probability of each level at each pixel, smoothed by `weight` images of uniform levels."""
    counts = F.one_hot(levels.reshape(-1, _SIZE), LEVELS).sum(0).double() + weight / LEVELS
    return (counts / counts.sum(1, keepdim=True)).log().T.contiguous()


class _Block(nn.Module):
    """A residual layer: h + B silu(A norm(h + time)), the identity at first."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, h: Tensor, vector: Tensor) -> Tensor:
        out: Tensor = h + self.leave(self.dropout(F.silu(self.enter(self.norm(h + vector)))))
        return out


class CellNet(nn.Module):
    """Predicts the noise in digits, called net(x, t, shift=None): (B, 1, 8, 8), (B,), (B, 2) -> (B, 1, 8, 8).

    Samples do not influence one another. Gradients and Jacobians of any mode and order are supported; the cells'
    sums are outside of batched products, which makes exact traces cheap.

    Args:
        log_histogram: (17, 64) log-probabilities of the levels, where it starts from. None: uniform.
        width: Of the residual layers.
        depth: Number of them.
        dropout: Probability, while training.
    """

    edges: Tensor
    log_histogram: Tensor
    features: Tensor

    def __init__(
        self, log_histogram: Tensor | None = None, width: int = 224, depth: int = 3, dropout: float = 0.3
    ) -> None:
        super().__init__()
        require_count("width", width)
        require_count("depth", depth)
        self.sde = VPSDE()
        level = torch.arange(LEVELS)
        edges = torch.linspace(-1.0, 1.0, LEVELS + 1, dtype=torch.float64)
        centre = 0.5 * (edges[1:] + edges[:-1])
        single = [(level == k).double() for k in (0, 1, LEVELS - 1)]
        start = torch.zeros(LEVELS, _SIZE, dtype=torch.float64) if log_histogram is None else log_histogram
        self.register_buffer("edges", edges)
        self.register_buffer("features", torch.stack([centre, centre**2, centre**3, *single]))
        self.register_buffer("log_histogram", start.double())
        # half_log_snr spans 12; half a period of the slowest wave covers it.
        self.label, self.time1, self.time2 = LabelFeatures(16, 24.0), nn.Linear(32, width), nn.Linear(width, width)
        self.shift = nn.Linear(2, width, bias=False)
        self.enter = nn.Linear(_SIZE, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.leave = nn.Linear(width, len(self.features) * _SIZE)
        for layer in (self.shift.weight, self.leave.weight, self.leave.bias):
            nn.init.zeros_(layer)

    def coefficients(self, x: Tensor, half_log_snr: Tensor, shift: Tensor | None = None) -> Tensor:
        """(B, 6, 64) changes of the log-probabilities, from states (B, 64) and half_log_snr (B,)."""
        vector = self.time2(F.silu(self.time1(as_weighed(self.label(half_log_snr), self.time1))))
        if shift is not None:
            vector = vector + self.shift(shift.to(vector.dtype))
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, vector)
        out: Tensor = self.leave(self.dropout(F.silu(self.norm(h))))
        return out.reshape(x.shape[0], -1, _SIZE)

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        """The noise predicted in `x` (B, 1, 8, 8) at times `t` (B,), for images that were shifted by `shift` (B, 2)."""
        if tuple(x.shape[1:]) != SHAPE:
            raise ValueError(f"x.shape={tuple(x.shape)}; (B, 1, 8, 8) is needed.")
        flat, t = x.reshape(-1, _SIZE), t.double()
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        coefficients = self.coefficients(flat, self.sde.half_log_snr(t).to(x.dtype), shift)
        cells = Cells(self.edges.double(), self.log_histogram.double(), self.features.double())
        if torch.is_grad_enabled():
            noise: Tensor = CellHead.apply(flat, coefficients, alpha, sigma, *cells)[0]  # type: ignore[no-untyped-call]
        else:
            noise = cell_noise(flat, coefficients, alpha, sigma, cells).noise
        return noise.to(x.dtype).reshape(x.shape)


def build(log_histogram: Tensor | None = None, *, seed: int = 0, width: int = 224) -> ScoreModel:
    """An untrained model, in evaluation mode: the exact one of a histogram.

    Args:
        log_histogram: (17, 64), see `histogram`. None: uniform levels.
        seed: Of the initial weights.
        width: Of the network.
    """
    require_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        net = CellNet(log_histogram, width)
    return ScoreModel(net, net.sde, data_std=0.71).eval()


def load() -> ScoreModel:
    """The trained model that ships with sdekit, in evaluation mode; (B, 1, 8, 8) images in [-1, 1]."""
    return ScoreModel.load(WEIGHTS, CellNet()).eval()


def train(
    levels: Tensor | None = None,
    *,
    steps: int = _STEPS,
    width: int = 224,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    device: str | torch.device = "cpu",
) -> ScoreModel:
    """A newly trained model, in evaluation mode: the recipe of the shipped weights.

    Args:
        levels: (N, 1, 8, 8) integers 0..16 to train on. None: the training images of `load_split()`.
        steps: Steps of 128 images; the learning rate falls to zero over them.
        width: Of the network.
        seed: Of the weights, the batches, the noise and the dropout.
        checkpoint: A file to resume from and to save to; see `sdekit.training.train`.
        progress: Show a progress bar.
        device: Where to train. The draws are those of its generator: another device, other draws.
    """
    data = load_split().train if levels is None else levels
    recipe = Recipe(steps=steps, learning_rate=2e-3, warmup=200, ema=0.999, clip=1.0, times=_TIMES, seed=seed)
    model = build(histogram(data), seed=seed, width=width).to(device)
    facts = {"data": digest(data), "batch_size": str(_BATCH), "shifted": str(_SHIFTED)}
    return run(model, _batches(data), recipe, checkpoint=checkpoint, facts=facts, progress=progress).model


def _batches(levels: Tensor) -> Batches:
    """Draws images, moves some of them by a pixel, and dequantises."""

    def draw(generator: torch.Generator) -> Batch:
        where = generator.device
        chosen = torch.randint(len(levels), (_BATCH,), generator=generator, device=where)
        by = torch.randint(-1, 2, (_BATCH, 2), generator=generator, device=where)
        by = by * (torch.rand(_BATCH, 1, generator=generator, device=where) < _SHIFTED)
        moved = shift(levels.to(where)[chosen], by)
        return Batch(dequantise(moved, generator), {"shift": by.to(torch.float32)})

    return draw


def baselines(split: Split | None = None) -> Baselines:
    """Bits per dimension of the test images under simple models: uniform, histogram, mixture of 10 categoricals."""
    data = load_split() if split is None else split
    return fit_baselines(data.train, data.test, LEVELS)


def bits_per_dim(model: ScoreModel, levels: Tensor, seed: int = 0, tolerance: float = 1e-2) -> Tensor:
    """(B,) float64 bits per dimension of images (B, 1, 8, 8) of levels, by the exact trace and one dequantisation.

    Args:
        model: Of dequantised images in [-1, 1].
        levels: Integers 0..16.
        seed: Of the dequantisation.
        tolerance: Of the solver, nats.
    """
    x = dequantise(levels.cpu(), torch.Generator().manual_seed(seed)).to(levels.device)
    return log_likelihood(model, x, tolerance=tolerance).bits_per_dim(LEVELS)


def main(path: Path = WEIGHTS) -> None:
    """Trains the network again, writes it to `path` and prints what it reaches."""
    split, start = load_split(), time.perf_counter()
    model = train(split.train)
    seconds = time.perf_counter() - start
    model.save(path)
    held_out, seen = (float(bits_per_dim(model, part).mean()) for part in (split.test, split.train[:360]))
    simple = baselines(split)
    sys.stdout.write(
        f"trained in {seconds:.0f} s, {sum(p.numel() for p in model.parameters())} parameters -> {path}\n"
        f"bits/dim of the test images at t_min={model.sde.t_min:g}: {held_out:.4f} (training images {seen:.4f})\n"
        f"mixture of 10 categoricals {simple.mixture:.4f}, histogram {simple.histogram:.4f}, "
        f"uniform {simple.uniform:.4f}\n"
    )


if __name__ == "__main__":
    main()

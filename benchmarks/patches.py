"""Colour patches of photographs, 16 x 16 x 3 (D = 768), and a small U-Net trained on them.

The photographs are those that the wheels of scikit-image and scikit-learn carry: nothing is downloaded. Of each image
the columns right of four fifths of its width are held out; a patch lies on one side only. Integers v are dequantised
uniformly, x = (v + u)/128 - 1 with u in [0, 1), so a density of x exists, and is steep: a bin is 1/128 wide.

The network predicts the noise under VP, with log(sigma/alpha)/4 as its time. It has 547,000 parameters (group
normalisation, SiLU, no dropout: smooth everywhere), trains on one core in 12 minutes, and is cached. Evaluated in
float64, so that rounding plays no part.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

import sdekit
from sdekit.model.nets import UNet
from sdekit.training import Batch, Recipe, train

from .common import CACHE, arguments, digest

SIDE = 16
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # of scikit-image; besides both of scikit-learn
_HELD_OUT = 0.8  # of the width: right of it nothing is trained on
_STEPS = 6000


@lru_cache(maxsize=1)
def photographs() -> tuple[Tensor, ...]:
    """The images, each (3, H, W) uint8."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    images = [getattr(data, name)() for name in PHOTOGRAPHS] + list(load_sample_images().images)
    return tuple(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() for image in images)


def regions(held_out: bool) -> list[Tensor]:
    """The part of every image that is trained on, or the part that is not."""
    cuts = [int(_HELD_OUT * image.shape[2]) for image in photographs()]
    return [i[:, :, cut:] if held_out else i[:, :, :cut] for i, cut in zip(photographs(), cuts, strict=True)]


def draw(parts: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, 16, 16) float64 dequantised patches, from parts by their area, at random places."""
    areas = torch.tensor([part[0].numel() for part in parts], dtype=torch.float64)
    chosen = torch.multinomial(areas, count, replacement=True, generator=generator)
    place = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    patches = torch.empty(count, 3, SIDE, SIDE, dtype=torch.float64)
    for row, (number, (high, wide)) in enumerate(zip(chosen.tolist(), place.tolist(), strict=True)):
        part = parts[number]
        top, left = int(high * (part.shape[1] - SIDE + 1)), int(wide * (part.shape[2] - SIDE + 1))
        patches[row] = part[:, top : top + SIDE, left : left + SIDE]
    return (patches + torch.rand(patches.shape, generator=generator, dtype=torch.float64)) / 128.0 - 1.0


def held_out(count: int, seed: int) -> Tensor:
    """(count, 3, 16, 16) float64 patches that no network has seen."""
    return draw(regions(True), count, torch.Generator().manual_seed(500 + seed))


@lru_cache(maxsize=1)
def data_std() -> float:
    """The standard deviation of the training patches' values, pixel by pixel, about their common mean."""
    values = draw(regions(False), 20_000, torch.Generator().manual_seed(0))
    return float(values.std())


def trained(quick: bool) -> sdekit.ScoreModel:
    """The network trained on the patches, float64, in eval mode.

    Args:
        quick: Train a little only.
    """
    steps = 60 if quick else _STEPS
    torch.manual_seed(0)  # of the initial weights
    net = UNet(3, 24, 3, period=4.0)
    model = sdekit.ScoreModel(net, sdekit.VPSDE(), sdekit.noise(sdekit.LogSigmaLabel(0.25)), data_std=data_std())
    path = CACHE / f"patches-noise-{digest(steps, repr(net), PHOTOGRAPHS)}.safetensors"
    if not path.exists():
        parts = regions(False)

        def batches(generator: torch.Generator) -> Batch:
            x = draw(parts, 64, generator).float()
            flipped = torch.rand(64, 1, 1, 1, generator=generator) < 0.5
            return Batch(torch.where(flipped, x.flip(3), x), {})

        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        done = train(model, batches, Recipe(steps, 1e-3), checkpoint=unfinished)
        done.model.save(path)
        unfinished.unlink()
        print("loss per dimension, every tenth of the way:", *losses(done.losses), flush=True)
    return sdekit.ScoreModel.load(path, net).double().eval()


def losses(values: Tensor) -> list[str]:
    """The mean loss of each tenth of the training, per dimension."""
    return [f"{float(part.mean()) / (3 * SIDE**2):.4f}" for part in values.chunk(10)]


def bits_per_dimension(log_prob: Tensor) -> Tensor:
    """(B,) bits per dimension of the integers whose patches have this log density of x = (v + u)/128 - 1."""
    size = 3 * SIDE**2
    return -(log_prob / size - math.log(128.0)) / math.log(2.0)


def main() -> None:
    """Trains the network if it is not trained yet."""
    trained(arguments(__doc__).quick)


if __name__ == "__main__":
    main()

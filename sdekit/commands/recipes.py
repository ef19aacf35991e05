"""What `sdekit train` does with an array of the user's: an EDM-preconditioned network on the linear VP process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from .._interrupt import terminated_as_interrupted
from .._tensor import digest
from ..model.parameterization import edm
from ..model.score_model import ScoreModel
from ..sde.vp import VPSDE
from ..training import Batch, Batches, Recipe, train
from ..units import Levels
from .kept import Interrupted
from .models import Architecture

_PERIOD = 4.0  # of the time features: EDM's label log(sigma/alpha)/4 spans 2.8 on the linear VP process


@dataclass(frozen=True)
class NetworkChoice:
    """The network to train.

    Attributes:
        kind: "mlp" for any event shape, "unet" for images (C, H, W).
        width: Of hidden layers, or channels at full resolution.
        depth: Hidden layers, or resolutions.
        dropout: Probability, while training.
    """

    kind: Literal["mlp", "unet"] = "mlp"
    width: int = 128
    depth: int = 3
    dropout: float = 0.0


def train_array(
    x: Tensor,
    levels: Levels | None,
    choice: NetworkChoice,
    recipe: Recipe,
    batch_size: int,
    checkpoint: Path,
    device: torch.device | str = "cpu",
    *,
    progress: bool = True,
) -> tuple[ScoreModel, Architecture]:
    """A network trained on `x`, and what it was built from.

    Args:
        x: Data, (N, *event): floating, or integers where `levels` says what they stand for.
        levels: See `Levels`; dequantised anew in every batch.
        choice: Of the network.
        recipe: Of the training; its seed is the first weights' too.
        batch_size: Samples a step.
        checkpoint: Resumed from if it exists.
        device: Where to train.
        progress: Show a progress bar.

    Raises:
        ValueError: Data that cannot be trained on, or a checkpoint of other data, levels, network or training.
        OSError: The last checkpoint cannot be written.
        Interrupted: Ctrl-C was pressed, or SIGTERM sent; the checkpoint has what there is.
    """
    if levels is not None:
        levels.check(x)
    elif not x.is_floating_point():
        raise ValueError(f"the array holds {x.dtype}; floating numbers are needed, or for integers --levels.")
    elif not bool(x.isfinite().all()):
        raise ValueError("the array holds numbers that are not finite: leave out the rows that do.")
    if x.dim() < 2 or x.shape[0] < 2:
        raise ValueError(f"x.shape={tuple(x.shape)}; at least two samples of shape (N, *event) are needed.")
    seen = x.float() if levels is None else levels.dequantise(x, torch.Generator().manual_seed(recipe.seed))
    std = float(seen.std())
    if not std > 0:
        raise ValueError("all numbers of the array are equal: there is nothing to learn.")
    architecture = Architecture(choice.kind, tuple(x.shape[1:]), choice.width, choice.depth, choice.dropout, _PERIOD)
    model = ScoreModel(architecture.build(recipe.seed), VPSDE(), edm(std)).to(device)
    facts = {"data": digest(x), "levels": str(levels), "batch_size": str(batch_size)}
    facts |= {name: str(value) for name, value in asdict(architecture).items()}
    draw = _batches(x, levels, batch_size)
    with terminated_as_interrupted():
        trained = train(model, draw, recipe, checkpoint=checkpoint, facts=facts, progress=progress)
    _require_end(trained.step, recipe.steps)
    return trained.model, architecture


def train_digits(
    steps: int, seed: int, checkpoint: Path, progress: bool, device: torch.device
) -> tuple[ScoreModel, Architecture]:
    """The digits network of the zoo, trained again by its own recipe, and what it is built from.

    Raises:
        Interrupted: Ctrl-C was pressed, or SIGTERM sent; the checkpoint has what there is.
    """
    from ..zoo import digits  # needs scikit-learn

    with terminated_as_interrupted():
        model = digits.train(steps=steps, seed=seed, checkpoint=checkpoint, progress=progress, device=device)
    with safe_open(str(checkpoint), framework="pt") as file:
        _require_end(int(file.metadata()["step"]), steps)
    return model, Architecture("digits", digits.SHAPE, 224, 3, 0.3, 0.0)


def _require_end(done: int, steps: int) -> None:
    if done < steps:
        raise Interrupted(f"stopped after {done} of {steps} steps; the same command goes on from there.")


def _batches(x: Tensor, levels: Levels | None, size: int) -> Batches:
    """Draws rows of `x` with replacement, dequantised where there are levels."""

    def draw(generator: torch.Generator) -> Batch:
        rows = torch.randint(x.shape[0], (size,), generator=generator, device=generator.device)
        chosen = x[rows.to(x.device)].to(generator.device)
        return Batch(chosen.float() if levels is None else levels.dequantise(chosen, generator), {})

    return draw

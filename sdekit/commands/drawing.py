"""Samples of a model: in batches, resumable, and the same however they are cut.

Sample i depends on the seed, on i and on its own condition alone, so several machines can draw a share each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..model.score_model import ScoreModel
from ..runtime import Runtime
from ..sampling import sample
from ..solver.base import Solver
from .evaluation import only_the_summary_warns
from .kept import Kept, require_finished


@dataclass(frozen=True)
class Drawing:
    """What to draw: what every sample depends on besides the model.

    Attributes:
        count: How many samples.
        event: The shape of one.
        first: The number of the first one. None: 0, and the model's conditions are those of these samples only.
        steps: Of the grid; None for the solver's default.
        solver: None for the default.
        eta: Noise level of the reverse SDE.
        seed: Of all noise.
    """

    count: int
    event: tuple[int, ...]
    first: int | None = None
    steps: int | None = None
    solver: Solver | None = None
    eta: float = 0.0
    seed: int = 0


def draw(
    model: ScoreModel,
    drawing: Drawing,
    *,
    batch_size: int = 256,
    partial: Path | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    runtime: Runtime = "auto",
) -> Tensor:
    """The samples, (count, *event), on the CPU.

    Args:
        model: The score model, on `device`, in eval mode.
        drawing: What to draw.
        batch_size: Samples in a batch; changes cost only.
        partial: Where to keep what is finished; resumed from if it exists, left there at the end.
        device: Where batches are drawn.
        progress: Show progress bars.
        runtime: How a step runs; changes cost only, and rounding.

    Raises:
        ValueError: `partial` is of another model or other options; a condition of other samples.
        Interrupted: Ctrl-C was pressed; what was finished is in `partial`.
        SolveError: The network cannot be used, or a sample failed.
    """
    first = 0 if drawing.first is None else drawing.first
    if drawing.first is None:
        model.check_batch(drawing.count)
    else:
        _require_conditions(model, first + drawing.count)
    numbers = torch.arange(first, first + drawing.count, device=device)
    few = torch.zeros(drawing.count, device=device)[:, *[None] * len(drawing.event)].expand(-1, *drawing.event)
    kept = Kept.of(partial, model, (drawing, few.dtype), few, numbers)
    with kept.until_done(drawing.count), only_the_summary_warns():
        while kept.done < drawing.count:
            rows = numbers[kept.done : kept.done + batch_size]
            solution = sample(
                *(model.take(rows), (rows.shape[0], *drawing.event)),
                solver=drawing.solver,
                steps=drawing.steps,
                eta=drawing.eta,
                seed=drawing.seed,
                indices=rows,
                device=device,
                progress=progress,
                runtime=runtime,
            )
            require_finished(solution.status)
            kept.add({"x": solution.x.cpu()})
    return kept.joined()["x"]


def _require_conditions(model: ScoreModel, count: int) -> None:
    """Raises ValueError where a condition of the model has no entry for one of the first `count` samples."""
    for name, value in model.bound.items():
        if isinstance(value, Tensor) and (value.dim() == 0 or value.shape[0] < count):
            raise ValueError(
                f"condition {name}.shape={tuple(value.shape)}; a leading size of at least {count} is needed, an entry "
                "for each sample up to the last of these."
            )

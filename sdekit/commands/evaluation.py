"""Log-likelihoods of a whole array: in batches, resumable, and the same numbers however it is cut.

What is finished is kept in one file beside the result, and a run that was interrupted goes on from there (kept.py). The
batch size is no part of what tells runs apart, since no result depends on it. An array may be evaluated in shards, by
rows: every row has the probes and the condition of its place in the whole array.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..captured import keep_graphs
from ..divergence import Divergence
from ..errors import PartialResultWarning, ToleranceWarning
from ..likelihood import log_likelihood
from ..model.score_model import ScoreModel
from ..runtime import Runtime
from ..solution import LogLikelihood, Status
from ..units import Levels
from .kept import Kept, require_finished


class Scores(NamedTuple):
    """What is kept of each sample, all (N,): see `LogLikelihood`."""

    log_prob: Tensor
    std_error: Tensor
    solver_error: Tensor
    log_prior: Tensor
    log_det: Tensor
    status: Tensor
    evaluations: Tensor

    @classmethod
    def of(cls, result: LogLikelihood) -> Scores:
        """The scores of one batch, on the CPU."""
        values = [getattr(result, name) for name in cls._fields[:-1]] + [result.stats.evaluations]
        return cls(*(value.cpu() for value in values))


@dataclass(frozen=True)
class Options:
    """How to evaluate: what every number depends on besides the data and the model.

    Attributes:
        tolerance: Nats per sample.
        divergence: Of the trace; None for the default.
        seed: Of the probes.
        max_evaluations: Of the network, a sample at most.
        nodes: So many evaluations on a fixed grid, whatever the tolerance; None: as many as the tolerance needs.
    """

    tolerance: float = 1e-2
    divergence: Divergence | None = None
    seed: int = 0
    max_evaluations: int = 10_000
    nodes: int | None = None


def evaluate(
    model: ScoreModel,
    x: Tensor,
    options: Options,
    *,
    batch_size: int = 256,
    partial: Path | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    runtime: Runtime = "auto",
    first: int = 0,
    total: int | None = None,
) -> Scores:
    """The scores of every sample of `x`, in batches.

    Args:
        model: The score model, on `device`, in eval mode.
        x: Data, (N, *event), floating, on the CPU.
        options: What the numbers depend on.
        batch_size: Samples in a batch; changes cost only.
        partial: Where to keep what is finished; resumed from if it exists, left there at the end.
        device: Where batches are evaluated.
        progress: Show a progress bar.
        runtime: How a step runs; changes cost only, and rounding.
        first: The place of x[0] in the whole array, of which `x` is a shard: keys probes and conditions.
        total: Samples of the whole array, of which the model has conditions; default: `x` ends it.

    Raises:
        ValueError: `partial` is of other data, another model or other options; a condition of other samples.
        Interrupted: Ctrl-C was pressed; what was finished is in `partial`.
        SolveError: The network cannot be used.
    """
    if x.shape[0] == 0:
        raise ValueError(f"x.shape={tuple(x.shape)}; at least one sample is needed.")
    model.check_batch(first + x.shape[0] if total is None else total)
    places = torch.arange(first, first + x.shape[0], device=device)
    kept = Kept.of(partial, model, (options, first), x, places, data=x)
    bar = tqdm(total=x.shape[0], initial=kept.done, disable=not progress, desc="log p", unit="sample")
    with kept.until_done(x.shape[0]), bar, only_the_summary_warns(), keep_graphs():
        while kept.done < x.shape[0]:
            rows = slice(kept.done, min(kept.done + batch_size, x.shape[0]))
            result = log_likelihood(
                model.take(places[rows]),
                x[rows].to(device),
                tolerance=options.tolerance,
                nodes=options.nodes,
                divergence=options.divergence,
                seed=options.seed,
                indices=places[rows],
                max_evaluations=options.max_evaluations,
                throw=False,
                runtime=runtime,
            )
            require_finished(result.status)
            kept.add(Scores.of(result)._asdict())
            bar.update(rows.stop - rows.start)
    return Scores(**kept.joined())


@contextmanager
def only_the_summary_warns() -> Iterator[None]:
    """Leaves out the warnings of single batches: status and solver_error say the same, and are summed up at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ToleranceWarning)
        warnings.simplefilter("ignore", PartialResultWarning)
        yield


class Summary(NamedTuple):
    """The mean over the samples that arrived, and what is known of its errors; nats per sample.

    Attributes:
        samples: How many were evaluated.
        arrived: How many arrived; the rest is left out of the means.
        loose: How many arrived with an estimated error above the tolerance.
        mean: Of log_prob.
        spread: Standard error of the mean over samples: another sample of the data would give another mean.
        trace: Standard error of the mean from the trace's probes.
        solver: Mean of solver_error, an estimate mostly above the mean error.
        evaluations: Mean number of network evaluations.
    """

    samples: int
    arrived: int
    loose: int
    mean: float
    spread: float
    trace: float
    solver: float
    evaluations: float

    def to_json(self) -> str:
        """The summary as JSON; numbers that are not finite become null."""
        values = {
            name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in self._asdict().items()
        }
        return json.dumps(values)


def summarise(scores: Scores | LogLikelihood) -> Summary:
    """The means and their errors; see `Summary`."""
    cost = scores.evaluations if isinstance(scores, Scores) else scores.stats.evaluations
    good = (scores.status == Status.DONE) | (scores.status == Status.LOOSE)
    count = int(good.sum())
    log_prob, trace = scores.log_prob[good], scores.std_error[good]
    return Summary(
        samples=scores.status.shape[0],
        arrived=count,
        loose=int((scores.status == Status.LOOSE).sum()),
        mean=float(log_prob.mean()) if count else math.nan,
        spread=float(log_prob.std() / math.sqrt(count)) if count > 1 else math.nan,
        trace=float(trace.square().sum().sqrt() / count) if count else math.nan,
        solver=float(scores.solver_error[good].mean()) if count else math.nan,
        evaluations=float(cost.double().mean()) if count else math.nan,
    )


def table(summary: Summary, size: int, levels: Levels | None) -> list[str]:
    """What `sdekit likelihood` prints of a summary, line by line, for samples of `size` dimensions."""
    if not summary.arrived:
        return [f"samples    none of {summary.samples} arrived: there is nothing to take the mean of"]
    lines = [
        f"samples    {summary.arrived} of {summary.samples} arrived ({summary.loose} above the tolerance), "
        f"{summary.evaluations:.1f} network evaluations each",
        f"log p      {summary.mean:.4f} nats   +- {summary.spread:.2g} over samples   +- {summary.trace:.2g} trace   "
        f"<= {summary.solver:.2g} solver",
    ]
    if levels is None:
        return [*lines, "bits/dim   depend on the width of a level: pass --levels, --low, --high"]
    scale = 1.0 / (size * math.log(2.0))
    offset = -math.log2(levels.width)
    return [
        *lines,
        f"bits/dim   {offset - summary.mean * scale:.4f}   +- {summary.spread * scale:.2g} over samples   "
        f"+- {summary.trace * scale:.2g} trace   <= {summary.solver * scale:.2g} solver",
        f"           {levels.count} levels on [{levels.low:g}, {levels.high:g}]: offset {offset:.4f}",
    ]

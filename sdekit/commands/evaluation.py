"""Log-likelihoods of a whole array: in batches, resumable, and the same numbers however it is cut.

After each batch everything finished so far is written to one file beside the result, with a fingerprint of the data,
the model and the options. A run that was interrupted goes on from there; a file with another fingerprint is refused, so
that numbers of two runs are never mixed. The batch size is no part of the fingerprint, since no result depends on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from .._tensor import digest
from ..captured import keep_graphs
from ..divergence import Divergence
from ..errors import PartialResultWarning, SdekitError, ToleranceWarning
from ..likelihood import log_likelihood
from ..model.score_model import ScoreModel
from ..runtime import Runtime
from ..solution import LogLikelihood, Status
from .arrays import write_arrays

_FORMAT = "sdekit.evaluation/1"


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

    @classmethod
    def join(cls, parts: list[Scores]) -> Scores:
        """The scores of consecutive batches as one."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


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


class Interrupted(SdekitError):
    """Ctrl-C during a command; the message says what was kept."""


def require_finished(status: Tensor) -> None:
    """Raises Interrupted where a solve was stopped by Ctrl-C: the library returns what there is, a command ends."""
    if bool((status == Status.INTERRUPTED).any()):
        raise Interrupted("interrupted.")


def fingerprint(model: ScoreModel, x: Tensor, options: Options, device: torch.device | str = "cpu") -> str:
    """A text that differs whenever data, weights, what the network does, its meaning or the options do.

    Args:
        model: The score model, on `device`.
        x: Data, (N, *event), N >= 1.
        options: What the numbers depend on.
        device: Where the model is.
    """
    whole = hashlib.sha256(digest(x).encode())
    for name, value in sorted(model.net.state_dict().items()):
        whole.update(f"{name} {digest(value)}".encode())
    for name, value in sorted(model.bound.items()):
        whole.update(f"{name} {digest(value) if isinstance(value, Tensor) else repr(value)}".encode())
    # What the network does and its weights do not tell: at three times, to digits that rounding leaves alone.
    ends = model.sde.t_min, 0.5 * (model.sde.t_min + model.sde.t_max), model.sde.t_max
    with torch.no_grad():
        one = model.take(torch.zeros(1, dtype=torch.int64, device=device))
        said = [one.output(x[:1].to(device), torch.tensor([t], dtype=torch.float64, device=device)) for t in ends]
    whole.update(" ".join(f"{value:.3g}" for out in said for value in out.double().flatten().tolist()).encode())
    facts = (type(model.net).__name__, model.sde, model.parameterization, model.data_std, options)
    # The address in the repr of a function differs from process to process.
    whole.update(re.sub(r" at 0x[0-9a-f]+", "", repr(facts)).encode())
    return whole.hexdigest()


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
) -> Scores:
    """The scores of every sample of `x`, in batches.

    Args:
        model: The score model, on `device`, in eval mode.
        x: Data, (N, *event), floating, on the CPU.
        options: What the numbers depend on.
        batch_size: Samples in a batch; changes cost only.
        partial: Where to keep what is finished; resumed from if it exists, removed by `discard` when done with it.
        device: Where batches are evaluated.
        progress: Show a progress bar.
        runtime: How a step runs; changes cost only, and rounding.

    Raises:
        ValueError: `partial` is of other data, another model or other options; a condition of other samples.
        Interrupted: Ctrl-C was pressed; what was finished is in `partial`.
        SolveError: The network cannot be used.
    """
    if x.shape[0] == 0:
        raise ValueError(f"x.shape={tuple(x.shape)}; at least one sample is needed.")
    model.check_batch(x.shape[0])
    mark = fingerprint(model, x, options, device)
    parts = [] if partial is None else _resume(partial, mark)
    done = sum(part.log_prob.shape[0] for part in parts)
    bar = tqdm(total=x.shape[0], initial=done, disable=not progress, desc="log p", unit="sample")
    try:
        with bar, only_the_summary_warns(), keep_graphs():
            while done < x.shape[0]:
                rows = torch.arange(done, min(done + batch_size, x.shape[0]))
                batch = model.take(rows.to(device)) if model.bound else model
                result = log_likelihood(
                    batch,
                    x[rows].to(device),
                    tolerance=options.tolerance,
                    nodes=options.nodes,
                    divergence=options.divergence,
                    seed=options.seed,
                    indices=rows.to(device),
                    max_evaluations=options.max_evaluations,
                    throw=False,
                    runtime=runtime,
                )
                require_finished(result.status)
                parts.append(Scores.of(result))
                done += rows.shape[0]
                if partial is not None:
                    parts = [Scores.join(parts)]
                    write_arrays(partial, parts[0]._asdict(), {"format": _FORMAT, "fingerprint": mark})
                bar.update(rows.shape[0])
    except (KeyboardInterrupt, Interrupted) as stop:
        kept = "nothing was kept" if partial is None or not done else f"{done} are kept in {str(partial)!r}"
        raise Interrupted(f"interrupted after {done} of {x.shape[0]} samples; {kept}.") from stop
    return Scores.join(parts)


@contextmanager
def only_the_summary_warns() -> Iterator[None]:
    """Leaves out the warnings of single batches: status and solver_error say the same, and are summed up at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ToleranceWarning)
        warnings.simplefilter("ignore", PartialResultWarning)
        yield


def _resume(partial: Path, mark: str) -> list[Scores]:
    """The scores kept in `partial`, as a list of one; the empty list where there is no such file."""
    if not partial.exists():
        return []
    try:
        with safe_open(str(partial), framework="pt") as file:
            metadata = file.metadata() or {}
            kept = Scores(*(file.get_tensor(name) for name in Scores._fields))
    except SafetensorError as error:
        raise ValueError(f"{str(partial)!r} cannot be resumed from: {error}. Remove it to start anew.") from error
    if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != mark:
        raise ValueError(
            f"{str(partial)!r} was left by a run with other data, another model or other options. "
            "Repeat that run to finish it, or remove the file to start anew."
        )
    return [kept]


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

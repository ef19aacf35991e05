"""Log-probabilities of integers: bounds by a density of dequantised states.

With K states x_i drawn for the levels k by a dequantiser (dequantize.py), and the log weights

    l_i = log p_t(x_i) + log P(k | x_i) - log q(x_i | k),

    mean         (1/K) sum_i l_i             the average bound, unbiased; the mean of -log q in closed form, or drawn
    importance   log (1/K) sum_i exp l_i     closer to log P(k) with each draw

Both are below log P(k) in expectation over the draws. Unless the trace is exact, log p_t carries the noise n_i of its
probes. The mean is none the worse for it: E n_i = 0. The importance bound is: E exp n_i > 1, and with noise of half a
nat 5 draws are 0.1 nats too high. It then needs an exact trace; or, with `debias`, half of the variance of n_i as the
probes tell it is taken from each l_i, which makes E exp(n_i) = 1 for normal noise, and is of first order else.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import trange

from . import _random
from ._checks import require_count, require_float64, require_indices, require_same_device, require_seed
from ._fit import times_of
from ._random import Stream
from ._tensor import flatten
from .dequantize import Dequantizer, UniformDequantizer
from .divergence import EXACT_UP_TO, Divergence, Exact, Hutchinson
from .errors import PartialResultWarning, SolveError, ToleranceWarning
from .integrate import finish
from .likelihood import log_likelihood
from .model.score_model import ScoreModel
from .runtime import Runtime
from .solution import DiscreteLogLikelihood, LogLikelihood, Status
from .targets import Gaussian
from .units import Levels

Bound = Literal["mean", "importance"]


class _Draws(NamedTuple):
    """All (B, K): log weights, their standard and solver errors, status, evaluations and time reached."""

    weight: Tensor
    std_error: Tensor
    solver_error: Tensor
    status: Tensor
    evaluations: Tensor
    reached: Tensor


def discrete_log_likelihood(
    model: ScoreModel,
    k: Tensor,
    *,
    levels: int = 256,
    low: float = -1.0,
    high: float = 1.0,
    dequantizer: Dequantizer | None = None,
    samples: int = 1,
    bound: Bound = "mean",
    debias: bool = False,
    entropy: Literal["closed", "sampled"] = "closed",
    t: Tensor | float | None = None,
    divergence: Divergence | None = None,
    tolerance: float = 1e-2,
    nodes: int | None = None,
    data_moments: Gaussian | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    dtype: torch.dtype | None = None,
    draws_at_once: int = 1,
    max_evaluations: int = 10_000,
    progress: bool = False,
    throw: bool = True,
    runtime: Runtime = "auto",
    slots: int | None = None,
) -> DiscreteLogLikelihood:
    """Lower bounds of the log-probabilities of integers `k` under the quantised model, each with its errors.

    Args:
        model: The score model, in eval mode.
        k: (B, *event) integers 0..levels-1, on the model's device.
        levels: Number of levels, >= 2; each stands for a bin of [low, high].
        low: Lower edge of the first bin, in the model's units.
        high: Upper edge of the last bin.
        dequantizer: How states are drawn for the levels. None: UniformDequantizer(), the right one for models trained
            on uniformly dequantised data; TruncatedNormalDequantizer() for those trained on the integers' centres.
        samples: Draws K, >= 1. The first K are the same whatever K is.
        bound: "mean": average of the draws, or "importance": K-sample importance-weighted.
        debias: For "importance" with a trace by probes: see the module.
        entropy: Of q, for "mean": "closed" form, or "sampled" with the draws: the same on average. Sampled has far less
            spread where p_t is like q within a cell (a model of the integers, with noise), closed where it is flat.
        t: Noise level of the states, a number or (B,), in [t_min, t_max]. None: the dequantiser's own.
        divergence: How the trace is had. None: Exact() up to 128 dimensions, else Hutchinson(probes=1).
        tolerance: Nats per draw; this and what follows: see `log_likelihood`.
        nodes: Evaluations on a fixed grid instead.
        data_moments: Gaussian of the data, for the terminal law.
        seed: Of the draws and the probes, 0 <= seed < 2^63.
        indices: (B,) global sample numbers that key them; default 0..B-1: pass them when you shuffle or split.
        dtype: Of the states; default float64 where the network is, else float32 (torch's default without parameters).
        draws_at_once: Draws solved together; more is faster for small batches and takes more memory.
        max_evaluations: Network evaluations a draw at most.
        progress: Show a progress bar of draws.
        throw: Raise SolveError if a sample fails (its `.solution` holds the rest); else read `status`.
        runtime: How a step runs, see `log_likelihood`.
        slots: Draws in work at a time, the next entering when one is done; None: all.

    Returns:
        A DiscreteLogLikelihood.

    Raises:
        ValueError, TypeError: Arguments that do not fit; an importance bound that would be none.
        SolveError: A draw of a sample failed and `throw`; or the network cannot be used.
    """
    cells = Levels(levels, low, high)
    law = UniformDequantizer() if dequantizer is None else dequantizer
    size = _check(model, k, cells, law, samples, draws_at_once)
    _check_bound(bound, entropy, samples, debias, divergence, size)
    require_seed(seed)
    numbers = require_indices(indices, k.shape[0], k.device)
    start = times_of("t", law.time(model.sde, cells) if t is None else t, k, model.sde.t_min, model.sde.t_max)
    task = _Task(
        *(model, k, start, law, cells, _random.sample_keys(seed, Stream.DEQUANTISE, numbers)),
        kind=_state_dtype(model, dtype),
        closed=bound == "mean" and entropy == "closed",
        debias=debias,
    )
    solve = partial(log_likelihood, divergence=divergence, tolerance=tolerance, nodes=nodes, data_moments=data_moments)
    solve = partial(solve, seed=seed, max_evaluations=max_evaluations, throw=False, runtime=runtime, slots=slots)
    draws = _no_draws(k.shape[0], samples, start)
    try:
        _fill(draws, task, solve, draws_at_once, progress)
    except SolveError as error:  # the network cannot be used: what it carries is of some rows of a draw
        raise SolveError(str(error), _combined(draws, bound, start, size)) from error
    result = _combined(draws, bound, start, size)
    _report(result, draws, numbers, throw)
    return result


class _Task(NamedTuple):
    """What every draw is made from: levels `k`, noise levels `start` (B,), keys (B,), and how it is weighed."""

    model: ScoreModel
    k: Tensor
    start: Tensor
    law: Dequantizer
    cells: Levels
    keys: Tensor
    kind: torch.dtype
    closed: bool
    debias: bool


def _fill(draws: _Draws, task: _Task, solve: Callable[..., LogLikelihood], at_once: int, progress: bool) -> None:
    """Makes the draws, `at_once` of every sample together; stops at Ctrl-C."""
    samples = draws.weight.shape[1]
    for first in trange(0, samples, at_once, disable=not progress, desc="draws"):
        numbers = torch.arange(first, min(first + at_once, samples), device=task.k.device)
        out, weight = _solved(task, numbers, solve)
        _put(draws, first, out, weight)
        if bool((out.status == Status.INTERRUPTED).any()):
            return


def _solved(task: _Task, numbers: Tensor, solve: Callable[..., LogLikelihood]) -> tuple[LogLikelihood, Tensor]:
    """Densities and log weights of the draws `numbers` (n,) of every sample, draw after draw: n B rows."""
    batch = task.k.shape[0]
    rows = torch.arange(batch, device=task.k.device).repeat(numbers.shape[0])
    number, keys, start = numbers.repeat_interleave(batch), task.keys[rows], task.start[rows]
    levels = flatten(task.k).long()[rows]
    drawn = task.law.draw(task.model.sde, start, levels, task.cells, keys, number)
    probes = _random.words(keys, -1 - number, 1)[:, 0]  # the draws themselves count from 0 upwards
    x = drawn.x.to(task.kind).reshape(-1, *task.k.shape[1:])
    with warnings.catch_warnings():  # said once, at the end
        warnings.simplefilter("ignore", ToleranceWarning)
        warnings.simplefilter("ignore", PartialResultWarning)
        out = solve(task.model.take(rows), x, t=start, indices=probes)
    weight = out.log_prob + drawn.decoder + (drawn.entropy if task.closed else drawn.surprise)
    return out, weight - 0.5 * out.std_error.square() if task.debias else weight


def _check(model: ScoreModel, k: Tensor, cells: Levels, law: Dequantizer, samples: int, at_once: int) -> int:
    """The dimensions of a sample, everything passed checked."""
    if not isinstance(k, Tensor):
        raise TypeError(f"k is a {type(k).__name__}; a torch.Tensor of integers, shape (B, *event), is needed.")
    if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
        raise TypeError(
            f"k.dtype={k.dtype}; integers 0..{cells.count - 1} are needed, the levels themselves: not scaled, not "
            "dequantised (for densities of floating data there is log_likelihood); .long() converts."
        )
    if k.dim() < 2:
        raise ValueError(f"k.shape={tuple(k.shape)}; shape (B, *event) with at least one event axis is needed.")
    cells.check(k, "k")
    given: object = law
    if not isinstance(given, Dequantizer):
        raise TypeError(f"dequantizer={given!r}; a dequantiser is needed, for example UniformDequantizer().")
    require_count("samples", samples)
    require_count("draws_at_once", at_once)
    require_float64(k.device)
    require_same_device(model, k, "k")
    model.check_batch(k.shape[0])
    return k.shape[1:].numel()


def _check_bound(
    bound: str, entropy: str, samples: int, debias: bool, divergence: Divergence | None, size: int
) -> None:
    """Raises ValueError for a bound that is unknown, or that would be none."""
    if bound not in ("mean", "importance"):
        raise ValueError(f"bound={bound!r}; 'mean' or 'importance' is needed.")
    if entropy not in ("closed", "sampled"):
        raise ValueError(f"entropy={entropy!r}; 'closed' or 'sampled' is needed.")
    if debias and bound == "mean":
        raise ValueError("debias=True with bound='mean', which probes do not bias: leave debias out.")
    if debias and isinstance(divergence, Hutchinson) and not divergence.fresh and divergence.probes > 1:
        raise ValueError(f"debias=True with {divergence}, whose spread is too uncertain: use fresh probes.")
    exact = isinstance(divergence, Exact) or (divergence is None and size <= EXACT_UP_TO)
    if bound == "importance" and samples > 1 and not (exact or debias):
        trace = f"divergence={divergence!r}" if divergence is not None else f"{size} dimensions, traces by one probe"
        raise ValueError(
            f"bound='importance' with {trace}: the mean of exponentials of noisy logarithms is too high, so this would "
            "be no lower bound. Pass divergence=sdekit.Exact(), or debias=True to take half of the noise's variance "
            "from each draw (a bound to first order), or bound='mean'."
        )


def _state_dtype(model: ScoreModel, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of the states: the one asked for, or the default."""
    if asked is not None:
        if not getattr(asked, "is_floating_point", False):
            raise TypeError(f"dtype={asked!r}; a floating dtype is needed, in which the states are kept.")
        return asked
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    wide = torch.float64 if torch.float64 in kinds else torch.float32
    return wide if kinds else torch.get_default_dtype()


def _no_draws(batch: int, samples: int, start: Tensor) -> _Draws:
    """Room for the draws: what is never filled was interrupted."""
    unknown = torch.full((batch, samples), math.nan, dtype=torch.float64, device=start.device)
    stopped = torch.full((batch, samples), int(Status.INTERRUPTED), dtype=torch.int64, device=start.device)
    reached = start[:, None].repeat(1, samples)
    return _Draws(unknown, unknown.clone(), unknown.clone(), stopped, torch.zeros_like(stopped), reached)


def _put(draws: _Draws, first: int, out: LogLikelihood, weight: Tensor) -> None:
    """Writes the draws from number `first` on, which `out` holds one after the other, into `draws`."""
    batch = draws.weight.shape[0]
    values = _Draws(weight, out.std_error, out.solver_error, out.status, out.stats.evaluations, out.t)
    for whole, part in zip(draws, values, strict=True):
        count = part.shape[0] // max(1, batch)
        whole[:, first : first + count] = part.reshape(count, batch).T


def _combined(draws: _Draws, bound: Bound, start: Tensor, size: int) -> DiscreteLogLikelihood:
    """The bound from its draws, and the errors."""
    count = draws.weight.shape[1]
    if bound == "mean":
        log_prob, share = draws.weight.mean(1), torch.full_like(draws.weight, 1.0 / count)
        spread = (draws.weight - log_prob[:, None]) / count
    else:
        log_prob, share = torch.logsumexp(draws.weight, 1) - math.log(count), draws.weight.softmax(1)
        spread = share - 1.0 / count
    unknown = torch.full_like(log_prob, math.nan)
    std_error = unknown if count == 1 else (count / (count - 1) * spread.square().sum(1)).sqrt()
    lost = (draws.status != Status.DONE) & (draws.status != Status.LOOSE)
    status = torch.where((draws.status == Status.LOOSE).any(1), int(Status.LOOSE), int(Status.DONE))
    worst = draws.status.gather(1, lost.long().argmax(1, keepdim=True))[:, 0]
    return DiscreteLogLikelihood(
        log_prob=log_prob,
        std_error=std_error,
        trace_error=(share * draws.std_error).square().sum(1).sqrt(),
        solver_error=(share * draws.solver_error).sum(1),
        draws=draws.weight,
        status=torch.where(lost.any(1), worst, status),
        evaluations=draws.evaluations.sum(1),
        t=start,
        dims=size,
    )


def _report(result: DiscreteLogLikelihood, draws: _Draws, numbers: Tensor, throw: bool) -> None:
    """Raises or warns, once, for what did not arrive or arrived loosely."""
    lost = (draws.status != Status.DONE) & (draws.status != Status.LOOSE)
    reached = draws.reached.gather(1, lost.long().argmax(1, keepdim=True))[:, 0]
    finish(result, result.status, None, reached, "the noise's end of time with every draw", numbers, throw)
    if loose := int((draws.status == Status.LOOSE).sum()):
        warnings.warn(
            f"{loose} of {draws.status.numel()} draws arrived with an estimated error above the tolerance (worst "
            f"{float(draws.solver_error.nan_to_num(0.0).max()):.3g} nats); see solver_error and status.",
            ToleranceWarning,
            stacklevel=3,
        )

"""The one loop: advance(carry) -> carry, and the driver that repeats it.

`advance` is pure: tensors in, tensors out, fixed shapes, no `.item()`, no branch on a tensor. It proposes a step for
every sample, judges each on its own, and commits by mask. The driver repeats it, asks between steps who is finished,
and drops finished samples from the batch; results do not depend on any of that.
"""

from __future__ import annotations

import time as clock
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ._checks import require_batch, require_count, require_indices, require_positive, require_same_device
from ._fit import check_direction, check_grid_ends, check_method, check_path, check_span, times_of
from ._tensor import all_finite, put, select, take, working
from .brownian import BrownianPath
from .controller import Controller, FixedGrid, Step
from .errors import NetworkError, PartialResultWarning, SolveError
from .solution import Path, Solution, Stats, Status, describe
from .solver.base import Solver
from .terms import Term

_COMPACT_SHARE = 0.85  # finished samples leave the batch when fewer than this share still run ...
_COMPACT_LEAST = 8  # ... unless the batch is so small that a call costs the same


class Carry(NamedTuple):
    """Everything that evolves, (B, ...) tensors."""

    s: Tensor
    z: Any
    memory: Any
    control: Any
    status: Tensor
    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor


class Problem(NamedTuple):
    """What stays: the equation, the method, the judge, where to end, the noise, the budget."""

    term: Term
    solver: Solver
    controller: Controller
    s_end: Tensor
    path: BrownianPath | None
    max_evaluations: int


class Limits(NamedTuple):
    """When to stop from outside: evaluations a sample, seconds; whether to show progress and to keep the path."""

    max_evaluations: int = 10_000
    wall_time: float | None = None
    progress: bool = False
    keep_path: bool = False


def begin(problem: Problem, s0: Tensor, z0: Any) -> Carry:
    """The carry at the start; samples that are not finite have failed already, those at the end have arrived."""
    status = torch.where(all_finite(z0), int(Status.RUNNING), int(Status.NOT_FINITE))
    status = torch.where((status == Status.RUNNING) & (s0 == problem.s_end), int(Status.DONE), status)
    if problem.solver.evaluations > problem.max_evaluations:  # not even the first advance is within the budget
        status = torch.where(status == Status.RUNNING, int(Status.BUDGET), status)
    none = torch.zeros_like(status)
    memory = problem.solver.init(problem.term, z0)
    return Carry(s0, z0, memory, problem.controller.start(problem.term, s0, problem.s_end), status, none, none, none)


def advance(problem: Problem, carry: Carry) -> Carry:
    """One step for every running sample: propose, judge, commit by mask."""
    term, solver, controller, s_end, path, budget = problem
    running = carry.status == Status.RUNNING
    ready = solver.ready(carry.memory)
    s1 = torch.where(running, controller.target(carry.s, s_end, carry.control), carry.s)
    proposal = solver.propose(term, carry.s, s1, carry.z, carry.memory, path)
    finite = all_finite(proposal.z)
    verdict = controller.judge(term, solver, proposal, Step(carry.s, s1, carry.z, finite), s_end, carry.control)
    accept, failed, judged, reached = verdict.accept, verdict.failed, running, s1
    if ready is not None:  # a start in place is not a step: nothing to judge but whether it is finite
        accept, failed = torch.where(ready, accept, finite), torch.where(ready, failed, ~finite)
        judged, reached = running & ready, torch.where(ready, s1, carry.s)
    accept, failed = accept & running, failed & running
    evaluations = carry.evaluations + running * solver.evaluations
    status = torch.where(accept & (reached == s_end), int(Status.DONE), carry.status)
    failure = torch.where(finite, int(Status.STEP_FLOOR), int(Status.NOT_FINITE))
    status = torch.where(failed, failure, status)
    spent = (status == Status.RUNNING) & (evaluations + solver.evaluations > budget)
    return Carry(
        torch.where(accept, reached, carry.s),
        select(accept, proposal.z, carry.z),
        select(accept, proposal.memory, carry.memory),
        select(judged, verdict.state, carry.control),
        torch.where(spent, int(Status.BUDGET), status),
        evaluations,
        carry.accepted + (accept & judged),
        carry.rejected + (judged & ~accept),
    )


class Outcome(NamedTuple):
    """The final carry, the number of network calls, the error that stopped the solve, if one did, and the path.

    The path is what every advance left: (accepted steps (B,), s (B,), z).
    """

    carry: Carry
    calls: int
    error: NetworkError | None
    seen: list[tuple[Tensor, Tensor, Any]]


def drive(problem: Problem, carry: Carry, limits: Limits) -> Outcome:
    """Repeats `advance` until no sample runs, a limit is reached, Ctrl-C is pressed or the network cannot be used."""
    whole, rows = carry, None
    calls, error, stopped = 0, None, None
    seen = [(carry.accepted, carry.s, carry.z)] if limits.keep_path else []
    began = clock.monotonic()
    start, span = float(carry.s.sum()), float((problem.s_end - carry.s).sum())
    bar = tqdm(total=100.0, disable=not limits.progress, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}")
    try:
        while True:
            running = carry.status == Status.RUNNING
            count = int(running.sum())
            if count == 0:
                break
            if limits.wall_time is not None and clock.monotonic() - began >= limits.wall_time:
                stopped = Status.TIME_LIMIT
                break
            if carry.s.shape[0] >= _COMPACT_LEAST and count < _COMPACT_SHARE * carry.s.shape[0]:
                local = running.nonzero().squeeze(1)
                whole, rows, problem, carry = (  # one assignment: an interrupt finds all of it or none
                    carry if rows is None else put(whole, rows, carry),
                    local if rows is None else rows[local],
                    _narrow(problem, local),
                    take(carry, local),
                )
            carry = advance(problem, carry)
            calls += problem.solver.evaluations
            if limits.progress or limits.keep_path:
                here = carry if rows is None else put(whole, rows, carry)
            if limits.keep_path:
                seen.append((here.accepted, here.s, here.z))
            if limits.progress:
                bar.update(100.0 * (float(here.s.sum()) - start) / span - bar.n if span else 0.0)
    except NetworkError as caught:
        error = caught
    except KeyboardInterrupt:
        stopped = Status.INTERRUPTED
    finally:
        bar.close()
    whole = carry if rows is None else put(whole, rows, carry)
    if stopped is not None:
        left = torch.where(whole.status == Status.RUNNING, int(stopped), whole.status)
        whole = whole._replace(status=left)
    return Outcome(whole, calls, error, seen)


def path_of(term: Term, seen: list[tuple[Tensor, Tensor, Any]], x0: Tensor) -> Path:
    """The states on the way, by the number of accepted steps; those that were not accepted are not seen twice."""
    last = seen[-1][0]
    if not last.numel():
        return Path(seen[-1][1][:, None], x0[:, None])
    length = int(last.max()) + 1
    rows = torch.arange(last.shape[0], device=last.device)
    t = torch.zeros(last.shape[0], length, dtype=torch.float64, device=last.device)
    x = x0.new_zeros(x0.shape[0], length, *x0.shape[1:])
    for accepted, s, z in seen:
        t[rows, accepted], x[rows, accepted] = term.time(s), term.leave(z, s).to(x0.dtype)
    place = torch.minimum(torch.arange(length, device=last.device), last[:, None])
    return Path(torch.take_along_dim(t, place, 1), x[rows[:, None], place])


def _narrow(problem: Problem, rows: Tensor) -> Problem:
    path = None if problem.path is None else problem.path.take(rows)
    return problem._replace(term=problem.term.take(rows), s_end=problem.s_end[rows], path=path)


def integrate(
    term: Term,
    solver: Solver,
    controller: Controller,
    x0: Tensor,
    t0: Tensor | float,
    t_end: Tensor | float,
    path: BrownianPath | None = None,
    *,
    indices: Tensor | None = None,
    max_evaluations: int = 10_000,
    wall_time: float | None = None,
    progress: bool = False,
    throw: bool = True,
    return_path: bool = False,
) -> Solution:
    """The state of every sample at `t_end`: the general door to every equation, solver and controller.

    No gradients are kept: differentiate through torchdiffeq or another library that takes the term.

    Args:
        term: The equation.
        solver: The method.
        controller: Who decides the steps.
        x0: (B, *event) states at `t0`.
        t0: Start, a number or (B,), within [t_min, t_max].
        t_end: End, a number or (B,), before or after `t0` as the term allows.
        path: Noise for a stochastic solver.
        indices: (B,) sample numbers for messages; default 0..B-1.
        max_evaluations: Network evaluations a sample at most.
        wall_time: Seconds at most; None for no limit.
        progress: Show a progress bar.
        throw: Raise if a sample does not arrive; else read `status`.
        return_path: Keep the states of all accepted steps, as the solution's `path`.

    Returns:
        x, the time reached, status and cost of each sample.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        SolveError: With `throw`, if a sample did not arrive; carries the Solution.
    """
    require_batch("x0", x0)
    require_same_device(term.model, x0, "x0")
    term.model.check_batch(x0.shape[0])
    check_method(solver, controller, path)
    check_path(path, x0)
    low, high = term.model.sde.t_min, term.model.sde.t_max
    begin_at, end_at = times_of("t0", t0, x0, low, high), times_of("t_end", t_end, x0, low, high)
    if isinstance(controller, FixedGrid):
        check_grid_ends(controller, begin_at, end_at)
    numbers = require_indices(indices, x0.shape[0], x0.device)
    s0, s_end = term.coordinate(begin_at), term.coordinate(end_at)
    check_direction(term, controller, s0, s_end)
    check_span(path, s0, s_end)
    problem = Problem(term, solver, controller, s_end, path, max_evaluations)
    limits = check_limits(max_evaluations, wall_time, progress)._replace(keep_path=return_path)
    with torch.inference_mode(False), torch.no_grad():
        outcome = drive(problem, begin(problem, s0, term.enter(working(x0), s0)), limits)
        carry = outcome.carry
        reached = term.time(carry.s)
        x = x0 if x0.shape[0] == 0 else term.leave(carry.z, carry.s).to(x0.dtype)
        way = path_of(term, outcome.seen, x0) if return_path else None
    stats = Stats(carry.evaluations, carry.accepted, carry.rejected, outcome.calls)
    solution = Solution(x, reached, carry.status, stats, solver.report(carry.memory), way)
    target = f"t={float(end_at[0]):.6g}" if x0.shape[0] else "the end"
    finish(solution, carry.status, outcome.error, reached, target, numbers, throw)
    return solution


def check_limits(max_evaluations: int, wall_time: float | None, progress: bool) -> Limits:
    """The limits of a solve, checked."""
    require_count("max_evaluations", max_evaluations)
    if wall_time is not None:
        require_positive("wall_time", wall_time)
    return Limits(max_evaluations, wall_time, progress)


def finish(
    solution: Any, status: Tensor, error: NetworkError | None, t: Tensor, target: str, indices: Tensor, throw: bool
) -> None:
    """Raises or warns for what did not arrive.

    Args:
        solution: What the caller would return.
        status: (B,) how each sample ended.
        error: What stopped the solve, if something did.
        t: (B,) times reached.
        target: Where the samples should have arrived, in words.
        indices: (B,) global sample numbers.
        throw: Whether failed samples raise.

    Raises:
        SolveError: The network cannot be used (always), or with `throw` a sample failed or ran out of evaluations.
    """
    if error is not None:
        left = t[status == Status.RUNNING]
        where = f" (at t from {float(left.min()):.6g} to {float(left.max()):.6g})" if left.numel() else ""
        raise SolveError(f"{error}{where}", solution) from error
    codes = set(status.tolist())
    failed = codes & {int(Status.NOT_FINITE), int(Status.STEP_FLOOR), int(Status.BUDGET)}
    if failed and throw:
        raise SolveError(describe(status, t, target, indices), solution)
    if codes & {int(Status.TIME_LIMIT), int(Status.INTERRUPTED)}:
        warnings.warn(describe(status, t, target, indices), PartialResultWarning, stacklevel=3)

"""The general door: any equation, solver and controller, from one time to another."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ._checks import require_batch, require_indices, require_same_device
from ._fit import check_direction, check_grid_ends, check_method, check_path, check_span, times_of
from ._tensor import working
from .brownian import BrownianPath
from .controller import Controller, FixedGrid
from .driver import Limits, Seen, check_limits, drive
from .errors import NetworkError, PartialResultWarning, SolveError
from .loop import Problem, begin
from .runtime import Runtime
from .solution import Path, Solution, Stats, Status, describe
from .solver.base import Solver
from .terms import Term


def path_of(term: Term, seen: list[Seen], x0: Tensor) -> Path:
    """The states on the way, by the number of accepted steps; those that were not accepted are not seen twice."""
    every = torch.arange(x0.shape[0], device=x0.device)
    if not every.numel():
        return Path(seen[0].s[:, None], x0[:, None])
    last = seen[0].accepted.clone()
    for some, accepted, _, _ in seen[1:]:
        last[every if some is None else some] = accepted
    length = int(last.max()) + 1
    t = torch.zeros(last.shape[0], length, dtype=torch.float64, device=last.device)
    x = x0.new_zeros(x0.shape[0], length, *x0.shape[1:])
    for some, accepted, s, z in seen:
        rows = every if some is None else some
        t[rows, accepted], x[rows, accepted] = term.time(s), term.leave(z, s).to(x0.dtype)
    place = torch.minimum(torch.arange(length, device=last.device), last[:, None])
    return Path(torch.take_along_dim(t, place, 1), x[every[:, None], place])


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
    runtime: Runtime = "auto",
    slots: int | None = None,
) -> Solution:
    """The state of every sample at `t_end`: the general door to every equation, solver and controller.

    No gradients are kept: for those of a density there is `log_prob`; for others torchdiffeq takes the term.

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
        runtime: How a step runs, to rounding the same: "eager" (and "auto"), "compile" (by torch's compiler: tens
            of seconds once for a kind of solve, then less overhead a step), "graph" (captured, on CUDA),
            "compiled-graph" (both).
        slots: Samples in work at a time, the next entering when one is done; None: all.

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
    limits = check_limits(max_evaluations, wall_time, progress, runtime, slots)._replace(keep_path=return_path)
    solution, error = carried(problem, s0, x0, limits)
    target = f"t={float(end_at[0]):.6g}" if x0.shape[0] else "the end"
    finish(solution, solution.status, error, solution.t, target, numbers, throw)
    return solution


def carried(problem: Problem, s0: Tensor, x0: Tensor, limits: Limits) -> tuple[Solution, NetworkError | None]:
    """Where the loop carries the states `x0` (B, *event) from the coordinate `s0` (B,), and what stopped it."""
    term = problem.term
    with torch.inference_mode(False), torch.no_grad():
        outcome = drive(problem, begin(problem, s0, term.enter(working(x0), s0)), limits)
        carry = outcome.carry
        reached = term.time(carry.s)
        x = x0 if x0.shape[0] == 0 else term.leave(carry.z, carry.s).to(x0.dtype)
        way = path_of(term, outcome.seen, x0) if limits.keep_path else None
    stats = Stats(carry.evaluations, carry.accepted, carry.rejected, outcome.calls, outcome.paid)
    return Solution(x, reached, carry.status, stats, problem.solver.report(carry.memory), way), outcome.error


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

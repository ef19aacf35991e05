"""Solves on fixed grids played back from a recording: the network, and a few multiples and sums around it."""

from __future__ import annotations

import math
import time as clock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ._fit import check_method
from ._tensor import all_finite, put, take, working
from .brownian import BrownianPath, IndependentIncrements
from .controller import Controller, FixedGrid
from .driver import Limits, check_limits, seconds_since, stops
from .errors import NetworkError
from .integrate import carried, finish, integrate
from .loop import Problem
from .model.score_model import ScoreModel
from .recording import recorded, usable
from .runtime import GRAPHS, Runtime
from .solution import Path, Solution, Stats, Status
from .solver.base import Solver
from .tape import STATE, Draw, Tape, added, input_of
from .terms import Term

_BLOCK = 1 << 18  # numbers drawn at once: 1.09 of the bare network at batch 64 where 2^17 takes 1.11, 2^13 1.28


class Played(NamedTuple):
    """What playing back left: the state and time reached, steps made, calls made, how it ended, and the path."""

    x: Tensor
    t: float
    steps: int
    calls: int
    stopped: Status | None
    error: NetworkError | None
    seen: list[tuple[float, Tensor]]


def play(
    tape: Tape, model: ScoreModel, x: Tensor, path: BrownianPath | None, start: float, limits: Limits, began: float
) -> Played:
    """Solves along a tape: the calls of the network, and a few multiples and sums of (B, *event) tensors around each.

    Args:
        tape: From `recorded`.
        model: With the network.
        x: (B, *event) at the grid's first time.
        path: Where draws come from, where the tape has some.
        start: That first time.
        limits: As in the loop. Between calls nothing is asked of the device, unless there is a wall time.
        began: When the solve did, by the monotonic clock.
    """
    values = tape.empty()
    values[STATE] = x
    t, made, calls, place = start, 0, 0, input_of(0)
    noise = _Noise(tape, path, x, values)
    call_network = model.caller(x, tape.labels)
    keep, timed = limits.keep_path, limits.wall_time is not None
    states = keep or not tape.chained
    seen = [(start, x)] if keep else []
    bar = tqdm(total=len(tape.steps), unit="step") if limits.progress else None  # one that shows nothing takes 30 us
    with stops(bar) as stop:
        for asked, after, late, at, spent in tape.steps:
            if timed and seconds_since(began, x) >= limits.wall_time:  # type: ignore[operator]
                stop.status = Status.TIME_LIMIT
                break
            for given, draws, tilt in asked:
                if draws:
                    noise.ask(draws)
                shown = added(given, values)
                out = call_network(shown, calls)
                values[place] = shown
                values[place + 1] = torch.add(out, shown, alpha=tilt) if tilt else out
                calls, place = calls + 1, place + 2
            if late:
                noise.ask(late)
            if states:
                values[STATE] = added(after, values)
            t, made = at, made + 1
            for number in spent:
                values[number] = None
            if keep:
                seen.append((t, values[STATE]))  # type: ignore[arg-type]
            if bar is not None:
                bar.update()
    if tape.chained and not limits.keep_path and made:
        values[STATE] = added(tape.steps[made - 1].after, values)
    reached = values[STATE]
    assert reached is not None  # it holds a state from the start on
    return Played(reached, t, made, calls, stop.status, stop.error, seen)


class _Noise:
    """Puts the answers of a path to a tape's questions in their places, in blocks where the path can give them so."""

    def __init__(self, tape: Tape, path: BrownianPath | None, like: Tensor, values: list[Tensor | None]) -> None:
        self._tape, self._path, self._like, self._values = tape, path, like, values
        self._ahead = max(1, _BLOCK // max(1, like.numel())) if isinstance(path, IndependentIncrements) else 0

    def ask(self, numbers: tuple[int, ...]) -> None:
        """Makes the draws of these numbers known."""
        first = self._tape.draw_place(0)
        for n in numbers:
            if self._values[first + n] is not None:
                continue
            if self._ahead and isinstance(self._path, IndependentIncrements):
                asked = self._tape.draws[n : n + self._ahead]
                self._values[first + n : first + n + len(asked)] = self._path.block(asked, self._like).unbind(0)
            else:
                self._values[first + n] = _drawn(self._tape.draws[n], self._path, self._like)


def _drawn(draw: Draw, path: BrownianPath | None, like: Tensor) -> Tensor:
    """What the path answers to a recorded question, for every sample."""
    assert path is not None  # a method that draws was checked to have one
    count, device = like.shape[0], like.device
    step = torch.full((count,), draw.step, dtype=torch.int64, device=device)
    if draw.kind == "normal":
        return path.normal(step, like, draw.lane)
    s0, s1 = (torch.full((count,), s, dtype=torch.float64, device=device) for s in (draw.s0, draw.s1))
    if draw.kind == "increment":
        return path.increment(s0, s1, step, like, draw.lane)
    return path.levy(s0, s1, step, like)[0 if draw.kind == "levy" else 1]


def _played(
    term: Term,
    solver: Solver,
    controller: FixedGrid,
    x0: Tensor,
    path: BrownianPath | None,
    *,
    indices: Tensor,
    max_evaluations: int,
    wall_time: float | None,
    progress: bool,
    throw: bool,
    return_path: bool,
    runtime: Runtime = "auto",
    slots: int | None = None,
) -> Solution | None:
    """As `integrate` from the grid's first time to its last; None where the loop has to do it.

    That is where the solve cannot be recorded, and where the budget does not reach. Where a sample came out not finite,
    the loop says where it failed; the others stay.
    """
    limits = check_limits(max_evaluations, wall_time, progress, runtime, slots)._replace(keep_path=return_path)
    if not usable(solver, controller, term) or x0.numel() == 0 or slots is not None or runtime in GRAPHS:
        return None
    began = clock.monotonic()
    try:
        tape = recorded(term, solver, controller)
    except KeyboardInterrupt:
        tape = Tape((), (), ())
    if tape is None or tape.calls > max_evaluations:
        return None
    start, end = controller.numbers[0], controller.numbers[-1]
    with torch.inference_mode(False), torch.no_grad():
        played = play(tape, term.model, working(x0), path, start, limits, began)
    count, device = len(indices), x0.device
    finite = math.isfinite(float(played.x.sum()))  # else some number is not, or the sum overflows
    each = None if finite else all_finite(played.x)
    through = bool(tape.steps) and played.steps == len(tape.steps)
    ended = Status.DONE if through else played.stopped or (Status.RUNNING if tape.steps else Status.INTERRUPTED)

    def whole(number: int) -> Tensor:
        return torch.full((count,), number, dtype=torch.int64, device=device)

    t = torch.full((count,), played.t, dtype=torch.float64, device=device)
    stats = Stats(whole(played.calls), whole(played.steps), whole(0), played.calls, played.calls * count)
    way = None
    if return_path:
        times = torch.tensor([at for at, _ in played.seen], dtype=torch.float64, device=device)
        way = Path(times.repeat(count, 1), torch.stack([x for _, x in played.seen], 1).to(x0.dtype))
    solution, error = Solution(played.x.to(x0.dtype), t, whole(int(ended)), stats, {}, way), played.error
    if each is not None and not bool(each.all()):
        failed = (~each).nonzero().squeeze(1)
        if through:
            solution, error = _again(solution, failed, term, solver, controller, x0, path, limits)
        else:
            solution = solution._replace(status=solution.status.index_fill(0, failed, int(Status.NOT_FINITE)))
    if not through or each is not None:  # else every sample has arrived
        finish(solution, solution.status, error, solution.t, f"t={end:.6g}", indices, throw)
    return solution


def _again(
    solution: Solution,
    rows: Tensor,
    term: Term,
    solver: Solver,
    controller: FixedGrid,
    x0: Tensor,
    path: BrownianPath | None,
    limits: Limits,
) -> tuple[Solution, NetworkError | None]:
    """The solution with what the loop finds for the samples `rows`, and what stopped that; the others stay.

    It solves the batch as it was: what a network does to a sample may depend on its place, though it should not.
    """
    ends = (torch.full((len(x0),), controller.numbers[k], dtype=torch.float64, device=x0.device) for k in (0, -1))
    s0, s_end = map(term.coordinate, ends)
    problem = Problem(term, solver, controller, s_end, path, limits.max_evaluations)
    found, error = carried(problem, s0, x0, limits)
    old, new, way = solution.stats, found.stats, found.path
    if way is not None and solution.path is not None:
        steps = torch.arange(solution.path.t.shape[1], device=x0.device).clamp(max=way.t.shape[1] - 1)
        way = put(solution.path, rows, Path(way.t[rows[:, None], steps], way.x[rows[:, None], steps]))
    each = put(_by_sample(solution), rows, take(_by_sample(found), rows))
    stats = Stats(*each.cost, old.calls + new.calls, old.paid + new.paid)
    return Solution(each.x, each.t, each.status, stats, solution.report, way), error


class _BySample(NamedTuple):
    """What of a solution is of single samples."""

    x: Tensor
    t: Tensor
    status: Tensor
    cost: tuple[Tensor, Tensor, Tensor]


def _by_sample(solution: Solution) -> _BySample:
    stats = solution.stats
    return _BySample(solution.x, solution.t, solution.status, (stats.evaluations, stats.accepted, stats.rejected))


def solve(
    term: Term,
    solver: Solver,
    controller: Controller,
    x: Tensor,
    t0: float,
    t1: float,
    path: BrownianPath | None,
    indices: Tensor,
    **limits: Any,
) -> Solution:
    """From t0 to t1 along a recording where there can be one, else by the loop."""
    if isinstance(controller, FixedGrid) and t0 == controller.numbers[0] and t1 == controller.numbers[-1]:
        term.model.check_batch(x.shape[0])
        check_method(solver, controller, path)
        played = _played(term, solver, controller, x, path, indices=indices, **limits)
        if played is not None:
            return played
    return integrate(term, solver, controller, x, t0, t1, path, indices=indices, **limits)

"""Who repeats the step: until no sample runs, a limit is reached, or something from outside stops it.

Between steps the driver asks who is finished, and finished samples leave. With `slots`, only so many samples are in
work at a time and the next of the batch takes the place of one that leaves, so that solves of very different length
waste nothing on samples that are done and the shapes stay what they are. Results depend on none of that.

On a device the question is asked ahead: the count of running samples is copied without waiting, and the host goes on
launching for a few steps before it needs the answer.
"""

from __future__ import annotations

import time as clock
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ._checks import require_count, require_positive
from ._interrupt import finish_step
from ._tensor import leaves, put, take, tree_map
from .errors import NetworkError
from .loop import Carry, Problem, still_running
from .runtime import Runtime, at_work, require_runtime, stepper
from .solution import Status

_REFILL = 16  # with a queue, a 16th of the slots may be idle: taking samples out and in costs as much as a few of them
_AHEAD = 4  # steps that the host may launch before it has to know how many samples run


class Limits(NamedTuple):
    """When to stop from outside, what to show and keep, and how to run.

    Attributes:
        max_evaluations: A sample, at most.
        wall_time: Seconds at most; None for no limit.
        progress: Whether to show a progress bar.
        keep_path: Whether to keep the states on the way.
        runtime: How a step runs.
        slots: How many samples are in work at a time; None: all.
    """

    max_evaluations: int = 10_000
    wall_time: float | None = None
    progress: bool = False
    keep_path: bool = False
    runtime: Runtime = "auto"
    slots: int | None = None


def check_limits(
    max_evaluations: int, wall_time: float | None, progress: bool, runtime: Runtime = "auto", slots: int | None = None
) -> Limits:
    """The limits of a solve, checked."""
    require_count("max_evaluations", max_evaluations)
    if wall_time is not None:
        require_positive("wall_time", wall_time)
    if slots is not None:
        require_count("slots", slots)
    require_runtime(runtime)
    return Limits(max_evaluations, wall_time, progress, False, runtime, slots)


class Seen(NamedTuple):
    """What an advance left of those in work.

    Attributes:
        rows: (b,) which of all samples they are; None: all.
        accepted: (b,) int64 accepted steps.
        s: (b,) float64.
        z: The states.
    """

    rows: Tensor | None
    accepted: Tensor
    s: Tensor
    z: Any


class Outcome(NamedTuple):
    """The final carry, what it cost, the error that stopped the solve, if one did, and the path.

    Attributes:
        carry: Of all samples.
        calls: Network calls.
        paid: Rows of all these calls together: evaluations computed, needed or not.
        error: What stopped the solve, if something did.
        seen: What every advance left, the start first, where it was to be kept.
    """

    carry: Carry
    calls: int
    paid: int
    error: NetworkError | None
    seen: list[Seen]


def seconds_since(began: float, like: Tensor) -> float:
    """Seconds since `began`, by the monotonic clock; what was launched on the device of `like` is waited for."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return clock.monotonic() - began


class Stop:
    """What ended a solve before its end: a network that cannot be used, or a status of those who still ran."""

    def __init__(self) -> None:
        self.error: NetworkError | None = None
        self.status: Status | None = None


@contextmanager
def stops(bar: tqdm[Any] | None) -> Iterator[Stop]:
    """Records what ends a solve within, instead of raising it, and closes the progress bar if there is one."""
    stop = Stop()
    try:
        yield stop
    except NetworkError as caught:
        stop.error = caught
    except KeyboardInterrupt:
        stop.status = Status.INTERRUPTED
    finally:
        if bar is not None:
            bar.close()


def drive(problem: Problem, carry: Carry, limits: Limits) -> Outcome:
    """Repeats the step until no sample runs, a limit is reached, Ctrl-C is pressed or the network cannot be used."""
    with closing(_Work(problem, carry, limits)) as work:
        return _driven(work, problem, carry, limits)


def _driven(work: _Work, problem: Problem, carry: Carry, limits: Limits) -> Outcome:
    calls, paid = 0, 0
    seen = [Seen(None, carry.accepted, carry.s, carry.z)] if limits.keep_path else []
    began = clock.monotonic()
    start, span = float(carry.s.sum()), float((problem.s_end - carry.s).sum())
    bar = tqdm(total=100.0, disable=not limits.progress, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}")
    with stops(bar) as stop:
        while work.goes_on():
            if limits.wall_time is not None and clock.monotonic() - began >= limits.wall_time:
                stop.status = Status.TIME_LIMIT
                break
            size = work.advance()
            calls += problem.solver.evaluations
            paid += size * problem.solver.evaluations
            if limits.keep_path:
                seen.append(work.seen())
            if limits.progress:
                bar.update(100.0 * (work.reached() - start) / span - bar.n if span else 0.0)
    whole = work.all()
    if stop.status is not None:
        left = torch.where(whole.status == Status.RUNNING, int(stop.status), whole.status)
        whole = whole._replace(status=left)
    return Outcome(whole, calls, paid, stop.error, seen)


class _Work:
    """The samples in work, taken from the whole, and those that wait for their place.

    Attributes:
        rows: (b,) which of the whole are in work; None: all of it.
        queue: Those that wait.
    """

    def __init__(self, problem: Problem, carry: Carry, limits: Limits) -> None:
        self._problem, self._whole = problem, carry
        self.rows: Tensor | None = None
        self.queue = carry.status.new_zeros(0)
        self._size = carry.s.shape[0]
        self._owned = limits.slots is not None and limits.slots < carry.s.shape[0]  # then written to in place
        if self._owned:
            waiting = (carry.status == Status.RUNNING).nonzero().squeeze(1)
            self._whole = tree_map(torch.clone, carry)
            self.rows, self.queue = waiting[: limits.slots], waiting[limits.slots :]
            self._size, problem, carry = len(self.rows), problem.take(self.rows), take(carry, self.rows)
        self._runtime = limits.runtime
        self._step = stepper(limits.runtime, problem, carry)
        self._poll = _Poll(carry.s.device)
        self._poll.ask(still_running(carry))

    def goes_on(self) -> bool:
        """Whether there is something to do; who is finished leaves, and who waits takes the place."""
        count = self._poll.answer()
        if count is None:
            return True
        size, waiting = self._size, len(self.queue)
        if count == 0 and not waiting:
            return False
        if waiting:
            if size - count >= max(1, size // _REFILL):
                self._turn_over(self._step.size(min(size, count + waiting), size))
        elif (smaller := self._step.size(count, size)) < size:
            self._turn_over(smaller)
        return True

    def advance(self) -> int:
        """One step of those in work; how many they are."""
        self._poll.ask(self._step.advance())
        return self._size

    def all(self) -> Carry:
        """The carry of all samples."""
        return self._with(self._step.carry())

    def seen(self) -> Seen:
        """What there is to keep of those in work."""
        carry = self._step.carry()
        return Seen(self.rows, carry.accepted, carry.s, carry.z)

    def reached(self) -> float:
        """The sum of all samples' s."""
        s = self._step.carry().s
        return float((s if self.rows is None else put(self._whole.s, self.rows, s)).sum())

    def close(self) -> None:
        """Ends the work."""
        self._step.close()

    def _with(self, carry: Carry) -> Carry:
        """The carry of all samples, of those in work what is given."""
        return carry if self.rows is None else put(self._whole, self.rows, carry)

    def _turn_over(self, size: int) -> None:
        """Lets those who are done go, and as many enter that `size` are in work: some who are done, if need be."""
        carry = self._step.carry()
        running = carry.status == Status.RUNNING
        order = torch.argsort(running.to(torch.int8), descending=True, stable=True)  # those who run first
        entering = self.queue[: size - int(running.sum())]
        staying = order[: size - len(entering)]
        rows = staying if self.rows is None else self.rows[staying]
        if self._owned:
            assert self.rows is not None  # where there is a queue, those in work have been told from it
            for leaf, part in zip(leaves(self._whole), leaves(carry), strict=True):
                leaf.index_copy_(0, self.rows, part)
            whole, rows = self._whole, torch.cat((rows, entering))
            carry = take(whole, rows)
        else:
            whole, carry = self._with(carry), take(carry, staying)
        problem, queue = self._problem.take(rows), self.queue[len(entering) :]
        with finish_step() as asked:  # an interrupt finds all of it or none
            self._whole, self.rows, self.queue, self._size = whole, rows, queue, len(rows)
            self._step = at_work(self._step, self._runtime, problem, carry)
        if asked():
            raise KeyboardInterrupt
        self._poll.forget()
        self._poll.ask(still_running(carry))


class _Poll:
    """How many samples run, asked of a device without waiting for what it has been given to do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked: deque[tuple[torch.cuda.Event | None, Tensor]] = deque()

    def ask(self, count: Tensor) -> None:
        """Asks for `count`, a number on the device."""
        if self._device.type != "cuda":
            self._asked.append((None, count))
            return
        copied = torch.empty((), dtype=count.dtype, pin_memory=True)
        copied.copy_(count, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._asked.append((event, copied))

    def answer(self) -> int | None:
        """The newest count that is known; None if none is, and the host need not wait for one yet."""
        count = None
        while self._asked:
            event, copied = self._asked[0]
            if event is not None and not event.query():  # type: ignore[no-untyped-call]
                if len(self._asked) <= _AHEAD:
                    break
                event.synchronize()
            self._asked.popleft()
            count = int(copied)
        return count

    def forget(self) -> None:
        """Drops what was asked of samples that are not in work any more."""
        self._asked.clear()

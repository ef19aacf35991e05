"""Densities on a fixed grid: the loop's numbers, with nothing around the network but a few sums.

On a fixed grid all samples share their nodes, so every coefficient of Adams's method is a number that is known before
the network is asked. In the units in which the network sees its input, with kept_k = out_k + tilt_k seen_k a multiple
of the slope f_k,

    seen_{k+1} = a seen_k + sum_i w_i kept_{k-i}          from predicted point to predicted point

and the corrected states, which nobody needs on the way, are not made. What is booked besides does not act on the path
and waits until there is enough of it (grid_books.py). Weights and field are those of newton.py and likelihood_flow.py:
no formula is stated again.
"""

from __future__ import annotations

import time as clock
from collections import deque
from functools import lru_cache

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ._checks import is_own
from ._tensor import all_finite, put, take
from .controller import FixedGrid, GridState
from .divergence import Hutchinson
from .driver import Limits, Outcome, Stop, drive, seconds_since, stops
from .grid import mixed_time
from .grid_behind import Shown, products_of, worth
from .grid_books import Books, Numbers
from .likelihood_flow import LikelihoodFlow
from .loop import Carry, Problem
from .model._caller import Caller
from .model._labels import label_dtype, label_rows
from .model.parameterization import Parameterization
from .model.score_model import ScoreModel
from .runtime import GRAPHS
from .sde.base import SDE
from .solution import Status
from .solver.adams import Adams
from .solver.newton import Formula, stacked


@lru_cache(maxsize=32)
def _numbers(
    sde: SDE,
    meaning: Parameterization,
    data_std: float,
    downward: bool,
    size: int,
    adams: Adams,
    at: tuple[float, ...],
) -> Numbers:
    """The coefficients for events of so many dimensions at the nodes `at`, on the CPU."""
    s, count, depth = torch.tensor(at, dtype=torch.float64, device="cpu"), len(at), adams.error_order
    mixed, keys = mixed_time(sde, data_std, downward), torch.zeros(count, 2, dtype=torch.int64, device="cpu")
    model = ScoreModel(nn.Identity(), sde, meaning, data_std)
    t, scale, of_x, of_output = LikelihoodFlow(model, None, torch.Size([size]), keys, mixed).node(s)
    seen = meaning.input_scale(sde, t)
    inverse = torch.ones_like(t) if seen is None else seen.reciprocal()
    slope, tilt, scale = of_output[0], of_x[0] * inverse / of_output[0], scale / inverse
    gradient = torch.stack((of_x[1] * inverse - of_output[1] * tilt, of_output[1]), 1)

    here, depths = torch.arange(count, device="cpu"), torch.arange(depth + 1, device="cpu")
    back, entered = here[:, None] - depths, here[1:]  # (n + 1, K + 1): the node i before each
    valid = depths[:-1] < entered[:, None]
    known = entered.clamp(max=depth)
    formula = Formula(known, known, False, torch.ones_like(entered, dtype=torch.bool))
    past = torch.where(valid, s[back[:-1, :-1].clamp(min=0)], 0.0)
    weights = stacked(past, formula, s[:-1], s[1:])
    predict, correct, error = s.new_zeros(3, count, depth + 1).unbind(0)
    predict[1:, :-1], correct[1:], error[1:] = weights.predict, weights.correct[:, 0], weights.correct[:, 1]
    after = correct.clone()
    after[:, 1:] -= predict[:, :-1]
    slopes = torch.where(back >= 0, slope[back.clamp(min=0)], 0.0)
    chain = torch.zeros_like(predict)
    chain[1:] = scale[1:, None] * (predict[1:] + after[:-1]) * slopes[:-1]
    weight = torch.zeros_like(s).index_add_(0, back.clamp(min=0).flatten(), (correct * (back >= 0)).flatten())
    return Numbers(
        tuple(meaning.label(sde, t).tolist()),
        scale,
        tilt.tolist(),
        gradient,
        slope * scale,
        of_x[0] * inverse * scale * size,
        chain.tolist(),
        after * slopes,
        correct,
        error,
        error * slopes,
        weight,
    )


def usable(problem: Problem, carry: Carry, limits: Limits) -> bool:
    """Whether the loop's numbers can be had so: a fixed grid that all samples share, Adams, and values of our own."""
    term, solver, control = problem.term, problem.solver, carry.control
    if not isinstance(problem.controller, FixedGrid) or not isinstance(control, GridState) or limits.runtime in GRAPHS:
        return False
    if type(term) is not LikelihoodFlow or not term.has_density or not term.asks_network or limits.slots is not None:
        return False
    if type(solver) is not Adams or solver.adaptive or solver.start != "ramp":
        return False
    model = term.model
    own = (model.sde, model.parameterization, model.parameterization.label, term.divergence)
    if type(model) is not ScoreModel or not all(map(is_own, own)) or carry.z.u.numel() == 0:
        return False
    if len(problem.controller.times) > problem.max_evaluations or bool((carry.status != Status.RUNNING).any()):
        return False
    if term.mixed.sde != model.sde or term.mixed.data_std != model.data_std:
        return False
    return _as_precise(model, carry.z.u) and bool((carry.s == carry.s[0]).all())


def _as_precise(model: ScoreModel, u: Tensor) -> bool:
    """Whether the network answers in the precision of the states; that it does not may be seen by its first answer."""
    return model.network_dtype(u) is u.dtype and model.precision(u, u.dtype) is u.dtype


def solve_density(problem: Problem, carry: Carry, limits: Limits) -> Outcome:
    """As `drive`: by short sums where that is possible, else by the loop.

    Where samples come out not finite, the loop says where they failed: it solves the batch again, as it was, and what
    it finds for them is taken; the others stay.
    """
    if not usable(problem, carry, limits):
        return drive(problem, carry, limits)
    outcome = _Solve(problem, carry, limits).run()
    coarse = not _as_precise(problem.term.model, carry.z.u)  # known now; what that costs is booked by the loop
    finite = all_finite((outcome.carry.z.u, outcome.carry.z.log_det))
    if not coarse and (outcome.error is not None or bool(finite.all())):
        return outcome
    again = drive(problem, carry, limits)
    if not coarse:
        rows = (~finite).nonzero().squeeze(1)
        again = again._replace(carry=put(outcome.carry, rows, take(again.carry, rows)))
    return again._replace(calls=again.calls + outcome.calls, paid=again.paid + outcome.paid)


class _Solve:
    """One solve along a grid."""

    def __init__(self, problem: Problem, carry: Carry, limits: Limits) -> None:
        assert isinstance(problem.term, LikelihoodFlow)
        assert isinstance(problem.solver, Adams)
        assert isinstance(problem.controller, FixedGrid)
        self.start, self.limits, self.term = carry, limits, problem.term
        self.depth, self.count = problem.solver.error_order, len(problem.controller.times)
        model, nodes = self.term.model, tuple(carry.control.nodes[0, : self.count].tolist())
        event = self.term.event.numel()
        self.numbers = _numbers(
            *(model.sde, model.parameterization, model.data_std, self.term.mixed.downward, event, problem.solver, nodes)
        )
        self.books = Books(self.term, self.depth, self.numbers, carry.z)
        self.calls = 0
        self.labels: tuple[Tensor, ...] = ()  # by node, where products wait for them

    def run(self) -> Outcome:
        """From the first node to the last, or to where something stops it."""
        term, numbers, limits, u = self.term, self.numbers, self.limits, self.start.z.u
        ratio = (numbers.scale[1:] / numbers.scale[:-1]).tolist()
        seen = (u * float(numbers.scale[0])).reshape(-1, *term.event)
        call = term.model.caller(seen, numbers.labels, keeps=False)
        kept: deque[Tensor] = deque(maxlen=self.depth + 1)  # newest first
        began = clock.monotonic()
        bar = tqdm(total=self.count, unit="node") if limits.progress else None
        with stops(bar) as stop:
            for k in range(self.count):
                if limits.wall_time is not None and seconds_since(began, u) >= limits.wall_time:
                    stop.status = Status.TIME_LIMIT
                    break
                shown = seen
                if k:
                    shown = seen * ratio[k - 1]
                    for weight, past in zip(numbers.chain[k], kept, strict=False):
                        shown.add_(past, alpha=weight)
                slope = self._node(call, shown, k)
                if not k and not _as_precise(term.model, u):
                    break
                kept.appendleft(slope)
                seen = shown
                if bar is not None:
                    bar.update()
        return self._outcome(stop)

    def _node(self, call: Caller, seen: Tensor, k: int) -> Tensor:
        """Asks the network at node k, which is booked then or waits for its products; a multiple of its slope."""
        term, books, tilt = self.term, self.books, self.numbers.tilt[k]
        probes = books.probes(k) if isinstance(term.divergence, Hutchinson) else None
        self.calls += 1
        behind = books.behind is not None and not books.behind.alone
        if behind and not books.last_of_block:
            slope = torch.add(call(seen, k), seen, alpha=tilt)
            books.enter(seen, slope, Shown(seen, slope, tilt, self.labels[k], probes, None))
            return slope
        out, answer = products_of(term, lambda state: call(state, k), seen, probes)
        slope = torch.add(out, seen, alpha=tilt)
        if behind:
            books.enter(seen, slope, Shown(seen, slope, tilt, self.labels[k], probes, answer.clone()))
            return slope
        if not k and worth(term, seen, answer, books.block):
            dtype = label_dtype(term.model.network_dtype(seen))
            self.labels = label_rows(self.numbers.labels, seen.shape[0], dtype, seen.device)
            books.ask_behind()
        books.enter(seen, slope, answer)
        return slope

    def _outcome(self, stop: Stop) -> Outcome:
        """What the loop would leave: after the last node that was booked."""
        start, books = self.start, self.books
        with stops(None) as late:  # what waits is asked for now
            books.settle()
        error, status = stop.error or late.error, stop.status or late.status
        nodes, behind = books.entered, books.behind
        made = max(0, nodes - 1)
        z, rounded, variance = books.close()
        each = torch.ones_like(start.status)
        through = nodes == self.count
        s = start.control.nodes[:, made] if nodes else start.s
        state, memory = GridState(start.control.nodes, made * each, books.indicated, rounded), start.memory
        if variance is not None:  # no node is open any more
            memory = memory._replace(ledger=memory.ledger._replace(variance=variance))
        ended = Status.DONE if through else status if status is not None else Status.RUNNING
        carry = Carry(s, z, memory, state, int(ended) * each, nodes * each, made * each, 0 * each)
        calls, paid = (0, 0) if behind is None else (behind.calls, behind.paid)
        return Outcome(carry, self.calls + calls, self.calls * len(each) + paid, error, [])

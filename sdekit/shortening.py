"""Solves written as short sums: from what a recording shows of every input and state to a tape.

A recording (recording.py) gives each input x_e of the network and each state z_k as a vector: what it takes of the
start, of every output, of every draw. Written over all outputs before, a sum would grow with the steps. So each is
written as a multiple of the state before it, of few inputs and outputs before it, and of draws. Two things make the
sums of multistep methods shorter still:

    tilted outputs    a method of slopes f_e = p_e x_e + q_e out_e takes inputs and outputs in the ratio of its own: the
                      tensor out_e + (p_e/q_e) x_e is then kept in place of the output, and is one term instead of two
    chained inputs    x_{e+1} as a multiple of x_e and slopes, where a method corrects: the corrected states between,
                      sums as long, are not needed and are made only where somebody wants them
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .tape import SAME, STATE, Call, Draw, Step, Sum, Tape, added, draw_of, input_of, output_of

_WINDOW = 14  # calls that a sum may reach back
_NOTHING = 1e-12  # of the largest coefficient, what may be left over by the calls that a sum names
_LARGEST = 30.0  # what the terms of a sum may add up to, by their sizes, against the sum
_SAME = 1e-14  # relative, by which rounding sets apart what is the same
_ALIKE = 1e-9  # relative, by which two ratios of one call may differ; what they are is found to the last digits later
_AGREE = 1e-8  # what a tape may differ by from the loop it was read off


class Run(NamedTuple):
    """What a run on the recording network left, R = 1 + calls + draws rows.

    Attributes:
        given: (E, R) inputs.
        states: (n + 1, R) states.
        times: (n + 1,) when.
        before: Steps made before each call.
        labels: Of each call.
        asked: Draws before each call.
        draws: The questions put to the path.
    """

    given: Tensor
    states: Tensor
    times: Tensor
    before: list[int]
    labels: list[float]
    asked: list[int]
    draws: list[Draw]


@dataclass
class _Terms:
    """A sum that is still to be shortened: its target and base (R,), and coefficients by the numbers of calls."""

    target: Tensor
    base: Tensor
    place: int
    a: float = 1.0
    inputs: dict[int, float] = field(default_factory=dict)
    outputs: dict[int, float] = field(default_factory=dict)
    draws: dict[int, float] = field(default_factory=dict)
    window: int = 0  # how many calls it reaches back

    @property
    def same(self) -> bool:
        """Whether it is its base and nothing else."""
        return self.a == 1.0 and not (self.inputs or self.outputs or self.draws)


def written(run: Run) -> Tape | None:
    """The shorter of the tapes that say what the run did; None where playing back would not give it again."""
    tape = _tape(run, chained=False)
    single = [len(step.calls) == 1 for step in tape.steps[1:]]
    if not run.draws and all(single) and any(step.calls[0].given != SAME for step in tape.steps[1:]):
        other = _tape(run, chained=True)
        if _operations(other) < _operations(tape) and _agrees(other, run):
            return other
    return tape if _agrees(tape, run) else None


def _operations(tape: Tape) -> int:
    """Operations on tensors around all calls, where no states are asked for on the way."""
    calls = [call for step in tape.steps for call in step.calls]
    states = [step.after for step in tape.steps][-1:] if tape.chained else [step.after for step in tape.steps]
    return sum(call.given.operations + int(call.tilt != 0) for call in calls) + sum(s.operations for s in states)


def _tape(run: Run, chained: bool) -> Tape:
    """The tape whose sums begin with the state, or with the input before (`chained`)."""
    calls: list[_Terms] = []
    states: list[_Terms] = []
    counts, e, asked = [], 0, 0  # of each step: its calls, and draws asked by its end
    for k in range(len(run.states) - 1):
        since = asked
        while e < len(run.before) and run.before[e] == k:
            linked = chained and e > 0
            base = run.given[e - 1] if linked else run.states[k]
            near = calls[-1].window - 1 if calls else 0
            place = input_of(e - 1) if linked else STATE
            calls.append(_terms(run, run.given[e], base, place, e, (since, run.asked[e]), near))
            asked, e = run.asked[e], e + 1
        # What is asked between this step's last call and the next one's first may belong to either.
        count = len(run.draws) if e == len(run.before) else run.asked[e]
        base, place = (run.given[e - 1], input_of(e - 1)) if chained else (run.states[k], STATE)
        near = states[-1].window - 1 if states else 0
        states.append(_terms(run, run.states[k + 1], base, place, e, (since, count), near))
        asked = max([asked, *(n + 1 for n in states[-1].draws)])
        counts.append((e, asked))
    tilts = _tilts([*calls, *states[-1 if chained else 0 :]])
    sums = [[_sum(terms, run, tilts) for terms in of] for of in (calls, states)]
    steps, e, asked = [], 0, 0
    for k, (calls_by, draws_by) in enumerate(counts):
        made = []
        for number in range(e, calls_by):
            questions = tuple(range(asked, run.asked[number]))
            made.append(Call(sums[0][number], questions, tilts.get(number, 0.0)))
            asked = run.asked[number]
        steps.append(Step(tuple(made), sums[1][k], tuple(range(asked, draws_by)), float(run.times[k + 1])))
        e, asked = calls_by, draws_by
    return _with_ends(Tape(tuple(steps), tuple(run.draws), tuple(run.labels), chained))


def _with_ends(tape: Tape) -> Tape:
    """The tape with what is needed no more after each step; whoever stops in the step after still finds the state."""
    last: dict[int, int] = {}
    number = 0
    for k, step in enumerate(tape.steps):
        for call in step.calls:
            last |= dict.fromkeys((*call.given.places, input_of(number), output_of(number)), k)
            last |= dict.fromkeys(map(tape.draw_place, call.draws), k)
            number += 1
        last |= dict.fromkeys(map(tape.draw_place, step.draws), k)
        last |= dict.fromkeys(step.after.places, k + int(tape.chained))
    last.pop(STATE, None)
    ends: list[list[int]] = [[] for _ in range(len(tape.steps) + 1)]
    for place, k in last.items():
        ends[k].append(place)
    return tape._replace(steps=tuple(step._replace(spent=tuple(ends[k])) for k, step in enumerate(tape.steps)))


def _share(target: Tensor, base: Tensor) -> float | None:
    """The number whose multiple of `base` is `target` (R,), to rounding; None where there is none."""
    share = (target @ base) / (base @ base)
    return float(share) if bool(((target - share * base).abs() <= _SAME * target.abs().max()).all()) else None


def _terms(
    run: Run, target: Tensor, base: Tensor, place: int, before: int, draws: tuple[int, int], near: int
) -> _Terms:
    """`target` as a sum of `base`, of few of the last of `before` calls, and of draws from one number to another.

    How few is looked for from `near` on: one less than the sum before it needed.
    """
    found = _Terms(target, base, place)
    share = _share(target, base)
    if share is not None and abs(share - 1.0) <= _SAME:
        return found
    calls, most = len(run.given), float(target.abs().max())
    for window in range(max(0, near), _WINDOW + 1):
        first = max(0, before - window)
        free = torch.zeros(len(target), dtype=torch.bool)
        free[1 + first : 1 + before] = True
        free[1 + calls + draws[0] : 1 + calls + draws[1]] = True
        names = [j for j in range(first, before) if _share(run.given[j], base) is None]
        basis = torch.stack([base, *run.given[names]], 1)
        size = basis.abs().amax(0).clamp(min=1e-300)
        known, wanted = (basis / size)[~free], target[~free, None]
        weights = torch.linalg.lstsq(known, wanted, rcond=1e-13, driver="gelsd").solution[:, 0] / size
        weights[(weights.abs() * size) <= 1e-13 * most] = 0.0  # rounding
        rest = target - basis @ weights
        large = float((weights.abs() * size).sum()) > _LARGEST * most  # in float32 that would show
        if first == 0 or (not large and bool((rest[~free].abs() <= _NOTHING * most).all())):
            break
    rest[rest.abs() <= 1e-15 * (basis.abs() @ weights.abs() + target.abs())] = 0.0
    places = (rest * free).nonzero()[:, 0].tolist()
    found.a, found.window = float(weights[0]), window
    found.inputs = {j: float(c) for c, j in zip(weights[1:], names, strict=True) if c != 0}
    found.outputs = {j - 1: float(rest[j]) for j in places if j <= calls}
    found.draws = {j - 1 - calls: float(rest[j]) for j in places if j > calls}
    return found


def _tilts(sums: list[_Terms]) -> dict[int, float]:
    """By call: the ratio in which most sums take its input and output, where keeping them so saves operations."""
    pairs: dict[int, list[tuple[float, float]]] = {}
    for terms in sums:
        for j in terms.outputs.keys() & terms.inputs.keys():
            pairs.setdefault(j, []).append((terms.inputs[j], terms.outputs[j]))
    found = {}
    for j, taken in pairs.items():
        for p, q in sorted(taken, key=lambda pair: -abs(pair[1])):
            alike = sum(abs(a - b * p / q) <= _ALIKE * abs(a) for a, b in taken)
            if 2 * alike > len(taken) and alike > 1:
                found[j] = p / q
                break
    return found


def _sum(terms: _Terms, run: Run, tilts: dict[int, float]) -> Sum:
    """The sum in the places of a tape, by tilted outputs; exact coefficients where its inputs cancel against them."""
    if terms.same:
        return Sum(1.0, terms.place)
    a, inputs = terms.a, dict(terms.inputs)
    most, calls = float(terms.target.abs().max()), len(run.given)
    for j, weight in terms.outputs.items():
        if j in tilts:
            share = _share(run.given[j], terms.base)
            if share is not None:
                a -= weight * tilts[j] * share
            else:
                inputs[j] = inputs.get(j, 0.0) - weight * tilts[j]
    kept = {j: c for j, c in inputs.items() if abs(c) * float(run.given[j].abs().max()) > _ALIKE * most}
    unit = torch.eye(len(terms.target), dtype=terms.target.dtype)
    columns = [terms.base, *(run.given[j] for j in kept)]
    columns += [unit[1 + j] + tilts.get(j, 0.0) * run.given[j] for j in terms.outputs]
    columns += [unit[1 + calls + n] for n in terms.draws]
    places = [*map(input_of, kept), *map(output_of, terms.outputs)]
    places += [draw_of(calls, n) for n in terms.draws]
    basis = torch.stack(columns, 1)
    weights = torch.linalg.lstsq(basis, terms.target[:, None], driver="gelsd").solution[:, 0]
    if bool(((basis @ weights - terms.target).abs() <= _NOTHING * most).all()):
        a = float(weights[0])
        one = abs(a - 1.0) * float(terms.base.abs().max()) <= _NOTHING * most
        return Sum(1.0 if one else a, terms.place, tuple(zip(weights[1:].tolist(), places, strict=True)))
    values = [*inputs.values(), *terms.outputs.values(), *terms.draws.values()]
    places = [*map(input_of, inputs), *places[len(kept) :]]
    return Sum(a, terms.place, tuple(zip(values, places, strict=True)))


def _agrees(tape: Tape, run: Run) -> bool:
    """Whether playing back on the rows of the recording gives them again."""
    unit = torch.eye(run.given.shape[1], dtype=torch.float64)
    values = tape.empty()
    values[STATE] = unit[0]
    for n in range(len(tape.draws)):
        values[tape.draw_place(n)] = unit[1 + tape.calls + n]
    worst, e = 0.0, 0
    for k, step in enumerate(tape.steps):
        for call in step.calls:
            got = added(call.given, values)
            worst = max(worst, float((got - run.given[e]).abs().max() / run.given[e].abs().max().clamp(min=1e-300)))
            values[input_of(e)], values[output_of(e)] = run.given[e], unit[1 + e] + call.tilt * run.given[e]
            e += 1
        values[STATE] = state = added(step.after, values)
        worst = max(worst, float((state - run.states[k + 1]).abs().max() / run.states[k + 1].abs().max()))
    return worst < _AGREE and e == tape.calls

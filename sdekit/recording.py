"""A solve on a fixed grid, recorded once as plain numbers and played back with nothing around the network.

On a fixed grid every method without a step control is linear in the start, the network's outputs and the noise drawn:

    input of call e    x_e = a z_k + sum_j p_j x_j + sum_j q_j out_j + sum_n c_n xi_n       z_k: at the step's start
    state after it     z_{k+1} = the same, of other coefficients

with j among the last few calls (a prediction is a multiple of the state it was made at and of the output), and all
coefficients are known before the network is asked. They are read off from the one loop itself: it is run on a batch in
which row 0 starts at 1 and every other row has a single output or draw equal to 1, all else 0. So no method states its
coefficients twice, and playing back gives what the loop gives, to rounding, at a tenth of the cost around the network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import is_own
from .controller import FixedGrid
from .driver import Limits, drive
from .errors import SdekitError
from .likelihood_flow import LikelihoodFlow
from .loop import Problem, begin
from .model.score_model import ScoreModel
from .solution import Status
from .solver.base import Solver
from .tape import SAME, Call, Draw, Step, Sum, Tape, added
from .terms import ProbabilityFlow, ReverseSDE, Term

MOST_CALLS = 512  # longer recordings take seconds
_KEPT = 64  # recordings held
_WINDOW = 14  # calls that a sum may reach back
_NOTHING = 1e-12  # of the largest coefficient, what may be left over by the calls that a sum names
_LARGEST = 30.0  # what the terms of a sum may add up to, by their sizes, against the sum
_SAME = 1e-14  # relative, by which rounding sets apart what is the same
_AGREE = 1e-8  # what a recording may differ by from the loop it was read off


class _Network(nn.Module):
    """Answers call e with 1 in row 1 + e and 0 elsewhere, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []
        self.labels: list[float] = []
        self.asked: list[int] = []  # draws before each call
        self.path: _Path | None = None

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        row = 1 + len(self.given)
        if row < len(x):
            out[row] = 1.0
        self.given.append(x[:, 0].clone())
        self.labels.append(float(label[0]))
        self.asked.append(0 if self.path is None else len(self.path.draws))
        return out


class _Path:
    """Answers draw n with 1 in row `first` + n and 0 elsewhere, and keeps what it was asked."""

    refinable = False

    def __init__(self, rows: int, first: int) -> None:
        self.rows = rows
        self.first = first
        self.draws: list[Draw] = []

    def _answer(self, kind: str, s0: Tensor | None, s1: Tensor | None, step: Tensor, like: Tensor, lane: int) -> Tensor:
        ends = (0.0, 0.0) if s0 is None or s1 is None else (float(s0[0]), float(s1[0]))
        out = torch.zeros_like(like)
        if self.first + len(self.draws) < self.rows:
            out[self.first + len(self.draws)] = 1.0
        self.draws.append(Draw(kind, *ends, int(step[0]), lane))
        return out

    def increment(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        return self._answer("increment", s0, s1, step, like, lane)

    def levy(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._answer("levy", s0, s1, step, like, 0), self._answer("area", s0, s1, step, like, 0)

    def normal(self, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        return self._answer("normal", None, None, step, like, lane)

    def uniform(self, step: Tensor, lane: int = 0) -> Tensor:
        raise SdekitError("a method with acceptance tests is not linear.")

    def take(self, rows: Tensor) -> _Path:
        return self

    def __len__(self) -> int:
        return self.rows


def usable(solver: Solver, controller: Any, term: Term) -> bool:
    """Whether a solve can be recorded: a fixed grid of moderate length, a linear method, no density, no report.

    And everything that decides its numbers besides the network is a value of this package: what users write may keep a
    state that no comparison sees.
    """
    if not isinstance(controller, FixedGrid) or not solver.linear or type(solver).report is not Solver.report:
        return False
    if term.has_density or (len(controller.times) + 8) * solver.evaluations > MOST_CALLS:
        return False
    if type(term.model) is not ScoreModel or (isinstance(term, ReverseSDE) and callable(term.eta)):
        return False
    meaning = term.model.parameterization
    return all(is_own(part) for part in (term, solver, term.model.sde, meaning, meaning.label))


_recordings: OrderedDict[Hashable, Tape | None] = OrderedDict()
_lock = Lock()


def recorded(term: Term, solver: Solver, controller: FixedGrid) -> Tape | None:
    """The recording of this solve, from the cache or made now; None where playing back would not be the same.

    Raises:
        KeyboardInterrupt: Ctrl-C while recording; nothing is kept then.
    """
    model = term.model
    kind = (type(term), term.eta) if isinstance(term, ReverseSDE) else (type(term),)
    key = (kind, solver, model.sde, model.parameterization, model.data_std, tuple(controller.times.tolist()))
    with _lock:
        if key in _recordings:
            _recordings.move_to_end(key)
            return _recordings[key]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations: threads only get in one another's way, up to 40 times slower
    try:
        tape = _record(term, solver, controller)
    finally:
        torch.set_num_threads(threads)
    with _lock:
        _recordings[key] = tape
        while len(_recordings) > _KEPT:
            _recordings.popitem(last=False)
    return tape


def _stand_in(term: Term, network: nn.Module, rows: int) -> Term:
    """The same equation of one dimension around another network."""
    model = ScoreModel(network, term.model.sde, term.model.parameterization, term.model.data_std).eval()
    if isinstance(term, ReverseSDE):
        return ReverseSDE(model, term.eta)
    if isinstance(term, LikelihoodFlow):
        return LikelihoodFlow(
            model, None, torch.Size([1]), torch.zeros(rows, 2, dtype=torch.int64, device="cpu"), term.mixed
        )
    return ProbabilityFlow(model)


class _Run(NamedTuple):
    """What a run on the recording network left: inputs (E, R), states (n + 1, R), steps made before each call."""

    given: Tensor
    states: Tensor
    times: Tensor
    before: list[int]
    network: _Network
    draws: list[Draw]


def _run(term: Term, solver: Solver, controller: FixedGrid, rows: int, first: int) -> _Run | None:
    network = _Network()
    path = _Path(rows, first) if solver.draws or isinstance(term, ReverseSDE) else None
    network.path = path
    equation = _stand_in(term, network, rows)
    x0 = torch.zeros(rows, 1, dtype=torch.float64, device="cpu")
    x0[0] = 1.0
    times = controller.times.double().cpu()
    s0, s_end = (equation.coordinate(times[place].expand(rows).contiguous()) for place in (0, -1))
    problem = Problem(equation, solver, FixedGrid(times), s_end, path, 10 * MOST_CALLS)
    outcome = drive(problem, begin(problem, s0, equation.enter(x0, s0)), Limits(10 * MOST_CALLS, None, False, True))
    if bool((outcome.carry.status == Status.INTERRUPTED).any()):
        raise KeyboardInterrupt
    if not bool((outcome.carry.status == Status.DONE).all()):
        return None
    states: list[Tensor] = []
    reached: list[Tensor] = []
    before: list[int] = []
    for accepted, s, z in outcome.seen:
        if int(accepted[0]) == len(states):
            states.append(equation.leave(z, s)[:, 0])
            reached.append(equation.time(s)[0])
        before += [int(accepted[0])] * solver.evaluations
    given = torch.stack(network.given)
    draws = [] if path is None else path.draws
    return _Run(given, torch.stack(states), torch.stack(reached), before[: len(given)], network, draws)


def _record(term: Term, solver: Solver, controller: FixedGrid) -> Tape | None:
    with torch.no_grad():
        counted = _run(term, solver, controller, 1, 1)
        if counted is None:
            return None
        calls, draws = len(counted.given), len(counted.draws)
        run = _run(term, solver, controller, 1 + calls + draws, 1 + calls)
    if run is None or not bool(torch.isfinite(run.given).all() & torch.isfinite(run.states).all()):
        return None
    tape = _written(run)
    return tape if _agrees(tape, run) else None


def _multiple(target: Tensor, z: Tensor) -> bool:
    """Whether `target` (R,) is a multiple of `z`, to rounding: one term of a sum will then do."""
    rest = target - (target @ z) / (z @ z) * z
    return bool((rest.abs() <= _SAME * target.abs().max()).all())


def _sum(target: Tensor, z: Tensor, run: _Run, before: int, since: int, asked: int) -> Sum:
    """`target` (R,) as a sum of `z`, of few of the last of `before` calls, and of the draws `since` to `asked`."""
    if _multiple(target, z) and abs(float(target @ z) / float(z @ z) - 1.0) <= _SAME:
        return SAME
    calls = len(run.given)
    for window in range(_WINDOW + 1):
        first = max(0, before - window)
        free = torch.zeros(len(target), dtype=torch.bool)
        free[1 + first : 1 + before] = True
        free[1 + calls + since : 1 + calls + asked] = True
        names = [j for j in range(first, before) if not _multiple(run.given[j], z)]
        basis = torch.stack([z, *run.given[names]], 1)
        size = basis.abs().amax(0).clamp(min=1e-300)
        known, wanted = (basis / size)[~free], target[~free, None]
        found = torch.linalg.lstsq(known, wanted, rcond=1e-13, driver="gelsd").solution[:, 0] / size
        rest = target - basis @ found
        large = float((found.abs() * size).sum()) > _LARGEST * float(target.abs().max())  # in float32 that would show
        if first == 0 or (not large and bool((rest[~free].abs() <= _NOTHING * target.abs().max()).all())):
            break
    rest[rest.abs() <= 1e-15 * (basis.abs() @ found.abs() + target.abs())] = 0.0
    inputs = tuple((float(c), j) for c, j in zip(found[1:], names, strict=True) if c != 0)
    places = (rest * free).nonzero()[:, 0].tolist()
    outputs = tuple((float(rest[j]), j - 1) for j in places if j <= calls)
    return Sum(float(found[0]), inputs, outputs, tuple((float(rest[j]), j - 1 - calls) for j in places if j > calls))


def _written(run: _Run) -> Tape:
    steps, asked, e = [], 0, 0
    for k in range(len(run.states) - 1):
        made, since = [], asked
        while e < len(run.before) and run.before[e] == k:
            count = run.network.asked[e]
            given = _sum(run.given[e], run.states[k], run, e, since, count)
            made.append(Call(given, run.network.labels[e], tuple(range(asked, count))))
            asked, e = count, e + 1
        count = len(run.draws) if e == len(run.before) else run.network.asked[e]
        # What is asked between this step's last call and the next one's first may belong to either.
        after = _sum(run.states[k + 1], run.states[k], run, e, since, count)
        count = max([asked, *(n + 1 for _, n in after.draws)])
        steps.append(Step(tuple(made), after, tuple(range(asked, count)), float(run.times[k + 1])))
        asked = count
    calls, draws = [0] * len(run.given), [0] * len(run.draws)  # the step that needs each last
    for k, step in enumerate(steps):
        for terms in (*(call.given for call in step.calls), step.after):
            for _, j in (*terms.inputs, *terms.outputs):
                calls[j] = k
            for _, n in terms.draws:
                draws[n] = k
    lists = [[tuple(i for i, last in enumerate(of) if last == k) for of in (calls, draws)] for k in range(len(steps))]
    ended = [step._replace(spent=spent, drawn=drawn) for step, (spent, drawn) in zip(steps, lists, strict=True)]
    return Tape(tuple(ended), tuple(run.draws), len(run.given))


def _agrees(tape: Tape, run: _Run) -> bool:
    """Whether playing back on the rows of the recording gives them again."""
    rows = run.given.shape[1]
    z = torch.zeros(rows, dtype=torch.float64)
    z[0] = 1.0
    unit = torch.eye(rows, dtype=torch.float64)
    inputs, outputs = dict(enumerate(run.given)), {j: unit[1 + j] for j in range(tape.calls)}
    noise = {n: unit[1 + tape.calls + n] for n in range(len(tape.draws))}
    worst, e = 0.0, 0
    for k, step in enumerate(tape.steps):
        for call in step.calls:
            got = added(call.given, z, inputs, outputs, noise)
            worst = max(worst, float((got - run.given[e]).abs().max() / run.given[e].abs().max().clamp(min=1e-300)))
            e += 1
        z = added(step.after, z, inputs, outputs, noise)
        worst = max(worst, float((z - run.states[k + 1]).abs().max() / run.states[k + 1].abs().max()))
    return worst < _AGREE and e == tape.calls

"""A solve on a fixed grid, recorded once as plain numbers and played back with nothing around the network.

On a fixed grid every method without a step control is linear in the start, the network's outputs and the noise drawn:

    input of call e    x_e = a z_k + sum_j p_j x_j + sum_j q_j out_j + sum_n c_n xi_n       z_k: at the step's start
    state after it     z_{k+1} = the same, of other coefficients

with j among the last few calls (a prediction is a multiple of the state it was made at and of the output), and all
coefficients are known before the network is asked. They are read off from the one loop itself: it is run on a batch in
which row 0 starts at 1 and every other row has a single output or draw equal to 1, all else 0, and what comes out is
written as short sums (shortening.py). So no method states its coefficients twice, and playing back gives what the loop
gives, to rounding, at a tenth of the cost around the network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import is_own
from .controller import FixedGrid
from .driver import Limits, drive
from .errors import SdekitError
from .likelihood_flow import LikelihoodFlow
from .loop import Problem, begin
from .model.score_model import ScoreModel
from .shortening import Run, written
from .solution import Status
from .solver.base import Solver
from .tape import Draw, Tape
from .terms import ProbabilityFlow, ReverseSDE, Term

MOST_CALLS = 512  # longer recordings take seconds
_KEPT = 64  # recordings held


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
_newest: list[tuple[tuple[Any, ...], Tape | None]] = [((), None)]  # the last one asked for: told without a hash
_lock = Lock()


def forget() -> None:
    """Drops all recordings."""
    with _lock:
        _recordings.clear()
        _newest[0] = (), None


def _same(a: Any, b: Any) -> bool:
    """Whether two parts of keys are one object or one number: no more is asked of most solves."""
    return a is b or (type(a) is float and a == b)


def recorded(term: Term, solver: Solver, controller: FixedGrid) -> Tape | None:
    """The recording of this solve, from the cache or made now; None where playing back would not be the same.

    Raises:
        KeyboardInterrupt: Ctrl-C while recording; nothing is kept then.
    """
    model = term.model
    kind = (type(term), term.eta) if isinstance(term, ReverseSDE) else (type(term),)
    key = (*kind, solver, model.sde, model.parameterization, model.data_std, controller.numbers)
    newest, tape = _newest[0]
    if len(key) == len(newest) and all(map(_same, key, newest)):
        return tape
    with _lock:
        if key in _recordings:
            _recordings.move_to_end(key)
            _newest[0] = key, _recordings[key]
            return _recordings[key]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations: threads only get in one another's way, up to 40 times slower
    try:
        tape = _record(term, solver, controller)
    finally:
        torch.set_num_threads(threads)
    with _lock:
        _recordings[key] = tape
        _newest[0] = key, tape
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


def _run(term: Term, solver: Solver, controller: FixedGrid, rows: int, first: int) -> Run | None:
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
    for _, accepted, s, z in outcome.seen:
        if int(accepted[0]) == len(states):
            states.append(equation.leave(z, s)[:, 0])
            reached.append(equation.time(s)[0])
        before += [int(accepted[0])] * solver.evaluations
    given = torch.stack(network.given)
    draws = [] if path is None else path.draws
    at = torch.stack(reached)
    return Run(given, torch.stack(states), at, before[: len(given)], network.labels, network.asked, draws)


def _record(term: Term, solver: Solver, controller: FixedGrid) -> Tape | None:
    with torch.no_grad():
        counted = _run(term, solver, controller, 1, 1)
        if counted is None:
            return None
        calls, draws = len(counted.given), len(counted.draws)
        run = _run(term, solver, controller, 1 + calls + draws, 1 + calls)
    if run is None or not bool(torch.isfinite(run.given).all() & torch.isfinite(run.states).all()):
        return None
    return written(run)

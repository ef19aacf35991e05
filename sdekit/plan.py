"""A grid and an order measured on the model itself: what a fixed number of steps is best spent on.

A predictor of order p makes an error of about |f^(p)(s)| h^(p+1) in a step of length h, f the slope of the flow in the
mixed variable s. All steps err alike where their density is

    1/h  proportional to  |f^(p)(s)|^(1/(p+1))

which a pilot measures: samples are carried down by twice as many equal steps as there will be, and divided differences
of their slopes give |f^(p)|, a power mean over samples. Added to it is a share of its mean over s, which keeps steps
where the pilot saw nothing; a window smooths it, since a multistep method wants neighbouring steps alike; and the first
steps may be shorter, since it begins with a low order.

What is left open, the order, the power, the share and the first step, is tried out: candidates carry the same samples,
and the one that comes closest to a solution of four times the steps is taken. Rare samples make most of a root mean
square error, and a few dozen do not tell candidates apart: so those that were measured only screen them, and the best
meet others too. Orders above 5 must win by a margin, since they err most on the rare samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ._checks import choose_device, require_count, require_deterministic, require_seed
from ._sampler import default_solver
from .controller import FixedGrid
from .grid import likelihood, mixed_time
from .likelihood_flow import LikelihoodFlow
from .model.score_model import ScoreModel
from .playback import solve
from .prior import draw_prior
from .solution import Solution, Status
from .solver.adams import Adams
from .solver.base import Solver

_ORDERS = ((14, (3, 4, 5)), (29, (3, 4, 5, 6)), (math.inf, (4, 5, 6, 7)))  # tried for up to so many steps
_SHAPES = ((2.0, 0.3), (2.0, 1.0), (2.0, 0.1), (1.5, 0.03), (1.0, 0.03))  # power of the mean over samples, and share
_FIRST = (1.0, 0.5, 0.25)  # the first step's part of its share, doubled from step to step until it is 1
_HEADS = 4  # orders and first steps that are tried with other shapes than the first
_SCREEN = 64  # samples that all candidates carry
_FINALISTS = 6  # candidates that carry all samples
_MARGIN, _SAFE = 1.35, 5  # the factor by which an order must win for each one that it is above 5
_PILOT, _FINE = 2, 4  # equal steps whose slopes are measured, and planned ones of the solution, for every step
_LEAST = 16  # steps, of which there are so many pilot and fine ones at least
_POINTS = 4001  # of the table of densities
_WINDOW = 0.03  # half width of the smoothing, in s
_APART = 1 << 40  # added to the pilot's sample numbers: none that a user draws


@dataclass(frozen=True, eq=False)
class Plan:
    """A solver and its grid: `sdekit.sample(model, shape, solver=plan.solver, controller=plan.controller)`.

    Attributes:
        solver: The method.
        times: (steps + 1,) float64 from t_max to t_min.
        error: Root mean square endpoint error on the pilot samples, in the units of x.
        default: The same of what `sample(steps=...)` does without a plan.
        evaluations: Network evaluations a pilot sample, on average, all candidates together: what the plan cost.
    """

    solver: Solver
    times: Tensor
    error: float
    default: float
    evaluations: int

    @property
    def controller(self) -> FixedGrid:
        """The grid as a controller."""
        return FixedGrid(self.times)


class _Candidate(NamedTuple):
    solver: Solver
    order: int
    times: Tensor
    first: float = 1.0  # step's part of its share


def plan_sampling(
    model: ScoreModel,
    event: Sequence[int],
    steps: int,
    *,
    samples: int = 192,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Plan:
    """The grid and order that carry pilot samples closest to where the probability flow takes them in so many steps.

    Costs about 20 evaluations of each of 192 samples for every step, or 37 of each where `samples` is 64 or less, at
    least as much as for 16 steps; once for a model and a number of steps.

    Args:
        model: The score model, in eval mode.
        event: A sample's shape.
        steps: Of the grid, >= 1.
        samples: Of the pilot, >= 1, carried at once; the batch of the condition where the model has one. 64 of them,
            evenly spread, are measured and meet every candidate; the others only meet the best six.
        seed: Of the pilot's noise, 0 <= seed < 2^63; its samples are none that `sample` draws.
        dtype: Of the pilot; default torch's default.
        device: Default: that of the network's parameters, else the CPU.
        progress: Show a progress bar.

    Returns:
        The plan.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        SolveError: The network failed on a pilot sample.
    """
    require_count("steps", steps)
    require_count("samples", samples)
    if not event or not all(type(size) is int and size >= 0 for size in event):
        raise ValueError(f"event={event!r}; a sample's shape with at least one axis is needed, for example (2,).")
    require_seed(seed)
    require_deterministic(model)
    numbers = torch.arange(samples, device=choose_device(model, device)) + _APART
    start = draw_prior(model, (samples, *event), seed, numbers, dtype or torch.get_default_dtype())
    fine = max(steps, _LEAST)
    with tqdm(disable=not progress, unit="evaluations") as bar, torch.no_grad():
        pilot = _Pilot(model, start, numbers, bar)
        slopes = pilot.slopes(likelihood(model.sde, _PILOT * fine, model.data_std))
        sizes = {order: _derivative(slopes, order - 1) for order in {*_orders(steps), _SAFE}}
        end = pilot.carry(_measured(model, _FINE * fine, sizes, _SAFE, _SHAPES[0], _FIRST[-1])).x
        entries, squares = _tried(pilot, steps, sizes, end)
        finalists = sorted(range(1, len(entries)), key=lambda k: _score(entries[k], squares[k]))[:_FINALISTS]
        if len(pilot.rest):
            for k in (0, *finalists):
                squares[k] = torch.cat((squares[k], pilot.squares(entries[k], end, pilot.rest)))
    best = min((0, *finalists), key=lambda k: _score(entries[k], squares[k]))
    error, default = (float(squares[k].mean().sqrt()) for k in (best, 0))
    return Plan(entries[best].solver, entries[best].times, error, default, -(-pilot.spent // samples))


class _Pilot:
    """The samples that candidates carry.

    Attributes:
        model: Of all samples.
        screen: Numbers of the samples that are measured and that all candidates carry.
        rest: Of the others.
        spent: Network evaluations, of one sample each.
    """

    def __init__(self, model: ScoreModel, start: Tensor, numbers: Tensor, bar: tqdm) -> None:
        self.model, self.spent = model, 0
        self._start, self._numbers, self._bar = start, numbers, bar
        count = start.shape[0]
        kept = torch.zeros(count, dtype=torch.bool, device=start.device)
        few = min(count, _SCREEN)
        kept[torch.arange(few, device=start.device) * count // few] = True
        self.screen, self.rest = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]

    def carry(self, entry: _Candidate, rows: Tensor | None = None, keep: bool = False) -> Solution:
        """What becomes of the samples `rows` (None: all); with all states on the way if they are to be kept."""
        start, numbers, model = self._start, self._numbers, self.model
        if rows is not None:
            start, numbers, model = start[rows], numbers[rows], model.take(rows)
        found = solve(
            *(_flow(model, start), entry.solver, FixedGrid(entry.times), start),
            *(model.sde.t_max, model.sde.t_min, None, numbers),
            max_evaluations=10**9,
            wall_time=None,
            progress=False,
            throw=True,
            return_path=keep,
        )
        if bool((found.status == Status.INTERRUPTED).any()):  # half a pilot plans nothing
            raise KeyboardInterrupt
        self._count(found.stats.calls, start.shape[0])
        return found

    def squares(self, entry: _Candidate, end: Tensor, rows: Tensor) -> Tensor:
        """(n,) float64 mean square error of each of the samples `rows`; infinite where it is not finite."""
        error = (self.carry(entry, rows).x - end[rows]).double().flatten(1)
        return error.square().mean(1).nan_to_num(nan=math.inf)

    def slopes(self, times: Tensor) -> Tensor:
        """(n + 1, B, D) float64 slopes of the flow in the mixed variable at `times`, along the ways of `screen`."""
        path = self.carry(_Candidate(Adams(_SAFE), _SAFE, times), self.screen, keep=True).path
        assert path is not None
        way, none = path.x.transpose(0, 1), torch.zeros_like(self.screen)
        term, found = _flow(self.model.take(self.screen), way[0]), []
        for s, x in zip(term.coordinate(times).to(way.device), way, strict=True):
            here = s.expand(len(none))
            found.append(term.evaluate(here, term.enter(x, here), none)[0].u.double())
            self._count(1, len(none))
        return torch.stack(found)

    def _count(self, calls: int, batch: int) -> None:
        self.spent += calls * batch
        self._bar.update(calls)


def _flow(model: ScoreModel, start: Tensor) -> LikelihoodFlow:
    """The flow of samples like `start` in the mixed variable."""
    keys = torch.zeros(start.shape[0], 2, dtype=torch.int64, device=start.device)
    return LikelihoodFlow(model, None, start.shape[1:], keys)


def _orders(steps: int) -> tuple[int, ...]:
    """The orders that are tried for so many steps."""
    tried = next(orders for most, orders in _ORDERS if steps <= most)
    return tuple(order for order in tried if order <= max(steps, tried[0]))


def _score(entry: _Candidate, squares: Tensor) -> float:
    """What is to be small: the root mean square error, times a margin for high orders."""
    return float(squares.mean().sqrt()) * _MARGIN ** max(0, entry.order - _SAFE)


def _tried(
    pilot: _Pilot, steps: int, sizes: dict[int, tuple[Tensor, Tensor]], end: Tensor
) -> tuple[list[_Candidate], list[Tensor]]:
    """What is tried, what `sample` does without a plan first, and its mean square errors on the samples that screen.

    Args:
        pilot: The samples.
        steps: Of the grid.
        sizes: By order, where and how large the derivative is that its density is made of.
        end: Where the flow takes all samples.
    """
    model, entries, squares = pilot.model, [], []

    def enter(entry: _Candidate) -> None:
        entries.append(entry)
        squares.append(pilot.squares(entry, end, pilot.screen))

    enter(_Candidate(default_solver(0.0, steps), _SAFE, likelihood(model.sde, steps, model.data_std)))
    for order in _orders(steps):
        for first in _FIRST:
            enter(_measured(model, steps, sizes, order, _SHAPES[0], first))
    heads = sorted(range(1, len(entries)), key=lambda k: _score(entries[k], squares[k]))[:_HEADS]
    for head in [entries[k] for k in heads]:
        for shape in _SHAPES[1:]:
            enter(_measured(model, steps, sizes, head.order, shape, head.first))
    return entries, squares


def _measured(
    model: ScoreModel,
    steps: int,
    sizes: dict[int, tuple[Tensor, Tensor]],
    order: int,
    shape: tuple[float, float],
    first: float,
) -> _Candidate:
    """The method of that order on its measured grid."""
    (power, share), (position, size) = shape, sizes[order]
    nodes = _nodes(position, size.pow(power).mean(1).pow(1.0 / (power * order)), steps, share, first)
    times = mixed_time(model.sde, model.data_std).time(nodes)
    times[0], times[-1] = model.sde.t_max, model.sde.t_min
    return _Candidate(Adams(order), order, times, first)


def _derivative(slopes: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Where (m,), ascending, and how large (m, B) the derivative of that order is."""
    count = slopes.shape[0] - 1
    size = (slopes.diff(n=order, dim=0) * float(count) ** order).square().mean(2).sqrt().flip(0)
    position = (torch.arange(len(size), dtype=torch.float64) + 0.5 * order) / count
    return position, size.cpu()


def _nodes(position: Tensor, density: Tensor, steps: int, share: float, first: float) -> Tensor:
    """(steps + 1,) nodes in s from 1 to 0, as dense as asked for.

    Args:
        position: (m,) ascending in (0, 1), where `density` (m,) was measured.
        density: Of the nodes, up to a factor.
        steps: Number of intervals.
        share: Of the mean density that is added to it.
        first: Part of its share that the first interval gets; doubled from interval to interval until it is 1.
    """
    s = torch.linspace(0.0, 1.0, _POINTS, dtype=torch.float64)
    wanted = _interpolated(s, position, density + share * density.mean())
    half = int(_WINDOW * (_POINTS - 1))
    window = torch.hann_window(2 * half + 3, periodic=False, dtype=torch.float64)[1:-1]
    padded = torch.cat((wanted[:1].expand(half), wanted, wanted[-1:].expand(half)))
    smooth = torch.nn.functional.conv1d(padded[None, None], (window / window.sum())[None, None])[0, 0]
    total = torch.cat((s[:1], torch.cumulative_trapezoid(smooth, s)))
    parts = (first * 2.0 ** torch.arange(steps, dtype=torch.float64)).clamp(max=1.0)
    place = torch.cat((s[:1], parts.cumsum(0) / parts.sum()))
    return _interpolated(1.0 - place, total / total[-1], s)


def _interpolated(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Linear interpolation of y (m,) over ascending x (m,), constant outside."""
    right = torch.searchsorted(x, at.contiguous()).clamp(1, len(x) - 1)
    share = ((at - x[right - 1]) / (x[right] - x[right - 1])).clamp(0.0, 1.0)
    return y[right - 1] + share * (y[right] - y[right - 1])

"""A grid and an order measured on the model itself: what a fixed number of steps is best spent on.

A predictor of order p makes an error of about |f^(p)(s)| h^(p+1) in a step of length h, f the slope of the flow in the
mixed variable s. All steps err alike where their density is

    1/h  proportional to  |f^(p)(s)|^(1/(p+1))

which a pilot measures: a few samples are carried down by many equal steps, and divided differences of their slopes,
over twice as many intervals as there will be steps, give |f^(p)|, root mean square over samples. Added to it is a share
of its mean, which keeps steps where the pilot saw nothing; a window smooths it, since a multistep method wants
neighbouring steps alike; and the first steps may be shorter, since it begins with a low order.

What is left open, the order, that share and the first step, is tried out: every candidate carries the same pilot
samples, and the one that comes closest to the fine solution is taken. Equal steps in the mixed variable are among them.
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
from .solution import Status
from .solver.adams import Adams
from .solver.base import Solver

_ORDERS = (3, 4, 5)
_SHARES = (0.1, 0.3, 1.0)  # of the mean density, added to it
_FIRST = (1.0, 0.25)  # the first step's part of its share, doubled from step to step until it is 1
_FINE = 8  # steps of the pilot for every step of the grid: its own error is then far below every candidate's
_STRIDE = 4  # of the pilot's steps make an interval of the divided differences
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
        evaluations: Network evaluations a pilot sample, all candidates together: what the plan cost.
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
    times: Tensor


def plan_sampling(
    model: ScoreModel,
    event: Sequence[int],
    steps: int,
    *,
    samples: int = 64,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Plan:
    """The grid and order that carry pilot samples closest to where the probability flow takes them in so many steps.

    Costs about 35 evaluations of `samples` samples for every step, once for a model and a number of steps.

    Args:
        model: The score model, in eval mode.
        event: A sample's shape.
        steps: Of the grid, >= 1.
        samples: Of the pilot, >= 1; the batch of the condition where the model has one.
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
    sde, spent = model.sde, 0
    bar = tqdm(disable=not progress, unit="evaluations")

    def carry(entry: _Candidate, keep: bool = False) -> tuple[Tensor, Tensor]:
        """The endpoint (B, *event), and the states on the way (n + 1, B, *event) if they are to be kept."""
        nonlocal spent
        term = LikelihoodFlow(model, None, start.shape[1:], torch.zeros(samples, 2, dtype=torch.int64).to(start.device))
        found = solve(
            *(term, entry.solver, FixedGrid(entry.times), start, sde.t_max, sde.t_min, None, numbers),
            max_evaluations=10**9,
            wall_time=None,
            progress=False,
            throw=True,
            return_path=keep,
        )
        if bool((found.status == Status.INTERRUPTED).any()):  # half a pilot plans nothing
            raise KeyboardInterrupt
        spent += found.stats.calls
        bar.update(found.stats.calls)
        return found.x, found.path.x.transpose(0, 1) if found.path is not None else found.x[:0]

    with bar, torch.no_grad():
        fine = likelihood(sde, _FINE * steps, model.data_std)
        end, way = carry(_Candidate(Adams(5), fine), keep=True)
        slopes = _slopes(model, fine[::_STRIDE], way[::_STRIDE])
        spent += slopes.shape[0]
        bar.update(slopes.shape[0])
        entries = [_Candidate(default_solver(0.0, steps), likelihood(sde, steps, model.data_std))]
        entries += _candidates(model, steps, slopes)
        errors = [_distance(carry(entry)[0], end) for entry in entries]
    best = min(range(len(entries)), key=lambda k: errors[k])
    return Plan(entries[best].solver, entries[best].times, errors[best], errors[0], spent)


def _distance(x: Tensor, end: Tensor) -> float:
    """Root mean square of x - end; infinite where it is not finite."""
    return float((x - end).double().square().mean().sqrt().nan_to_num(nan=math.inf))


def _slopes(model: ScoreModel, times: Tensor, way: Tensor) -> Tensor:
    """(n + 1, B, D) float64 slopes of the flow in the mixed variable at `times`, along the states `way`."""
    batch, event = way.shape[1], way.shape[2:]
    keys = torch.zeros(batch, 2, dtype=torch.int64, device=way.device)
    term = LikelihoodFlow(model, None, event, keys)
    nodes = term.coordinate(times).to(way.device)
    found = []
    for s, x in zip(nodes, way, strict=True):
        here = s.expand(batch)
        found.append(term.evaluate(here, term.enter(x, here), keys[:, 0])[0].u.double())
    return torch.stack(found)


def _candidates(model: ScoreModel, steps: int, slopes: Tensor) -> list[_Candidate]:
    """What is tried: the orders that so many steps allow, on measured grids and on equal steps."""
    sde, mixed, made = model.sde, mixed_time(model.sde, model.data_std), []
    for order in (p for p in _ORDERS if p <= max(steps, _ORDERS[0])):
        solver = Adams(order)
        made.append(_Candidate(solver, likelihood(sde, steps, model.data_std)))
        if slopes.shape[0] <= order:
            continue
        position, size = _derivative(slopes, order - 1)
        for share in _SHARES:
            for first in _FIRST:
                nodes = _nodes(position, size.pow(1.0 / order), steps, share, first)
                times = mixed.time(nodes)
                times[0], times[-1] = sde.t_max, sde.t_min
                made.append(_Candidate(solver, times))
    return made


def _derivative(slopes: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Where (m,), ascending, and how large (m,) the derivative of that order is, root mean square over all samples."""
    count = slopes.shape[0] - 1
    size = (slopes.diff(n=order, dim=0) * float(count) ** order).square().mean((1, 2)).sqrt().flip(0)
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

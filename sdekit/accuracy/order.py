"""Observed orders as objects: an estimate, its standard error, and whether a claim is proven by them.

With the mean error e_g over P independent problems on grids of N_g steps, h_g = 1/N_g,

    estimate    the least-squares slope of log2 e_g against log2 h_g over the finest grids
    std_error   its jackknife over the problems: all grids of one problem are left out together
    proven      the lower 95% bound of the estimate lies above the claim less 0.2, and the slope from each of these
                grids to the next above the claim less 0.5

The second condition is for errors that change sign: where they happen to vanish near a grid, any slope can be had.
The slope is not weighted: on these grids the errors are systematic and not noise, so that weights by their spread would
favour coarse grids, which are the biased ones. Of three grids that double, the slope uses the two outer ones only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

from .._checks import require_batch, require_count
from .._tensor import flatten
from ..brownian import BrownianPath
from ..controller import FixedGrid
from ..integrate import integrate
from ..sde.base import SDE
from ..solution import Status
from ..solver.base import Solver
from ..terms import Term

FINEST = 3  # grids that the slope is taken over
_SLACK, _LOCAL_SLACK = 0.2, 0.5  # what a proven order, and its slope between two grids, may fall short of the claim
_CLEAN = 5.0  # a reference wrong by 1/5 of the finest error moves a slope over three grids by at most 0.15
_SLOWEST = 1.25  # least ratio of a reference's successive changes to go by; rounding does not shrink at all


@dataclass(frozen=True)
class Order:
    """An observed order of convergence.

    Attributes:
        estimate: The slope over the finest grids; NaN where an error there is 0 or not finite.
        std_error: Its standard error over the problems.
        claimed: What the method is said to have.
        errors: Mean error on each grid, coarsest first.
        steps: Mean step of each grid as a share of the way.
        problems: Independent problems (samples, axes) that the errors are means of.
        floor: By how much the reference itself may be wrong, in the units of `errors`; 0 where it is exact.
    """

    estimate: float
    std_error: float
    claimed: float
    errors: tuple[float, ...]
    steps: tuple[float, ...]
    problems: int
    floor: float = 0.0

    def lower(self, confidence: float = 0.95) -> float:
        """The bound that the order of a problem's mean error exceeds with `confidence`, in (0, 1), by Student's t."""
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence={confidence!r}; a number between 0 and 1 is needed.")
        return self.estimate - float(stdtrit(self.problems - 1, confidence)) * self.std_error

    @property
    def slopes(self) -> tuple[float, ...]:
        """The slope from each grid to the next."""
        errors, steps = (torch.tensor(part, dtype=torch.float64).log2() for part in (self.errors, self.steps))
        return tuple((errors.diff() / steps.diff()).tolist())

    @property
    def proven(self) -> bool:
        """Whether bound and slopes exceed the claim as the module says, with a reference good enough to say so."""
        steady = min(self.slopes[1 - FINEST :]) > self.claimed - _LOCAL_SLACK
        return self.lower() > self.claimed - _SLACK and steady and _CLEAN * self.floor <= self.errors[-1]


def order_of(errors: Tensor, steps: Sequence[float], claimed: float, *, floor: float = 0.0) -> Order:
    """The order observed in errors of independent problems on grids that are refined.

    Args:
        errors: (G, P) errors >= 0 of P >= 2 problems on G >= 3 grids, coarsest first; inf for a solve that failed.
        steps: G mean steps, strictly decreasing.
        claimed: The order claimed.
        floor: Mean error of the reference.

    Raises:
        ValueError: Shapes or values that do not fit.
    """
    lengths = torch.tensor(list(steps), dtype=torch.float64)
    if errors.dim() != 2 or errors.shape[1] < 2 or errors.shape[0] != lengths.shape[0] or errors.shape[0] < FINEST:
        raise ValueError(
            f"errors.shape={tuple(errors.shape)} with {lengths.shape[0]} steps; (G, P) with one row a step, "
            f"G >= {FINEST} and P >= 2 problems are needed."
        )
    if not bool((lengths > 0).all() and (lengths.diff() < 0).all()):
        raise ValueError(f"steps={list(steps)!r}; positive, strictly decreasing steps are needed: coarsest grid first.")
    if bool((errors < 0).any()):
        raise ValueError(f"errors holds {float(errors.min()):.3g}; errors of at least 0 are needed: take norms.")
    used, count = errors[-FINEST:].double().cpu(), errors.shape[1]
    log_steps = lengths[-FINEST:].log2()
    weights = log_steps - log_steps.mean()
    weights = weights / weights.square().sum()
    means = errors.double().mean(1)
    estimate = float(weights @ used.mean(1).log2())
    without = weights @ ((used.sum(1, keepdim=True) - used) / (count - 1)).log2()
    std_error = float((without - without.mean()).square().sum().mul((count - 1) / count).sqrt())
    if not (math.isfinite(estimate) and math.isfinite(std_error)):
        estimate = std_error = math.nan
    return Order(estimate, std_error, float(claimed), tuple(means.tolist()), tuple(lengths.tolist()), count, floor)


def half_log_snr_grids(
    sde: SDE, counts: Sequence[int], first: float = -3.0, last: float = 2.5, uneven: float = 0.2
) -> list[Tensor]:
    """Grids of times from half_log_snr `first` to `last`, one of (n + 1,) float64 times for each n in `counts`.

    The steps repeat with period 3, in the ratio 1 + u : 1 - 2u : 1 + u: a multistep method with the coefficients of
    equal steps shows. Counts that double and are divisible by 3 refine without any other change.

    Args:
        sde: The forward process.
        counts: Numbers of steps, each >= 1.
        first: half_log_snr of the noisy end.
        last: half_log_snr of the other.
        uneven: u, from 0 (equal steps in half_log_snr) to less than 0.5.
    """
    if not 0.0 <= uneven < 0.5:
        raise ValueError(f"uneven={uneven!r}; 0 <= uneven < 0.5 is needed: from 0.5 on the grid would turn back.")
    grids = []
    for n in counts:
        require_count("counts", n)
        place = torch.arange(n + 1, dtype=torch.float64)
        shift = torch.tensor([0.0, uneven, -uneven], dtype=torch.float64).repeat(n // 3 + 1)[: n + 1]
        shift[-1] = 0.0
        grids.append(sde.clamp(sde.time_at(first + (last - first) * (place + shift) / n)))
    for grid in grids[1:]:  # to the bit: vectorised functions round by position
        grid[0], grid[-1] = grids[0][0], grids[0][-1]
    return grids


def check_grids(grids: Sequence[Tensor]) -> list[float]:
    """The mean step of each grid as a share of the way.

    Raises:
        ValueError: Too few grids, not refined from one to the next, or with different ends.
    """
    if len(grids) < FINEST:
        raise ValueError(f"{len(grids)} grids; at least {FINEST} are needed, coarsest first.")
    counts = [grid.shape[0] - 1 for grid in grids]
    if counts != sorted(set(counts)):
        raise ValueError(f"grids of {counts} steps; strictly more steps from one to the next are needed.")
    ends = {(float(grid[0]), float(grid[-1])) for grid in grids}
    if len(ends) > 1:
        raise ValueError(f"grids with the ends {sorted(ends)}; the same first and last time are needed.")
    return [1.0 / count for count in counts]


def endpoint(solver: Solver, term: Term, x: Tensor, times: Tensor, path: BrownianPath | None = None) -> Tensor:
    """Where the solver carries `x` (B, *event) along the grid `times`; infinite for samples that did not arrive."""
    most = 2 * (times.shape[0] + 16) * max(1, solver.evaluations)  # start-ups included
    ends = float(times[0]), float(times[-1])
    found = integrate(term, solver, FixedGrid(times), x, *ends, path, max_evaluations=most, throw=False)
    arrived = found.status == Status.DONE
    return torch.where(arrived.reshape(-1, *(1,) * (x.dim() - 1)), found.x, math.inf)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """(B,) root mean square over the event of x - y; infinite where it is not finite."""
    found = flatten(x - y).square().mean(1).sqrt()
    return torch.where(torch.isfinite(found), found, math.inf)


class Reference(NamedTuple):
    """A fine solution x (B, *event), and by how much it may be wrong on average."""

    x: Tensor
    floor: float


def reference_endpoint(
    solver: Solver, term: Term, x: Tensor, times: Tensor, path: BrownianPath | None = None
) -> Reference:
    """The solution on a fine grid, its error estimated from those on every second and every fourth time of it.

    With d and D the mean distances between successive solutions, the finer first, the rest of the geometric series is
    d / (D/d - 1).

    Args:
        solver: A trusted method.
        term: The equation.
        x: (B, *event) float64 states at times[0].
        times: (n + 1,) with n a multiple of 4.
        path: Noise for a stochastic solver; one that gives all grids the same path.

    Raises:
        ValueError: A number of steps that is no multiple of 4.
    """
    if times.shape[0] % 4 != 1:
        raise ValueError(f"times with {times.shape[0] - 1} steps; a multiple of 4 is needed, to halve it twice.")
    fine, middle, coarse = (endpoint(solver, term, x, times[::every], path) for every in (1, 2, 4))
    last, before = float(distance(fine, middle).mean()), float(distance(middle, coarse).mean())
    return Reference(fine, last / (max(before / last, _SLOWEST) - 1.0) if 0.0 < last < math.inf else last)


def check_states(x: Tensor) -> Tensor:
    """`x`, checked to be (B, *event) float64 with B >= 2.

    Raises:
        ValueError: Another shape or dtype.
    """
    require_batch("x", x)
    if x.dtype != torch.float64 or x.shape[0] < 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; at least 2 samples in float64 are needed: "
            "rounding of float32 hides an order, and the samples' spread is the error of the estimate."
        )
    return x


def deterministic_order(
    solver: Solver, term: Term, x: Tensor, exact: Tensor | Reference, grids: Sequence[Tensor], *,
    claimed: float | None = None,
) -> Order:  # fmt: skip
    """The observed order of a flow solver at the end of its grids; a problem is a sample.

    Args:
        solver: The method.
        term: The equation, for the batch of `x`.
        x: (B, *event) float64 states at the grids' first time, B >= 2.
        exact: (B, *event) where the flow carries them, or a Reference for it.
        grids: Times of at least 3 grids with the same ends, coarsest first.
        claimed: Default: `solver.order`.

    Raises:
        ValueError: Arguments that do not fit.
    """
    check_states(x)
    steps = check_grids(grids)
    known = exact if isinstance(exact, Reference) else Reference(exact, 0.0)
    if known.x.shape != x.shape:
        raise ValueError(f"exact.shape={tuple(known.x.shape)}; x.shape={tuple(x.shape)} is needed.")
    errors = torch.stack([distance(endpoint(solver, term, x, grid), known.x) for grid in grids])
    return order_of(errors, steps, solver.order if claimed is None else claimed, floor=known.floor)

"""Weak orders without Monte Carlo, and strong orders on shared paths.

Weak. With an exact Gaussian score the whole solve is affine in its start and in its draws xi_k, whatever the solver
remembers or how often it draws within a step:

    x_N = b + A x_0 + sum_k c_k xi_k        so        x_N | x_0 ~ N(b + A x_0, Q),   Q = sum_k c_k^2

b, A and every c_k are read off from one batched solve: in each row one input is 1 and the others are 0. With the
reverse SDE's own law x_s | x_t ~ N(m_s + Phi (x_t - m_t), V_s - Phi^2 V_t),

    Phi = sqrt(V_s / V_t) exp(-int eta^2 (sigma^2 / V) dlambda),       V = alpha^2 v + sigma^2,

the error is the root mean square over x_t of the Wasserstein distance between the two laws,

    error^2 = (A - Phi)^2 V_t + (b + A m_t - m_s)^2 + (sqrt(Q) - sqrt(V_s - Phi^2 V_t))^2.

Strong. Coarse and fine solves share one path: increments and areas over any step of any grid are exact sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from ..sde.base import as_time
from ..solver.base import Solver
from ..targets import Gaussian
from ..terms import ReverseSDE, Term
from .order import Order, check_grids, check_states, distance, endpoint, order_of, reference_endpoint
from .paths import ALL, NONE, Recorder, SharedPath, UnitDraws

_POINTS = 64  # of Gauss's rule in half_log_snr: rounding, over any range in use here


def _times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class _Moments(NamedTuple):
    """Mean and variance (N, D) of x_t at N times."""

    mean: Tensor
    variance: Tensor


def _moments(term: Term, target: Gaussian, t: Tensor) -> _Moments:
    """The moments of the target's diffusion at times `t` (N,), read off from its score -(x - m) / V.

    Raises:
        ValueError: Axes that depend on one another.
    """
    count, dim = t.shape[0], target.dim
    origin, one = torch.zeros(count, dim, dtype=torch.float64), torch.ones(count, dim, dtype=torch.float64)
    slant = one * torch.arange(1.0, dim + 1.0, dtype=torch.float64)
    base, unit, other = (target.score(term.model.sde, x, t) for x in (origin, one, slant))
    precision = base - unit
    if not torch.allclose(base - other, precision * slant, rtol=1e-8, atol=1e-12):
        raise ValueError("the Gaussian's axes depend on one another; pass variances instead of a covariance matrix.")
    return _Moments(base / precision, 1.0 / precision)


class _Law(NamedTuple):
    """x_N | x_0 ~ N(shift + gain x_0, variance) axis by axis, (D,) each."""

    shift: Tensor
    gain: Tensor
    variance: Tensor


def _exact_law(term: Term, target: Gaussian, first: float, last: float) -> _Law:
    """What the equation itself does from time `first` to `last`; without noise unless it is a ReverseSDE."""
    sde = term.model.sde
    (mean0, mean1), (variance0, variance1) = _moments(term, target, _times(first, last))
    ends = sde.half_log_snr(_times(first, last))
    half, middle = 0.5 * (ends[1] - ends[0]), 0.5 * (ends[1] + ends[0])
    points, weights = (torch.from_numpy(part) for part in leggauss(_POINTS))
    t = sde.clamp(sde.time_at(middle + half * points))
    level = torch.zeros_like(t)
    if isinstance(term, ReverseSDE):
        level = as_time(term.eta(t)) if callable(term.eta) else torch.full_like(t, term.eta)
    rate = (weights * half * level.square() * sde.sigma(t).square())[:, None] / _moments(term, target, t).variance
    decay = rate.sum(0)
    gain = (variance1 / variance0).sqrt() * torch.exp(-decay)
    # V_s - Phi^2 V_t cancels where there is little noise.
    return _Law(mean1 - gain * mean0, gain, -torch.expm1(-2.0 * decay) * variance1)


def _method_law(solver: Solver, term: Term, dim: int, times: Tensor) -> _Law:
    """What the solver does from the first time to the last, from its response to each of its inputs.

    Raises:
        ValueError: The response to all inputs at once is not the sum of the responses.
    """
    recorder = Recorder()
    endpoint(solver, term, torch.zeros(1, dim, dtype=torch.float64), times, recorder)
    codes = torch.tensor([NONE, NONE, ALL, *recorder.draws], dtype=torch.int64)
    x = torch.zeros(codes.shape[0], dim, dtype=torch.float64)
    x[1:3] = 1.0
    found = endpoint(solver, term, x, times, UnitDraws(codes))
    shift, together, parts = found[0], found[2] - found[0], torch.cat((found[1:2], found[3:])) - found[0]
    size = parts.abs().sum(0) + shift.abs()
    if bool(torch.isfinite(found).all()) and bool(((parts.sum(0) - together).abs() > 1e-9 * size).any()):
        raise ValueError(
            f"{solver} is not affine on a Gaussian (a step that looks at norms?); its law is not known in closed form."
        )
    return _Law(shift, parts[0], parts[1:].square().sum(0))


def _law_error(found: _Law, exact: _Law, start: _Moments, transition: bool) -> Tensor:
    """(D,) root mean square over the start of the Wasserstein distance of the two laws, or that of what follows it."""
    mean, variance = start.mean[0], start.variance[0]
    bias = found.shift - exact.shift + (found.gain - exact.gain) * mean
    if transition:
        gap = (found.gain - exact.gain).square() * variance
        spread = found.variance.sqrt() - exact.variance.sqrt()
    else:
        gap = torch.zeros_like(bias)
        spread, goal = ((law.gain.square() * variance + law.variance).sqrt() for law in (found, exact))
        spread = spread - goal
    error = (gap + bias.square() + spread.square()).sqrt()
    return torch.where(torch.isfinite(error), error, math.inf)


def weak_order(
    solver: Solver, term: Term, target: Gaussian, grids: Sequence[Tensor], *,
    transition: bool = True, claimed: float | None = None,
) -> Order:  # fmt: skip
    """The observed weak order on a Gaussian, with no Monte Carlo error; a problem is an axis of the Gaussian.

    Args:
        solver: The method.
        term: The equation, of `target.score_model(sde)`.
        target: A Gaussian of at least 2 independent axes: each has its own mean and variance.
        grids: Times of at least 3 grids with the same ends, coarsest first.
        transition: Compare the laws given the start, which tell one eta from another. False: only the laws after an
            exact start, for a solver that adds noise of its own to the probability flow.
        claimed: Default: `solver.order`.

    Raises:
        ValueError: Arguments that do not fit, or a solver that is not affine on a Gaussian.
    """
    steps = check_grids(grids)
    first, last = float(grids[0][0]), float(grids[0][-1])
    start, exact = _moments(term, target, _times(first)), _exact_law(term, target, first, last)
    laws = [_method_law(solver, term, target.dim, grid) for grid in grids]
    errors = torch.stack([_law_error(law, exact, start, transition) for law in laws])
    return order_of(errors, steps, solver.order if claimed is None else claimed)


def strong_order(
    solver: Solver, term: Term, x: Tensor, grids: Sequence[Tensor], *,
    reference: Solver, finest: Tensor, claimed: float, seed: int = 0,
) -> Order:  # fmt: skip
    """The observed strong order: mean distance at the end from a reference on the same path; a problem is a sample.

    The grids need not share their times: the path is drawn through every time at which the solver asks for it, also
    within its steps. Of the reference only the times of its grid are known.

    Args:
        solver: The method.
        term: The equation.
        x: (B, *event) float64 states at the grids' first time, B >= 2.
        grids: Times of at least 3 grids with the same ends, coarsest first.
        reference: A trusted method that asks for the path over whole steps.
        finest: Times of the reference's grid, a multiple of 4 steps. Euler and Maruyama's method needs 16 times the
            steps of the finest grid, one of strong order 1.5 needs 6 times, or its own error is seen in the order.
        claimed: The strong order claimed.
        seed: Of the paths, 0 <= seed < 2^63.

    Raises:
        ValueError: Arguments that do not fit, or a solver that draws what no path determines.
    """
    check_states(x)
    steps = check_grids(grids)
    check_grids([*grids, finest])
    asked = set(term.coordinate(finest.double()).tolist())
    for grid in grids:
        recorder = Recorder()
        endpoint(solver, term, torch.zeros_like(x[:1]), grid, recorder)
        asked |= recorder.times
    path = SharedPath.draw(seed, _times(*sorted(asked)), x)
    known = reference_endpoint(reference, term, x, finest, path)
    errors = torch.stack([distance(endpoint(solver, term, x, grid, path), known.x) for grid in grids])
    return order_of(errors, steps, claimed, floor=known.floor)

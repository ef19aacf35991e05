"""The density that a sampler with finitely many steps really draws from.

A deterministic sampler is a map x = Phi(z) of a draw z of the prior. Where Phi is invertible its samples have the law

    log q(x) = log prior(z) - log|det dPhi/dz|,

exactly, however few and coarse the steps; as they shrink, q tends to the flow's density at the scheme's order. The
Jacobian is exact: D vector-Jacobian products. A scheme whose step sees nothing but the state (`Solver.remembers` is
False: Euler, Heun, RK4, DDIM, DPMSolver) is a composition of one map a step, and log|det| a sum over steps, each with
its sign. A scheme that remembers (multistep, first-same-as-last) is differentiated as a whole.

That Phi is invertible is assumed, not shown: a positive determinant at every step is needed, and is checked where each
step has one, but is not enough. Where two latents lead to one x its density is the sum of what both report.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ._checks import (
    choose_device,
    require_batch,
    require_count,
    require_deterministic,
    require_indices,
    require_part,
    require_same_device,
    require_seed,
    require_shape,
)
from ._fit import check_grid_ends, check_method
from ._products import require_traceable, vector_jacobian
from ._sampler import default_solver
from ._tensor import column, flatten, working
from .controller import FixedGrid
from .driver import Limits, drive
from .errors import NetworkError, SdekitWarning
from .grid import likelihood as likelihood_grid
from .integrate import finish
from .loop import Problem, begin
from .model.score_model import ScoreModel
from .prior import draw_prior
from .sampling import equation_of
from .solution import Stats, Status
from .solver.base import Solver
from .terms import Term

_MOST_DIMS = 128  # of an exact Jacobian: D products of D numbers a sample, and a determinant of D^3 operations
_STEPS = 32  # of the default grid, as in `sample`
_BUDGET = 1_000_000  # evaluations: the grid ends a solve


class SamplerDensity(NamedTuple):
    """Samples of a numerical sampler and their exact log densities. All (n,) unless said otherwise.

    Attributes:
        x: (n, *event) the samples.
        log_prob: float64 nats, log density at x of the law the sampler draws from; NaN where `status` did not arrive.
        log_prior: float64 nats, log density of `latent` under the prior.
        log_det: float64 nats, log|det dx/dlatent|; log_prob = log_prior - log_det.
        folds: int64, how many of the maps composed had a determinant that is not positive: not 0 means that the
            sampler is not invertible there. (A scheme that remembers is a single map: an even number is not seen.)
        latent: (n, *event) what x was made from.
        status: int64 of `Status`.
        stats: Cost of the sampling, without the products.
        t: float64 time reached.
    """

    x: Tensor
    log_prob: Tensor
    log_prior: Tensor
    log_det: Tensor
    folds: Tensor
    latent: Tensor
    status: Tensor
    stats: Stats
    t: Tensor


def sampler_log_density(
    model: ScoreModel,
    start: Sequence[int] | Tensor,
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    times: Tensor | None = None,
    denoise: bool = False,
    seed: int = 0,
    indices: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    throw: bool = True,
) -> SamplerDensity:
    """Samples as `sample` makes them with these steps, each with the exact log density of the sampler's own law.

    Args:
        model: The score model, in eval mode.
        start: (n, *event), to draw from the prior as `sample` does; or latents, (n, *event) at t_max. At most 128
            dimensions.
        solver: Of the probability flow, without noise; None: Adams, as in `sample`.
        steps: Of a grid equally spaced in the mixed variable; default 32.
        times: (n + 1,) the grid instead, from t_max to t_min.
        denoise: Also replace x by the denoised data at t_min: one map more. (`sample` does so by default.)
        seed: Of the prior's draws.
        indices: (n,) global sample numbers that key the draws; default 0..n-1.
        dtype: Of the draws; default torch's default. Of latents: their own.
        device: Of the draws; default that of the network's parameters, else the CPU.
        progress: Show a progress bar.
        throw: Raise SolveError if a sample fails; else read `status`.

    Returns:
        A SamplerDensity. With a warning where a determinant was not positive.

    Raises:
        ValueError, TypeError: Arguments that do not fit; more than 128 dimensions; a solver that draws noise.
        SolveError: A sample failed and `throw`; or the network cannot be used.
    """
    require_deterministic(model)
    latent, numbers = _latent(model, start, seed, indices, dtype, device)
    size = latent.shape[1:].numel()
    if size > _MOST_DIMS:
        raise ValueError(f"a sample has {size} dimensions; at most {_MOST_DIMS} are possible: the Jacobian is exact.")
    require_part("solver", solver, "propose", "sdekit.Heun()")
    grid = _grid(model, steps, times)
    chosen = solver if solver is not None else default_solver(0.0, len(grid.times) - 1)
    if chosen.equation == "reverse" or chosen.draws:
        raise ValueError(f"solver={chosen}; a scheme without noise is needed: with noise x is no function of a latent.")
    check_method(chosen, grid, None)
    first, last = (latent.new_full((len(numbers),), t, dtype=torch.float64) for t in (model.sde.t_max, model.sde.t_min))
    check_grid_ends(grid, first, last)
    if len(numbers):
        one = model.take(torch.zeros_like(numbers[:1]))
        require_traceable(lambda state: one.output(state, first[:1]), working(latent[:1]))
    legs = [grid] if chosen.remembers else [FixedGrid(torch.stack(pair)) for pair in itertools.pairwise(grid.times)]
    with torch.inference_mode(False):
        result, error = _composed(
            equation_of(model, chosen, 0.0, latent), chosen, legs, working(latent), denoise, progress
        )
    result = result._replace(x=result.x.to(latent.dtype), latent=latent)
    finish(result, result.status, error, result.t, "the data's end of time", numbers, throw)
    _warn_folded(result, len(legs) + int(denoise))
    return result


def _latent(
    model: ScoreModel,
    start: Sequence[int] | Tensor,
    seed: int,
    indices: Tensor | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor]:
    """The latents, given or drawn, and the samples' numbers."""
    if isinstance(start, Tensor):
        latent = require_batch("start", start)
        require_same_device(model, latent, "start")
        numbers = require_indices(indices, latent.shape[0], latent.device)
    else:
        sizes = require_shape(start)
        require_seed(seed)
        numbers = require_indices(indices, sizes[0], choose_device(model, device))
        latent = draw_prior(model, sizes, seed, numbers, dtype or torch.get_default_dtype())
    model.check_batch(latent.shape[0])
    return latent, numbers


def _grid(model: ScoreModel, steps: int | None, times: Tensor | None) -> FixedGrid:
    if times is not None:
        if steps is not None:
            raise ValueError(f"steps={steps} together with times; pass one or the other.")
        return FixedGrid(torch.as_tensor(times, dtype=torch.float64))
    count = _STEPS if steps is None else steps
    require_count("steps", count)
    return FixedGrid(likelihood_grid(model.sde, count, model.data_std))


class _Way(NamedTuple):
    """How far the maps have led: state, time, status, log|det| so far, folds seen, cost."""

    x: Tensor
    t: Tensor
    status: Tensor
    log_det: Tensor
    folds: Tensor
    stats: Stats


def _composed(
    term: Term, solver: Solver, legs: list[FixedGrid], latent: Tensor, denoise: bool, progress: bool
) -> tuple[SamplerDensity, NetworkError | None]:
    """The maps of all legs after one another, with their determinants, and the error that stopped them, if one did."""
    none = torch.zeros(latent.shape[0], dtype=torch.int64, device=latent.device)
    t_max, error = torch.full_like(none, term.model.sde.t_max, dtype=torch.float64), None
    way = _Way(latent, t_max, none + int(Status.DONE), 0.0 * t_max, none, Stats(none, none, none, 0, 0))
    try:
        for leg in tqdm(legs, disable=not progress, unit="map"):
            way, error = _walked(term, solver, leg, way)
            if error is not None or not bool((way.status == Status.DONE).any()):
                break
        else:
            way = _denoised(term.model, way) if denoise and len(none) else way
    except NetworkError as caught:  # while denoising
        error = caught
        way = way._replace(status=torch.where(way.status == Status.DONE, int(Status.RUNNING), way.status))
    except KeyboardInterrupt:  # between solves; within one the loop heeds it
        way = way._replace(status=torch.where(way.status == Status.DONE, int(Status.INTERRUPTED), way.status))
    arrived, log_prior = way.status == Status.DONE, term.model.sde.prior_log_prob(latent)
    log_prob, log_prior, log_det = (
        torch.where(arrived, value, torch.nan) for value in (log_prior - way.log_det, log_prior, way.log_det)
    )
    found = SamplerDensity(way.x, log_prob, log_prior, log_det, way.folds, latent, way.status, way.stats, way.t)
    return found, error


def _walked(term: Term, solver: Solver, leg: FixedGrid, way: _Way) -> tuple[_Way, NetworkError | None]:
    """One map further, along the grid of a leg."""
    going = way.status == Status.DONE
    with torch.enable_grad():
        leaf = way.x.detach().requires_grad_()
        s0, s_end = (term.coordinate(t.to(leaf.device).expand(leaf.shape[0])) for t in leg.times[[0, -1]])
        problem = Problem(term, solver, leg, s_end, None, _BUDGET)
        outcome = drive(problem, begin(problem, s0, term.enter(leaf, s0)), Limits(_BUDGET))
        carry = outcome.carry
        moved = term.leave(carry.z, carry.s)
    status = torch.where(going, carry.status, way.status)
    before = way.stats
    stats = Stats(
        before.evaluations + carry.evaluations * going,
        before.accepted + carry.accepted * going,
        before.rejected + carry.rejected * going,
        before.calls + outcome.calls,
        before.paid + outcome.paid,
    )
    way = _Way(moved.detach(), torch.where(going, term.time(carry.s), way.t), status, way.log_det, way.folds, stats)
    if outcome.error is not None or not bool((status == Status.DONE).any()):
        return way, outcome.error
    return _with_determinant(way, moved, leaf), None


def _denoised(model: ScoreModel, way: _Way) -> _Way:
    """The last map, from x at t_min to the denoised data."""
    with torch.enable_grad():
        leaf = way.x.detach().requires_grad_()
        moved = model.data(leaf, model.sde.t_min)
    arrived = column(way.status == Status.DONE, moved)
    stats = way.stats.plus(1, way.status == Status.DONE)
    way = way._replace(x=torch.where(arrived > 0, moved.detach(), way.x), stats=stats)
    return _with_determinant(way, moved, leaf)


def _with_determinant(way: _Way, out: Tensor, leaf: Tensor) -> _Way:
    """The way with log|det d out/d leaf| added, and the folds counted."""
    size, batch = flatten(leaf).shape[1], leaf.shape[0]
    if not batch:
        return way
    axes = torch.eye(size, dtype=leaf.dtype, device=leaf.device)
    vectors = axes[:, None, :].expand(size, batch, size).reshape(-1, *leaf.shape)
    jacobian = vector_jacobian(out, leaf, vectors, keep=False).flatten(2).transpose(0, 1)
    known = torch.isfinite(jacobian).all(2).all(1)
    sign, log_det = torch.linalg.slogdet(torch.where(known[:, None, None], jacobian.double(), axes.double()))
    status = torch.where((way.status == Status.DONE) & ~known, int(Status.NOT_FINITE), way.status)
    return way._replace(status=status, log_det=way.log_det + log_det, folds=way.folds + (sign <= 0))


def _warn_folded(result: SamplerDensity, maps: int) -> None:
    folded = int((result.folds > 0).sum())
    if folded:
        warnings.warn(
            f"{folded} of {result.folds.shape[0]} samples passed a map whose determinant is not positive (of {maps}): "
            "the sampler folds space there, several latents may lead to one x, and log_prob is the density that one of "
            "them brings. Take more steps.",
            SdekitWarning,
            stacklevel=3,
        )

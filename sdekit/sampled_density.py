"""Samples with their log density, from one solve.

The probability flow carries a draw x_T of the prior down to x at t_min, and the change of variables along with it:

    log p(x) = log q_T(x_T) - log|det dx/dx_T|,     log|det dx/dx_T| = D log(alpha_0 c_0 / (alpha_T c_T)) + l,

l the divergence accumulated on the way (likelihood_flow.py). Sampling first and asking `log_likelihood` after costs
twice the evaluations, and carries the sampling's error into x and back.

Control in nats holds in this direction as in the other. With V(s, u) the log density of the flow at s, a local error
(e_u, e_l) of a step moves x to a point of other density, and the value carried along by e_l: what is reported is then
off by the sum over steps of gradient . e_u + e_l, the density at the x that is returned. `tolerance` bounds that.

The law is that of the exact flow; that of a sampler with few steps is another (sampler_density.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import choose_device, require_deterministic, require_indices, require_seed, require_shape
from ._fit import check_grid_ends
from ._method import Method, check_forward_mode, choose_method, judged, warn_loose
from ._tensor import working
from .controller import Controller, FixedGrid
from .divergence import Divergence, Hutchinson
from .driver import Outcome, check_limits
from .grid import mixed_time
from .grid_density import solve_density
from .integrate import finish
from .likelihood import check_laws, probe_variance
from .likelihood_flow import FlowState, LikelihoodFlow
from .loop import Problem, begin
from .model.score_model import ScoreModel
from .prior import draw_prior
from .runtime import Runtime
from .solution import Stats
from .solver.base import Solver
from .units import Affine, bits_per_dim


class SampledDensity(NamedTuple):
    """Samples and their log densities. All (n,) unless said otherwise.

    Attributes:
        x: (n, *event) the samples, at t_min; where `status` did not arrive, where they got to.
        log_prob: float64 nats, density in the units of x at x; NaN where `status` did not arrive.
        std_error: float64 nats, standard error from the trace's probes; 0 for exact traces.
        solver_error: float64 nats, estimate of how far log_prob is from the density at x (not of how far x is from
            where the exact flow leads).
        log_prior: float64 nats, log density of `latent` under the prior.
        log_det: float64 nats, log|det dx/dlatent|; log_prob = log_prior - log_det.
        latent: (n, *event) the draws of the prior.
        status: int64 of `Status`.
        stats: Cost.
        t: float64 time reached.
    """

    x: Tensor
    log_prob: Tensor
    std_error: Tensor
    solver_error: Tensor
    log_prior: Tensor
    log_det: Tensor
    latent: Tensor
    status: Tensor
    stats: Stats
    t: Tensor

    def bits_per_dim(self, levels: int = 256, low: float = -1.0, high: float = 1.0) -> Tensor:
        """(n,) float64 bits per dimension of the samples as `LogLikelihood.bits_per_dim` has them."""
        return bits_per_dim(self.log_prob, self.x.shape[1:].numel(), levels, low, high)


def sample_log_prob(
    model: ScoreModel,
    shape: Sequence[int],
    *,
    divergence: Divergence | None = None,
    tolerance: float = 1e-2,
    nodes: int | None = None,
    solver: Solver | None = None,
    controller: Controller | None = None,
    transform: Affine | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    max_evaluations: int = 10_000,
    wall_time: float | None = None,
    progress: bool = False,
    throw: bool = True,
    runtime: Runtime = "auto",
    slots: int | None = None,
) -> SampledDensity:
    """Samples of the model's probability flow, each with its log density, a standard error and an error estimate.

    Args:
        model: The score model, in eval mode.
        shape: (n, *event).
        divergence: How the trace is had. None: Exact() up to 128 dimensions, else Hutchinson(probes=1).
        tolerance: Nats per sample, > 0, by the solver's own estimate (default solver only).
        nodes: That many evaluations on a fixed grid instead, >= 2.
        solver: None: variable-step Adams controlled in nats, as in `log_likelihood`; any solver with its controller
            else, whose grid runs from t_max to t_min.
        controller: For `solver`; default Nats(tolerance) where there is an error estimate.
        transform: Maps the user's units into the model's: x is returned in the user's, and log_prob is for these.
        seed: Of the prior's draws and the probes, 0 <= seed < 2^63.
        indices: (n,) global sample numbers that key both; default 0..n-1. The draws are those of `sample`.
        dtype: Of the samples; default torch's default.
        device: Default: that of the network's parameters, else the CPU.
        max_evaluations: Network evaluations a sample at most.
        wall_time: Seconds at most; what there is is returned with a warning, and so it is after Ctrl-C.
        progress: Show a progress bar.
        throw: Raise SolveError if a sample fails (its `.solution` holds the rest); else read `status`.
        runtime: How a step runs, to rounding the same: "eager" (and "auto"), "compile" (by torch's compiler: tens
            of seconds once for a kind of solve, then less overhead a step), "graph" (captured, on CUDA),
            "compiled-graph" (both).
        slots: Samples in work at a time, the next entering when one is done; None: all.

    Returns:
        A SampledDensity; x is the state at t_min itself, not denoised: a denoised one has another density.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        SolveError: A sample failed and `throw`; or the network cannot be used.
    """
    sizes = require_shape(shape)
    require_seed(seed)
    require_deterministic(model)
    model.check_batch(sizes[0])
    where, sde = choose_device(model, device), model.sde
    numbers = require_indices(indices, sizes[0], where)
    latent = draw_prior(model, sizes, seed, numbers, dtype or torch.get_default_dtype())
    method = choose_method(model, latent, divergence, tolerance, nodes, solver, controller)
    limits = check_limits(max_evaluations, wall_time, progress, runtime, slots)
    first = torch.full((sizes[0],), sde.t_max, dtype=torch.float64, device=where)
    if isinstance(method.controller, FixedGrid) and nodes is None:
        check_grid_ends(method.controller, first, torch.full_like(first, sde.t_min))
    check_laws(None, transform, latent)
    keys, mixed = Hutchinson.keys(seed, numbers), mixed_time(sde, model.data_std, downward=True)
    term = LikelihoodFlow(model, method.divergence, latent.shape[1:], keys, mixed)
    start = working(latent)
    check_forward_mode(method.divergence, model, start, first)
    with torch.inference_mode(False), torch.no_grad():
        s0 = term.coordinate(first)
        problem = Problem(term, method.solver, method.controller, torch.ones_like(s0), None, max_evaluations)
        outcome = solve_density(problem, begin(problem, s0, term.enter(start, s0)), limits)
        result = _result(term, method, outcome, start, first, transform)
    finish(result, outcome.carry.status, outcome.error, result.t, "the data's end of time", numbers, throw)
    warn_loose(result.status, result.solver_error, method)
    return result._replace(x=result.x.to(latent.dtype), latent=latent)


def _result(
    term: LikelihoodFlow, method: Method, outcome: Outcome, latent: Tensor, first: Tensor, transform: Affine | None
) -> SampledDensity:
    """The SampledDensity of a finished drive."""
    carry = outcome.carry
    state: FlowState = carry.z
    last = term.time(carry.s)
    x = term.leave(state, carry.s)
    log_det = state.u.shape[1] * (term.log_scale(last) - term.log_scale(first))
    log_det = log_det + state.log_det[:, : term.values].mean(1)
    if transform is not None:
        x, log_det = transform.inverse(x), log_det - transform.log_det(term.event)
    log_prior = term.model.sde.prior_log_prob(latent)
    std_error = probe_variance(term, method.solver, carry.memory, state).sqrt()
    solver_error, _, status, arrived = judged(method, carry)
    values = log_prior - log_det, std_error, solver_error, log_prior, log_det
    log_prob, std_error, solver_error, log_prior, log_det = (torch.where(arrived, v, torch.nan) for v in values)
    stats = Stats(carry.evaluations, carry.accepted, carry.rejected, outcome.calls, outcome.paid)
    return SampledDensity(x, log_prob, std_error, solver_error, log_prior, log_det, latent, status, stats, last)

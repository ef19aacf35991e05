"""log p with an error bar and an error estimate.

The probability flow carries x to the noise's end of time, and

    log p_t(x) = log q_T(x_T) + log det,     log det = D log(alpha_T c_T / (alpha_t c_t)) + l,

with q_T the terminal law and l the divergence accumulated along the path (terms.py). Four errors are kept apart:

    std_error      of the trace's probes; 0 for Exact()
    solver_error   of the integration, by the solver's own estimate
    the ends       log p at t_min is not log p_0 (`end`), and the SDE's prior is not p_T (`data_moments`)

With a learned score this is the density of the probability-flow model, not of the SDE's.
"""

from __future__ import annotations

import math
import warnings
from functools import partial

import torch
from torch import Tensor

from ._checks import (
    require_batch,
    require_deterministic,
    require_indices,
    require_part,
    require_same_device,
    require_seed,
)
from ._fit import check_grid_ends, check_moments, times_of
from ._method import Method, check_forward_mode, choose_method, judged, warn_loose
from ._tensor import column, dot, flatten, working
from .budget import Ends
from .controller import Controller, FixedGrid
from .divergence import Divergence, Hutchinson
from .driver import Outcome, check_limits
from .ends import MISMATCH_EVALUATIONS, End, Entry, enter_data, mismatch
from .errors import NetworkError, PartialResultWarning, SmoothnessWarning, SolveError
from .grid_density import solve_density
from .integrate import finish
from .ledger import lone_variance, note
from .likelihood_flow import FlowState, LikelihoodFlow
from .loop import Problem, begin
from .model.score_model import ScoreModel
from .runtime import Runtime
from .sde.base import SDE
from .solution import LogLikelihood, Stats, Status
from .solver.adams import Adams
from .solver.base import Solver
from .targets import Gaussian
from .units import Affine, on_levels


def log_likelihood(
    model: ScoreModel,
    x: Tensor,
    *,
    divergence: Divergence | None = None,
    tolerance: float = 1e-2,
    nodes: int | None = None,
    solver: Solver | None = None,
    controller: Controller | None = None,
    t: Tensor | float | None = None,
    end: End = "marginal",
    data_moments: Gaussian | None = None,
    transform: Affine | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    budget: bool = False,
    max_evaluations: int = 10_000,
    wall_time: float | None = None,
    progress: bool = False,
    throw: bool = True,
    runtime: Runtime = "auto",
    slots: int | None = None,
) -> LogLikelihood:
    """Log densities of `x` under the model's probability flow, each with a standard error and an error estimate.

    Args:
        model: The score model, in eval mode.
        x: Data, (B, *event), floating, on the model's device.
        divergence: How the trace is had. None: Exact() up to 128 dimensions, else Hutchinson(probes=1).
        tolerance: Nats per sample, > 0, by the solver's own estimate (default solver only).
        nodes: That many evaluations on a fixed grid instead (start-up counted), >= 2. A perceptron is asked for the
            products of many nodes in one call more where a node has at most 4, which is faster (docs/decisions).
        solver: None: variable-step Adams controlled in nats (docs/decisions); any solver with its controller else.
        controller: For `solver`; default Nats(tolerance) where there is an error estimate.
        t: Noise level whose density is asked, a number or (B,); default t_min.
        end: "marginal": log p at t_min of x as given, what others report. "heat" (one evaluation more) or
            "extrapolate" (three): corrected to log p_0, for smooth densities only: data with edges, such as
            dequantised integers, get a first-order error in sigma.
        data_moments: Gaussian of the *data* (in the model's units): the terminal law is then its p_T, not the prior.
        transform: Maps x into the model's units; log_prob stays a density in the units of x.
        seed: Of the probes, 0 <= seed < 2^63.
        indices: (B,) global sample numbers that key the probes; default 0..B-1: pass them when you shuffle or split.
        budget: Estimate what is left out at both ends too, for `out.budget()`: 4 evaluations more, 5 with end="heat", 3
            with "extrapolate".
        max_evaluations: Network evaluations a sample at most.
        wall_time: Seconds at most; what there is is returned with a warning, and so it is after Ctrl-C.
        progress: Show a progress bar.
        throw: Raise SolveError if a sample fails (its `.solution` holds the rest); else read `status`.
        runtime: How a step runs, to rounding the same: "eager" (and "auto"), "compile" (by torch's compiler: tens
            of seconds once for a kind of solve, then less overhead a step), "graph" (captured, on CUDA),
            "compiled-graph" (both).
        slots: Samples in work at a time, the next entering when one is done; None: all.

    Returns:
        A LogLikelihood; every field per sample.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        SolveError: A sample failed and `throw`; or the network cannot be used.
    """
    require_batch("x", x)
    require_seed(seed)
    require_same_device(model, x)
    require_deterministic(model)
    model.check_batch(x.shape[0])
    method = choose_method(model, x, divergence, tolerance, nodes, solver, controller)
    _check_end(end, t, budget)
    limits = check_limits(max_evaluations, wall_time, progress, runtime, slots)
    sde, numbers = model.sde, require_indices(indices, x.shape[0], x.device)
    start = times_of("t", sde.t_min if t is None else t, x, sde.t_min, sde.t_max)
    if isinstance(method.controller, FixedGrid) and nodes is None:
        check_grid_ends(method.controller, start, torch.full_like(start, sde.t_max))
    check_laws(data_moments, transform, x)
    start_from = working(x)
    mapped = start_from if transform is None else transform.forward(start_from)
    term = LikelihoodFlow(model, method.divergence, x.shape[1:], Hutchinson.keys(seed, numbers))
    check_forward_mode(method.divergence, model, mapped, start)
    with torch.inference_mode(False), torch.no_grad():
        entry = enter_data(term, mapped, end, budget)
        s0 = term.coordinate(start)
        besides = entry.evaluations + (MISMATCH_EVALUATIONS if budget else 0)
        if max_evaluations <= besides:
            raise ValueError(
                f"max_evaluations={max_evaluations}; more than {besides} is needed for end={end!r}, budget={budget}."
            )
        problem = Problem(term, method.solver, method.controller, torch.ones_like(s0), None, max_evaluations - besides)
        outcome = solve_density(problem, begin(problem, s0, term.enter(entry.x, s0)), limits)
        result = _result(term, method, outcome, entry, start, data_moments, transform)
        result = result._replace(latent=result.latent.to(x.dtype), whole=on_levels(x))
        if budget and outcome.error is None:
            result = _with_ends(result, term, entry, end, data_moments)
    finish(result, outcome.carry.status, outcome.error, result.t, "the noise's end of time", numbers, throw)
    warn_loose(result.status, result.solver_error, method)
    return result


def check_laws(data_moments: Gaussian | None, transform: Affine | None, x: Tensor) -> None:
    """Raises where the moments or the units do not fit the data: before the solve, not after it."""
    check_moments(data_moments, x)
    if transform is not None:
        require_part("transform", transform, "check", "sdekit.Affine(2.0, -1.0)")
        transform.check(x.shape[1:])


def _check_end(end: str, t: Tensor | float | None, budget: bool) -> None:
    if end not in ("marginal", "heat", "extrapolate"):
        raise ValueError(f"end={end!r}; 'marginal', 'heat' or 'extrapolate' is needed.")
    if budget and t is not None:
        raise ValueError(f"t={t} with budget=True; what is left out at t_min is no error then: leave one of them out.")
    if end == "marginal":
        return
    if t is not None:
        raise ValueError(f"t={t} with end={end!r}; the correction goes from t_min to the data: leave t out.")
    warnings.warn(
        f"end={end!r} estimates log p_0 of a smooth density. For data with edges (dequantised integers) it is wrong by "
        "first order in sigma: use end='marginal' there.",
        SmoothnessWarning,
        stacklevel=3,
    )


def _result(
    term: LikelihoodFlow,
    method: Method,
    outcome: Outcome,
    entry: Entry,
    start: Tensor,
    data_moments: Gaussian | None,
    transform: Affine | None,
) -> LogLikelihood:
    """The LogLikelihood of a finished drive."""
    carry = outcome.carry
    state: FlowState = carry.z
    log_prior, log_det, latent, last = density(term, state, start, carry.s, data_moments, transform)
    pull = None
    if carry.stray is not None:
        pull = flatten(_score_of_law(term.model.sde, data_moments, latent))
        pull = pull * column(torch.exp(term.log_scale(last)), pull)
    log_det = log_det + entry.log_det
    variance = probe_variance(term, method.solver, carry.memory, state) + entry.variance
    solver_error, rounding, status, arrived = judged(method, carry, pull)
    values = state.log_det[:, : term.values]
    nothing = torch.full_like(log_prior, math.nan)
    log_prob = torch.where(arrived, log_prior + log_det, nothing)
    stats = Stats(carry.evaluations, carry.accepted, carry.rejected, outcome.calls, outcome.paid).plus(
        entry.evaluations
    )
    return LogLikelihood(
        log_prob,
        torch.where(arrived, variance.sqrt(), nothing),
        torch.where(arrived, solver_error, nothing),
        torch.where(arrived, log_prior, nothing),
        torch.where(arrived, log_det, nothing),
        latent,
        status,
        stats,
        last,
        None if term.values < 2 else log_prob[:, None] + (values - values.mean(1, keepdim=True)),
        torch.where(arrived, rounding, nothing),
        degrees=None if term.fresh or term.values < 2 else term.values - 1,
        reach=torch.where(arrived, dot(latent, latent) / (term.event.numel() * term.model.sde.prior_std**2), nothing),
    )


def _score_of_law(sde: SDE, data_moments: Gaussian | None, x: Tensor) -> Tensor:
    """The terminal law's score, the shape of `x` (B, ...)."""
    return -x / sde.prior_std**2 if data_moments is None else data_moments.score(sde, x, sde.t_max)


def _law(sde: SDE, data_moments: Gaussian | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """The terminal law's score, the shape of `x` (B, ...), and its divergence (B,)."""
    score = _score_of_law(sde, data_moments, x)
    if data_moments is not None:
        return score, data_moments.divergence(sde, x, sde.t_max)
    return score, x.new_full((x.shape[0],), -x[:1].numel() / sde.prior_std**2, dtype=torch.float64)


def _with_ends(
    result: LogLikelihood, term: LikelihoodFlow, entry: Entry, end: End, data_moments: Gaussian | None
) -> LogLikelihood:
    """The result with what was left out at the ends, and what finding that cost."""
    sde = term.model.sde
    if bool(((result.status == Status.INTERRUPTED) | (result.status == Status.TIME_LIMIT)).any()):
        return result
    try:
        excess, calls = mismatch(term, working(result.latent), partial(_law, sde, data_moments))
    except KeyboardInterrupt:
        text = "interrupted in the error budget: the densities are done, the ends are not estimated."
        warnings.warn(text, PartialResultWarning, stacklevel=3)
        return result
    except NetworkError as error:
        raise SolveError(f"{error} (at t={sde.t_max:g}, in the error budget)", result) from error
    known = ~result.log_prob.isnan()
    left_out, spread, excess = (torch.where(known, part, math.nan) for part in (entry.left_out, entry.spread, excess))
    ends = Ends(left_out, spread, excess, end, data_moments is not None)
    return result._replace(ends=ends, stats=result.stats.plus(calls))


def density(
    term: LikelihoodFlow,
    state: FlowState,
    start: Tensor,
    s: Tensor,
    data_moments: Gaussian | None,
    transform: Affine | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B,) log prior, log determinant of a path from time `start` to `state` at `s`, the latent and the time there."""
    last = term.time(s)
    log_scale = term.log_scale(last)
    latent = term.scaled(state, log_scale)
    values = state.log_det[:, : term.values].mean(1)
    log_det = state.u.shape[1] * (log_scale - term.log_scale(start)) + values
    if transform is not None:
        log_det = log_det + transform.log_det(term.event)
    if data_moments is None:
        return term.model.sde.prior_log_prob(latent), log_det, latent, last
    return data_moments.marginal_log_prob(term.model.sde, latent, term.model.sde.t_max), log_det, latent, last


def probe_variance(term: LikelihoodFlow, solver: Solver, memory: object, state: FlowState) -> Tensor:
    """(B,) variance that the probes left in the log determinant."""
    if not isinstance(term.divergence, Hutchinson):
        return torch.zeros_like(state.log_det[:, 0])
    if term.fresh:
        assert isinstance(solver, Adams)  # the only solver that weighs its nodes
        return solver.probe_variance(term, memory)  # type: ignore[arg-type]
    if state.product is not None:  # one fixed probe: the whole path is one node
        size, law = state.u.shape[1], term.divergence.law
        probe = term.divergence.draw(term.keys, torch.zeros_like(term.keys[:, 0]), size, torch.float64)
        return lone_variance(note(probe, state.product.double()[:, None]), law, size, 1)
    probes = state.log_det.shape[1]
    apart = state.log_det - state.log_det.mean(1, keepdim=True)
    return apart.square().sum(1) / ((probes - 1) * probes)  # torch's `var` of a row depends on how many rows there are

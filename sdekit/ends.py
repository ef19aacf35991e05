"""From log p at t_min to log p_0: the data's end of time.

The solve gives the density of x at t_min, which is the data's density smoothed by tau = (sigma/alpha)^2. For a smooth
density one backward step of the heat equation undoes that. With y the data as given, score_y that of y's law,

    heat          y1 = y - tau/2 score_y(y, tau)
    extrapolate   ym = y - tau/4 score_y(y, tau),  s = 3/2 score_y(ym, tau) - 1/2 score_y(ym, 2 tau),  y1 = y - tau/2 s

and log p_0(y) = log p_tau(y1) + log det, log det = -tau/2 div of the score used. Both are wrong to first order in sigma
where the density has edges.

What is left out is estimated by the next correction: "marginal" by the first order,

    log p_0(x) - log p_t(x) = -tau/2 (div score + |score|^2) - (1 - alpha)(D + x . score) + ...

"heat" by what "extrapolate" changes, "extrapolate" by that times the factor by which the two before it fell. At the
noise's end the model's score is compared with that of the terminal law q: with p_T nearly Gaussian of deviation s,

    log p_T(x) - log q(x) = int_0^1 x . (score - score_q)(r x) dr + m(score) - m(score_q),
    m(score) = -s^2/2 |score(0)|^2 - 1/2 (D + s^2 div score(0))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._tensor import column, dot, flatten, mean_over
from .divergence import Hutchinson
from .errors import NetworkError, SolveError
from .ledger import lone_variance, note
from .likelihood_flow import LikelihoodFlow
from .model.parameterization import Mix

End = Literal["marginal", "heat", "extrapolate"]

_GAUSS = (0.5 - 0.5 / math.sqrt(3.0), 0.5 + 0.5 / math.sqrt(3.0))  # two points: a Gaussian's score is linear
MISMATCH_EVALUATIONS = len(_GAUSS) + 1
_SHIFT = 1 << 40  # node number of the probes drawn here: no path has as many nodes


class Entry(NamedTuple):
    """Where a path starts.

    Attributes:
        x: (B, *event) state at the start.
        log_det: (B,) float64 nats of the way there.
        variance: (B,) float64 of its probes.
        evaluations: Network evaluations spent.
        left_out: (B,) float64 estimate of log p_0 less what the solve from here gives; 0 where it was not asked for.
        spread: (B,) float64 its standard error from the probes.
    """

    x: Tensor
    log_det: Tensor
    variance: Tensor
    evaluations: int
    left_out: Tensor
    spread: Tensor

    @classmethod
    def empty(cls, x: Tensor) -> Entry:
        """The start at `x` itself."""
        none = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        return cls(x, none, none, 0, none, none)


def enter_data(term: LikelihoodFlow, x: Tensor, end: End, budget: bool = False) -> Entry:
    """Where the solve of `x` starts, at t_min, for the end asked for.

    Args:
        term: The equation; its divergence serves the correction too.
        x: (B, *event) data.
        end: "marginal": x itself; "heat" and "extrapolate": see the module.
        budget: Estimate what is left out; one evaluation more for "marginal", two for "heat".

    Raises:
        SolveError: The network cannot be used.
    """
    if not x.shape[0] or (end == "marginal" and not budget):
        return Entry.empty(x)
    try:
        return _marginal(term, x) if end == "marginal" else _corrected(term, x, end, budget)
    except NetworkError as error:
        raise SolveError(f"{error} (at t={term.model.sde.t_min:g}, in the correction end={end!r})") from error


def _marginal(term: LikelihoodFlow, x: Tensor) -> Entry:
    """The start at `x` itself, with the first order of what that leaves out."""
    sde, y = term.model.sde, flatten(x)
    t = torch.full((x.shape[0],), sde.t_min, dtype=torch.float64, device=x.device)
    tau, alpha = torch.exp(-2.0 * sde.half_log_snr(t)), sde.alpha(t)
    score, divergence, variance = _score(term, y * column(1.0 / alpha, y), t, 0)
    smoothed = -0.5 * tau * (divergence + dot(score, score))
    scaled = torch.expm1(sde.log_alpha(t)) * (y.shape[1] + dot(y, score))
    nothing = torch.zeros_like(smoothed)
    return Entry(x, nothing, nothing, 1, smoothed + scaled, 0.5 * tau * variance.sqrt())


def _corrected(term: LikelihoodFlow, x: Tensor, end: End, budget: bool) -> Entry:
    """Where the solve starts after a backward step of the heat equation."""
    sde = term.model.sde
    first = torch.full((x.shape[0],), sde.t_min, dtype=torch.float64, device=x.device)
    tau = float(torch.exp(-2.0 * sde.half_log_snr(sde.t_min)))
    y, none, calls = flatten(x), torch.zeros_like(first), 1
    score, divergence, variance = _score(term, y, first, 0)
    shift, div, spread = score, divergence, variance
    left_out, doubt = none, none
    if end == "extrapolate" or budget:
        second = sde.clamp(sde.time_at(sde.half_log_snr(first) - 0.5 * torch.log(torch.full_like(first, 2.0))))
        middle = y - 0.25 * tau * score
        near, near_div, near_var = _score(term, middle, first, 1)
        far, far_div, far_var = _score(term, middle, second, 2)
        shift, div = 1.5 * near - 0.5 * far, 1.5 * near_div - 0.5 * far_div
        spread, calls = 2.25 * near_var + 0.25 * far_var, 3
        change = -0.5 * tau * (div - divergence + dot(shift - score, shift))
        fell = change.abs() / (0.5 * tau * (divergence.abs() + dot(score, score)))
        left_out, doubt = change, 0.5 * tau * (spread + variance).sqrt()
        if end == "extrapolate":
            left_out, doubt = change * fell.clamp(max=1.0), doubt * fell.clamp(max=1.0)
        else:
            shift, div, spread = score, divergence, variance
    moved = y - 0.5 * tau * shift
    alpha = sde.alpha(first)
    start = (column(alpha, moved) * moved).reshape(x.shape)
    # The solve's density is of x = alpha y at t_min.
    log_det = -0.5 * tau * div + y.shape[1] * alpha.log()
    return Entry(start, log_det, 0.25 * tau**2 * spread, calls, left_out, doubt)


def mismatch(term: LikelihoodFlow, x: Tensor, law: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """(B,) nats by which the model's own log density of x at t_max exceeds the terminal law's; evaluations spent.

    Args:
        term: The equation.
        x: (B, *event) latents.
        law: Score (B, D) and its divergence (B,) of the terminal law at states (B, D).

    Raises:
        NetworkError: The network cannot be used.
    """
    sde, flat = term.model.sde, flatten(x)
    if not x.shape[0]:
        return torch.zeros(0, dtype=torch.float64, device=x.device), 0
    t = torch.full((x.shape[0],), sde.t_max, dtype=torch.float64, device=x.device)
    along = torch.zeros_like(t)
    for share in _GAUSS:
        state = share * flat
        score = flatten(term.model.score(state.reshape(x.shape), t))
        along = along + 0.5 * dot(flat, score - law(state)[0])
    origin = torch.zeros_like(flat)
    score, divergence, _ = _score(term, origin, t, 3)
    alpha, variance = sde.alpha(t), sde.prior_std**2
    there, slope = law(origin)
    # The score of y = x/alpha is alpha that of x.
    score, divergence = score * column(1.0 / alpha, score), divergence / alpha.square()
    excess = dot(score, score) - dot(there, there) + divergence - slope
    return along - 0.5 * variance * excess, MISMATCH_EVALUATIONS


def _score(term: LikelihoodFlow, y: Tensor, t: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Score of y's law (B, D), its divergence (B,) and the variance of that (B,), at y = x/alpha and time t."""
    model, sde = term.model, term.model.sde
    alpha, rho = sde.alpha(t), torch.exp(-sde.half_log_snr(t))

    def field(state: Tensor) -> Tensor:
        x = (column(alpha, state) * state).reshape(-1, *term.event)
        target = Mix(torch.zeros_like(rho), -1.0 / rho)
        return flatten(model.as_mix(x, t, model.output(x, t), target))

    divergence = term.divergence
    assert divergence is not None  # a LikelihoodFlow of log_likelihood has one
    probes = None
    if isinstance(divergence, Hutchinson):
        # Of their own even where the path has fixed ones: the variances of both are then added.
        node = torch.full_like(term.keys[:, 0], _SHIFT + number)
        probes = replace(divergence, fresh=True).draw(term.keys, node, y.shape[1], y.dtype)
    value, traces, products = divergence.evaluate(field, y, probes)
    if not isinstance(divergence, Hutchinson) or probes is None or products is None:
        return value, traces[:, 0], torch.zeros_like(traces[:, 0])
    count = divergence.probes
    variance = lone_variance(note(probes[:count], products[:, :count]), divergence.law, y.shape[1], count)
    return value, mean_over(traces[:, :count], 1), variance

"""From log p at t_min to log p_0: the data's end of time.

The solve gives the density of x at t_min, which is the data's density smoothed by tau = (sigma/alpha)^2. For a smooth
density one backward step of the heat equation undoes that. With y the data as given, score_y that of y's law,

    heat          y1 = y - tau/2 score_y(y, tau)
    extrapolate   ym = y - tau/4 score_y(y, tau),  s = 3/2 score_y(ym, tau) - 1/2 score_y(ym, 2 tau),  y1 = y - tau/2 s

and log p_0(y) = log p_tau(y1) + log det, log det = -tau/2 div of the score used. Both are wrong to first order in sigma
where the density has edges.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._tensor import column, flatten
from .divergence import Hutchinson
from .errors import NetworkError, SolveError
from .ledger import lone_variance, note
from .likelihood_flow import LikelihoodFlow
from .model.parameterization import Mix

End = Literal["marginal", "heat", "extrapolate"]

_SHIFT = 1 << 40  # node number of the probes drawn here: no path has as many nodes


class Entry(NamedTuple):
    """Where a path starts.

    Attributes:
        x: (B, *event) state at the start.
        log_det: (B,) float64 nats of the way there.
        variance: (B,) float64 of its probes.
        evaluations: Network evaluations spent.
    """

    x: Tensor
    log_det: Tensor
    variance: Tensor
    evaluations: int

    @classmethod
    def empty(cls, x: Tensor) -> Entry:
        """The start at `x` itself."""
        none = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        return cls(x, none, none, 0)


def enter_data(term: LikelihoodFlow, x: Tensor, end: End) -> Entry:
    """Where the solve of `x` starts, at t_min, for the end asked for.

    Args:
        term: The equation; its divergence serves the correction too.
        x: (B, *event) data.
        end: "marginal": x itself; "heat" and "extrapolate": see the module.

    Raises:
        SolveError: The network cannot be used.
    """
    if end == "marginal" or not x.shape[0]:
        return Entry.empty(x)
    try:
        return _corrected(term, x, end)
    except NetworkError as error:
        raise SolveError(f"{error} (at t={term.model.sde.t_min:g}, in the correction end={end!r})") from error


def _corrected(term: LikelihoodFlow, x: Tensor, end: End) -> Entry:
    """Where the solve starts after a backward step of the heat equation."""
    sde = term.model.sde
    first = torch.full((x.shape[0],), sde.t_min, dtype=torch.float64, device=x.device)
    tau = float(torch.exp(-2.0 * sde.half_log_snr(sde.t_min)))
    y = flatten(x)
    if end == "heat":
        score, divergence, variance = _score(term, y, first, 0)
        moved, log_det, spread, calls = y - 0.5 * tau * score, -0.5 * tau * divergence, 0.25 * tau**2 * variance, 1
    else:
        second = sde.clamp(sde.time_at(sde.half_log_snr(first) - 0.5 * torch.log(torch.full_like(first, 2.0))))
        middle = y - 0.25 * tau * _score(term, y, first, 0)[0]
        near, near_div, near_var = _score(term, middle, first, 1)
        far, far_div, far_var = _score(term, middle, second, 2)
        moved = y - 0.5 * tau * (1.5 * near - 0.5 * far)
        log_det = -0.5 * tau * (1.5 * near_div - 0.5 * far_div)
        spread, calls = 0.25 * tau**2 * (2.25 * near_var + 0.25 * far_var), 3
    alpha = sde.alpha(first)
    start = (column(alpha, moved) * moved).reshape(x.shape)
    # The solve's density is of x = alpha y at t_min.
    return Entry(start, log_det + y.shape[1] * alpha.log(), spread, calls)


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
        node = torch.full_like(term.keys[:, 0], _SHIFT + number if divergence.fresh else 0)
        probes = divergence.draw(term.keys, node, y.shape[1], y.dtype)
    value, traces, products = divergence.evaluate(field, y, probes)
    if not isinstance(divergence, Hutchinson) or probes is None or products is None:
        return value, traces[:, 0], torch.zeros_like(traces[:, 0])
    count = divergence.probes
    variance = lone_variance(note(probes[:count], products[:, :count]), divergence.law, y.shape[1], count)
    return value, traces[:, :count].mean(1), variance

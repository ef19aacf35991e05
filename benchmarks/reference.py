"""Reference solutions, independent of sdekit's solvers, variables and coordinates.

With y = x/alpha and q = log(sigma/alpha) the probability flow and its log determinant are

    dy/dq = rho eps,      dl/dq = rho div_y eps = sigma div_x eps,      rho = sigma/alpha,
    log p_t(x) = log q_T(x_T) + D log(alpha_T / alpha_t) + l,

integrated by scipy's DOP853 at a relative tolerance near rounding. The solve is repeated 100 times looser; how far the
two differ is reported as the reference's own error (that of the looser one, so an upper estimate). Where the exact
trace is dear the path alone is integrated that way, and the trace afterwards on panels of Gauss-Legendre nodes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import sdekit
from sdekit.targets import Gaussian

from .common import cached, digest

_TIGHT, _LOOSER = 1e-11, 100.0
_PANEL = 8  # Gauss-Legendre nodes a panel


class Reference(NamedTuple):
    """log p by the SDE's prior, the latent x_T, both (B, ...) float64, and the reference's own error (B,)."""

    log_prob: Tensor
    latent: Tensor
    error: Tensor

    def with_moments(self, sde: sdekit.SDE, moments: Gaussian) -> Tensor:
        """(B,) log p with the moment-matched terminal law instead of the prior."""
        matched = moments.marginal_log_prob(sde, self.latent, sde.t_max)
        return self.log_prob - sde.prior_log_prob(self.latent) + matched


def traced_field(
    model: sdekit.ScoreModel, probe: Tensor | None
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
    """A function (x, t, traced) -> eps (B, *event), div_x eps (B,) by one probe, or exactly where `probe` is None.

    Exact targets give their divergence in closed form: no automatic differentiation takes part.

    Args:
        model: The score model.
        probe: (B, D) signs, or None.
    """

    target = getattr(model.net, "target", None)

    def field(x: Tensor, t: Tensor, traced: bool) -> tuple[Tensor, Tensor]:
        if not traced or (target is not None and probe is None):
            with torch.no_grad():
                eps = model.noise(x, t)
                if target is None:
                    return eps, torch.zeros(x.shape[0], dtype=x.dtype)
                return eps, -model.sde.sigma(t) * target.divergence(model.sde, x, t)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            eps = model.noise(leaf, t)
            flat = eps.flatten(1)
            if probe is None:
                size = flat.shape[1]
                axes = torch.eye(size, dtype=x.dtype)[:, None, :].expand(size, *flat.shape)
                rows = torch.autograd.grad(flat, leaf, axes, is_grads_batched=True)[0].flatten(2)
                trace = torch.einsum("ibi->b", rows)
            else:
                trace = (torch.autograd.grad(flat, leaf, probe)[0].flatten(1) * probe).sum(1)
        return eps.detach(), trace.detach()

    return field


def reference(
    model: sdekit.ScoreModel,
    x: Tensor,
    probe: Tensor | None = None,
    *,
    panels: int = 0,
    tight: float = _TIGHT,
    checked: bool = True,
) -> Reference:
    """The reference solution for `x` (B, *event), float64; cached.

    Args:
        model: Float64, without conditions.
        x: States at t_min.
        probe: (B, D) a fixed probe for the trace; None: the exact trace.
        panels: 0: the trace is integrated with the path; else on so many panels afterwards (and on half as many).
        tight: The relative tolerance; the other solve is 100 times looser.
        checked: False: without the other solve, where it is dear; the error is then NaN.
    """
    options: tuple[float, ...] = (panels,) if tight == _TIGHT else (panels, tight)
    key = digest(x, *(() if probe is None else (probe,)), repr(model.sde), repr(model.parameterization), *options)
    weights = digest(*model.state_dict().values()) if model.state_dict() else digest(*_law(model))

    def make() -> dict[str, Tensor]:
        log_prob, latent = _solve(model, x, probe, tight, panels)
        unknown = torch.full_like(log_prob, torch.nan)
        error = (log_prob - _solve(model, x, probe, _LOOSER * tight, panels)[0]).abs() if checked else unknown
        return {"log_prob": log_prob, "latent": latent, "error": error}

    found = cached(f"reference-{key}-{weights}{'' if checked else '-alone'}", make)
    return Reference(found["log_prob"], found["latent"], found["error"])


def _law(model: sdekit.ScoreModel) -> tuple[Tensor, ...]:
    """What an exact network depends on: its answer at fixed points."""
    target = model.net.target
    x = torch.linspace(-1.0, 1.0, 3 * target.dim, dtype=torch.float64).reshape(3, target.dim)
    return target.log_prob(x), target.log_prob(7.0 * x)


def _solve(
    model: sdekit.ScoreModel, x: Tensor, probe: Tensor | None, rtol: float, panels: int
) -> tuple[Tensor, Tensor]:
    """log p and latent of one solve."""
    sde, (batch, size) = model.sde, (x.shape[0], x.shape[1:].numel())
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    low, high = (-sde.half_log_snr(ends)).tolist()
    alpha = sde.alpha(ends).tolist()
    field = traced_field(model, probe)

    def slope(q: float, y: Tensor, traced: bool) -> tuple[Tensor, Tensor]:
        t = sde.clamp(sde.time_at(torch.tensor(-q, dtype=torch.float64))).expand(batch)
        eps, trace = field(sde.alpha(t)[0] * y, t, traced)
        return np.exp(q) * eps, sde.sigma(t)[0] * trace

    def rhs(q: float, state: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(state)
        rate, trace = slope(q, parts[: batch * size].reshape(x.shape), panels == 0)
        return torch.cat((rate.reshape(-1), trace) if panels == 0 else (rate.reshape(-1),)).numpy()

    start = (x.double() / alpha[0]).reshape(-1)
    start = torch.cat((start, torch.zeros(batch, dtype=torch.float64))) if panels == 0 else start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy raises tolerances below its floor, and says so
        atol = rtol * model.data_std
        path = solve_ivp(rhs, (low, high), start.numpy(), "DOP853", rtol=rtol, atol=atol, dense_output=panels > 0)
    if not path.success:
        raise RuntimeError(f"the reference did not arrive: {path.message}")
    latent = alpha[1] * torch.from_numpy(path.y[: batch * size, -1].copy()).reshape(x.shape)
    if panels == 0:
        gained = torch.from_numpy(path.y[batch * size :, -1].copy())
    else:
        gained = _quadrature(
            lambda q: slope(q, torch.from_numpy(path.sol(q)).reshape(x.shape), True)[1], low, high, panels
        )
    scale = size * (sde.log_alpha(ends[1]) - sde.log_alpha(ends[0]))
    return sde.prior_log_prob(latent) + scale + gained, latent


def _quadrature(integrand: Callable[[float], Tensor], low: float, high: float, panels: int) -> Tensor:
    """The integral over [low, high] by Gauss-Legendre on equal panels."""
    points, weights = np.polynomial.legendre.leggauss(_PANEL)
    edges = np.linspace(low, high, panels + 1)
    total = 0.0
    for left, right in pairwise(edges.tolist()):
        for point, weight in zip(points, weights, strict=True):
            total = total + 0.5 * (right - left) * weight * integrand(
                float(0.5 * (left + right) + 0.5 * (right - left) * point)
            )
    assert isinstance(total, Tensor)
    return total


def fine_reference(model: sdekit.ScoreModel, x: Tensor, steps: int) -> Reference:
    """A reference for networks with kinks, where high orders are of no use: the midpoint rule on equal steps of q.

    Args:
        model: Float64, without conditions.
        x: States at t_min.
        steps: Of the finer grid; the coarser one has half as many, and their difference is the error stated.
    """
    key = digest(x, repr(model.sde), repr(model.parameterization), steps, *model.state_dict().values())

    def make() -> dict[str, Tensor]:
        fine, coarse = _midpoint(model, x, steps), _midpoint(model, x, steps // 2)
        return {"log_prob": fine[0], "latent": fine[1], "error": (fine[0] - coarse[0]).abs()}

    found = cached(f"fine-{key}", make)
    return Reference(found["log_prob"], found["latent"], found["error"])


def _midpoint(model: sdekit.ScoreModel, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """log p and latent by the midpoint rule in q, every trace at a midpoint."""
    sde, field = model.sde, traced_field(model, None)
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    low, high = (-sde.half_log_snr(ends)).tolist()
    y, gained, step = (
        x.double() / sde.alpha(ends[0]),
        torch.zeros(x.shape[0], dtype=torch.float64),
        (high - low) / steps,
    )

    def slope(q: float, y: Tensor, traced: bool) -> tuple[Tensor, Tensor]:
        t = sde.clamp(sde.time_at(torch.tensor(-q, dtype=torch.float64))).expand(x.shape[0])
        eps, trace = field(sde.alpha(t)[0] * y, t, traced)
        return float(np.exp(q)) * eps, sde.sigma(t)[0] * trace

    for number in range(steps):
        q = low + number * step
        middle = y + 0.5 * step * slope(q, y, False)[0]
        rate, trace = slope(q + 0.5 * step, middle, True)
        y, gained = y + step * rate, gained + step * trace
    latent = sde.alpha(ends[1]) * y
    scale = x.shape[1:].numel() * (sde.log_alpha(ends[1]) - sde.log_alpha(ends[0]))
    return sde.prior_log_prob(latent) + scale + gained, latent

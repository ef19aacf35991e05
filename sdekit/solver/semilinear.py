"""The exact part of a diffusion's equations, and the weights that an integral gives to predictions.

Between lambda_0 and lambda_1 = lambda_0 + h, with noise level eta (0: the probability flow) and k = 1 + eta^2,

    data form    x_1 = (sigma_1/sigma_0) e^{-eta^2 h} x_0 + alpha_1 int_0^h k e^{-k (h-r)} data(lambda_0 + r) dr
                       + sigma_1 sqrt(1 - e^{-2 eta^2 h}) z
    noise form   x_1 = (alpha_1/alpha_0) x_0 - sigma_1 int_0^h k e^{h-r} noise(lambda_0 + r) dr
                       + sigma_1 eta sqrt(e^{2h} - 1) z

The linear part is exact. What a method chooses is the polynomial, through predictions at known nodes, that stands for
the prediction under the integral. All scalars are float64; a step may go either way when eta = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._tensor import column, constant
from ..sde.base import SDE
from ..terms import ReverseSDE, Term

Form = Literal["data", "noise"]
Variable = Literal["half_log_snr", "t", "rho"]

_POINTS = 20  # of Gauss's rule: polynomials of degree 3 under e^{-(h-r)} come out to rounding for h up to 20
_TAYLOR_BELOW = 0.5
_TAYLOR_TERMS = 16


@lru_cache(maxsize=1)
def _rule() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.legendre.leggauss(_POINTS)
    return (0.5 * (nodes + 1.0)).tolist(), (0.5 * weights).tolist()


def _gauss(device: torch.device) -> tuple[Tensor, Tensor]:
    """Gauss's rule on [0, 1]: nodes and weights, float64."""
    nodes, weights = _rule()
    return constant(nodes, torch.float64, device), constant(weights, torch.float64, device)


def psi(order: int, z: Tensor) -> Tensor:
    """psi_k(z) = int_0^1 e^{(1-r) z} r^{k-1}/(k-1)! dr, float64: (e^z - 1)/z for k = 1, accurate for every real z.

    Args:
        order: k >= 1.
        z: Any shape.
    """
    near = torch.where(z.abs() < _TAYLOR_BELOW, z, 0.0)
    series = torch.zeros_like(z)
    for j in reversed(range(_TAYLOR_TERMS)):
        series = series * near + 1.0 / math.factorial(j + order)
    far = torch.where(z.abs() < _TAYLOR_BELOW, 1.0, z)
    value = torch.expm1(far) / far
    for k in range(1, order):
        value = (value - 1.0 / math.factorial(k)) / far
    return torch.where(z.abs() < _TAYLOR_BELOW, series, value)


class Linear(NamedTuple):
    """A step's exact part, (B,) float64 each.

    Attributes:
        keep: What multiplies x_0.
        gain: What multiplies the integral of the prediction.
        rate: k, before the exponential.
        exponent: c of the kernel e^{c (h - r)}.
        noise: Standard deviation of the noise.
        start: lambda_0.
        length: h.
    """

    keep: Tensor
    gain: Tensor
    rate: Tensor
    exponent: Tensor
    noise: Tensor
    start: Tensor
    length: Tensor


def linear(sde: SDE, form: Form, t0: Tensor, t1: Tensor, level: Tensor) -> Linear:
    """The exact part of the step from t0 to t1 (B,) at noise level `level` (B,)."""
    start = sde.half_log_snr(t0)
    length = sde.half_log_snr(t1) - start
    square = level.square()
    rate = 1.0 + square
    if form == "data":
        keep = torch.exp(sde.log_sigma(t1) - sde.log_sigma(t0) - square * length)
        noise = sde.sigma(t1) * (-torch.expm1(-2.0 * square * length)).clamp(min=0.0).sqrt()
        return Linear(keep, sde.alpha(t1), rate, -rate, noise, start, length)
    keep = torch.exp(sde.log_alpha(t1) - sde.log_alpha(t0))
    noise = sde.sigma(t1) * level * torch.expm1(2.0 * length).clamp(min=0.0).sqrt()
    return Linear(keep, -sde.sigma(t1), rate, torch.ones_like(rate), noise, start, length)


def variable_of(sde: SDE, name: Variable) -> Callable[[Tensor], Tensor]:
    """The map from the half log signal-to-noise ratio to the variable in which a polynomial interpolates."""
    if name == "t":
        return sde.time_at
    return (lambda value: torch.exp(-value)) if name == "rho" else (lambda value: value)


def weights(step: Linear, nodes: Tensor, valid: Tensor, variable: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, K) weights of the predictions at `nodes`: gain times the integral of each Lagrange polynomial.

    Args:
        step: The exact part.
        nodes: (B, K) half log signal-to-noise ratios of the predictions, newest first.
        valid: (B, K) which there are; of two equal nodes the newer counts.
        variable: From `variable_of`.
    """
    count = nodes.shape[1]
    other = ~torch.eye(count, dtype=torch.bool, device=nodes.device)
    newer = other.tril()
    same = ((nodes[:, :, None] == nodes[:, None, :]) & newer & valid[:, None, :]).any(2)
    valid = valid & ~same
    points, rule = _gauss(nodes.device)
    inside = step.length[:, None] * points
    kernel = rule * torch.exp(step.exponent[:, None] * (step.length[:, None] - inside))
    kernel = kernel * (step.gain * step.rate * step.length)[:, None]
    place, knots = variable(step.start[:, None] + inside), variable(nodes)
    pairs = valid[:, :, None] & valid[:, None, :] & other
    apart = torch.where(pairs, knots[:, :, None] - knots[:, None, :], 1.0)
    ratios = (place[:, :, None, None] - knots[:, None, None, :]) / apart[:, None]
    basis = torch.where(pairs[:, None], ratios, 1.0).prod(3)
    return torch.einsum("bq,bqk->bk", kernel, basis) * valid


def combine(keep: Tensor, z: Tensor, each: Tensor, predictions: tuple[Tensor, ...]) -> Tensor:
    """keep z + sum_k each_k prediction_k, in the dtype of `z`; `each` is (B, K)."""
    total = column(keep, z) * z
    for k, prediction in enumerate(predictions):
        total = total + column(each[:, k], z) * prediction.to(z.dtype)
    return total


def predict(term: Term, form: Form, x: Tensor, t: Tensor) -> Tensor:
    """The network's data or noise prediction at (x, t)."""
    return term.model.data(x, t) if form == "data" else term.model.noise(x, t)


def level_of(term: Term, t0: Tensor, t1: Tensor) -> Tensor:
    """(B,) the noise level of a step: that in the middle of it in half log signal-to-noise ratio; 0 for a flow."""
    if not isinstance(term, ReverseSDE):
        return torch.zeros_like(t0)
    sde = term.model.sde
    middle = 0.5 * (sde.half_log_snr(t0) + sde.half_log_snr(t1))
    return term.level(sde.clamp(sde.time_at(middle)))

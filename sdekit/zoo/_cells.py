"""The exact noise prediction for data that are uniform within known cells.

A pixel of dequantised data is uniform within one of K cells of width h. Given the probabilities pi_k of the cells,
the density of x_t = alpha x_0 + sigma eps and its derivatives are sums over the edges e_0 < ... < e_K:

    p   = sum_k pi_k [Phi(z_k) - Phi(z_k+1)] / (alpha h),               z_k = (x - alpha e_k)/sigma,
    p'  = sum_k pi_k [phi(z_k) - phi(z_k+1)] / (alpha h sigma),
    p'' = sum_k pi_k [z_k+1 phi(z_k+1) - z_k phi(z_k)] / (alpha h sigma^2),

and the noise prediction is the posterior mean -sigma p'/p. A broad Gaussian of weight 1e-5 is mixed in: it keeps p
above zero, and what a network says about impossible pixels finite. The probabilities are softmax(l_k + sum_c f_ck a_c):
fixed log-probabilities l, and a few coefficients a that a network predicts, on fixed features f.

Everything is elementwise, so its derivatives with respect to x and a are three small tensors. They are computed in
closed form along with the value, and a product with the Jacobian is then a few multiplications: an exact trace, which
needs one product a dimension, runs these K-fold sums once and not once a dimension.

All of it is in float64. At t_max a cell is 1e-3 of the noise wide and the differences lose three digits; float32 has
not that many to lose, and a second formula for wide noise would put a jump where the two meet.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FLOOR = 1e-5
_FLOOR_STD = 1.0  # of the floor in x_0: wider than the data, so that it decays slowest
_FAR = 26.0  # standard deviations: phi is 1e-147 there, and beyond it denormals cost ten times a multiplication
_TINY = 1e-140  # its inverse can still be squared, which second derivatives do


class Cells(NamedTuple):
    """What is known of the data, all float64.

    Attributes:
        edges: (K + 1,), increasing, equidistant.
        log_probability: (K, D), log-probability of each cell at each pixel, up to a constant a pixel.
        features: (C, K), what a coefficient adds to the log-probability of each cell.
    """

    edges: Tensor
    log_probability: Tensor
    features: Tensor


class CellNoise(NamedTuple):
    """The prediction and its derivatives, float64.

    Attributes:
        noise: (B, D).
        by_x: (B, D), d noise / d x.
        by_coefficient: (B, C, D), d noise / d coefficient.
    """

    noise: Tensor
    by_x: Tensor
    by_coefficient: Tensor


def cell_noise(x: Tensor, coefficients: Tensor, alpha: Tensor, sigma: Tensor, cells: Cells) -> CellNoise:
    """The exact noise prediction and its derivatives, in plain operations that can be differentiated again.

    Args:
        x: (B, D) states.
        coefficients: (B, C, D), the network's.
        alpha: (B,) float64.
        sigma: (B,) float64.
        cells: Edges, log-probabilities, features.
    """
    x, a, s = x.double(), alpha[:, None], sigma[:, None]
    batch, size = x.shape
    count = cells.features.shape[0]
    # Cells come first: sums and differences over them are then over whole contiguous planes.
    flat = coefficients.double().transpose(0, 1).reshape(count, batch * size)
    change = (cells.features.T @ flat).reshape(-1, batch, size)
    pi = torch.softmax(cells.log_probability[:, None] + change, 0)
    z = ((x / s)[None] - (a / s) * cells.edges[:, None, None]).clamp(-_FAR, _FAR)
    phi = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    # Phi(z) as a step plus the tail beyond |z|: differences of two tails keep the digits that differences of Phi lose.
    above = z >= 0
    sign = torch.where(above, 1.0, -1.0)
    tail = 0.5 * sign * torch.special.erfc(sign * z * math.sqrt(0.5))
    mass = (above[:-1] & ~above[1:]).double() - (tail[:-1] - tail[1:])
    slope = phi[:-1] - phi[1:]
    moment = z * phi

    unit = (1.0 - _FLOOR) / (a * (cells.edges[1] - cells.edges[0]))
    variance = (a * _FLOOR_STD) ** 2 + s * s
    floor = _FLOOR * torch.exp(-0.5 * x * x / variance) / torch.sqrt(2.0 * math.pi * variance)
    p0 = unit * (pi * mass).sum(0) + floor
    p1 = unit / s * (pi * slope).sum(0) - x / variance * floor
    p2 = unit / (s * s) * (pi * (moment[1:] - moment[:-1])).sum(0) + (x * x / variance - 1.0) / variance * floor
    # Beyond 25 standard deviations p0 is beyond use. The floor's score is the right one there, and the division is made
    # by 1: a zero under a gradient would come back as NaN through the branch that was not taken.
    known = p0 > _TINY
    inverse = torch.where(known, p0, 1.0).reciprocal()
    score = torch.where(known, p1 * inverse, -x / variance)
    by_x = torch.where(known, s * (score * score - p2 * inverse), s / variance)
    share = pi * (unit * inverse * (s * score * mass - slope))
    by_log_probability = share - pi * share.sum(0)
    by_coefficient = (cells.features @ by_log_probability.reshape(-1, batch * size)).reshape(count, batch, size)
    return CellNoise(-s * score, by_x, by_coefficient.transpose(0, 1))


class CellHead(torch.autograd.Function):
    """`cell_noise` with derivatives by multiplication. Call `CellHead.apply(x, coefficients, alpha, sigma, *cells)[0]`.

    Forward and backward mode, torch.func transforms, batched products and second derivatives are supported. Gradients
    reach x and the coefficients, not alpha, sigma or the cells.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, coefficients: Tensor, alpha: Tensor, sigma: Tensor, edges: Tensor, log_p: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = cell_noise(x, coefficients, alpha, sigma, Cells(edges, log_p, features))
        return out.noise.to(x.dtype), out.by_x.to(x.dtype), out.by_coefficient.to(x.dtype).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.save_for_forward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *inputs, by_x, by_coefficient = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated: the derivatives need their own graph
            x, coefficients, alpha, sigma, *cells = inputs
            again = cell_noise(x, coefficients, alpha, sigma, Cells(*cells))
            by_x, by_coefficient = again.by_x.to(x.dtype), again.by_coefficient.to(x.dtype)
        return grad * by_x, grad.unsqueeze(-2) * by_coefficient, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, coefficients: Tensor | None, *_: Any) -> tuple[Tensor, None, None]:
        by_x, by_coefficient = ctx.saved_tensors
        change = torch.zeros_like(by_x) if x is None else x * by_x
        if coefficients is not None:
            change = change + (coefficients * by_coefficient).sum(-2)
        return change, None, None

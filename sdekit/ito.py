"""Samples of the reverse SDE with the log density of each, gathered on the way.

One step, from t to the less noisy s, of half_log_snr h, with k^2 = 1 - exp(-2h) and fresh noise z, draws

    x_s = alpha_s x0_hat + sigma_s (exp(-h) eps + k z)

and adds the log ratio of that draw's density to the forward process's density of going back,

    log p_s(x_s) - log p_t(x_t) ~ D log(sigma_t/sigma_s) + 1/2 |k eps - exp(-h) z|^2 - 1/2 |z|^2.

As h -> 0 this is Ito's formula (f D + g^2/2 |s|^2) d tau + g s . dw. The sum over the steps, from the prior's log
density on, estimates log p of the exact score's marginals, and of nothing else. For any network and any steps it is

    log p(x) + log of [path given x under the model / path given x under the forward process],

p the density of the chain that drew x: its mean is *above* log p(x) by a Kullback-Leibler divergence, where `sde_bound`
is below the model's. What a step leaves out is, to leading order, r - E r with
r = 1/2 k exp(lambda_s) (x0_hat_s - x0_hat_t) . z.

Source: Skreta et al. 2024, the superposition of diffusion models using the Ito density estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import grid
from ._checks import choose_device, require_count, require_deterministic, require_indices, require_seed
from ._tensor import column, dot
from .brownian import IndependentIncrements
from .model.parameterization import Data, Noise
from .model.score_model import ScoreModel
from .prior import draw_prior


class ItoDensity(NamedTuple):
    """Samples and the log density gathered on the way to them.

    Attributes:
        x: (n, *event) samples of the model at t_min.
        value: (n,) float64 nats, estimate of log p_{t_min}(x).
        std_error: (n,) float64 nats, what the discretisation leaves, by its own estimate.
        evaluations: (n,) int64 network evaluations.
    """

    x: Tensor
    value: Tensor
    std_error: Tensor
    evaluations: Tensor


def ito_log_density(
    model: ScoreModel,
    shape: Sequence[int],
    *,
    steps: int = 256,
    seed: int = 0,
    indices: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    batch: int = 1024,
) -> ItoDensity:
    """Samples of the reverse SDE, each with an estimate of its log density gathered on the way; no divergence.

    Exact scores: the estimate tends to log p_{t_min}(x) as 1/sqrt(steps), under the SDE's prior. Other networks: its
    mean is above the log density of the chain that drew x, by as much as the paths differ from the forward process.

    Args:
        model: The score model, in eval mode.
        shape: (n, *event).
        steps: Of the grid, equally spaced in the mixed variable; as many network evaluations.
        seed: Of the noise, 0 <= seed < 2^63; the start is that of `sample`.
        indices: (n,) global sample numbers that key the noise; default 0..n-1.
        dtype: Of the samples; default torch's default.
        device: Default: that of the network's parameters, else the CPU.
        batch: Rows of a network call, >= 1; no result depends on it.

    Returns:
        An ItoDensity.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        NetworkError: The network cannot be used.
    """
    sizes = tuple(shape)
    if len(sizes) < 2 or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"shape={shape!r}; (n, *event) with at least one event axis is needed, for example (16, 2).")
    require_count("steps", steps, 3)
    require_count("batch", batch)
    require_seed(seed)
    require_deterministic(model)
    model.check_batch(sizes[0])
    numbers = require_indices(indices, sizes[0], choose_device(model, device))
    start = draw_prior(model, sizes, seed, numbers, dtype or torch.get_default_dtype())
    times = grid.likelihood(model.sde, steps, model.data_std).to(start.device)
    with torch.no_grad():
        parts = [
            _descend(model.take(rows), start[rows], times, IndependentIncrements(seed, numbers[rows]))
            for rows in torch.split(torch.arange(sizes[0], device=start.device), batch)
        ]
    x, value, variance = (torch.cat(part) for part in zip(*parts, strict=True))
    return ItoDensity(x, value, variance.sqrt(), torch.full_like(numbers, steps))


def _descend(model: ScoreModel, x: Tensor, times: Tensor, path: IndependentIncrements) -> tuple[Tensor, Tensor, Tensor]:
    """x at the last of `times`, the log density gathered, and the variance of what the steps leave in it.

    The mean of r is smooth along the path, so half the square of neighbours' difference stands for its variance.
    """
    sde, size, batch = model.sde, x.shape[1:].numel(), x.shape[0]
    value, variance = sde.prior_log_prob(x), torch.zeros(batch, dtype=torch.float64, device=x.device)
    before, left = None, None
    for number in range(times.shape[0] - 1):
        t, s = times[number].expand(batch), times[number + 1].expand(batch)
        out = model.output(x, t)
        data, eps = (model.as_mix(x, t, out, kind.mix(sde, t)) for kind in (Data(), Noise()))
        if before is not None:
            right = 0.5 * dot(data - before[0], before[1]) * before[2]
            if left is not None:
                variance = variance + 0.5 * (right - left).square()
            left = right
        h = sde.half_log_snr(s) - sde.half_log_snr(t)
        keep, share = torch.exp(-h), (-torch.expm1(-2.0 * h)).sqrt()
        z = path.normal(torch.full_like(path.indices, number), x)
        back = column(share, x) * eps - column(keep, x) * z
        value = value + size * (sde.log_sigma(t) - sde.log_sigma(s)) + 0.5 * (dot(back, back) - dot(z, z))
        noise = column(sde.sigma(s) * keep, x) * eps + column(sde.sigma(s) * share, x) * z
        x = column(sde.alpha(s), x) * data + noise
        before = (data, z, share * torch.exp(sde.half_log_snr(s)))
    steps = times.shape[0] - 1
    return x, value, variance * (steps / (steps - 2))  # the first step has no neighbour, the last no right end

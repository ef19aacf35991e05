"""diffrax on the exact mixtures, written in jax.numpy: VP, float64, every sample with its own steps (vmap).

With lambda_ki the eigenvalues of component k's covariance, V_k its axes, m_k its mean, and at time t

    v_ki = alpha^2 lambda_ki + sigma^2,   z_k = V_k'(x - alpha m_k),   r_k = softmax_k of the weighted densities,

the score and its divergence are

    score = -sum_k r_k V_k (z_k / v_k),      div score = sum_k r_k (|z_k / v_k|^2 - sum_i 1/v_ki) - |score|^2,

and the flow is dx/dt = -beta/2 (x + score). jax and diffrax are no dependency of anything here: `available` says
whether they are installed.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import sdekit

from .peers import Run
from .problems import Mixture

available = all(importlib.util.find_spec(name) is not None for name in ("jax", "diffrax"))


def diffrax_tsit5(mixture: Mixture, sde: sdekit.VPSDE, x: Tensor, tolerance: float) -> Run:
    """diffrax's Tsit5 with its PIDController at rtol = atol = `tolerance`, on the CPU, compiled once before timing.

    Args:
        mixture: The data's law.
        sde: The linear VP process; its betas enter the formulas here.
        x: (B, D) float64 states at t_min.
        tolerance: Relative and absolute.
    """
    import jax
    import jax.numpy as jnp

    compiled = _compiled(mixture, sde)
    points, bound = jnp.asarray(x.numpy()), jnp.asarray(tolerance)
    jax.block_until_ready(compiled(points, bound))
    began = time.process_time()
    last, steps, good = jax.block_until_ready(compiled(points, bound))
    seconds = time.process_time() - began
    end, count, arrived = (torch.from_numpy(jax.device_get(part).copy()) for part in (last, steps, good))
    log_prob = sde.prior_log_prob(end[:, :-1]) + end[:, -1]
    # Six new stages a step (first same as last), two evaluations to start.
    evaluations = 6.0 * count.double() + 2.0
    return Run(torch.where(arrived, log_prob, torch.nan), int(evaluations.max()), float(evaluations.mean()), seconds)


@lru_cache(maxsize=4)
def _compiled(mixture: Mixture, sde: sdekit.VPSDE) -> Callable[..., Any]:
    """(B, D) points, a tolerance -> the states at t_max with their log determinants, steps, whether they arrived."""
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    values, axes = torch.linalg.eigh(mixture.covariances)
    weights, means, values, axes = (jnp.asarray(v.numpy()) for v in (mixture.weights, mixture.means, values, axes))
    low, high = sde.beta_min, sde.beta_max

    def field(t, state, _):
        point = state[:-1]
        integral = t * (low + 0.5 * (high - low) * t)
        alpha, noise = jnp.exp(-0.5 * integral), -jnp.expm1(-integral)
        spread = alpha**2 * values + noise
        z = jnp.einsum("kji,kj->ki", axes, point - alpha * means)
        share = jax.nn.softmax(jnp.log(weights) - 0.5 * jnp.sum(z**2 / spread + jnp.log(spread), 1))
        pulled = z / spread
        score = -jnp.einsum("k,kji,ki->j", share, axes, pulled)
        divergence = share @ (jnp.sum(pulled**2, 1) - jnp.sum(1.0 / spread, 1)) - score @ score
        rate = -0.5 * (low + (high - low) * t)
        return jnp.append(rate * (point + score), rate * (point.shape[0] + divergence))

    def solve(point, tolerance):
        found = diffrax.diffeqsolve(
            *(diffrax.ODETerm(field), diffrax.Tsit5(), sde.t_min, sde.t_max, None, jnp.append(point, 0.0)),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=20_000,
            throw=False,
        )
        return found.ys[0], found.stats["num_steps"], found.result == diffrax.RESULTS.successful

    return jax.jit(jax.vmap(solve, in_axes=(0, None)))

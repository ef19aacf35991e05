"""diffrax on the exact mixtures, written in jax.numpy: VP, float64, every sample with its own steps (vmap).

Of networks it calls torch back: one call a stage for the whole batch, so its evaluations are its own and its time is
not. With lambda_ki the eigenvalues of component k's covariance, V_k its axes, m_k its mean, and at time t

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

from .peers import ProbeOrExact, Run, _Field
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
    end, arrived, evaluations = _arrived(jax.block_until_ready(compiled(points, bound)))
    seconds = time.process_time() - began
    log_prob = sde.prior_log_prob(end[:, :-1]) + end[:, -1]
    return Run(torch.where(arrived, log_prob, torch.nan), int(evaluations.max()), float(evaluations.mean()), seconds)


def _arrived(found: Any) -> tuple[Tensor, Tensor, Tensor]:
    """States at the end, whether they arrived, and evaluations (B,), of what the compiled solve gave."""
    import jax

    end, count, arrived = (torch.from_numpy(jax.device_get(part).copy()) for part in found)
    # Six new stages a step (first same as last), two evaluations to start.
    return end, arrived, 6.0 * count.double() + 2.0


def diffrax_of_network(model: sdekit.ScoreModel, x: Tensor, probe: ProbeOrExact, tolerance: float) -> Run:
    """The same solver on any model: torch is called back at every stage.

    Args:
        model: Float64, on the CPU.
        x: (B, *event) float64 states at t_min.
        probe: (B, D) signs, one fixed probe a sample; None: the exact trace.
        tolerance: Relative and absolute.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # a callback that waits for its own arguments
    field = _Field(model, x.shape[1:], probe)

    def call(t: Any, state: Any, signs: Any) -> Any:
        times, states, given = (torch.from_numpy(np.array(part)) for part in (t, state, signs))
        field.probe = None if probe is None else given
        with torch.no_grad():
            return field(times, states).numpy()

    def slope(t: Any, state: Any, signs: Any) -> Any:
        return jax.pure_callback(call, jax.ShapeDtypeStruct(state.shape, state.dtype), t, state, signs,
                                 vmap_method="broadcast_all")  # fmt: skip

    start, signs = jnp.asarray(field.start(x).numpy()), jnp.asarray((x.flatten(1) if probe is None else probe).numpy())
    solve = jax.jit(jax.vmap(_solver(slope, model.sde.t_min, model.sde.t_max), in_axes=(0, None, 0)))
    bound = jnp.asarray(tolerance)
    ready = solve.lower(start, bound, signs).compile()
    began = time.process_time()
    end, arrived, evaluations = _arrived(jax.block_until_ready(ready(start, bound, signs)))
    seconds = time.process_time() - began
    log_prob = torch.where(arrived, field.finish(end), torch.nan)
    return Run(log_prob, field.calls, float(evaluations.mean()), seconds, field.latent(end))


def _solver(field: Callable[..., Any], first: float, last: float) -> Callable[..., Any]:
    """A start, a tolerance, arguments of the field -> the state at `last`, steps, whether it arrived."""
    import diffrax

    def solve(start: Any, tolerance: Any, args: Any) -> Any:
        found = diffrax.diffeqsolve(
            *(diffrax.ODETerm(field), diffrax.Tsit5(), first, last, None, start, args),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=20_000,
            throw=False,
        )
        return found.ys[0], found.stats["num_steps"], found.result == diffrax.RESULTS.successful

    return solve


@lru_cache(maxsize=4)
def _compiled(mixture: Mixture, sde: sdekit.VPSDE) -> Callable[..., Any]:
    """(B, D) points, a tolerance -> the states at t_max with their log determinants, steps, whether they arrived."""
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

    solve = _solver(field, sde.t_min, sde.t_max)
    return jax.jit(jax.vmap(lambda x, tolerance: solve(jnp.append(x, 0.0), tolerance, None), in_axes=(0, None)))

"""diffrax on the network of `runtime.py`: a program of its own, since jax may live in another environment.

    python runtime_jax.py PROBLEM.npz TOLERANCE REPEATS  ->  {"evaluations": mean of a sample, "seconds": of each}

The noise network's probability flow under VP (beta from 0.1 to 20) with one fixed probe, in float32,

    dx/dt = -beta/2 (x - eps(x)/sigma),      dl/dt = v . d(dx/dt)/dx v,

by Dopri5 and a PIDController, every sample with its own steps (vmap), compiled before the clock starts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

BETAS, ENDS = (0.1, 20.0), (1e-5, 1.0)


def main(path: str, tolerance: float, repeats: int) -> None:
    problem = np.load(path)
    count = sum(name.startswith("w") for name in problem.files)
    layers = [(jnp.asarray(problem[f"w{k}"]), jnp.asarray(problem[f"b{k}"])) for k in range(count)]

    def network(x: Any) -> Any:
        for number, (weight, bias) in enumerate(layers):
            x = weight @ (jax.nn.silu(x) if number else x) + bias
        return x

    def field(t: Any, state: Any, probe: Any) -> Any:
        integral = t * (BETAS[0] + 0.5 * (BETAS[1] - BETAS[0]) * t)
        half = 0.5 * (BETAS[0] + (BETAS[1] - BETAS[0]) * t)
        sigma = jnp.sqrt(-jnp.expm1(-integral))
        slope, pull = jax.vjp(lambda x: half * (network(x) / sigma - x), state[:-1])
        return jnp.append(slope, pull(probe)[0] @ probe)

    def solve(x: Any, probe: Any) -> Any:
        found = diffrax.diffeqsolve(
            *(diffrax.ODETerm(field), diffrax.Dopri5(), *ENDS, None, jnp.append(x, 0.0), probe),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=20_000,
        )
        return found.ys[0], found.stats["num_steps"]

    compiled = jax.jit(jax.vmap(solve))
    x, probe = jnp.asarray(problem["x"]), jnp.asarray(problem["probe"])
    _, steps = jax.block_until_ready(compiled(x, probe))
    evaluations = float(np.mean(6.0 * np.asarray(steps) + 2.0))  # first same as last
    now = time.perf_counter if jax.default_backend() != "cpu" else time.process_time
    took = []
    for _ in range(repeats):
        began = now()
        jax.block_until_ready(compiled(x, probe))
        took.append((now() - began) / evaluations)
    print(json.dumps({"seconds": min(took), "evaluations": evaluations}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))

"""Other packages' ODE solvers on the same likelihood: each in its own habitual setting.

They integrate x and log det together in (t, x), from t_min to t_max, the prior added at the end:

    torchdiffeq   dopri5, the whole batch in one odeint (as FFJORD, k-diffusion and flow_matching call it)
    scipy         RK45 on the flattened batch (as score_sde calls it; there the network runs twice an evaluation)
    torchode      tsit5, steps per sample; a call evaluates the whole batch until its last sample is done

Value and trace come from one network call for each, as in sdekit, so that only the solvers differ.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torchode
from scipy.integrate import solve_ivp
from torch import Tensor
from torchdiffeq import odeint

import sdekit

ProbeOrExact = Tensor | None


class Run(NamedTuple):
    """What a solve gave and cost.

    Attributes:
        log_prob: (B,) nats; NaN if the solve failed.
        calls: Network calls of the batch.
        evaluations: Mean network evaluations a sample needed (the calls, for solvers that step all samples together).
        seconds: CPU time.
        latent: (B, *event) x at t_max, where the package gives it.
    """

    log_prob: Tensor
    calls: int
    evaluations: float
    seconds: float
    latent: Tensor | None = None


class _Field:
    """(t, (B, D + 1)) -> slopes of x and of the log determinant; counts its calls."""

    def __init__(self, model: sdekit.ScoreModel, event: torch.Size, probe: ProbeOrExact) -> None:
        self.model, self.event, self.probe, self.calls = model, event, probe, 0

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        self.calls += 1
        sde = self.model.sde
        with torch.enable_grad():
            leaf = state[:, :-1].detach().requires_grad_()
            flow = self.model.velocity(leaf.reshape(-1, *self.event), sde.clamp(t)).flatten(1)
            if self.probe is None:
                size = flow.shape[1]
                axes = torch.eye(size, dtype=flow.dtype)[:, None, :].expand(size, *flow.shape)
                trace = torch.einsum("ibi->b", torch.autograd.grad(flow, leaf, axes, is_grads_batched=True)[0])
            else:
                trace = (torch.autograd.grad(flow, leaf, self.probe)[0] * self.probe).sum(1)
        return torch.cat((flow.detach(), trace[:, None]), 1)

    def start(self, x: Tensor) -> Tensor:
        return torch.cat((x.flatten(1), x.new_zeros(x.shape[0], 1)), 1)

    def latent(self, state: Tensor) -> Tensor:
        return state[:, :-1].reshape(-1, *self.event)

    def finish(self, state: Tensor) -> Tensor:
        return self.model.sde.prior_log_prob(self.latent(state)) + state[:, -1].double()


def torchdiffeq_dopri5(model: sdekit.ScoreModel, x: Tensor, probe: ProbeOrExact, tolerance: float) -> Run:
    """torchdiffeq's dopri5 at rtol = atol = `tolerance`."""
    field, sde, began = _Field(model, x.shape[1:], probe), model.sde, time.process_time()
    times = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64, device=x.device)
    with torch.no_grad():
        last = odeint(field, field.start(x), times, rtol=tolerance, atol=tolerance, method="dopri5")[-1]
    return Run(field.finish(last), field.calls, float(field.calls), time.process_time() - began, field.latent(last))


def scipy_rk45(model: sdekit.ScoreModel, x: Tensor, probe: ProbeOrExact, tolerance: float) -> Run:
    """scipy's RK45 at rtol = atol = `tolerance`."""
    field, sde, began = _Field(model, x.shape[1:], probe), model.sde, time.process_time()
    start = field.start(x)

    def rhs(t: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat).to(x.dtype).reshape(start.shape)
        return field(torch.tensor(t, dtype=torch.float64), state).double().reshape(-1).numpy()

    flat = start.double().reshape(-1).numpy()
    path = solve_ivp(rhs, (sde.t_min, sde.t_max), flat, "RK45", rtol=tolerance, atol=tolerance)
    last = torch.from_numpy(path.y[:, -1].copy()).reshape(start.shape)
    return Run(field.finish(last), field.calls, float(field.calls), time.process_time() - began, field.latent(last))


def torchode_tsit5(model: sdekit.ScoreModel, x: Tensor, probe: ProbeOrExact, tolerance: float) -> Run:
    """torchode's tsit5 at rtol = atol = `tolerance`, steps per sample."""
    field, sde, began = _Field(model, x.shape[1:], probe), model.sde, time.process_time()
    ends = (torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device) for t in (sde.t_min, sde.t_max))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        term = torchode.ODETerm(field)
        controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Tsit5(term=term), controller)
        found = solver.solve(torchode.InitialValueProblem(field.start(x), *ends))
    seconds = time.process_time() - began
    # Six new stages a step (first same as last), two evaluations to start.
    mean = float(6.0 * found.stats["n_steps"].double().mean() + 2.0)
    log_prob = torch.where(found.status == 0, field.finish(found.ys[:, -1]), torch.nan)
    return Run(log_prob, field.calls, mean, seconds, field.latent(found.ys[:, -1]))


PEERS: dict[str, Callable[[sdekit.ScoreModel, Tensor, ProbeOrExact, float], Run]] = {
    "torchdiffeq dopri5": torchdiffeq_dopri5,
    "scipy RK45": scipy_rk45,
    "torchode tsit5": torchode_tsit5,
}


def sdekit_default(model: sdekit.ScoreModel, x: Tensor, probe: ProbeOrExact, tolerance: float) -> Run:
    """sdekit's default at `tolerance` nats; with one fixed probe (`fixed_probe`) where `probe` is given."""
    divergence = sdekit.Exact() if probe is None else sdekit.Hutchinson(probes=1, fresh=False)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sdekit.log_likelihood(model, x, divergence=divergence, tolerance=tolerance, throw=False)
    mean = float(found.stats.evaluations.double().mean())
    return Run(found.log_prob, found.stats.calls, mean, time.process_time() - began, found.latent)


def fixed_probe(x: Tensor) -> Tensor:
    """(B, D) the signs that sdekit's fixed probe of seed 0 has for samples 0..B-1: all methods get the same."""
    count, size = x.shape[0], x.shape[1:].numel()
    numbers = torch.arange(count)
    fixed = sdekit.Hutchinson(probes=1, fresh=False)
    return fixed.draw(fixed.keys(0, numbers), torch.zeros_like(numbers), size, x.dtype)[0].to(x.device)

"""Other packages' own likelihoods, called as their users call them. Each is imported where it is first used.

zuko           FreeFormJacobianTransform (FFJORD): its dopri5 at its default tolerances, the trace exact
flow_matching  ODESolver.compute_likelihood: torchdiffeq's dopri5 on its clock, 1 at the data and 0 at the noise,
               the trace exact, one backward pass a dimension
k-diffusion    sampling.log_likelihood: of y = x / alpha as a function of sigma / alpha, the data taken for y at the
               first of them; one probe, from the global generator; it gives no latent
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sdekit

from .peers import Run
from .samplers import Counted, k_diffusion, ratios

LIMIT = 3000  # calls: one such solve was seen to go on for minutes without an end


class GaveUp(Exception):
    """A solve that was still going on after LIMIT calls."""


class _Velocity:
    """The drift of the probability flow, calls counted and limited."""

    def __init__(self, model: sdekit.ScoreModel) -> None:
        self.model, self.sde, self.calls = model, model.sde, 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > LIMIT:
            raise GaveUp
        return self.model.velocity(x, self.sde.clamp(t.double()))


def zuko_ffjord(model: sdekit.ScoreModel, x: Tensor) -> Run:
    """zuko's free-form Jacobian transform at its defaults, atol 1e-6 and rtol 1e-5."""
    from zuko.transforms import FreeFormJacobianTransform

    field, sde, began = _Velocity(model), model.sde, time.process_time()
    transform = FreeFormJacobianTransform(field, t0=sde.t_min, t1=sde.t_max)
    with torch.no_grad():
        latent, log_det = transform.call_and_ladj(x)
    seconds = time.process_time() - began
    return Run(sde.prior_log_prob(latent) + log_det, field.calls, float(field.calls), seconds, latent)


def flow_matching_dopri5(model: sdekit.ScoreModel, x: Tensor) -> Run:
    """flow_matching's likelihood with dopri5 at its default tolerances, 1e-5."""
    from flow_matching.solver import ODESolver

    field, sde, began = _Velocity(model), model.sde, time.process_time()
    span = sde.t_max - sde.t_min

    class Backward(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
            return -span * field(sde.t_min + span * (1.0 - t.double()), x)

    clock = torch.tensor([1.0, 0.0], dtype=torch.float64)
    latent, log_prob = ODESolver(Backward()).compute_likelihood(
        *(x, sde.prior_log_prob, None, "dopri5"), time_grid=clock, exact_divergence=True
    )
    return Run(log_prob.detach(), field.calls, float(field.calls), time.process_time() - began, latent.detach())


def k_diffusion_default(model: sdekit.ScoreModel, x: Tensor) -> Run:
    """k-diffusion's log_likelihood at its default tolerances, 1e-4, and its one probe."""
    field, sde, began = Counted(model), model.sde, time.process_time()
    low, high = ratios(sde)

    def denoiser(y: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        t = field.time(sigma)
        return field.data(sde.alpha(t).reshape(-1, *[1] * (y.dim() - 1)) * y, t)

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        found, _ = k_diffusion().log_likelihood(denoiser, x, low, high)
    return Run(found, field.calls, float(field.calls), time.process_time() - began)


OWN: dict[str, tuple[str, Callable[[sdekit.ScoreModel, Tensor], Run]]] = {
    "zuko FFJORD": ("zuko", zuko_ffjord),
    "flow_matching dopri5 1e-5": ("flow_matching", flow_matching_dopri5),
    "k-diffusion, one probe": ("k_diffusion", k_diffusion_default),
}


def own_likelihood(name: str, model: sdekit.ScoreModel, x: Tensor) -> Run | None:
    """What the package `name` of OWN says of `x`, NaN after LIMIT calls; None where it is not installed."""
    package, method = OWN[name]
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return method(model, x)
    except GaveUp:
        return Run(torch.full((x.shape[0],), math.nan, dtype=torch.float64), LIMIT, float(LIMIT), math.nan)

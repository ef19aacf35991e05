"""Other people's solvers take the terms as they are, and arrive where sdekit does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import SDES, draw, gaussian, mixture
from scipy.integrate import solve_ivp

import sdekit

TARGET = mixture(2, 4)


def states(sde, t, count=5):
    return sde.perturb(TARGET.sample(count), t, draw(1, count, 2))


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
@pytest.mark.parametrize("backward", [False, True])
def test_torchdiffeq_takes_the_flow_as_it_is(name, backward):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    sde = SDES[name]
    flow = sdekit.ProbabilityFlow(TARGET.score_model(sde))
    ends = (sde.t_max, sde.t_min) if backward else (sde.t_min, sde.t_max)
    x = states(sde, ends[0])
    with torch.no_grad():
        theirs = torchdiffeq.odeint(flow, x, torch.tensor(ends, dtype=torch.float64), rtol=1e-7, atol=1e-7)[-1]
    ours = (sdekit.decode if backward else sdekit.encode)(flow.model, x, controller=sdekit.PID(1e-8, 1e-8)).x
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_torchsde_takes_the_reverse_equation_over_its_span(eta):
    # 4,000 paths of 200 steps: mean and variance of each coordinate within 6 standard errors and 2% of bias (weak
    # order 1): false alarm 1e-8.
    torchsde = pytest.importorskip("torchsde")
    sde, target, n = sdekit.VPSDE(t_min=1e-2), gaussian(2), 4_000
    reverse = sdekit.ReverseSDE(target.score_model(sde), eta)
    assert reverse.span == (-1.0, -1e-2)
    span = torch.tensor(reverse.span, dtype=torch.float64)
    noise = torchsde.BrownianInterval(span[0], span[1], (n, 2), dtype=torch.float64, entropy=3)
    with torch.no_grad():
        end = torchsde.sdeint(reverse, draw(2, n, 2), span, bm=noise, dt=0.99 / 200, method="euler")[-1]
    ours = sdekit.sample(
        *(reverse.model, (n, 2)),
        eta=eta,
        controller=sdekit.FixedGrid(sdekit.grid.uniform_time(sde, 200)),
        dtype=torch.float64,
        denoise=False,
    ).x
    alpha, sigma = float(sde.alpha(1e-2)), float(sde.sigma(1e-2))
    basis, values = target._components.basis[0], target._components.values[0]
    variance = alpha**2 * ((basis * values) @ basis.T).diagonal() + sigma**2
    for x in (end, ours):
        offset = x - alpha * target._components.means[0]
        assert (offset.mean(0).abs() < 6.0 * (variance / n).sqrt() + 0.02 * variance.sqrt()).all()
        assert ((offset.square().mean(0) / variance - 1.0).abs() < 6.0 * math.sqrt(2.0 / n) + 0.06).all()


def test_torchsde_and_sdekit_agree_where_there_is_no_noise():
    torchsde = pytest.importorskip("torchsde")
    sde = sdekit.VPSDE(t_min=1e-2)
    reverse, x = sdekit.ReverseSDE(TARGET.score_model(sde), 0.0), draw(2, 3, 2)
    span = torch.tensor(reverse.span, dtype=torch.float64)
    with torch.no_grad():
        end = torchsde.sdeint(reverse, x, span, dt=0.99 / 64, method="euler")[-1]
    grid = sdekit.FixedGrid(sdekit.grid.uniform_time(sde, 64))
    ours = sdekit.integrate(sdekit.ProbabilityFlow(reverse.model), sdekit.Euler(), grid, x, 1.0, 1e-2).x
    torch.testing.assert_close(end, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_scipy_takes_the_flow_through_numpy(name):
    sde = SDES[name]
    flow = sdekit.ProbabilityFlow(TARGET.score_model(sde))
    x = states(sde, sde.t_min, 2)

    def slope(t, flat):
        with torch.no_grad():
            return flow(t, torch.from_numpy(flat.reshape(2, 2))).numpy().ravel()

    solved = solve_ivp(slope, (sde.t_min, sde.t_max), x.numpy().ravel(), method="RK45", rtol=1e-7, atol=1e-8)
    ours = sdekit.encode(flow.model, x, controller=sdekit.PID(1e-8, 1e-8)).x
    np.testing.assert_allclose(solved.y[:, -1].reshape(2, 2), ours.numpy(), rtol=1e-3, atol=1e-4)


def test_a_solver_that_steps_outside_meets_the_clamped_flow():
    # torchdiffeq evaluates beyond its last time: the network must never see that.
    sde = SDES["vp"]
    flow, x = sdekit.ProbabilityFlow(TARGET.score_model(sde)), draw(1, 3, 2)
    torch.testing.assert_close(flow(1.36, x), flow(1.0, x), rtol=0, atol=0)
    torch.testing.assert_close(flow(-21.6, x), flow(1e-5, x), rtol=0, atol=0)
    torch.testing.assert_close(flow(torch.tensor(0.3, dtype=torch.float32), x), flow(float(torch.tensor(0.3)), x))


def test_the_log_density_by_torchdiffeq_is_sdekits():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    sde, x = SDES["vp"], TARGET.sample(4)
    model = TARGET.score_model(sde)
    flow = sdekit.ProbabilityFlow(model)

    def augmented(t, state):
        with torch.enable_grad():
            leaf = state[0].requires_grad_()
            rate = flow(t, leaf)
            rows = [torch.autograd.grad(rate[:, i].sum(), leaf, retain_graph=True)[0][:, i] for i in range(2)]
        return rate.detach(), sum(rows)

    zero = torch.zeros(4, dtype=torch.float64)
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    latent, gained = torchdiffeq.odeint(augmented, (x, zero), ends, rtol=1e-8, atol=1e-8)
    theirs = sde.prior_log_prob(latent[-1]) + gained[-1]
    ours = sdekit.log_likelihood(model, x, tolerance=1e-4)
    torch.testing.assert_close(ours.log_prob, theirs, rtol=0, atol=2e-4)

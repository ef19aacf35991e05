"""torchdiffeq, torchsde and scipy take the terms as they are, and agree with sdekit's own solvers."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import draw, gaussian, mixture, seeded
from scipy.integrate import solve_ivp

import sdekit
from sdekit.interop.scipy import right_hand_side

VP = sdekit.VPSDE()
torchdiffeq = pytest.importorskip("torchdiffeq")
torchsde = pytest.importorskip("torchsde")


def own(model, x):
    return sdekit.encode(model, x, solver=sdekit.Dopri8(), controller=sdekit.PID(1e-10, 1e-10)).x


def test_torchdiffeq_integrates_a_probability_flow():
    model, x = mixture(2, 1).score_model(VP), mixture(2, 1).sample(5, generator=seeded(0))
    times = torch.tensor([VP.t_min, VP.t_max], dtype=torch.float64)
    ends = torchdiffeq.odeint(sdekit.ProbabilityFlow(model), x, times, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ends[-1], own(model, x), rtol=0, atol=1e-5)


def test_a_solver_that_overshoots_never_carries_the_network_out_of_its_times():
    seen = []

    class Watching(torch.nn.Module):
        def forward(self, x, label):
            seen.append(label.clone())
            return x * VP.sigma(label)[:, None]

    model = sdekit.ScoreModel(Watching(), VP)
    times = torch.tensor([VP.t_max, VP.t_min], dtype=torch.float64)
    torchdiffeq.odeint(sdekit.ProbabilityFlow(model), draw(0, 3, 2), times, rtol=1e-3, atol=1e-3)
    labels = torch.cat(seen)
    assert labels.min() >= VP.t_min
    assert labels.max() <= VP.t_max


def test_scipy_integrates_a_probability_flow():
    model, x = mixture(2, 1).score_model(VP), mixture(2, 1).sample(5, generator=seeded(0))
    function, start = right_hand_side(sdekit.ProbabilityFlow(model), x)
    found = solve_ivp(function, (VP.t_min, VP.t_max), start, method="DOP853", rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.from_numpy(found.y[:, -1]).reshape(x.shape), own(model, x), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Should have (ta|tb)")
def test_torchsde_integrates_a_reverse_sde():
    """2,000 paths of 60 Euler steps against the Gaussian's variances: within 4.5 standard errors and the bias of the
    scheme, which the same number of steps of sdekit's own method shows too. False alarm below 1e-4."""
    target = gaussian(2)
    sde = sdekit.VPSDE(t_min=1e-2)
    model = target.score_model(sde)
    rsde = sdekit.ReverseSDE(model, eta=1.0)
    start = sde.sample_prior((2000, 2), generator=seeded(0), dtype=torch.float64)
    low, high = rsde.span
    assert low < high
    times = torch.linspace(low, high, 61, dtype=torch.float64)
    torch.manual_seed(0)  # of torchsde's own entropy
    path = torchsde.BrownianInterval(low, high, size=(2000, 2), dtype=torch.float64, entropy=1)
    with torch.no_grad():
        ends = torchsde.sdeint(rsde, start, times, bm=path, method="euler", dt=(high - low) / 60)
    mine = sdekit.sample(
        *(model, (2000, 2)),
        eta=1.0,
        controller=sdekit.FixedGrid(sdekit.grid.uniform_time(sde, 60)),
        denoise=False,
        dtype=torch.float64,
    ).x
    noise = 4.5 * math.sqrt(2.0) * math.sqrt(2 / 2000)
    assert (torch.log(ends[-1].var(0) / mine.var(0)).abs() < noise).all()
    gap = (ends[-1].mean(0) - mine.mean(0)).abs() / mine.std(0)
    assert (gap < 4.5 * math.sqrt(2 / 2000)).all()

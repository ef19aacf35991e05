"""Every stochastic method leaves a mixture's marginals as they are: moments and characteristic function."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import SDES, draw, mixture, times

import sdekit

COUNT, STEPS = 4_000, 64
SOLVERS = {
    "euler-maruyama": (sdekit.EulerMaruyama(), 4),
    "stochastic heun": (sdekit.StochasticHeun(), 1),
    "reverse diffusion": (sdekit.ReverseDiffusion(), 4),
    "sra1": (sdekit.SRA1(), 1),
    "sra3": (sdekit.SRA3(), 1),
    "sde-dpm-1": (sdekit.SDEDPMSolver(), 4),
    "sde-dpm++1": (sdekit.SDEDPMSolverPP(1), 4),
    "sde-dpm++2": (sdekit.SDEDPMSolverPP(2), 1),
    "sa": (sdekit.SASolver(2, 2), 1),
    "langevin": (sdekit.PredictorCorrector(sdekit.SDEDPMSolverPP(1), sdekit.Langevin(0.02)), 4),
}
AT_ONE = {
    "ancestral small": (sdekit.Ancestral(), 4),
    "ancestral large": (sdekit.Ancestral("large"), 4),
    "seeds": (sdekit.SEEDS(), 1),
    "ddim": (sdekit.DDIM(1.0), 4),
}
CASES = [(name, "vp", solver, more, eta) for name, (solver, more) in SOLVERS.items() for eta in (0.4, 1.5)]
CASES += [(name, "ve", solver, more, 1.0) for name, (solver, more) in (SOLVERS | AT_ONE).items()]
CASES += [(name, "vp", solver, more, 1.0) for name, (solver, more) in AT_ONE.items()]


def statistics(x):
    """(N, S) of each sample: coordinates, their products, and waves of a few frequencies."""
    waves = x @ draw(9, 2, 4)
    return torch.cat((x, x.square(), x[:, :1] * x[:, 1:], waves.cos(), waves.sin()), 1)


@pytest.mark.parametrize(
    ("name", "sde", "solver", "more", "eta"), CASES, ids=[f"{name}-{sde}-{eta}" for name, sde, _, _, eta in CASES]
)
def test_the_marginal_of_a_mixture_is_kept(name, sde, solver, more, eta):
    process, target = SDES[sde], mixture(2, 1)
    source = torch.Generator().manual_seed(3)

    def law(t, count):
        x0 = target.sample(count, generator=source)
        return process.perturb(x0, t, torch.randn(count, 2, generator=source, dtype=torch.float64))

    steps = STEPS * more
    grid = process.time_at(torch.linspace(-1.5, 1.0, steps + 1, dtype=torch.float64))
    first, last = process.time_at(times(-1.5, 1.0)).tolist()
    grid[0], grid[-1] = first, last
    term = sdekit.ReverseSDE(target.score_model(process), eta)
    path = sdekit.IndependentIncrements(7, torch.arange(COUNT))
    found = sdekit.integrate(term, solver, sdekit.FixedGrid(grid), law(first, COUNT), first, last, path).x
    exact = law(last, 50 * COUNT)
    means, spread = statistics(exact).mean(0), statistics(exact).std(0)
    z = (statistics(found).mean(0) - means) / (spread * math.sqrt(1.02 / COUNT))
    # 13 statistics, |z| < 5: false alarm 1e-5 a case; the step's own bias is below 1 in all of them.
    assert float(z.abs().max()) < 5.0, (name, z)


def test_it_notices_noise_of_the_wrong_size():
    class Louder(sdekit.IndependentIncrements):
        def increment(self, s0, s1, step, like, lane=0):
            return 1.3 * super().increment(s0, s1, step, like, lane)

    process, target = SDES["vp"], mixture(2, 1)
    first, last = process.time_at(times(-1.5, 1.0)).tolist()
    grid = process.time_at(torch.linspace(-1.5, 1.0, 65, dtype=torch.float64))
    grid[0], grid[-1] = first, last
    source = torch.Generator().manual_seed(3)
    noise = torch.randn(COUNT, 2, generator=source, dtype=torch.float64)
    x = process.perturb(target.sample(COUNT, generator=source), first, noise)
    term = sdekit.ReverseSDE(target.score_model(process), 1.5)
    found = sdekit.integrate(
        term, sdekit.SDEDPMSolverPP(2), sdekit.FixedGrid(grid), x, first, last, Louder(7, torch.arange(COUNT))
    ).x
    exact = process.perturb(target.sample(COUNT, generator=source), last, noise)
    spread = statistics(exact).std(0) * math.sqrt(2.0 / COUNT)
    assert float(((statistics(found) - statistics(exact)).mean(0) / spread).abs().max()) > 8.0

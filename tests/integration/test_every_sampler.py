"""What must hold of every sampler: few steps are finite, and a sample is its own, to the bit."""

from __future__ import annotations

import pytest
import torch
from helpers import PARAMETERIZATIONS, SDES, Function, mixture

import sdekit

SAMPLERS = {
    repr(solver): solver
    for solver in (
        sdekit.Euler(),
        sdekit.Heun(),
        sdekit.Dopri5(),
        sdekit.Adams(3),
        sdekit.Adams(5, "inside"),
        sdekit.DDIM(),
        sdekit.DDIM(0.5),
        sdekit.DPMSolver(3),
        sdekit.DPMSolverPP(2),
        sdekit.DPMSolverPP(3),
        sdekit.DPMSolverPP(3, multistep=False),
        sdekit.DEIS(4),
        sdekit.UniPC(3),
        sdekit.EulerMaruyama(),
        sdekit.Ancestral(),
        sdekit.Ancestral("large"),
        sdekit.ReverseDiffusion(),
        sdekit.StochasticHeun(),
        sdekit.EDMChurn(),
        sdekit.SRA1(),
        sdekit.SRA3(),
        sdekit.SDEDPMSolver(),
        sdekit.SDEDPMSolverPP(2),
        sdekit.SEEDS(),
        sdekit.SASolver(3, 3),
        sdekit.PredictorCorrector(sdekit.SDEDPMSolverPP(1), sdekit.Langevin()),
        sdekit.PredictorCorrector(sdekit.EulerMaruyama(), sdekit.Underdamped()),
    )
}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


@every_sampler
@pytest.mark.parametrize("sde", SDES)
def test_one_to_ten_steps_are_finite_for_every_parameterization(name, sde):
    target, kinds = mixture(2, 1), list(PARAMETERIZATIONS.values())
    for steps in range(1, 11):
        model = target.score_model(SDES[sde], kinds[(steps + len(name)) % len(kinds)])
        found = sdekit.sample(model, (3, 2), solver=SAMPLERS[name], steps=steps, dtype=torch.float64)
        assert torch.isfinite(found.x).all(), (steps, model.parameterization)
        assert found.stats.accepted.tolist() == [steps] * 3


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_is_the_same_to_the_bit_alone_in_a_batch_and_shuffled(name, dtype):
    # The network works number by number: matrix products of another size would round otherwise.
    model = sdekit.ScoreModel(
        Function(lambda x, t: torch.tanh(x) * (1.0 + t.to(x.dtype)[:, None])), SDES["vp"], sdekit.noise(), data_std=0.5
    )

    def drawn(indices):
        return sdekit.sample(
            model, (len(indices), 3), solver=SAMPLERS[name], steps=7, dtype=dtype, indices=torch.tensor(indices), seed=4
        ).x

    together = drawn(list(range(37)))
    assert torch.equal(drawn([36, 5, 11]), together[[36, 5, 11]])
    assert torch.equal(drawn([20]), together[[20]])

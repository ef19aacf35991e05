"""On CUDA: nothing waits within a step, and captured and compiled steps give the eager numbers."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import SDES, mixture, perceptron

import sdekit
from sdekit.loop import Problem, advance, begin

pytestmark = pytest.mark.gpu

SDE = SDES["vp"]
TARGET = mixture(4, 6, count=5)
MODELS = {
    "exact": TARGET.score_model(SDE),
    "network": sdekit.ScoreModel(perceptron(4, 2), SDES["karras"], sdekit.edm(0.7)),
}
DIVERGENCES = [sdekit.Exact(), sdekit.Hutchinson(control=True)]


def data(count=40):
    return TARGET.sample(count, generator=torch.Generator().manual_seed(3)).cuda()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_no_step_waits_for_the_device(name, divergence):
    model, x = MODELS[name].cuda(), data()
    term = sdekit.likelihood_flow.LikelihoodFlow(
        model, divergence, x.shape[1:], sdekit.Hutchinson.keys(0, torch.arange(len(x), device="cuda"))
    )
    with torch.no_grad():
        s0 = term.coordinate(torch.full((len(x),), model.sde.t_min, dtype=torch.float64, device="cuda"))
        problem = Problem(term, sdekit.Adams(5), sdekit.controller.Nats(1e-2), torch.ones_like(s0), None, 1000)
        carry = advance(problem, begin(problem, s0, term.enter(x, s0)))  # small tables are made once
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(6):
                carry = advance(problem, carry)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("slots", [None, 16])
@pytest.mark.parametrize("runtime", ["graph", pytest.param("compile", marks=pytest.mark.gpu(emulated=False))])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_densities_are_the_eager_ones(name, divergence, runtime, slots):
    model, x = MODELS[name].cuda(), data()
    eager = sdekit.log_likelihood(model, x, divergence=divergence, runtime="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = sdekit.log_likelihood(model, x, divergence=divergence, runtime=runtime, slots=slots)
    torch.testing.assert_close(fast.log_prob, eager.log_prob, rtol=0.0, atol=1e-8)
    torch.testing.assert_close(fast.std_error, eager.std_error, rtol=1e-6, atol=1e-9)
    assert torch.equal(fast.stats.evaluations, eager.stats.evaluations)
    assert torch.equal(fast.status, eager.status)


def test_flows_and_noise_are_captured_too():
    model, x = MODELS["exact"].cuda(), data(12)
    for solver, term, path in (
        (sdekit.Heun(), sdekit.ProbabilityFlow(model), None),
        (
            sdekit.EulerMaruyama(),
            sdekit.ReverseSDE(model),
            sdekit.IndependentIncrements(1, torch.arange(12, device="cuda")),
        ),
    ):
        grid = sdekit.FixedGrid(sdekit.grid.likelihood(SDE, 12, model.data_std))
        eager, fast = (
            sdekit.integrate(term, solver, grid, x, SDE.t_max, SDE.t_min, path, runtime=how)
            for how in ("eager", "graph")
        )
        torch.testing.assert_close(fast.x, eager.x, rtol=1e-9, atol=1e-10)


def test_a_network_that_asks_the_host_is_not_captured_and_says_why():
    class Asks(torch.nn.Module):
        def forward(self, x, label):
            return -x if float(x.detach().sum()) < 1e9 else x

    model, x = sdekit.ScoreModel(Asks(), SDE, sdekit.score()), data(8)
    with pytest.warns(sdekit.errors.SdekitWarning, match="captured"):
        fast = sdekit.log_likelihood(model, x, runtime="graph")
    eager = sdekit.log_likelihood(model, x, runtime="eager")
    torch.testing.assert_close(fast.log_prob, eager.log_prob, rtol=0.0, atol=1e-9)

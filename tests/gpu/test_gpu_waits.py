"""On CUDA: how often the host waits for the device does not depend on the number of steps."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import SDES, draw, perceptron

import sdekit

pytestmark = pytest.mark.gpu

SOLVERS = [
    None,
    sdekit.Heun(),
    sdekit.UniPC(3),
    sdekit.EulerMaruyama(),
    sdekit.SRA1(),
    sdekit.PredictorCorrector(sdekit.SDEDPMSolverPP(1), sdekit.SNRLangevin()),
]
DIVERGENCES = [sdekit.Exact(), sdekit.Hutchinson(), sdekit.Hutchinson(2, fresh=False), sdekit.Hutchinson(control=True)]
LARGE = 16_384  # samples, of 4 dimensions: so many that noise and books are made for a step or a node at a time


@pytest.fixture(scope="module")
def model():
    return sdekit.ScoreModel(perceptron(4, 1, width=8), SDES["vp"], sdekit.noise(), data_std=0.5).cuda().eval()


def waits(call):
    """How often a call makes the host wait, once what is made once has been made."""
    call()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in said)


def test_that_a_wait_is_counted():
    x = torch.ones(3, device="cuda")
    assert waits(lambda: float(x.sum())) == 1
    assert waits(lambda: x.sum()) == 0


@pytest.mark.parametrize("runtime", ["auto", "graph"])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_sampling_does_not_wait_step_by_step(model, solver, runtime):
    def call(steps, batch):
        return lambda: sdekit.sample(model, (batch, 4), solver=solver, steps=steps, runtime=runtime)

    batch = 5 if runtime == "graph" else LARGE
    few = waits(call(6, batch))
    assert waits(call(12, batch)) <= few <= 12


@pytest.mark.parametrize("runtime", ["auto", "graph"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_densities_on_a_grid_do_not_wait_node_by_node(model, divergence, runtime):
    x = draw(1, 5 if runtime == "graph" else LARGE, 4).float().cuda()

    def call(nodes):
        return lambda: sdekit.log_likelihood(model, x, nodes=nodes, divergence=divergence, runtime=runtime)

    few = waits(call(6))
    assert waits(call(12)) <= few <= 12


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_controlled_densities_wait_no_more_for_a_tighter_tolerance(model, divergence):
    x = draw(1, 3, 4).cuda()  # too few to leave the batch before all are done

    def call(tolerance):
        return lambda: sdekit.log_likelihood(model, x, tolerance=tolerance, divergence=divergence)

    assert waits(call(1e-2)) <= waits(call(1e-1)) <= 12

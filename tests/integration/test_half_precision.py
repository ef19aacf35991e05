"""Networks of half precision under states of single precision: the budget's line covers what their rounding costs.

The truth is the same network, its rounded weights in double precision, on the same points and grid.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from helpers import mixture, seeded

import sdekit
from sdekit.model.nets import MLP
from sdekit.training import Batch, Recipe, train
from sdekit.zoo import digits as zoo

HALVES = [torch.bfloat16, torch.float16]
TARGET = mixture(2, 3)


@cache
def learned():
    """A small network trained on samples of a mixture, in seconds."""
    torch.manual_seed(0)  # of the initial weights
    net, label = MLP((2,), 64, 3, period=4.0), sdekit.noise(sdekit.LogSigmaLabel(0.25))
    model = sdekit.ScoreModel(net, sdekit.VPSDE(), label, data_std=TARGET.std)

    def batches(generator):
        return Batch(TARGET.sample(256, generator=generator).float(), {})

    return train(model, batches, Recipe(400, learning_rate=3e-3), progress=False).model.eval()


def in_dtype(model, dtype):
    net = copy.deepcopy(model.net).to(dtype)
    return sdekit.ScoreModel(net, model.sde, model.parameterization, model.data_std).eval()


def rounded(model, x, dtype, divergence, nodes):
    """log p by the network in `dtype`, and by its copy of the same weights in double precision."""
    low = in_dtype(model, dtype)
    kept = {"divergence": divergence, "nodes": nodes}
    narrow = sdekit.log_likelihood(low, x.float(), **kept)
    wide = sdekit.log_likelihood(in_dtype(low, torch.float64), x.float().double(), **kept)
    return narrow, (narrow.log_prob - wide.log_prob).abs(), wide


@pytest.mark.parametrize(("divergence", "nodes"), [(sdekit.Exact(), 32), (sdekit.Hutchinson(), 64)], ids=repr)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_rounding_line_covers_a_half_precision_network_on_a_mixture(dtype, divergence, nodes):
    """All of 128 points, at some ten times the median error: the line is a bound."""
    x = TARGET.sample(128, generator=seeded(3))
    narrow, error, _ = rounded(learned(), x, dtype, divergence, nodes)
    assert bool((error <= narrow.rounding).all())
    assert narrow.rounding.median() < 100.0 * error.median()
    single = rounded(learned(), x, torch.float32, divergence, nodes)
    assert error.median() > 30.0 * single[1].median()  # there is something to cover ...
    assert float((error > single[0].rounding).double().mean()) > 0.9  # ... and a line of single precision would not


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_rounding_line_covers_a_half_precision_network_on_images(dtype):
    """24 held-out digits, 64 dimensions; more steps do not average it away, and the line does not say so."""
    x = zoo.dequantise(zoo.load_split().test[:24], seeded(5))
    narrow, error, _ = rounded(zoo.load(), x, dtype, sdekit.Hutchinson(), 32)
    assert bool((error <= narrow.rounding).all())
    more, error, _ = rounded(zoo.load(), x, dtype, sdekit.Hutchinson(), 128)
    assert bool((error <= more.rounding).all())
    assert 0.8 < more.rounding.median() / narrow.rounding.median() < 1.25


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("divergence", [sdekit.Exact(), sdekit.Hutchinson(), sdekit.Hutchinson(3)], ids=repr)
def test_traces_are_summed_in_double_precision(divergence, dtype):
    """300 ones, and 1/1024: neither sum is a number of 8 or of 11 bits."""
    size = 301
    net = torch.nn.Linear(size, size, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.diag(torch.tensor([1.0] * 300 + [2.0**-10])))
    net = net.to(dtype)
    x, keys = torch.zeros(4, size), sdekit.Hutchinson.keys(0, torch.arange(4))
    probes = None
    if isinstance(divergence, sdekit.Hutchinson):
        probes = divergence.draw(keys, torch.zeros(4, dtype=torch.int64), size, x.dtype)
    found = divergence.evaluate(lambda state: net(state.to(dtype)).float(), x, probes)
    assert found.traces.dtype == torch.float64
    assert bool((found.traces == 300.0 + 2.0**-10).all())

"""CPU and CUDA give the same results: signs to the bit, everything else to rounding."""

from __future__ import annotations

import pytest
import torch
from helpers import mixture, perceptron, seeded

import sdekit
from sdekit import _random

pytestmark = pytest.mark.gpu
VP = sdekit.VPSDE()


def test_signs_agree_to_the_bit_and_normals_to_rounding():
    keys = _random.sample_keys(3, _random.Stream.PROBE, torch.arange(100))
    node = torch.arange(100)
    there = keys.cuda(), node.cuda()
    assert torch.equal(_random.words(keys, node, 9), _random.words(*there, 9).cpu())
    signs = _random.rademacher(keys, node, 130, torch.float64)
    assert torch.equal(signs, _random.rademacher(*there, 130, torch.float64).cpu())
    normals = _random.normal(keys, node, 130, torch.float64)
    torch.testing.assert_close(_random.normal(*there, 130, torch.float64).cpu(), normals, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("divergence", [sdekit.Exact(), sdekit.Hutchinson(), sdekit.Hutchinson(2, fresh=False)])
def test_densities_agree_across_devices(divergence):
    target = mixture(4, seed=2)
    model, x = target.score_model(VP), target.sample(64, generator=seeded(0))
    here = sdekit.log_likelihood(model, x, divergence=divergence, tolerance=1e-3)
    there = sdekit.log_likelihood(model, x.cuda(), divergence=divergence, tolerance=1e-3)
    assert there.log_prob.device.type == "cuda"
    torch.testing.assert_close(there.log_prob.cpu(), here.log_prob, rtol=0, atol=1e-8)
    torch.testing.assert_close(there.std_error.cpu(), here.std_error, rtol=0, atol=1e-8)


def test_samples_agree_across_devices():
    model = sdekit.ScoreModel(perceptron(3, 0), VP)
    here = sdekit.sample(model, (32, 3), seed=1, dtype=torch.float64).x
    there = sdekit.sample(model.cuda(), (32, 3), seed=1, dtype=torch.float64).x
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-9)


def test_data_and_network_on_different_devices_are_refused():
    model = sdekit.ScoreModel(perceptron(3, 0), VP).cuda()
    with pytest.raises(ValueError, match="one device"):
        sdekit.log_likelihood(model, torch.zeros(2, 3, dtype=torch.float64))

"""The same numbers on CUDA: integers to the bit, the rest to rounding."""

from __future__ import annotations

import pytest
import torch
from helpers import SDES, draw, gaussian, mixture, perceptron

import sdekit
from sdekit import _random
from sdekit._random import Stream

pytestmark = pytest.mark.gpu


def on(device, law, size=200, dtype=torch.float64):
    keys = _random.sample_keys(2026, Stream.PROBE, torch.arange(64, device=device))
    return law(keys, torch.arange(64, device=device), size, dtype).cpu()


def test_integers_and_signs_agree_to_the_bit():
    keys = [_random.sample_keys(7, Stream.BROWNIAN, torch.arange(100, device=d)) for d in ("cpu", "cuda")]
    assert torch.equal(keys[0], keys[1].cpu())
    words = [_random.words(k, torch.arange(100, device=k.device), 33).cpu() for k in keys]
    assert torch.equal(*words)
    assert torch.equal(on("cpu", _random.rademacher), on("cuda", _random.rademacher))


def test_normals_and_spheres_agree_to_rounding():
    torch.testing.assert_close(on("cuda", _random.normal), on("cpu", _random.normal), rtol=1e-12, atol=1e-13)
    single = [on(device, _random.normal, dtype=torch.float32) for device in ("cuda", "cpu")]
    torch.testing.assert_close(*single, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(on("cuda", _random.sphere), on("cpu", _random.sphere), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", SDES)
def test_schedules_agree(name):
    sde = SDES[name]
    t = torch.linspace(sde.t_min, sde.t_max, 200, dtype=torch.float64)
    for function in (sde.alpha, sde.sigma, sde.half_log_snr, sde.drift_rate, sde.diffusion):
        torch.testing.assert_close(function(t.cuda()).cpu(), function(t), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(sde.time_at(sde.half_log_snr(t.cuda())).cpu(), t, rtol=1e-9, atol=0.0)


DIVERGENCES = [sdekit.Exact(), sdekit.Hutchinson(), sdekit.Hutchinson(2, fresh=False), sdekit.Hutchinson(control=True)]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("name", ["vp", "ve", "table"])
def test_log_densities_agree(divergence, name):
    target = mixture(4, 3)
    model, x = target.score_model(SDES[name]), target.sample(16)
    ours, theirs = (sdekit.log_likelihood(model, state, divergence=divergence, seed=3) for state in (x, x.cuda()))
    assert theirs.log_prob.device.type == "cuda"
    torch.testing.assert_close(theirs.log_prob.cpu(), ours.log_prob, rtol=0, atol=1e-8)
    torch.testing.assert_close(theirs.std_error.cpu(), ours.std_error, rtol=1e-6, atol=1e-8)
    assert torch.equal(theirs.stats.evaluations.cpu(), ours.stats.evaluations)


def test_a_networks_log_densities_agree_through_data_moments_and_ends():
    x, moments = draw(1, 8, 3), gaussian(3)
    found = []
    for device in ("cpu", "cuda"):
        model = sdekit.ScoreModel(perceptron(3, 1), SDES["vp"]).to(device)
        with pytest.warns(sdekit.SmoothnessWarning):
            out = sdekit.log_likelihood(model, x.to(device), end="extrapolate", data_moments=moments)
        found.append(out.log_prob.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"eta": 1.0, "steps": 20}, {"solver": sdekit.DPMSolverPP(), "steps": 10}])
def test_samples_agree(options):
    model = mixture(4, 3).score_model(SDES["vp"])
    ours, theirs = (sdekit.sample(model, (6, 4), dtype=torch.float64, device=d, **options).x for d in ("cpu", "cuda"))
    assert theirs.device.type == "cuda"
    torch.testing.assert_close(theirs.cpu(), ours, rtol=0, atol=1e-8)


def test_encode_and_decode_agree():
    target = mixture(4, 3)
    model, x = target.score_model(SDES["vp"]), target.sample(5)
    latent = sdekit.encode(model, x.cuda()).x
    torch.testing.assert_close(latent.cpu(), sdekit.encode(model, x).x, rtol=0, atol=1e-8)
    torch.testing.assert_close(sdekit.decode(model, latent).x.cpu(), x, rtol=0, atol=1e-3)


def test_data_and_network_on_two_devices_are_refused():
    model = sdekit.ScoreModel(perceptron(3, 1), SDES["vp"]).cuda()
    with pytest.raises(ValueError, match=r"'cpu'.*'cuda:0'"):
        sdekit.log_likelihood(model, draw(1, 2, 3))


@pytest.mark.parametrize(
    "solver",
    [
        None,
        sdekit.DPMSolverPP(3),
        sdekit.UniPC(3),
        sdekit.SDEDPMSolverPP(2),
        sdekit.SRA1(),
        sdekit.EDMChurn(),
        sdekit.PredictorCorrector(sdekit.SDEDPMSolverPP(1), sdekit.Langevin()),
    ],
    ids=repr,
)
def test_samplers_draw_the_same_samples_on_both_devices(solver):
    net = perceptron(3, 1)
    found = []
    for device in ("cpu", "cuda"):
        model = sdekit.ScoreModel(net.to(device), SDES["vp"], sdekit.noise(), data_std=0.5).eval()
        found.append(sdekit.sample(model, (5, 3), solver=solver, steps=9, dtype=torch.float64, seed=3).x.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8)


def test_a_path_of_time_is_the_same_on_both_devices():
    ends = torch.tensor([0.1, 0.2], dtype=torch.float64), torch.tensor([0.3, 0.9], dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        path = sdekit.BrownianMotion(2, torch.arange(2, device=device), 0.0, 1.0)
        step, like = (
            torch.zeros(2, dtype=torch.int64, device=device),
            torch.zeros(2, 4, dtype=torch.float64, device=device),
        )
        found.append([part.cpu() for part in path.levy(*(end.to(device) for end in ends), step, like)])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-12, atol=1e-13)

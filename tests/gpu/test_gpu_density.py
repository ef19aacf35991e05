"""Comparisons, guided models, sampled densities and chunks on CUDA: the CPU's numbers, within the memory there is."""

from __future__ import annotations

import pytest
import torch
from helpers import mixture

import sdekit
from sdekit._memory import free_bytes, peak_of
from sdekit.chunking import chunked
from sdekit.comparison import log_ratio
from sdekit.model.guidance import GuidanceInterval, classifier_guided, guided
from sdekit.sampled_density import sample_log_prob
from sdekit.sampler_density import sampler_log_density

pytestmark = pytest.mark.gpu
VP = sdekit.VPSDE()


def models():
    return mixture(4, 3).score_model(VP), mixture(4, 5).score_model(VP)


def test_differences_agree():
    x = mixture(4, 3).sample(16)
    options = {"divergence": sdekit.Hutchinson(3), "nodes": 24, "seed": 3}
    ours, theirs = (log_ratio(*models(), state, **options) for state in (x, x.cuda()))
    torch.testing.assert_close(theirs.value.cpu(), ours.value, rtol=0, atol=1e-8)
    torch.testing.assert_close(theirs.std_error.cpu(), ours.std_error, rtol=1e-6, atol=1e-8)


def test_guided_models_agree():
    x, t = mixture(4, 3).sample(6), torch.linspace(0.01, 1.0, 6, dtype=torch.float64)
    by_model = guided(*models(), GuidanceInterval(2.0, -1.0, 2.0))
    by_class = classifier_guided(models()[0], lambda x, t, y: -(x - y).square().sum(1), 0.5, y=torch.zeros(6, 4))
    for model, there in ((by_model, by_model), (by_class, by_class.condition(classifier_y=torch.zeros(6, 4).cuda()))):
        torch.testing.assert_close(there.noise(x.cuda(), t.cuda()).cpu(), model.noise(x, t), rtol=1e-10, atol=1e-10)


def test_samples_and_their_densities_agree():
    options = {"dtype": torch.float64, "seed": 5}
    for call in (
        lambda device: sample_log_prob(models()[0], (12, 4), device=device, **options),
        lambda device: sampler_log_density(
            models()[0], (12, 4), solver=sdekit.DDIM(), steps=9, denoise=True, device=device, **options
        ),
        lambda device: sampler_log_density(models()[0], (12, 4), steps=9, device=device, **options),
    ):
        ours, theirs = call("cpu"), call("cuda")
        assert theirs.x.device.type == "cuda"
        torch.testing.assert_close(theirs.x.cpu(), ours.x, rtol=0, atol=1e-7)
        torch.testing.assert_close(theirs.log_prob.cpu(), ours.log_prob, rtol=0, atol=1e-7)


@pytest.mark.gpu(emulated=False)
def test_chunks_grow_to_what_fits_and_are_halved_where_memory_runs_out():
    device = torch.device("cuda", torch.cuda.current_device())
    free = free_bytes(device)
    assert 0 < free <= torch.cuda.mem_get_info(device)[1]
    x, sizes = torch.arange(64.0, device=device), []

    def work(part, rows):
        """An eighth of the free memory a sample: 8 do not fit."""
        sizes.append(len(part))
        return torch.ones(len(part), free // 8 // 4, device=device).mul_(part[:, None]).mean(1)

    torch.testing.assert_close(chunked(work, x, chunk=16), x)
    assert sizes[0] == 16
    assert max(sizes[3:]) <= 8
    sizes.clear()
    torch.testing.assert_close(chunked(work, x), x)
    assert sizes[0] == 2
    assert max(sizes) <= 4
    assert peak_of(lambda: torch.ones(2**20, device=device), device)[1] >= 2**22

"""Samples, latents and back: the right law, the same sample in any batch, and a flow that can be run backward."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import SDES, draw, gaussian, mixture, seeded, watched

import sdekit

VP = sdekit.VPSDE()
DOUBLE = torch.float64


class TestTheLaw:
    @pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
    def test_the_flow_carries_the_prior_as_the_exact_flow_does(self, sde):
        target = gaussian(3)
        model = target.score_model(sde)
        start = sdekit.sampling.draw_prior(model, (16, 3), 5, torch.arange(16), DOUBLE)
        exact = target.flow_map(sde, start, sde.t_max, sde.t_min)
        rough = sdekit.sample(model, (16, 3), steps=12, seed=5, denoise=False, dtype=DOUBLE).x
        fine = sdekit.sample(model, (16, 3), steps=48, seed=5, denoise=False, dtype=DOUBLE).x
        # four times the steps of a method of order 3: 64 times less error; 20 leaves room for the start-up
        assert (fine - exact).abs().max() < (rough - exact).abs().max() / 20
        assert (fine - exact).abs().max() < 1e-3

    @pytest.mark.parametrize("eta", [0.5, 1.0])
    def test_the_reverse_sde_keeps_the_marginals(self, eta):
        """2,000 draws; mean and variance of 2 dimensions, each within 4.5 standard errors and the bias of order
        1/200 of Euler-Maruyama: a false alarm with probability below 1e-4."""
        target = sdekit.targets.Gaussian(torch.tensor([0.5, -0.3]), torch.tensor([0.3, 0.05]))
        x = sdekit.sample(target.score_model(VP), (2000, 2), eta=eta, steps=200, denoise=False, dtype=DOUBLE, seed=2).x
        std = torch.tensor([0.3, 0.05], dtype=DOUBLE).sqrt()
        assert ((x.mean(0) - torch.tensor([0.5, -0.3])).abs() < 4.5 * std / math.sqrt(2000) + 0.01 * std).all()
        assert ((x.var(0) / std.square() - 1).abs() < 4.5 * math.sqrt(2 / 2000) + 0.06).all()

    def test_denoising_is_one_evaluation_more_and_gives_the_posterior_mean(self):
        model, watch = watched(mixture(2, 0).score_model(VP))
        plain = sdekit.sample(model, (4, 2), steps=9, denoise=False, dtype=DOUBLE)
        calls, watch.calls = watch.calls, 0
        clean = sdekit.sample(model, (4, 2), steps=9, dtype=DOUBLE)
        assert watch.calls == calls + 1
        assert (clean.stats.evaluations == plain.stats.evaluations + 1).all()
        assert clean.stats.calls == plain.stats.calls + 1 == watch.calls
        torch.testing.assert_close(clean.x, model.data(plain.x, VP.t_min))


class TestTheSampleAlone:
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_a_sample_depends_on_the_seed_and_its_index_alone(self, eta):
        model = mixture(3, 1).score_model(VP)
        options = {"eta": eta, "steps": 20, "seed": 4, "dtype": DOUBLE}
        whole = sdekit.sample(model, (12, 3), **options).x
        alone = sdekit.sample(model, (1, 3), indices=torch.tensor([7]), **options).x
        torch.testing.assert_close(alone[0], whole[7], rtol=0, atol=1e-12)
        order = torch.randperm(12, generator=seeded(0))
        torch.testing.assert_close(
            sdekit.sample(model, (12, 3), indices=order, **options).x, whole[order], rtol=0, atol=1e-12
        )
        assert (sdekit.sample(model, (12, 3), **{**options, "seed": 5}).x != whole).all()

    def test_its_noise_is_the_same_to_the_bit(self):
        model = mixture(3, 1).score_model(VP)
        many = sdekit.sampling.draw_prior(model, (50, 3), 1, torch.arange(50), DOUBLE)
        one = sdekit.sampling.draw_prior(model, (1, 3), 1, torch.tensor([33]), DOUBLE)
        assert torch.equal(one[0], many[33])


class TestThereAndBack:
    @pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
    def test_encode_then_decode_returns_the_data(self, sde):
        model = mixture(2, 3).score_model(sde)
        x = mixture(2, 3).sample(8, generator=seeded(1))
        latent = sdekit.encode(model, x)
        assert (latent.t == sde.t_max).all()
        back = sdekit.decode(model, latent.x)
        torch.testing.assert_close(back.x, x, rtol=0, atol=1e-3)
        assert (back.t == sde.t_min).all()

    def test_a_tighter_control_brings_the_data_back_closer(self):
        model, x = mixture(2, 3).score_model(VP), mixture(2, 3).sample(8, generator=seeded(1))
        gaps = []
        for tolerance in (1e-3, 1e-7):
            options = {"controller": sdekit.PID(tolerance, tolerance), "solver": sdekit.Dopri8()}
            gaps.append(
                float((sdekit.decode(model, sdekit.encode(model, x, **options).x, **options).x - x).abs().max())
            )
        assert gaps[1] < 1e-5 < gaps[0]

    def test_encoding_a_gaussian_is_its_flow_map(self):
        target = gaussian(3)
        x = target.sample(5, generator=seeded(0))
        latent = sdekit.encode(target.score_model(VP), x).x
        torch.testing.assert_close(latent, target.flow_map(VP, x, VP.t_min, VP.t_max), rtol=0, atol=1e-4)

    def test_the_same_steps_share_one_grid_in_both_directions(self):
        model, x = mixture(2, 3).score_model(VP), mixture(2, 3).sample(6, generator=seeded(1))
        gaps = []
        for steps in (20, 80):
            back = sdekit.decode(model, sdekit.encode(model, x, steps=steps).x, steps=steps).x
            gaps.append(float((back - x).abs().max()))
        assert gaps[1] < gaps[0] / 8


class TestBadInput:
    MODEL = gaussian(2).score_model(VP)

    @pytest.mark.parametrize(
        ("shape", "options", "words"),
        [
            ((4,), {}, "event axis"),
            ((4, -2), {}, "event axis"),
            ((4, 2), {"eta": -0.5}, "eta=-0.5"),
            ((4, 2), {"steps": 0}, "steps=0"),
            ((4, 2), {"steps": 8, "controller": sdekit.PID()}, "one or the other"),
            ((4, 2), {"seed": -3}, "seed=-3"),
            ((4, 2), {"eta": 1.0, "controller": sdekit.PID()}, "no error estimate"),
            ((4, 2), {"solver": sdekit.RK4(), "controller": sdekit.PID()}, "no error estimate"),
        ],
    )
    def test_of_samples_is_named(self, shape, options, words):
        with pytest.raises(ValueError, match=words):
            sdekit.sample(self.MODEL, shape, **options)

    def test_no_samples_are_no_samples(self):
        assert sdekit.sample(self.MODEL, (0, 2)).x.shape == (0, 2)
        assert sdekit.encode(self.MODEL, torch.zeros(0, 2)).x.shape == (0, 2)

    def test_solvers_are_refused_for_equations_that_are_not_theirs(self):
        with pytest.raises(TypeError, match="ReverseSDE"):
            sdekit.sample(self.MODEL, (2, 2), solver=sdekit.EulerMaruyama())
        with pytest.raises(TypeError, match="ProbabilityFlow"):
            sdekit.sample(self.MODEL, (2, 2), eta=1.0, solver=sdekit.DPMSolverPP())

    def test_one_to_ten_steps_give_numbers(self):
        for steps in range(1, 11):
            for options in ({}, {"solver": sdekit.DPMSolverPP()}, {"solver": sdekit.Heun()}, {"eta": 1.0}):
                x = sdekit.sample(mixture(2, 0).score_model(VP), (3, 2), steps=steps, **options).x
                assert x.isfinite().all(), (steps, options)


def test_samples_in_the_middle_of_the_flow_agree_with_its_latents():
    target = mixture(2, 3)
    model = target.score_model(VP)
    x = sdekit.sample(model, (6, 2), denoise=False, dtype=DOUBLE, steps=200).x
    latent = sdekit.encode(model, x).x
    start = sdekit.sampling.draw_prior(model, (6, 2), 0, torch.arange(6), DOUBLE)
    torch.testing.assert_close(latent, start, rtol=0, atol=1e-3)
    assert draw(0, 1).dtype == latent.dtype

"""Samples of the reverse SDE with their log density: its error, its bias, and what is exact for any network."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from helpers import Function, gaussian, mixture, watched

from sdekit import VESDE, VPSDE, NetworkError, ScoreModel, grid
from sdekit.ito import ito_log_density

VP = VPSDE()
MILD = VPSDE(t_min=0.1, t_max=0.6)  # few nats along a path: its log ratio has no heavy tail


def exact(target, sde, steps, count=384, seed=0):
    """What it found for an exact score, and its error against log p at t_min."""
    found = ito_log_density(target.score_model(sde), (count, target.dim), steps=steps, dtype=torch.float64, seed=seed)
    return found, found.value - target.marginal_log_prob(sde, found.x, sde.t_min)


class TestExactScores:
    @pytest.mark.parametrize(("target", "sde"), [(mixture(2, 1), VP), (gaussian(3), VESDE())], ids=["vp", "ve"])
    def test_sixteen_times_the_steps_leave_a_quarter_of_the_error(self, target, sde):
        """Order 1/2: ratios of root mean squares over 384 samples, 3% each, and a bias that falls faster."""
        error = [float(exact(target, sde, steps)[1].square().mean().sqrt()) for steps in (32, 512)]
        assert 3.2 < error[0] / error[1] < 7.0

    def test_the_error_bar_is_that_of_the_discretisation_and_the_bias_half_its_square(self):
        """Variances of 1024 samples, to 30%: 6 times their own error; the bias to 5 of its standard errors and 30%."""
        found, error = exact(mixture(2, 2), VP, 256, count=1024)
        claimed = float(found.std_error.square().mean())
        assert 0.75 < float(error.var()) / claimed < 1.3
        assert abs(float(error.mean()) - 0.5 * claimed) < 5.0 * float(error.std()) / 32 + 0.3 * 0.5 * claimed

    def test_a_point_mass_has_its_density_in_any_steps(self):
        """Data c: the steps are exact, so log p is too, but for N(0, I) in the place of p_T."""
        center = torch.tensor([0.4, -0.3], dtype=torch.float64)

        def noise(x, t):
            return (x - VP.alpha(t)[:, None] * center) / VP.sigma(t)[:, None]

        found = ito_log_density(ScoreModel(Function(noise), VP), (64, 2), steps=7, dtype=torch.float64)
        sigma = VP.sigma(VP.t_min)
        off = (found.x - VP.alpha(VP.t_min) * center) / sigma
        truth = -0.5 * off.square().sum(1) - 2.0 * sigma.log() - math.log(2.0 * math.pi)
        torch.testing.assert_close(found.value, truth, rtol=0, atol=0.03)
        assert found.std_error.max() < 1e-6


def kappa(t):
    """A wrong linear network's eps = kappa(t) x."""
    return 1.2 * MILD.sigma(t) / (0.5 * MILD.alpha(t).square() + MILD.sigma(t).square())


@cache
def linear(steps, count):
    """What was found for that network, and the variance P of the chain: its law is N(0, P)."""
    model = ScoreModel(Function(lambda x, t: kappa(t)[:, None] * x), MILD, data_std=0.7)
    found = ito_log_density(model, (count, 1), steps=steps, dtype=torch.float64, batch=count)
    variance = 1.0
    for t, s in pairwise(grid.likelihood(MILD, steps, 0.7)):
        h = MILD.half_log_snr(s) - MILD.half_log_snr(t)
        data = (1.0 - MILD.sigma(t) * kappa(t)) / MILD.alpha(t)
        keep = MILD.alpha(s) * data + MILD.sigma(s) * torch.exp(-h) * kappa(t)
        variance = float(keep.square() * variance - MILD.sigma(s).square() * torch.expm1(-2.0 * h))
    return found, variance


class TestLinearNetwork:
    STEPS, COUNT = 48, 20_000

    def test_the_samples_have_the_chains_variance(self):
        """5 standard errors of a variance of 20000 normal samples."""
        found, variance = linear(self.STEPS, self.COUNT)
        assert abs(float(found.x.square().mean()) / variance - 1.0) < 5.0 * math.sqrt(2.0 / self.COUNT)

    def test_the_log_ratio_of_the_paths_has_mean_one_and_its_log_is_above(self):
        """E[p(x) / exp(value)] = 1 for any network and any steps: 5 standard errors of 20000 samples."""
        found, variance = linear(self.STEPS, self.COUNT)
        own = -0.5 * found.x[:, 0].square() / variance - 0.5 * math.log(2.0 * math.pi * variance)
        ratio = (own - found.value).exp()
        error = float(ratio.std()) / math.sqrt(self.COUNT)
        assert abs(float(ratio.mean()) - 1.0) < 5.0 * error < 0.1
        above = found.value - own
        assert float(above.mean()) > 5.0 * float(above.std()) / math.sqrt(self.COUNT)


class TestEachSampleAlone:
    def test_company_order_and_the_size_of_a_call_change_nothing(self):
        model = mixture(2, 3).score_model(VP)
        whole = ito_log_density(model, (7, 2), steps=12, seed=3, dtype=torch.float64)
        rows = torch.tensor([6, 2])
        part = ito_log_density(model, (2, 2), steps=12, seed=3, dtype=torch.float64, indices=rows, batch=1)
        for mine, theirs in zip(part, whole, strict=True):
            torch.testing.assert_close(mine, theirs[rows], rtol=1e-10, atol=1e-10)
        other = ito_log_density(model, (7, 2), steps=12, seed=4, dtype=torch.float64)
        assert (other.value != whole.value).all()

    def test_a_condition_follows_its_sample(self):
        shift = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)[:, None]
        model = ScoreModel(Function(lambda x, t, shift: 0.5 * (x - shift)), VP).condition(shift=shift)
        whole = ito_log_density(model, (6, 1), steps=5, dtype=torch.float64, batch=4)
        rows = torch.tensor([5, 0])
        part = ito_log_density(model.take(rows), (2, 1), steps=5, dtype=torch.float64, indices=rows)
        torch.testing.assert_close(part.value, whole.value[rows], rtol=1e-12, atol=1e-12)

    def test_evaluations_are_what_the_network_saw(self):
        model, watch = watched(gaussian(3).score_model(VP))
        found = ito_log_density(model, (5, 3), steps=9, batch=2)
        assert found.x.dtype == torch.float32
        assert watch.rows == int(found.evaluations.sum()) == 45
        assert VP.t_min <= torch.cat(watch.labels).min()

    def test_no_samples_are_no_samples(self):
        found = ito_log_density(gaussian(3).score_model(VP), (0, 3), steps=4)
        assert found.x.shape == (0, 3)
        assert found.value.shape == found.std_error.shape == found.evaluations.shape == (0,)


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((4,), {}, ValueError, "event axis"),
        ((4, 2.0), {}, ValueError, "event axis"),
        ((4, 3), {"steps": 2}, ValueError, "steps=2"),
        ((4, 3), {"batch": 0}, ValueError, "batch=0"),
        ((4, 3), {"seed": -1}, ValueError, "seed"),
        ((4, 3), {"indices": torch.arange(3)}, ValueError, "indices"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(shape, options, error, message):
    with pytest.raises(error, match=message):
        ito_log_density(gaussian(3).score_model(VP), shape, **options)


def test_networks_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="dropout"):
        ito_log_density(ScoreModel(torch.nn.Sequential(torch.nn.Dropout(0.1)), VP), (2, 3))
    with pytest.raises(NetworkError, match="shape"):
        ito_log_density(ScoreModel(Function(lambda x, t: x[:, :1]), VP), (2, 3))

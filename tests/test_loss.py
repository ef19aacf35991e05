"""Denoising losses: their value at the exact score, their weights, and the law of their times."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sdekit import loss as losses
from sdekit.model import parameterization as forms
from sdekit.model.score_model import ScoreModel
from sdekit.sde.flow import RectifiedFlow
from sdekit.sde.ve import VESDE
from sdekit.sde.vp import VPSDE, CosineVPSDE, SubVPSDE

SDES = [VPSDE(t_min=1e-3), SubVPSDE(t_min=1e-2), CosineVPSDE(t_min=1e-3), VESDE(), RectifiedFlow(t_min=1e-3)]
FORMS = [forms.noise(), forms.score(), forms.data(), forms.velocity(), forms.v(), forms.edm(0.5)]
TIMES = [losses.UniformTime, losses.UniformHalfLogSNR, losses.LogNormalSigma, losses.CauchyLogSigma]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class ExactGaussian(nn.Module):
    """The exact output, in any parameterization, for data N(0, variance I)."""

    def __init__(self, sde, form, variance):
        super().__init__()
        self.sde, self.form, self.variance = sde, form, variance

    def forward(self, x, label):
        t = label
        alpha, sigma = self.sde.alpha(t)[:, None], self.sde.sigma(t)[:, None]
        total = alpha**2 * self.variance + sigma**2
        data, noise = alpha * self.variance / total * x, sigma / total * x
        weights = self.form.mix(self.sde, t)
        return weights.data[:, None] * data + weights.noise[:, None] * noise


class TimeOnly(ExactGaussian):
    """The same behind EDM's input scaling, label and all: t is recovered from log(rho)/4."""

    def forward(self, x, label):
        t = self.sde.time_at(-4.0 * label)
        return super().forward(x / self.form.input_scale(self.sde, t)[:, None], t)


def exact(sde, form, variance=0.3):
    kind = TimeOnly if isinstance(form, forms.EDM) else ExactGaussian
    return ScoreModel(kind(sde, form, variance), sde, form)


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_the_error_of_the_noise_does_not_depend_on_what_the_network_predicts(sde, form):
    x0, noise = (torch.randn(7, 3, generator=generator(seed), dtype=torch.float64) for seed in (1, 2))
    t = torch.linspace(sde.t_min, sde.t_max, 7, dtype=torch.float64)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    predicted = sigma / (alpha**2 * 0.3 + sigma**2) * (alpha * x0 + sigma * noise)
    closed = (noise - predicted).square().sum(1)
    torch.testing.assert_close(losses.denoising_error(exact(sde, form), x0, t, noise), closed, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("times", TIMES)
def test_the_likelihood_loss_at_the_exact_score_is_the_gaussians_closed_form(times):
    # E|eps - eps_hat|^2 = D alpha^2 v/(alpha^2 v + sigma^2) and integrates over lambda to D/2 log(1 + v e^{2 lambda}).
    sde, variance, size, batch = VPSDE(t_min=1e-2), 0.3, 4, 400_000
    x0 = math.sqrt(variance) * torch.randn(batch, size, generator=generator(), dtype=torch.float64)
    model = exact(sde, forms.noise(), variance)
    each = losses.denoising_loss(
        model, x0, weight=losses.likelihood, times=times(), importance=True, generator=generator(1)
    )
    clean, noisy = (2.0 * float(sde.half_log_snr(t)) for t in (sde.t_min, sde.t_max))
    closed = 0.5 * size * (math.log1p(variance * math.exp(clean)) - math.log1p(variance * math.exp(noisy)))
    # Five standard errors of independent draws; low discrepancy only has less. False alarms: below 1e-6.
    assert abs(float(each.mean()) - closed) < 5.0 * float(each.std()) / math.sqrt(batch)


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_the_bound_is_the_constant_loss_at_uniform_half_log_snr(sde):
    drawn = losses.UniformHalfLogSNR().draw(sde, 64, generator())
    span = float(sde.half_log_snr(sde.t_min) - sde.half_log_snr(sde.t_max))
    ratio = losses.likelihood(sde, drawn.t) / drawn.density
    torch.testing.assert_close(ratio, torch.full_like(ratio, span))


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_the_likelihood_weight_is_half_the_squared_diffusion_over_the_variance(sde):
    t = torch.linspace(sde.t_min, sde.t_max, 9, dtype=torch.float64)
    torch.testing.assert_close(losses.likelihood(sde, t), 0.5 * (sde.diffusion(t) / sde.sigma(t)).square())


def test_native_weights_are_the_published_ones():
    sde = VPSDE(t_min=1e-3)
    t = torch.linspace(sde.t_min, sde.t_max, 9, dtype=torch.float64)
    alpha, sigma, rho = sde.alpha(t), sde.sigma(t), torch.exp(-sde.half_log_snr(t))
    same = torch.testing.assert_close
    same(losses.Native(forms.noise())(sde, t), losses.uniform(sde, t))
    same(losses.Native(forms.data())(sde, t), rho.square())
    same(losses.Native(forms.v())(sde, t), 1.0 / alpha.square())  # k = alpha^2 + sigma^2 = 1
    same(losses.Native(forms.velocity())(sde, t), (sigma * sde.dhalf_log_snr(t)).square())
    same(losses.Native(forms.edm(0.4))(sde, t), losses.EDMWeight(0.4)(sde, t))


def test_min_snr_weights_the_datas_error_by_the_smaller_of_snr_and_gamma():
    sde = VPSDE(t_min=1e-3)
    t = torch.linspace(sde.t_min, sde.t_max, 33, dtype=torch.float64)
    snr = torch.exp(2.0 * sde.half_log_snr(t))
    torch.testing.assert_close(losses.MinSNR(5.0)(sde, t) * snr, snr.clamp(max=5.0))


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("times", TIMES)
def test_the_density_is_that_of_the_quantiles(sde, times):
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    step = 1e-6
    law = times()
    slope = (law.at(sde, u + step).t - law.at(sde, u - step).t) / (2 * step)
    torch.testing.assert_close(law.at(sde, u).density * slope.abs(), torch.ones_like(u), rtol=1e-5, atol=0)


@pytest.mark.parametrize("times", TIMES)
def test_low_discrepancy_times_hit_each_of_b_equal_parts_once(times):
    sde, batch = VPSDE(), 50
    law, grid = times(), torch.linspace(0, 1, batch + 1, dtype=torch.float64)
    cuts = law.at(sde, grid).t.sort().values
    drawn = law.draw(sde, batch, generator(3)).t
    inside = torch.bucketize(drawn, cuts, right=True) - 1
    assert sorted(inside.tolist()) == list(range(batch))


@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_each_time_alone_is_uniform(low_discrepancy):
    # Kolmogorov-Smirnov on one time of each of 2000 draws: beyond 2.5/sqrt(n) with probability 2 exp(-12.5) = 7e-6.
    sde, source, draws = VPSDE(), generator(4), 2000
    law = losses.UniformTime(low_discrepancy=low_discrepancy)
    t = torch.stack([law.draw(sde, 5, source).t[3] for _ in range(draws)]).sort().values
    u = (t - sde.t_min) / (sde.t_max - sde.t_min)
    gap = (u - (torch.arange(draws) + 0.5) / draws).abs().max()
    assert float(gap) < 2.5 / math.sqrt(draws)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_no_time_lies_outside_of_the_process(sde, times):
    drawn = times().draw(sde, 1000, generator(5)).t
    assert bool(((drawn >= sde.t_min) & (drawn <= sde.t_max)).all())


def test_the_same_generator_gives_the_same_loss_and_leaves_the_global_one_alone():
    model, x0 = exact(VPSDE(), forms.noise()), torch.randn(6, 2, generator=generator(), dtype=torch.float64)
    before = torch.get_rng_state()
    first, second = (losses.denoising_loss(model, x0, generator=generator(9)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_input_is_named_at_the_door():
    model = exact(VPSDE(), forms.noise())
    with pytest.raises(TypeError, match="dequantise"):
        losses.denoising_loss(model, torch.zeros(2, 3, dtype=torch.int64), generator=generator())
    with pytest.raises(ValueError, match="sigma_data=-1"):
        losses.EDMWeight(-1.0)
    with pytest.raises(ValueError, match="batch=0"):
        losses.UniformTime().draw(VPSDE(), 0, generator())

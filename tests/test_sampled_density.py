"""Samples with their log density from one solve: closed forms, and the round trip through log_likelihood."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import SDES, gaussian, mixture, perceptron, watched

import sdekit
from sdekit.sampled_density import sample_log_prob
from sdekit.zoo import digits

VP = sdekit.VPSDE()


def log_variances(target, sde, t):
    return (sde.alpha(t) ** 2 * target._components.values[0] + sde.sigma(t) ** 2).log().sum()


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
def test_of_a_gaussian_both_are_the_closed_form(sde):
    target, t0, t1 = gaussian(3), *(torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, sde.t_max))
    out = sample_log_prob(target.score_model(sde), (20, 3), tolerance=1e-2, dtype=torch.float64)
    wanted = target.flow_map(sde, out.latent, t1, t0)
    torch.testing.assert_close(out.x, wanted, rtol=0, atol=1e-2)
    log_det = 0.5 * (log_variances(target, sde, t0) - log_variances(target, sde, t1))
    torch.testing.assert_close(out.log_det, log_det.expand(20), rtol=0, atol=1e-2)
    torch.testing.assert_close(out.log_prob, sde.prior_log_prob(out.latent) - log_det, rtol=0, atol=1e-2)
    assert (out.solver_error <= 1e-2).all()
    assert (out.t == sde.t_min).all()


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2])
@pytest.mark.parametrize("sde", [VP, sdekit.VESDE(), sdekit.RectifiedFlow()], ids=["vp", "ve", "flow"])
def test_the_likelihood_asked_afterwards_agrees_within_the_tolerance(sde, tolerance):
    model = mixture(4, seed=5).score_model(sde)
    out = sample_log_prob(model, (60, 4), tolerance=tolerance, dtype=torch.float64)
    back = sdekit.log_likelihood(model, out.x, tolerance=tolerance / 20)
    error = (out.log_prob - back.log_prob).abs()
    assert (error <= tolerance).all()
    assert (error <= out.solver_error).double().mean() > 0.95
    assert float(out.stats.evaluations.double().mean()) < 90


def test_of_the_shipped_network_too():
    model = digits.load()
    out = sample_log_prob(model, (3, 1, 8, 8), tolerance=1e-1)
    assert out.x.shape == (3, 1, 8, 8)
    back = sdekit.log_likelihood(model.double(), out.x.double(), tolerance=3e-2)
    assert ((out.log_prob - back.log_prob).abs() <= 1e-1 + back.solver_error).all()
    torch.testing.assert_close(out.bits_per_dim(17), -out.log_prob / (64 * math.log(2)) - math.log2(2 / 17))


@pytest.mark.filterwarnings("ignore::sdekit.ToleranceWarning")  # its score says little of where the prior pulls
def test_of_a_random_smooth_network_too():
    model = sdekit.ScoreModel(perceptron(5, 3), VP)
    out = sample_log_prob(model, (8, 5), tolerance=3e-2, dtype=torch.float64)
    back = sdekit.log_likelihood(model, out.x, tolerance=1e-2)
    assert ((out.log_prob - back.log_prob).abs() <= 4e-2).all()


def test_the_samples_are_those_of_sample():
    model = mixture(4, seed=5).score_model(VP)
    out = sample_log_prob(model, (5, 4), tolerance=1e-3, seed=7, dtype=torch.float64)
    plain = sdekit.sample(model, (5, 4), steps=64, seed=7, denoise=False, dtype=torch.float64)
    torch.testing.assert_close(out.x, plain.x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("fresh", [True, False])
def test_the_standard_error_is_that_of_the_probes(fresh):
    """400 samples, one grid: what is left between traces is the probes'. 5 standard deviations of each statistic."""
    model, n = mixture(8, seed=3).score_model(VP), 400
    options = {"nodes": 20, "dtype": torch.float64, "seed": 2}
    exact = sample_log_prob(model, (n, 8), **options)
    out = sample_log_prob(model, (n, 8), divergence=sdekit.Hutchinson(4, fresh=fresh), **options)
    torch.testing.assert_close(out.x, exact.x, rtol=1e-9, atol=1e-9)
    off = out.log_prob - exact.log_prob
    assert abs(float(off.mean())) < 5 * float(off.std()) / math.sqrt(n)
    share = float(out.std_error.square().mean() / off.square().mean())
    slack = 5 * math.sqrt(2 / n + 2 / (3 * n))
    assert 1 - slack < share < 1.3 + slack  # for fresh probes it may be conservative, by 1.3 at most here


@pytest.mark.parametrize("divergence", [sdekit.Exact(), sdekit.Hutchinson(2), sdekit.Hutchinson(1, control=True)])
def test_a_sample_is_the_same_alone_and_in_any_batch(divergence):
    model, rows = mixture(3, seed=1).score_model(VP), torch.tensor([11, 4])
    options = {"divergence": divergence, "seed": 3, "dtype": torch.float64}
    whole = sample_log_prob(model, (12, 3), **options)
    part = sample_log_prob(model, (2, 3), indices=rows, **options)
    torch.testing.assert_close(part.x, whole.x[rows], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(part.log_prob, whole.log_prob[rows], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(part.std_error, whole.std_error[rows], rtol=1e-6, atol=1e-9)


def test_in_other_units_x_and_its_density_are_in_these():
    model, units = mixture(3, seed=1).score_model(VP), sdekit.Affine(torch.tensor([2.0, 0.5, -4.0]), 0.3)
    out = sample_log_prob(model, (6, 3), tolerance=1e-2, transform=units, dtype=torch.float64)
    plain = sample_log_prob(model, (6, 3), tolerance=1e-2, dtype=torch.float64)
    torch.testing.assert_close(units.forward(out.x), plain.x)
    back = sdekit.log_likelihood(model, out.x, tolerance=1e-2, transform=units)
    torch.testing.assert_close(out.log_prob, back.log_prob, rtol=0, atol=2e-2)
    torch.testing.assert_close(out.log_prob - plain.log_prob, torch.full((6,), math.log(4.0), dtype=torch.float64))


def test_any_solver_takes_a_grid_from_noise_to_data():
    model = mixture(3, seed=1).score_model(VP)
    grid = sdekit.grid.likelihood(VP, 60, model.data_std)
    out = sample_log_prob(model, (5, 3), solver=sdekit.RK4(), controller=sdekit.FixedGrid(grid), dtype=torch.float64)
    default = sample_log_prob(model, (5, 3), tolerance=1e-3, dtype=torch.float64)
    torch.testing.assert_close(out.log_prob, default.log_prob, rtol=0, atol=1e-3)
    assert (out.stats.evaluations == 240).all()
    with pytest.raises(ValueError, match="must agree exactly"):
        sample_log_prob(model, (5, 3), solver=sdekit.RK4(), controller=sdekit.FixedGrid(grid.flip(0)))


def test_a_state_keeps_its_dtype_and_a_density_is_float64():
    model = mixture(2, seed=1).score_model(VP)
    for dtype in (torch.float32, torch.float16):
        out = sample_log_prob(model, (3, 2), nodes=12, dtype=dtype)
        assert out.x.dtype == out.latent.dtype == dtype
        assert out.log_prob.dtype == torch.float64


def test_an_empty_batch_is_empty():
    out = sample_log_prob(mixture(2, seed=1).score_model(VP), (0, 2))
    assert out.x.shape == (0, 2)
    assert out.log_prob.shape == (0,)


def test_a_failed_sample_is_named_and_the_others_are_kept():
    def spoil(call, x, label, answer):
        return torch.where((torch.arange(len(x)) == 1)[:, None], torch.nan, answer())

    model, _ = watched(mixture(2, seed=1).score_model(VP), spoil)
    with pytest.raises(sdekit.SolveError, match=r"did not reach the data's end.*\n  sample 8") as caught:
        sample_log_prob(model, (3, 2), nodes=9, indices=torch.tensor([7, 8, 9]))
    kept = caught.value.solution
    assert kept.log_prob.isnan().tolist() == [False, True, False]
    assert kept.status.tolist() == [sdekit.Status.DONE, sdekit.Status.NOT_FINITE, sdekit.Status.DONE]


def test_an_interrupt_returns_what_there_is():
    def stop(call, x, label, answer):
        if call == 9:
            raise KeyboardInterrupt
        return answer()

    model, _ = watched(mixture(2, seed=1).score_model(VP), stop)
    with pytest.warns(sdekit.PartialResultWarning, match="interrupted"):
        out = sample_log_prob(model, (3, 2))
    assert out.log_prob.isnan().all()
    assert (out.t > VP.t_min).all()
    assert (out.stats.evaluations == 8).all()


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((3,), {}, ValueError, "event axis"),
        ((3, 2), {"tolerance": 0.0}, ValueError, "tolerance"),
        ((3, 2), {"nodes": 9, "solver": sdekit.RK4()}, ValueError, "nodes= together"),
        ((3, 2), {"seed": -1}, ValueError, "seed"),
        ((3, 2), {"indices": torch.arange(2)}, ValueError, "indices"),
        ((3, 2), {"transform": sdekit.Affine(torch.ones(3))}, ValueError, "scale"),
        ((3, 2), {"divergence": "exact"}, TypeError, "divergence"),
    ],
)
def test_what_does_not_fit_is_refused(shape, options, error, message):
    with pytest.raises(error, match=message):
        sample_log_prob(mixture(2, seed=1).score_model(VP), shape, **options)

"""How often the error bars cover, over many seeds: the law of each kind of probe, and what is known to fail.

False alarms: bands are four standard errors of a share of N, 6e-5 each if the shares were those stated.
"""

import math
import warnings

import pytest
import torch
from helpers import draw, gaussian

import sdekit

N = 1500
REPEATED = torch.arange(N)


def band(share):
    return 4.0 * math.sqrt(share * (1.0 - share) / N)


def answers(target, x, divergence, **how):
    """Errors and results at one point for N draws of the probes, each against the exact trace on the same nodes."""
    model, points = target.score_model(sdekit.VPSDE()), x.expand(N, -1)
    out = sdekit.log_likelihood(model, points, divergence=divergence, indices=REPEATED, nodes=24, **how)
    exact = sdekit.log_likelihood(model, x, divergence=sdekit.Exact(), nodes=24)
    return out.log_prob - exact.log_prob, out


@pytest.mark.parametrize("probes", [2, 4, 8])
def test_margins_of_fixed_probes_cover_in_many_dimensions(probes):
    target = gaussian(30, seed=3)
    error, out = answers(target, draw(5, 1, 30), sdekit.Hutchinson(probes=probes, fresh=False))
    covered = float((error.abs() <= out.margin()).double().mean())
    assert abs(covered - 0.95) <= band(0.95) + 0.02
    normal = float((error.abs() <= 1.96 * out.std_error).double().mean())
    assert normal < covered  # what 1.96 of a spread of few numbers is not


def test_margins_of_fresh_probes_cover_over_the_data():
    target = gaussian(30, seed=3)
    x = target.sample(N, generator=torch.Generator().manual_seed(1))
    model, how = target.score_model(sdekit.VPSDE()), {"nodes": 24}
    out = sdekit.log_likelihood(model, x, divergence=sdekit.Hutchinson(), **how)
    exact = sdekit.log_likelihood(model, x, divergence=sdekit.Exact(), **how)
    covered = float(((out.log_prob - exact.log_prob).abs() <= out.margin()).double().mean())
    assert abs(covered - 0.95) <= band(0.95) + 0.02


def test_a_budget_of_few_fixed_probes_is_conservative():
    """1.96 of the spread of two numbers would cover 70%."""
    target = gaussian(30, seed=3)
    error, out = answers(target, draw(5, 1, 30), sdekit.Hutchinson(probes=2, fresh=False), budget=True)
    assert out.budget().quantile == pytest.approx(12.706, abs=1e-3)
    covered = float((error.abs() <= out.budget().total()).double().mean())
    assert covered >= 0.95 - band(0.95) - 0.02
    assert "12.7 times" in str(out.budget())


def test_two_fixed_probes_in_two_dimensions_say_nothing_half_of_the_time_and_a_warning_says_so():
    target = sdekit.targets.Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        error, out = answers(target, draw(5, 1, 2), sdekit.Hutchinson(probes=2, fresh=False))
    assert any("one and the same answer in 50% of all draws" in str(warning.message) for warning in seen)
    silent = (out.std_error < 1e-9).double().mean()
    assert abs(float(silent) - 0.5) <= band(0.5)
    assert error[out.std_error < 1e-9].abs().min() > 0.1


@pytest.mark.parametrize(
    ("divergence", "size", "warned"),
    [
        (sdekit.Hutchinson(2, fresh=False), 7, True),
        (sdekit.Hutchinson(2, fresh=False), 8, False),
        (sdekit.Hutchinson(8, fresh=False), 2, False),
        (sdekit.Hutchinson(2, fresh=False), 1, False),
        (sdekit.Hutchinson(1, fresh=False), 2, False),
        (sdekit.Hutchinson(2), 2, False),
        (sdekit.Hutchinson(2, fresh=False, law="gaussian"), 2, False),
    ],
)
def test_the_warning_comes_where_the_chance_is_above_a_hundredth(divergence, size, warned):
    model = gaussian(size).score_model(sdekit.VPSDE())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sdekit.log_likelihood(model, draw(0, 2, size), nodes=4, divergence=divergence)
    assert any("fixed probes of signs" in str(warning.message) for warning in seen) == warned


@pytest.mark.parametrize("law", ["rademacher", "sphere"])
def test_in_one_dimension_signs_are_exact_and_say_so(law):
    target = sdekit.targets.GaussianMixture(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.full((2,), 0.2))
    for how in ({"nodes": 24}, {}):
        model, x = target.score_model(sdekit.VPSDE()), draw(2, 40, 1)
        out = sdekit.log_likelihood(model, x, divergence=sdekit.Hutchinson(law=law), **how)
        exact = sdekit.log_likelihood(model, x, divergence=sdekit.Exact(), **how)
        assert (out.std_error == 0).all()
        if how:
            torch.testing.assert_close(out.log_prob, exact.log_prob, rtol=0, atol=1e-9)


def test_margins_are_quantiles_times_the_standard_error():
    model, x = gaussian(10).score_model(sdekit.VPSDE()), draw(0, 5, 10)
    for divergence, at_95, at_50 in (
        (sdekit.Hutchinson(), 1.95996, 0.67449),
        (sdekit.Hutchinson(1, fresh=False), 1.95996, 0.67449),
        (sdekit.Hutchinson(4), 1.95996, 0.67449),
        (sdekit.Hutchinson(2, control=True), 1.95996, 0.67449),
        (sdekit.Hutchinson(4, fresh=False), 3.18245, 0.76489),
    ):
        out = sdekit.log_likelihood(model, x, divergence=divergence, nodes=8)
        torch.testing.assert_close(out.margin(), at_95 * out.std_error, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(out.margin(0.5), at_50 * out.std_error, rtol=1e-4, atol=0.0)
        assert out.budget().quantile == pytest.approx(at_95, abs=1e-4)
    ratio = sdekit.log_ratio(model, gaussian(10, seed=1).score_model(sdekit.VPSDE()), x, divergence=divergence)
    torch.testing.assert_close(ratio.margin(), 3.18245 * ratio.std_error, rtol=1e-5, atol=0.0)
    for level in (0.0, 1.0, 95, math.nan):
        with pytest.raises(ValueError, match="a confidence between 0 and 1"):
            out.margin(level)


def test_a_bound_and_a_solve_have_probes_of_their_own():
    """With the solve's probes their errors were correlated by 0.66; four standard errors of none are 0.1."""
    target = gaussian(16, seed=2)
    model, x = target.score_model(sdekit.VPSDE()), draw(1, 1, 16).expand(N, -1)
    both = sdekit.sandwich(model, x, draws=32, divergence=sdekit.Hutchinson(), indices=REPEATED, seed=3)
    pair = torch.stack((both.flow.log_prob, both.sde_bound.value))
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.11


def test_levels_of_enormous_weight_are_warned_of():
    model, x = gaussian(3).score_model(sdekit.VPSDE()), draw(0, 4, 3)
    with pytest.warns(sdekit.SdekitWarning, match="times the weight of uniform ones"):
        sdekit.path_integral(model, x, draws=4, times=sdekit.loss.LogNormalSigma())
    for sde in (sdekit.VPSDE(), sdekit.VESDE(), sdekit.KarrasSDE(), sdekit.RectifiedFlow()):
        sdekit.path_integral(gaussian(3).score_model(sde), x, draws=4)  # the default raises none

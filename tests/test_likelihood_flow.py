"""What a local error costs: at least its effect, at most its size, and little where its two parts cancel."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import draw, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

import sdekit
from sdekit.likelihood_flow import FlowState, LikelihoodFlow
from sdekit.targets import Gaussian
from sdekit.terms import Aux


def flow(size, divergence=None):
    """The term of a Gaussian with unequal variances in `size` dimensions, for two samples."""
    model = Gaussian(torch.zeros(size), torch.linspace(0.1, 2.0, size)).score_model(sdekit.VPSDE())
    chosen = sdekit.Hutchinson(fresh=False) if divergence is None else divergence
    return LikelihoodFlow(model, chosen, torch.Size((size,)), sdekit.Hutchinson.keys(0, torch.arange(2)))


def cost(term, gradient, in_u, in_l):
    """(B,) nats of an error (e_u, e_l) at this gradient."""
    return term.nats(FlowState(in_u, in_l[:, None].expand(-1, term.channels), None), Aux(gradient, None))


@settings(max_examples=25)
@given(size=st.sampled_from([1, 2, 16, 17, 64, 256, 1024]), seed=st.integers(0, 999), lean=st.floats(-3.0, 1.0))
def test_a_cost_lies_between_the_effect_and_the_size_of_an_error(size, seed, lean):
    term, gradient, in_u = flow(size), draw(seed, 2, size), draw(seed + 1, 2, size)
    along = (gradient * in_u).sum(1)
    in_l = lean * along
    priced, effect, whole = cost(term, gradient, in_u, in_l), (along + in_l).abs(), along.abs() + in_l.abs()
    share = max(0.25, min(1.0, 8.0 / math.sqrt(size)))
    torch.testing.assert_close(priced, torch.maximum(effect, share * whole), rtol=1e-12, atol=1e-14)
    assert (priced >= effect * (1 - 1e-12)).all()
    assert (priced <= whole * (1 + 1e-12)).all()


def test_in_few_dimensions_nothing_cancels():
    term, gradient, in_u = flow(64), draw(0, 2, 64), draw(1, 2, 64)
    along = (gradient * in_u).sum(1)
    torch.testing.assert_close(cost(term, gradient, in_u, -along), 2.0 * along.abs())


@pytest.mark.parametrize(("size", "share"), [(64, 1.0), (256, 0.5), (4096, 0.25), (65536, 0.25)])
def test_without_a_control_probe_the_norms_are_discounted_alike(size, share):
    term = flow(size, sdekit.Hutchinson())
    gradient, in_u = draw(0, 2, size), draw(1, 2, size)
    wanted = share * gradient.norm(dim=1) * in_u.norm(dim=1)
    torch.testing.assert_close(cost(term, gradient, in_u, draw(2, 2)), wanted)


def test_the_two_parts_of_a_fields_error_cancel_on_average():
    """Stein's identity for e = tanh(B u + b): the mean of gradient . e + div e over 40,000 draws is zero.

    |z| < 4.5: false alarm 1e-5.
    """
    size, count = 32, 40_000
    x = torch.randn(count, size, generator=seeded(1), dtype=torch.float64)
    matrix, shift = 0.1 * draw(2, size, size) + 0.5 * torch.eye(size), draw(3, size)
    value = (x @ matrix.T + shift).tanh()
    along, within = -(x * value).sum(1), ((1.0 - value.square()) * matrix.diagonal()).sum(1)
    total = along + within
    assert abs(float(total.mean() / (total.std() / math.sqrt(count)))) < 4.5
    assert float(along.mean().abs()) > 20.0 * float(along.std() / math.sqrt(count))  # neither part alone


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2])
def test_in_512_dimensions_the_tolerance_holds_and_costs_less_than_the_size_of_errors(tolerance, monkeypatch):
    """Signs are exact probes of a diagonal Jacobian, so the closed form is the truth: samples, and samples times 2."""
    size = 512
    target = Gaussian(draw(4, size), torch.linspace(0.05, 2.0, size))
    x = target.sample(3, generator=seeded(5))
    x = torch.cat((x, 2.0 * x))
    model, sde = target.score_model(sdekit.VPSDE()), sdekit.VPSDE()

    def solve():
        return sdekit.log_likelihood(
            model, x, divergence=sdekit.Hutchinson(fresh=False), tolerance=tolerance, data_moments=target
        )

    found = solve()
    error = (found.log_prob - target.marginal_log_prob(sde, x, sde.t_min)).abs()
    assert (error <= tolerance).all()
    assert (error <= found.solver_error).all()
    monkeypatch.setattr("sdekit.likelihood_flow._LEAST", 1.0)
    saved = solve().stats.evaluations - found.stats.evaluations
    assert (saved[:3] > 0).all()
    assert saved.sum() > 0  # so far out as twice a sample, steps are bound by stability

"""Planned grids: steps where the flow bends, measured on other draws than those they are used for."""

from __future__ import annotations

import pytest
import torch
from helpers import mixture
from torch import Tensor, nn

import sdekit
from sdekit.likelihood_flow import LikelihoodFlow
from sdekit.plan import _APART, _derivative, _nodes

SDE = sdekit.VPSDE(t_min=1e-3)


def endpoint(model: sdekit.ScoreModel, start: Tensor) -> Tensor:
    """Where the flow takes `start`, to 1e-10."""
    flow = LikelihoodFlow(model, None, start.shape[1:], torch.zeros(len(start), 2, dtype=torch.int64))
    judge = sdekit.PID(1e-11, 1e-11)
    return sdekit.integrate(flow, sdekit.Dopri8(), judge, start, SDE.t_max, SDE.t_min, max_evaluations=10**5).x


class Wavy(nn.Module):
    """A noise prediction that oscillates near t_max, as learned time features do."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * (1.0 + 0.5 * torch.sin(60.0 * t.to(x.dtype) ** 4))[:, None]


@pytest.mark.parametrize("kind", ["mixture", "wavy"])
@pytest.mark.parametrize("steps", [19, 49])
def test_a_planned_grid_is_closer_than_equal_steps_on_draws_it_has_not_seen(kind: str, steps: int) -> None:
    wavy = sdekit.ScoreModel(Wavy(), SDE, data_std=1.0)
    model = mixture(2, 0).score_model(SDE) if kind == "mixture" else wavy
    plan = sdekit.plan_sampling(model, (2,), steps, samples=24, dtype=torch.float64)
    start = sdekit.sampling.draw_prior(model, (64, 2), 5, torch.arange(64), torch.float64)
    truth = endpoint(model, start)
    by_plan = sdekit.sample(
        model, (64, 2), solver=plan.solver, controller=plan.controller, denoise=False, seed=5, dtype=torch.float64
    )
    equal = sdekit.sample(model, (64, 2), steps=steps, denoise=False, seed=5, dtype=torch.float64)
    error, default = ((found.x - truth).square().mean().sqrt() for found in (by_plan, equal))
    assert by_plan.stats.evaluations.eq(equal.stats.evaluations).all()
    assert error < 0.6 * default
    # What the plan says of itself is what others find, up to the draws.
    assert plan.error <= plan.default
    assert 0.2 < plan.error / error < 5.0
    assert 0.2 < plan.default / default < 5.0


def test_nodes_share_a_density_equally() -> None:
    position = torch.linspace(0.0, 1.0, 801, dtype=torch.float64)
    density = 1.0 + 3.0 * position  # its integral from 0 to s is s + 1.5 s^2
    nodes = _nodes(position, density, 40, 0.0, 1.0)
    shares = (nodes + 1.5 * nodes.square()).diff().abs()
    assert nodes[0] == 1.0
    assert nodes[-1] == 0.0
    # A window levels the density off within 0.03 of the ends.
    torch.testing.assert_close(shares, torch.full_like(shares, 2.5 / 40), rtol=0.02, atol=0.0)


def test_a_constant_density_means_equal_steps_and_short_first_ones_double() -> None:
    position = torch.linspace(0.1, 0.9, 30, dtype=torch.float64)
    equal = _nodes(position, torch.ones_like(position), 10, 0.3, 1.0).diff().neg()
    torch.testing.assert_close(equal, torch.full_like(equal, 0.1), rtol=1e-9, atol=0.0)
    short = _nodes(position, torch.ones_like(position), 10, 0.3, 0.25).diff().neg()
    torch.testing.assert_close(short[1:3] / short[:2], torch.full_like(short[:2], 2.0), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(short[3:], short[2].expand(7), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_derivatives_of_a_polynomial_are_those_of_calculus(order: int) -> None:
    s = torch.linspace(1.0, 0.0, 41, dtype=torch.float64)
    position, size = _derivative((s ** (order + 1))[:, None, None], order)
    # The order-th derivative of s^(order + 1) is (order + 1)! s, and its divided difference is that at the middle.
    factor = torch.tensor(range(1, order + 2)).prod()
    torch.testing.assert_close(size[:, 0], factor * position, rtol=1e-6, atol=1e-9)
    assert bool((position.diff() > 0).all())


def test_a_plan_is_the_same_again_and_another_for_another_seed() -> None:
    model = mixture(2, 0).score_model(SDE)
    one, two, other = (sdekit.plan_sampling(model, (2,), 8, samples=8, seed=s, dtype=torch.float64) for s in (0, 0, 1))
    assert torch.equal(one.times, two.times)
    assert (one.solver, one.error, one.evaluations) == (two.solver, two.error, two.evaluations)
    assert one.error != other.error
    assert one.times[0] == SDE.t_max
    assert one.times[-1] == SDE.t_min
    assert one.times.shape == (9,)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_have_a_plan_too(steps: int) -> None:
    model = mixture(2, 0).score_model(SDE)
    plan = sdekit.plan_sampling(model, (2,), steps, samples=8, dtype=torch.float64)
    assert plan.times.shape == (steps + 1,)
    assert plan.error <= plan.default < 10.0


@pytest.mark.parametrize("samples", [4, 100])
def test_the_stated_cost_is_what_was_called(samples: int) -> None:
    rows = 0

    class Counted(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            nonlocal rows
            rows += x.shape[0]
            return x / (1.0 + t.to(x.dtype)[:, None])

    model = sdekit.ScoreModel(Counted(), SDE, data_std=1.0)
    plan = sdekit.plan_sampling(model, (2,), 6, samples=samples)
    # The package may call a little more, on one sample, to see whether a network can be played back.
    assert plan.evaluations <= rows / samples + 1 <= 1.2 * plan.evaluations


def test_every_sample_keeps_its_own_condition_where_only_some_are_carried() -> None:
    start = sdekit.sampling.draw_prior(
        mixture(2, 0).score_model(SDE), (100, 2), 0, torch.arange(100) + _APART, torch.float32
    )
    sizes = set()

    class Numbered(nn.Module):
        def forward(self, x: Tensor, t: Tensor, number: Tensor) -> Tensor:
            if bool((t == SDE.t_max).all()):
                torch.testing.assert_close(x, start[number])
                sizes.add(len(x))
            return torch.tanh(x - 0.01 * number[:, None])

    model = sdekit.ScoreModel(Numbered(), SDE, data_std=1.0).condition(number=torch.arange(100))
    plan = sdekit.plan_sampling(model, (2,), 4, samples=100)
    assert {36, 64, 100} <= sizes
    assert plan.error <= plan.default


def test_bad_arguments_are_refused_at_the_door() -> None:
    model = mixture(2, 0).score_model(SDE)
    with pytest.raises(ValueError, match="steps=0"):
        sdekit.plan_sampling(model, (2,), 0)
    with pytest.raises(ValueError, match="samples=0"):
        sdekit.plan_sampling(model, (2,), 4, samples=0)
    with pytest.raises(ValueError, match="event"):
        sdekit.plan_sampling(model, (), 4)

"""The error budget: every line against what it is said to estimate, known in closed form."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from helpers import gaussian, mixture, moments
from torch import Tensor

import sdekit
from sdekit.budget import Budget
from sdekit.zoo import digits as zoo

SDES = {
    "VP": sdekit.VPSDE(t_min=1e-3),
    "VE": sdekit.VESDE(),
    "sub-VP": sdekit.SubVPSDE(t_min=1e-2),
    "flow": sdekit.RectifiedFlow(t_min=1e-2),
}


def solved(model: sdekit.ScoreModel, x: Tensor, tolerance: float = 1e-6, **settings: object) -> sdekit.LogLikelihood:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sdekit.SmoothnessWarning)
        return sdekit.log_likelihood(model, x, budget=True, tolerance=tolerance, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("matched", [False, True])
def test_the_terminal_law_s_line_is_its_distance_from_the_exact_law(name: str, matched: bool) -> None:
    sde, target = SDES[name], mixture(3, 1)
    x = target.sample(12, generator=torch.Generator().manual_seed(0))
    out = solved(target.score_model(sde), x, 1e-2, data_moments=moments(target) if matched else None)
    assert out.ends is not None
    truth = target.marginal_log_prob(sde, out.latent, sde.t_max) - out.log_prior
    torch.testing.assert_close(out.ends.mismatch, truth, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("name", SDES)
def test_what_the_data_s_end_leaves_out_is_estimated_to_first_order(name: str) -> None:
    sde, target = SDES[name], gaussian(3)
    x = target.sample(12, generator=torch.Generator().manual_seed(1))
    out = solved(target.score_model(sde), x, data_moments=target)
    assert out.ends is not None
    truth = target.log_prob(x) - out.log_prob
    assert truth.abs().max() > 1e-5
    share = (out.ends.truncation - truth).abs() / truth.abs().max()
    assert share.max() < 0.1


def test_what_a_heat_step_leaves_out_is_estimated_by_the_next_order() -> None:
    sde, target = sdekit.VPSDE(t_min=0.02), gaussian(3)
    x = target.sample(12, generator=torch.Generator().manual_seed(1))
    out = solved(target.score_model(sde), x, end="heat", data_moments=target)
    assert out.ends is not None
    truth = target.log_prob(x) - out.log_prob
    assert truth.abs().max() > 3e-5  # thirty tolerances
    share = (out.ends.truncation - truth).abs() / truth.abs().max()
    assert share.max() < 0.2


def test_extrapolation_is_said_to_leave_little_and_leaves_little() -> None:
    sde, target = SDES["VP"], mixture(2, 3)
    x = target.sample(24, generator=torch.Generator().manual_seed(2))
    model = target.score_model(sde)
    before, after = (solved(model, x, end=end).ends for end in ("marginal", "extrapolate"))
    assert before is not None
    assert after is not None
    assert after.truncation.abs().median() < 0.05 * before.truncation.abs().median()
    exact = solved(model, x, end="extrapolate", data_moments=moments(target))
    assert exact.ends is not None
    assert (exact.log_prob + exact.ends.mismatch - target.log_prob(x)).abs().max() < 1e-4


def test_one_probe_says_how_uncertain_the_data_s_end_is() -> None:
    """Bound 4.5 standard errors of a mean of 400, both ways: false alarm below 1e-5."""
    sde, target = SDES["VP"], gaussian(6, 1)
    x = target.sample(1, generator=torch.Generator().manual_seed(4)).expand(400, -1)
    exact = solved(target.score_model(sde), x[:1]).ends
    noisy = sdekit.log_likelihood(
        target.score_model(sde), x, budget=True, nodes=8, divergence=sdekit.Hutchinson(probes=1)
    ).ends
    assert exact is not None
    assert noisy is not None
    gap = noisy.truncation - exact.truncation
    assert gap.mean().abs() < 4.5 * gap.std() / 20.0
    # Without neighbours a Rademacher probe's variance is a bound.
    assert noisy.spread.square().mean() > 0.9 * gap.var()


def test_rounding_covers_what_single_precision_changes() -> None:
    """Of 24 images none was outside, by far: one in a hundred is what larger runs gave."""
    double = zoo.load().double().eval()
    single = zoo.load().float().eval()
    x = zoo.dequantise(zoo.load_split().test[:24], torch.Generator().manual_seed(5)).float()
    wide, narrow = (sdekit.log_likelihood(model, data, nodes=24) for model, data in ((double, x.double()), (single, x)))
    assert wide.rounding is not None
    assert narrow.rounding is not None
    error = (wide.log_prob - narrow.log_prob).abs()
    assert int((error > narrow.rounding).sum()) <= 1
    assert narrow.rounding.median() < 100.0 * error.median()
    # Twenty-nine bits of the mantissa apart.
    ratio = narrow.rounding / wide.rounding
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0**29), rtol=0.05, atol=0.0)


def test_the_ends_do_not_move_the_value_and_their_evaluations_are_counted() -> None:
    target = mixture(2, 0)
    model, x = target.score_model(SDES["VP"]), target.sample(5, generator=torch.Generator().manual_seed(6))
    plain, full = sdekit.log_likelihood(model, x), sdekit.log_likelihood(model, x, budget=True)
    assert torch.equal(plain.log_prob, full.log_prob)
    assert torch.equal(full.stats.evaluations, plain.stats.evaluations + 4)
    assert plain.ends is None


def test_a_sample_s_budget_is_its_own() -> None:
    target = mixture(2, 0)
    model, x = target.score_model(SDES["VE"]), target.sample(9, generator=torch.Generator().manual_seed(7))
    together, alone = (sdekit.log_likelihood(model, part, budget=True) for part in (x, x[4:5]))
    for one, other in zip(together.budget().lines, alone.budget().lines, strict=True):
        assert one.nats is not None
        assert other.nats is not None
        torch.testing.assert_close(one.nats[4:5], other.nats, rtol=1e-6, atol=1e-15)


def test_the_table_names_every_cause_its_source_and_its_remedy() -> None:
    target = mixture(2, 0)
    model, x = target.score_model(SDES["VP"]), target.sample(5, generator=torch.Generator().manual_seed(8))
    full = sdekit.log_likelihood(model, x, budget=True)
    budget = full.budget()
    names = [line.name for line in budget.lines]
    assert names == ["trace", "solver", "truncation at t_min", "terminal law", "rounding"]
    text = str(budget)
    assert all(line.name in text and line.remedy in text and line.source in text for line in budget.lines)
    assert full.ends is not None
    ends = full.ends.truncation.abs() + full.ends.mismatch.abs()
    expected = full.solver_error + 1.25 * ends + full.rounding
    torch.testing.assert_close(budget.total(), expected)
    bare = sdekit.log_likelihood(model, x).budget()
    assert [line.nats is None for line in bare.lines] == [False, False, True, True, False]
    assert "budget=True" in str(bare)


def test_the_total_covers_where_the_end_is_nearly_all_of_it() -> None:
    """The end's own line, which estimates the size of what is missing, covers 73% here."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    target = sdekit.targets.GaussianMixture(
        torch.ones(8), 2.0 * torch.stack((angle.cos(), angle.sin()), 1), torch.full((8,), 0.05)
    )
    x = target.sample(150, generator=torch.Generator().manual_seed(11))
    out = sdekit.log_likelihood(target.score_model(SDES["VE"]), x, tolerance=1e-3, budget=True)
    error = (out.log_prob - target.log_prob(x)).abs()
    assert float((error <= out.budget().total()).double().mean()) >= 0.98


def test_an_empty_batch_has_an_empty_budget() -> None:
    out = sdekit.log_likelihood(mixture(2, 0).score_model(SDES["VP"]), torch.zeros(0, 2).double(), budget=True)
    budget = out.budget()
    assert isinstance(budget, Budget)
    assert budget.total().shape == (0,)
    assert "?" in str(budget)


def test_a_solver_without_an_estimate_claims_none() -> None:
    target, sde = mixture(2, 0), SDES["VP"]
    grid = sdekit.FixedGrid(sdekit.grid.likelihood(sde, 8).flip(0))
    x = target.sample(3, generator=torch.Generator().manual_seed(9))
    out = sdekit.log_likelihood(target.score_model(sde), x, solver=sdekit.RK4(), controller=grid, budget=True)
    assert bool(out.solver_error.isnan().all())
    assert bool(out.budget().total().isnan().all())
    assert "?" in str(out.budget())


def test_a_single_precision_network_rounds_double_precision_states() -> None:
    """As much as in half precision, for its precision; in single precision too, the states' own part is small."""
    net = zoo.load().float().eval()
    x = zoo.dequantise(zoo.load_split().test[:2], torch.Generator().manual_seed(5)).double()
    mixed = sdekit.log_likelihood(net, x, nodes=6).rounding
    half = sdekit.log_likelihood(net.to(torch.bfloat16), x, nodes=6).rounding
    assert mixed is not None
    assert half is not None
    share = torch.finfo(torch.float32).eps / torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(mixed, share * half, rtol=0.05, atol=0.0)


def test_what_the_budget_cannot_mean_is_refused() -> None:
    target = mixture(2, 0)
    model, x = target.score_model(SDES["VP"]), target.sample(2, generator=torch.Generator().manual_seed(9))
    with pytest.raises(ValueError, match="leave one of them out"):
        sdekit.log_likelihood(model, x, t=0.5, budget=True)
    with pytest.raises(ValueError, match="more than 4 is needed"):
        sdekit.log_likelihood(model, x, nodes=4, max_evaluations=4, budget=True)
    assert int(sdekit.log_likelihood(model, x, nodes=4, max_evaluations=8, budget=True).stats.calls) == 8


def test_a_network_that_fails_in_the_budget_leaves_the_densities() -> None:
    target, sde = mixture(2, 0), SDES["VP"]
    exact, calls = target.score_model(sde), 0

    class Fails(torch.nn.Module):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 9:
                raise RuntimeError("no more")
            return exact.net(x, label)

    model = sdekit.ScoreModel(Fails(), sde, exact.parameterization, exact.data_std)
    x = target.sample(2, generator=torch.Generator().manual_seed(9))
    with pytest.raises(sdekit.SolveError, match="in the error budget") as caught:
        sdekit.log_likelihood(model, x, nodes=8, budget=True)
    assert bool(caught.value.solution.log_prob.isfinite().all())

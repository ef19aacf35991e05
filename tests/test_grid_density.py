"""On a fixed grid a density is had by short sums: the loop's numbers, and the loop itself where they do not serve."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from helpers import PARAMETERIZATIONS, SDES, draw, mixture, perceptron, watched

import sdekit
from sdekit import Exact, Hutchinson, Status, grid_books, grid_density

TARGET = mixture(3, 1)
MODEL = TARGET.score_model(SDES["vp"])
DIVERGENCES = [
    Exact(),
    Hutchinson(1, fresh=False),
    Hutchinson(3, fresh=False),
    Hutchinson(1),
    Hutchinson(2, control=True),
    Hutchinson(2, law="gaussian"),
    Hutchinson(2, law="sphere"),
]
FIELDS = ("log_prob", "log_det", "std_error", "solver_error", "rounding", "latent", "t", "reach")


@pytest.fixture
def solves(monkeypatch):
    """How many solves went by short sums; a switch that leaves all to the loop."""

    class Solves:
        count = 0

        def by_the_loop(self, how=True):
            monkeypatch.setattr(grid_density, "usable", (lambda *_: False) if how else usable)

    usable, run, found = grid_density.usable, grid_density._Solve.run, Solves()

    def counted(solve):
        found.count += 1
        return run(solve)

    monkeypatch.setattr(grid_density._Solve, "run", counted)
    return found


def both(solves, model, x, **options):
    """The density by short sums and by the loop."""
    found = []
    for loop in (False, True):
        solves.by_the_loop(loop)
        found.append(sdekit.log_likelihood(model, x, throw=False, **options))
    assert solves.count >= 1
    return found


def agree(ours, theirs, rtol=1e-9, atol=1e-12):
    for name in FIELDS:
        found, wanted = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=0.0 if name == "rounding" else atol, equal_nan=True)
    assert torch.equal(ours.status, theirs.status)
    for a, b in zip(ours.stats, theirs.stats, strict=True):
        assert a == b if isinstance(a, int) else torch.equal(a, b)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("name", SDES)
def test_it_is_what_the_loop_gives(name, divergence, solves):
    for kind in ("noise", "edm"):
        model = TARGET.score_model(SDES[name], PARAMETERIZATIONS[kind])
        agree(*both(solves, model, TARGET.sample(4), nodes=12, divergence=divergence, seed=3), rtol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("block", [1, 60, 1 << 20])
def test_however_many_nodes_are_booked_at_once(block, divergence, solves, monkeypatch):
    monkeypatch.setattr(grid_books, "_BLOCK", block)
    for nodes in (5, 17):
        agree(*both(solves, MODEL, TARGET.sample(4), nodes=nodes, divergence=divergence), rtol=1e-8)


@pytest.mark.parametrize("order", [2, 3, 6])
@pytest.mark.parametrize("grid", ["karras", "uniform_time"])
def test_on_any_grid_at_any_order_with_any_end(order, grid, solves):
    times = getattr(sdekit.grid, grid)(MODEL.sde, 14).flip(0)
    options = {"solver": sdekit.Adams(order), "controller": sdekit.FixedGrid(times), "divergence": Hutchinson(2)}
    x = TARGET.sample(3)
    agree(*both(solves, MODEL, x, **options), rtol=1e-7)
    with pytest.warns(sdekit.SmoothnessWarning):
        agree(*both(solves, MODEL, x, end="heat", **options), rtol=1e-7)


def test_learned_networks_of_single_precision_agree_to_their_rounding(solves):
    model = sdekit.ScoreModel(perceptron(3, 2).float(), SDES["karras"], sdekit.edm(0.7))
    x = draw(1, 40, 3).float()
    for divergence in (Exact(), Hutchinson(1)):
        ours, theirs = both(solves, model, x, nodes=32, divergence=divergence)
        assert solves.count
        torch.testing.assert_close(ours.log_prob, theirs.log_prob, rtol=0.0, atol=2e-4)
        torch.testing.assert_close(ours.std_error, theirs.std_error, rtol=1e-3, atol=1e-6)


def test_no_sample_influences_another(solves):
    x = draw(2, 9, 3)
    whole = sdekit.log_likelihood(MODEL, x, nodes=20, divergence=Hutchinson(2), seed=5)
    rows = torch.tensor([7, 2])
    part = sdekit.log_likelihood(MODEL, x[rows], nodes=20, divergence=Hutchinson(2), seed=5, indices=rows)
    assert solves.count == 2
    torch.testing.assert_close(part.log_prob, whole.log_prob[rows], rtol=0.0, atol=1e-12)
    torch.testing.assert_close(part.std_error, whole.std_error[rows], rtol=1e-10, atol=0.0)
    torch.testing.assert_close(part.solver_error, whole.solver_error[rows], rtol=1e-7, atol=1e-14)


def test_densities_of_samples_on_the_way_are_the_loops_too(solves):
    found = []
    for loop in (False, True):
        solves.by_the_loop(loop)
        found.append(sdekit.sample_log_prob(MODEL, (4, 3), nodes=14, divergence=Hutchinson(1), dtype=torch.float64))
    assert solves.count == 1
    torch.testing.assert_close(found[0].x, found[1].x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0].log_prob, found[1].log_prob, rtol=1e-10, atol=1e-10)


def test_nan_is_of_its_own_sample_and_the_loop_says_where(solves):
    x = TARGET.sample(3)

    def act(call, x, label, answer):
        bad = (torch.arange(len(x)) == 1) & (label < 0.5) & (label > 0.2)
        return torch.where(bad[:, None], torch.nan, answer())

    model, _ = watched(MODEL, act)
    ours, theirs = both(solves, model, x, nodes=12)
    assert ours.status.tolist() == [Status.DONE, Status.NOT_FINITE, Status.DONE]
    assert torch.equal(ours.t, theirs.t)
    torch.testing.assert_close(ours.log_prob, theirs.log_prob, rtol=1e-12, atol=0.0, equal_nan=True)
    assert ours.stats.calls == theirs.stats.calls + 12  # those in vain are counted
    solves.by_the_loop(False)
    whole = sdekit.log_likelihood(MODEL, x, nodes=12)
    for name in FIELDS:  # the others have the bits that they have without it
        assert torch.equal(getattr(ours, name)[[0, 2]], getattr(whole, name)[[0, 2]])


@pytest.mark.parametrize("block", [1, 30, 1 << 20])
@pytest.mark.parametrize("late", [0, 1, 2, 7])
def test_whoever_stops_it_finds_what_the_loop_has(late, block, solves, monkeypatch):
    monkeypatch.setattr(grid_books, "_BLOCK", block)
    x = TARGET.sample(3)

    def shapeless(call, x, label, answer):
        return answer()[:, :1] if call > late else answer()

    def interrupted(call, x, label, answer):
        if call > late:
            raise KeyboardInterrupt
        return answer()

    stopped = []
    for loop in (False, True):
        solves.by_the_loop(loop)
        model, _ = watched(MODEL, shapeless)
        with pytest.raises(sdekit.SolveError, match=r"returned shape \(3, 1\)") as caught:
            sdekit.log_likelihood(model, x, nodes=12, divergence=Hutchinson(2))
        model, _ = watched(MODEL, interrupted)
        with pytest.warns(sdekit.PartialResultWarning):
            found = sdekit.log_likelihood(model, x, nodes=12, divergence=Hutchinson(2))
        stopped.append((caught.value.solution, found))
    assert solves.count == 2
    for ours, theirs in zip(*stopped, strict=True):
        assert torch.equal(ours.status, theirs.status)
        assert torch.equal(ours.stats.evaluations, theirs.stats.evaluations)
        assert torch.equal(ours.stats.accepted, theirs.stats.accepted)
        assert torch.equal(ours.t, theirs.t)
        torch.testing.assert_close(ours.latent, theirs.latent, rtol=1e-10, atol=1e-12)
        assert bool(ours.log_prob.isnan().all())
        assert bool(theirs.log_prob.isnan().all())


def test_networks_that_write_into_their_labels_are_served_too(solves):
    class Rough(torch.nn.Module):
        def forward(self, x, label):
            return torch.tanh(x + label.mul_(3.0)[:, None])

    model = sdekit.ScoreModel(Rough(), SDES["vp"], sdekit.data(), data_std=0.5)
    x = draw(4, 5, 3)
    first, again = (sdekit.log_likelihood(model, x, nodes=10).log_prob for _ in range(2))
    solves.by_the_loop()
    assert torch.equal(first, again)
    torch.testing.assert_close(first, sdekit.log_likelihood(model, x, nodes=10).log_prob, rtol=1e-12, atol=0.0)


def test_time_limits_and_budgets_hold(solves):
    x = TARGET.sample(2)
    with pytest.warns(sdekit.PartialResultWarning, match="wall_time"):
        found = sdekit.log_likelihood(MODEL, x, nodes=12, wall_time=1e-9)
    assert found.status.tolist() == [Status.TIME_LIMIT] * 2
    assert solves.count == 1
    found = sdekit.log_likelihood(MODEL, x, nodes=12, max_evaluations=7, throw=False)
    assert found.status.tolist() == [Status.BUDGET] * 2
    assert solves.count == 1  # that is the loop's


class Own(sdekit.ScoreModel):
    def output(self, x, t):
        return super().output(x, t)


def test_what_is_not_shared_or_not_ours_is_left_to_the_loop(solves):
    x = TARGET.sample(4)
    scale = [1.0]
    labelled = sdekit.noise(lambda sde, t: scale[0] * t)
    single = sdekit.ScoreModel(perceptron(3, 2).float(), SDES["karras"], sdekit.edm(0.7))
    grid = sdekit.FixedGrid(sdekit.grid.karras(MODEL.sde, 5).flip(0))
    cases = [
        (MODEL, {"slots": 2}),
        (MODEL, {"t": torch.tensor([0.1, 0.1, 0.1, 0.3], dtype=torch.float64)}),
        (MODEL, {"nodes": None, "solver": sdekit.RK4(), "controller": grid}),
        (sdekit.ScoreModel(MODEL.net, MODEL.sde, labelled, 0.5), {}),
        (Own(MODEL.net, MODEL.sde, MODEL.parameterization, MODEL.data_std), {}),
        (single, {}),  # a network of less precision than the data
    ]
    for model, options in cases:
        sdekit.log_likelihood(model, x, **{"nodes": 9, **options})
    assert solves.count == 0
    half = sdekit.log_likelihood(MODEL, x, nodes=9, t=0.1)  # one level for all
    assert solves.count == 1
    exact = TARGET.marginal_log_prob(MODEL.sde, x, 0.1)
    assert float((half.log_prob - exact).abs().max()) < 0.5


def test_the_error_of_a_grid_goes_down_as_the_order_says():
    # By its own sums, not by comparison: log p against the closed form on grids twice as fine.
    x, sde = TARGET.sample(64), SDES["vp"]
    errors = []
    for nodes in (65, 129, 257):
        term = sdekit.log_likelihood(MODEL, x, nodes=nodes)
        exact = TARGET.marginal_log_prob(sde, x, sde.t_min)
        law = TARGET.marginal_log_prob(sde, term.latent, sde.t_max) - sde.prior_log_prob(term.latent)
        errors.append(float((term.log_prob + law - exact).square().mean().sqrt()))
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(rates) > 2.5, (errors, rates)  # a ramp: 3 at most

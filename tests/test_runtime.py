"""However a step runs, the numbers are the same to rounding; and what cannot run as asked says why."""

from __future__ import annotations

import shutil
from collections import OrderedDict

import pytest
import torch
from helpers import SDES, Function, draw, mixture, perceptron, seeded, watched
from torch import nn

import sdekit
from sdekit import Status, compiled, driver, tracing
from sdekit.solver import newton

SDE = SDES["vp"]
TARGET = mixture(3, 5)
EXACT = TARGET.score_model(SDE)
LEARNED = sdekit.ScoreModel(perceptron(3, 2), SDES["karras"], sdekit.edm(0.7))


def same(ours, theirs, atol=1e-9):
    torch.testing.assert_close(ours.log_prob, theirs.log_prob, rtol=0.0, atol=atol)
    torch.testing.assert_close(ours.std_error, theirs.std_error, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(ours.solver_error, theirs.solver_error, rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(ours.rounding, theirs.rounding, rtol=1e-7, atol=0.0)
    assert torch.equal(ours.stats.evaluations, theirs.stats.evaluations)
    assert torch.equal(ours.status, theirs.status)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="needs a C++ compiler")
class TestCompiled:
    """One compilation each: some seconds."""

    def test_densities_are_the_eager_ones_in_every_batch_and_for_every_network(self):
        for model, count in ((EXACT, 7), (EXACT, 1), (TARGET.score_model(SDE, sdekit.noise()), 12)):
            x = TARGET.sample(count, generator=torch.Generator().manual_seed(count))
            eager, fast = (sdekit.log_likelihood(model, x, runtime=how) for how in ("eager", "compile"))
            same(fast, eager)
        x = TARGET.sample(5).T.contiguous().T  # in another order in memory
        same(sdekit.log_likelihood(EXACT, x, runtime="compile"), sdekit.log_likelihood(EXACT, x.contiguous()))
        before = len(compiled._programs)
        sdekit.log_likelihood(EXACT, TARGET.sample(3), seed=9, runtime="compile")
        assert len(compiled._programs) == before, "the same kind of solve was compiled again"

    def test_probes_and_a_scaled_input_are_the_same(self):
        divergence = sdekit.Hutchinson(2, control=True)
        for count in (5, 1):
            x = draw(count, count, 3)
            eager, fast = (
                sdekit.log_likelihood(LEARNED, x, divergence=divergence, runtime=how, tolerance=1e-3)
                for how in ("eager", "compile")
            )
            same(fast, eager)

    def test_a_method_that_begins_inside_of_its_first_step_does_too(self):
        newton._kept.clear()  # what is made in a trace is not kept
        options = {
            "solver": sdekit.Adams(4, "inside"),
            "controller": sdekit.FixedGrid(sdekit.grid.likelihood(SDE, 12).flip(0)),
        }
        x = TARGET.sample(5)
        fast, eager = (sdekit.log_likelihood(EXACT, x, runtime=how, **options) for how in ("compile", "eager"))
        same(fast, eager)

    def test_the_network_is_the_one_of_the_moment(self):
        net = perceptron(3, 2)
        model = sdekit.ScoreModel(net, SDES["karras"], sdekit.edm(0.7))
        divergence = sdekit.Hutchinson(2, control=True)  # compiled by the test before, or here
        x = draw(3, 4, 3)
        first = sdekit.log_likelihood(model, x, divergence=divergence, tolerance=1e-3, runtime="compile")
        with torch.no_grad():
            for weight in net.parameters():
                weight.mul_(0.9)
        eager, fast = (
            sdekit.log_likelihood(model, x, divergence=divergence, tolerance=1e-3, runtime=how)
            for how in ("eager", "compile")
        )
        same(fast, eager)
        assert (first.log_prob - fast.log_prob).abs().min() > 1e-3

    def test_failures_are_recorded_as_they_are_eagerly(self):
        def act(call, x, label, answer):
            bad = (torch.arange(len(x)) == 1) & (call > 8 and len(x) == 3)
            return torch.where(bad[:, None], torch.nan, answer())

        x, found = TARGET.sample(3), []
        for how in ("eager", "compile"):
            model, _ = watched(EXACT, act)
            found.append(sdekit.log_likelihood(model, x, runtime=how, throw=False))
        assert found[1].status.tolist() == [Status.DONE, Status.NOT_FINITE, Status.DONE]
        assert torch.equal(found[0].status, found[1].status)
        torch.testing.assert_close(found[1].log_prob[[0, 2]], found[0].log_prob[[0, 2]], rtol=0.0, atol=1e-9)

        def shapeless(call, x, label, answer):
            return answer()[:, :1] if call > 8 else answer()

        model, _ = watched(EXACT, shapeless)
        with pytest.raises(sdekit.SolveError, match=r"returned shape \(3, 1\)") as caught:
            sdekit.log_likelihood(model, x, runtime="compile")
        assert (caught.value.solution.stats.evaluations == 8).all()

    def test_conditions_follow_their_samples(self):
        class Shifted(nn.Module):
            def forward(self, x, label, shift):
                return TARGET.score_model(SDE).net(x - shift, label)

        model = sdekit.ScoreModel(Shifted(), SDE, EXACT.parameterization, EXACT.data_std)
        x, shift = TARGET.sample(9), 0.1 * draw(4, 9, 3)
        eager, fast = (
            sdekit.log_likelihood(model.condition(shift=shift), x, runtime=how, slots=slots)
            for how, slots in (("eager", None), ("compile", 4))
        )
        same(fast, eager)

    def test_flows_and_noise_are_the_same(self):
        x = TARGET.sample(6)
        eager, fast = (
            sdekit.integrate(
                *(sdekit.ProbabilityFlow(EXACT), sdekit.Heun(), sdekit.PID(1e-4, 1e-4), x, 0.1, SDE.t_max), runtime=how
            )
            for how in ("eager", "compile")
        )
        torch.testing.assert_close(fast.x, eager.x, rtol=0.0, atol=1e-10)
        assert torch.equal(fast.stats.evaluations, eager.stats.evaluations)
        grid = sdekit.FixedGrid(sdekit.grid.likelihood(SDE, 12, EXACT.data_std))
        path = sdekit.IndependentIncrements(3, torch.arange(6))
        eager, fast = (
            sdekit.integrate(
                *(sdekit.ReverseSDE(EXACT), sdekit.EulerMaruyama(), grid, draw(8, 6, 3), SDE.t_max, SDE.t_min, path),
                runtime=how,
            )
            for how in ("eager", "compile")
        )
        torch.testing.assert_close(fast.x, eager.x, rtol=0.0, atol=1e-10)

    def test_a_path_that_is_divided_is_the_same(self):
        def solve(how, count):
            path = sdekit.BrownianMotion(3, torch.arange(count), -SDE.t_max, -SDE.t_min, depth=5)
            control, start = sdekit.PID(3e-2, 3e-2), draw(8, 6, 3)[:count].float()
            term, solver = sdekit.ReverseSDE(EXACT), sdekit.StochasticHeun()
            return sdekit.integrate(term, solver, control, start, SDE.t_max, SDE.t_min, path, runtime=how)

        for count in (6, 2):
            eager, fast = solve("eager", count), solve("compile", count)
            torch.testing.assert_close(fast.x, eager.x, rtol=0.0, atol=1e-5)
            assert torch.equal(fast.stats.evaluations, eager.stats.evaluations)
            assert int(fast.stats.rejected.sum()) > 0


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("a Own", {"solver": "own"}),
        ("Own is not of this package", {"controller": "own"}),
        ("its eta is a function", {"term": sdekit.ReverseSDE(EXACT, lambda t: 0.5 * t)}),
        ("its model is a Sub", {"model": "own"}),
        ("only CUDA has graphs", {"runtime": "graph"}),
    ],
)
def test_what_cannot_run_as_asked_runs_eagerly_and_says_why(reason, options):
    class Own(sdekit.PID):
        pass

    class Sub(sdekit.ScoreModel):
        pass

    model = Sub(EXACT.net, SDE, EXACT.parameterization) if "model" in options else EXACT
    term = options.get("term", sdekit.ProbabilityFlow(model))
    if "solver" in options:

        class Own(sdekit.ProbabilityFlow):  # an equation of the user's own
            pass

        term = Own(model)
    noise = isinstance(term, sdekit.ReverseSDE)
    grid = sdekit.FixedGrid(torch.linspace(SDE.t_max, SDE.t_min, 5, dtype=torch.float64))
    controller = grid if noise else Own(1e-3, 1e-3) if "controller" in options else sdekit.PID(1e-3, 1e-3)
    solver = sdekit.EulerMaruyama() if noise else sdekit.Heun()
    path = sdekit.IndependentIncrements(0, torch.arange(4)) if noise else None
    given = term, solver, controller, draw(1, 4, 3), SDE.t_max, SDE.t_min, path
    with pytest.warns(sdekit.errors.SdekitWarning, match=reason):
        found = sdekit.integrate(*given, runtime=options.get("runtime", "compile"))
    assert torch.equal(found.x, sdekit.integrate(*given, runtime="eager").x)


MADE_OF_SOLVES = {
    "ratio": lambda x, **how: sdekit.log_ratio(EXACT, LEARNED, x, **how).value,
    "discrete": lambda x, **how: sdekit.discrete_log_likelihood(EXACT, (x > 0).long(), levels=2, **how).log_prob,
    "sandwich": lambda x, **how: sdekit.sandwich(EXACT, x, draws=8, **how).flow.log_prob,
}


@pytest.mark.parametrize("name", MADE_OF_SOLVES)
def test_what_is_made_of_solves_hands_runtime_and_slots_on(name, monkeypatch):
    solve = MADE_OF_SOLVES[name]
    x, asked, plain = TARGET.sample(3, generator=seeded(4)), [], driver.stepper
    monkeypatch.setattr(driver, "stepper", lambda how, *rest: asked.append(how) or plain("eager", *rest))
    eager, other = (solve(x, runtime=how) for how in ("eager", "compile"))
    assert set(asked) == {"eager", "compile"}
    assert torch.equal(eager, other)
    if name != "sandwich":
        torch.testing.assert_close(solve(x, slots=2), eager, rtol=0, atol=1e-9)


def plain_pieces(monkeypatch):
    """Has pieces run operation by operation, as they were traced: no compiler is needed."""
    monkeypatch.setattr(tracing, "fused", lambda piece, given: piece)
    monkeypatch.setattr(compiled, "_programs", OrderedDict())


@pytest.mark.parametrize("slots", [None, 3])
def test_noise_with_step_control_is_compiled_too(slots, monkeypatch):
    plain_pieces(monkeypatch)
    options = {"eta": 1.0, "controller": sdekit.PID(1e-2, 1e-2), "dtype": torch.float64}
    eager = sdekit.sample(EXACT, (7, 3), **options)
    fast = sdekit.sample(EXACT, (7, 3), runtime="compile", slots=slots, **options)  # a warning would be an error
    torch.testing.assert_close(fast.x, eager.x, rtol=0.0, atol=1e-10)
    assert torch.equal(fast.stats.evaluations, eager.stats.evaluations)


@pytest.mark.parametrize("how", ["compile", "compiled again"])
def test_rounding_is_booked_in_the_first_compiled_solve_of_a_network_too(how, monkeypatch):
    plain_pieces(monkeypatch)
    net, x = perceptron(3, 2).float(), draw(1, 5, 3).float()
    models = [sdekit.ScoreModel(Function(lambda x, label: net(x, label).bfloat16()), SDE) for _ in range(2)]
    options = {"solver": sdekit.Dopri5(), "tolerance": 1.0, "throw": False}
    eager = sdekit.log_likelihood(models[0], x, **options)
    if how == "compiled again":
        sdekit.log_likelihood(models[1], x, runtime="compile", **options)
    fast = sdekit.log_likelihood(models[1], x, runtime="compile", **options)
    torch.testing.assert_close(fast.rounding, eager.rounding, rtol=1e-5, atol=0.0)
    assert fast.stats.calls == eager.stats.calls


def test_a_compiler_that_fails_after_the_first_step_is_named(monkeypatch):
    def fails(piece, given):
        raise OSError("no compiler here")

    plain_pieces(monkeypatch)
    monkeypatch.setattr(tracing, "fused", fails)
    x = draw(1, 5, 3)
    with pytest.warns(sdekit.SdekitWarning, match="no compiler here.*It runs eagerly"):
        fast = sdekit.log_likelihood(TARGET.score_model(SDE), x, runtime="compile")
    torch.testing.assert_close(fast.log_prob, sdekit.log_likelihood(EXACT, x).log_prob, rtol=0.0, atol=1e-9)


def test_a_runtime_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="'compile'"):
        sdekit.log_likelihood(EXACT, TARGET.sample(2), runtime="fast")


def test_automatic_is_eager_on_a_cpu():
    net = Function(lambda x, label: -x)
    model = sdekit.ScoreModel(net, SDE, sdekit.score())
    x = draw(1, 3, 2)
    found = [sdekit.log_likelihood(model, x, runtime=how).log_prob for how in ("auto", "eager")]
    assert torch.equal(*found)

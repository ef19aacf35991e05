"""The one loop: every sample as if it were alone, every failure its own, every limit kept."""

from __future__ import annotations

import time

import pytest
import torch
from helpers import SDES, Function, Watch, draw, gaussian, mixture, times, watched
from hypothesis import given, settings
from hypothesis import strategies as st

import sdekit
from sdekit import Status

SDE, TARGET = SDES["vp"], mixture(2, 4)
MODEL = TARGET.score_model(SDE)
GRID = sdekit.FixedGrid(sdekit.grid.uniform_half_log_snr(SDE, 12).flip(0))
PID = sdekit.PID(1e-4, 1e-4)


def flow(model=MODEL):
    return sdekit.ProbabilityFlow(model)


def data(count, seed=1):
    return TARGET.sample(count, generator=torch.Generator().manual_seed(seed))


def solve(x, solver=None, controller=PID, model=MODEL, t0=SDE.t_min, t_end=SDE.t_max, **options):
    return sdekit.integrate(flow(model), solver or sdekit.Tsit5(), controller, x, t0, t_end, **options)


SOLVERS = {"Tsit5": sdekit.Tsit5(), "Dopri8": sdekit.Dopri8(), "Adams": sdekit.Adams(5), "Heun": sdekit.Heun()}


@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=4)
@given(order=st.permutations(range(5)), size=st.integers(1, 5), seed=st.integers(0, 3))
def test_each_sample_is_solved_as_if_it_were_alone(name, order, size, seed):
    x, rows = data(5, seed), torch.tensor(order[:size])
    together, apart = (solve(part, SOLVERS[name], sdekit.PID(1e-3, 1e-3), t0=0.2) for part in (x, x[rows]))
    assert torch.equal(apart.stats.accepted, together.stats.accepted[rows])
    assert torch.equal(apart.stats.rejected, together.stats.rejected[rows])
    assert torch.equal(apart.stats.evaluations, together.stats.evaluations[rows])
    torch.testing.assert_close(apart.x, together.x[rows], rtol=1e-11, atol=1e-12)


def test_dropping_finished_samples_from_the_batch_changes_nothing():
    # Samples that start at different times finish after very different numbers of steps.
    x, start = data(24), torch.linspace(0.02, 0.99, 24, dtype=torch.float64)
    model, watch = watched(MODEL)
    found = solve(x, t0=start, model=model)
    assert watch.rows < 0.75 * 24 * watch.calls, "the batch was never made smaller"
    for i in range(0, 24, 5):
        alone = solve(x[i : i + 1], t0=float(start[i]))
        torch.testing.assert_close(found.x[i : i + 1], alone.x, rtol=1e-11, atol=1e-12)
        assert int(found.stats.evaluations[i]) == int(alone.stats.evaluations[0])
    assert (found.status == Status.DONE).all()
    assert found.t.tolist() == [SDE.t_max] * 24


def test_samples_have_their_own_start_and_end():
    target = gaussian(3)
    x = draw(1, 6, 3)
    t0, t1 = times(0.1, 0.2, 0.3, 0.9, 0.5, 0.4), times(0.8, 0.25, 0.9, 0.2, 0.5, 0.1)
    found = solve(x, controller=sdekit.PID(1e-9, 1e-9), model=target.score_model(SDE), t0=t0, t_end=t1)
    torch.testing.assert_close(found.x, target.flow_map(SDE, x, t0, t1), rtol=1e-6, atol=1e-7)
    assert torch.equal(found.t, t1)
    assert int(found.stats.evaluations[4]) == 0  # it was there already


def test_what_goes_forward_comes_back():
    x = data(4)
    for solver in (sdekit.Dopri5(), sdekit.Adams(5)):
        there = solve(x, solver, sdekit.PID(1e-7, 1e-7), t0=0.05, t_end=0.9)
        back = solve(there.x, solver, sdekit.PID(1e-7, 1e-7), t0=0.9, t_end=0.05)
        torch.testing.assert_close(back.x, x, rtol=0, atol=1e-4)


def poisoned(bad, when=0):
    """A network that answers NaN for the samples whose first number equals one of `bad`, from call `when` on."""

    def act(call, x, label, answer):
        out = answer()
        hit = torch.stack([(x[:, 0] - value).abs() < 1e-9 for value in bad]).any(0)
        return torch.where((hit & (call > when))[:, None], torch.nan, out)

    return watched(MODEL, act)[0]


@pytest.mark.parametrize("controller", [PID, GRID], ids=["pid", "grid"])
@pytest.mark.parametrize("solver", [sdekit.Tsit5(), sdekit.Adams(4)], ids=["tsit5", "adams"])
def test_a_network_that_fails_one_sample_fails_that_sample_only(controller, solver):
    x = data(9)
    alone = solve(x, solver, controller)
    model, numbers = poisoned([float(x[3, 0])]), torch.arange(9) * 100
    with pytest.raises(
        sdekit.SolveError, match=r"1 of 9 samples did not reach t=1\.\n  sample 300 at t=1e-05: .*not finite"
    ) as caught:
        solve(x, solver, controller, model, indices=numbers)
    found = caught.value.solution
    assert found.status.tolist() == [Status.NOT_FINITE if i == 3 else Status.DONE for i in range(9)]
    others = torch.arange(9) != 3
    torch.testing.assert_close(found.x[others], alone.x[others], rtol=1e-11, atol=1e-12)
    quiet = solve(x, solver, controller, model, throw=False)
    assert torch.equal(quiet.status, found.status)
    assert int(found.stats.evaluations[3]) < 120, "a hopeless sample must not go on for long"


def test_a_sample_that_is_not_a_number_costs_nothing_and_disturbs_nobody():
    x = data(4)
    x[1, 0] = torch.nan
    found = solve(x, throw=False)
    assert found.status.tolist() == [Status.DONE, Status.NOT_FINITE, Status.DONE, Status.DONE]
    assert int(found.stats.evaluations[1]) == 0
    torch.testing.assert_close(found.x[[0, 2, 3]], solve(x[[0, 2, 3]]).x, rtol=1e-11, atol=1e-12)


def test_all_samples_that_fail_are_counted_and_the_first_eight_named():
    x = torch.full((11, 2), torch.nan, dtype=torch.float64)
    with pytest.raises(sdekit.SolveError, match=r"(?s)11 of 11.*sample 7 .*and 3 more") as caught:
        solve(x)
    assert "sample 8" not in str(caught.value)


BUDGETS = {"Tsit5": (sdekit.Tsit5(), PID), "Adams": (sdekit.Adams(5), PID), "grid": (sdekit.RK4(), GRID)}


@pytest.mark.parametrize(("solver", "controller"), BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("budget", [1, 2, 7, 13, 26])
def test_the_budget_is_never_exceeded_and_what_there_is_is_kept(solver, controller, budget):
    model, watch = watched(MODEL)
    with pytest.raises(sdekit.SolveError, match="max_evaluations reached") as caught:
        solve(data(3), solver, controller, model, max_evaluations=budget)
    found = caught.value.solution
    assert watch.calls <= budget
    assert found.stats.calls == watch.calls
    assert (found.stats.evaluations <= budget).all()
    assert (found.status == Status.BUDGET).all()
    assert torch.isfinite(found.x).all()
    assert ((found.t >= SDE.t_min) & (found.t < SDE.t_max)).all()


def test_a_sample_within_the_budget_arrives_although_others_do_not():
    found = solve(data(3), t0=times(1e-5, 0.999, 1e-5), max_evaluations=30, throw=False)
    assert found.status.tolist() == [Status.BUDGET, Status.DONE, Status.BUDGET]


def test_what_it_reports_is_what_it_called():
    for solver in SOLVERS.values():
        model, watch = watched(MODEL)
        found = solve(data(3), solver, model=model)
        assert found.stats.calls == watch.calls
        assert int(found.stats.evaluations.max()) == watch.calls
        starts = 1 if isinstance(solver, sdekit.Adams) or solver.tableau.first_same_as_last else 0
        advances = found.stats.accepted + found.stats.rejected + starts
        assert torch.equal(found.stats.evaluations, advances * solver.evaluations)


def test_a_wall_time_returns_what_there_is_with_a_warning():
    def slow(call, x, label, answer):
        time.sleep(0.02)
        return answer()

    began = time.monotonic()
    with pytest.warns(sdekit.PartialResultWarning, match="wall_time reached"):
        found = solve(data(3), controller=sdekit.PID(1e-9, 1e-9), model=watched(MODEL, slow)[0], wall_time=0.3)
    assert time.monotonic() - began < 20.0
    assert (found.status == Status.TIME_LIMIT).all()
    assert (found.t > SDE.t_min).any()
    assert torch.isfinite(found.x).all()


@pytest.mark.parametrize("call", [1, 8, 40])
def test_an_interrupt_returns_what_there_is_with_a_warning(call):
    def interrupted(now, x, label, answer):
        if now == call:
            raise KeyboardInterrupt
        return answer()

    x = data(12)
    with pytest.warns(sdekit.PartialResultWarning, match="interrupted"):
        found = solve(x, model=watched(MODEL, interrupted)[0], t0=torch.linspace(0.01, 0.999, 12, dtype=torch.float64))
    assert ((found.status == Status.INTERRUPTED) | (found.status == Status.DONE)).all()
    assert (found.status == Status.INTERRUPTED).any()
    whole = solve(x, t0=torch.linspace(0.01, 0.999, 12, dtype=torch.float64))
    done = found.status == Status.DONE
    torch.testing.assert_close(found.x[done], whole.x[done], rtol=1e-11, atol=1e-12)
    assert torch.isfinite(found.x).all()


@pytest.mark.parametrize("call", [1, 9])
def test_a_network_that_changes_its_shape_is_an_error_that_keeps_what_was_done(call):
    def shrinking(now, x, label, answer):
        return answer()[:, :1] if now >= call else answer()

    with pytest.raises(sdekit.SolveError, match=r"shape \(3, 1\).*\(at t from") as caught:
        solve(data(3), model=watched(MODEL, shrinking)[0])
    found = caught.value.solution
    assert torch.isfinite(found.x).all()
    assert (found.status == Status.RUNNING).all()
    assert (found.t >= SDE.t_min).all()


def test_a_network_that_raises_is_an_error_that_names_it():
    def broken(now, x, label, answer):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(sdekit.SolveError, match="cannot be multiplied"):
        solve(data(3), model=watched(MODEL, broken)[0])


def test_an_empty_batch_is_an_empty_answer():
    for controller in (PID, GRID):
        model, watch = watched(MODEL)
        found = solve(torch.zeros(0, 2, dtype=torch.float64), controller=controller, model=model)
        assert found.x.shape == (0, 2)
        assert found.status.shape == found.t.shape == found.stats.evaluations.shape == (0,)
        assert watch.calls == found.stats.calls == 0


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("backward", [False, True])
def test_no_adaptive_solver_asks_outside_of_the_times_the_network_knows(solver, backward):
    ends = (SDE.t_max, SDE.t_min) if backward else (SDE.t_min, SDE.t_max)
    for term in (sdekit.ProbabilityFlow, lambda model: sdekit.LikelihoodFlow(model, None, torch.Size([2]), KEYS)):
        model, watch = watched(MODEL)
        x = SDE.perturb(data(3), ends[0], draw(2, 3, 2))
        sdekit.integrate(term(model), solver, sdekit.PID(1e-3, 1e-3), x, *ends)
        seen = torch.cat(watch.labels)
        assert SDE.t_min <= float(seen.min())
        assert float(seen.max()) <= SDE.t_max


KEYS = sdekit.Hutchinson.keys(0, torch.arange(3))


def test_a_grid_must_run_between_the_ends_of_the_solve():
    x = data(2)
    with pytest.raises(ValueError, match=r"flip"):
        solve(x, controller=sdekit.FixedGrid(sdekit.grid.uniform_time(SDE, 5)))
    with pytest.raises(ValueError, match="agree exactly"):
        solve(x, controller=GRID, t0=0.1)
    with pytest.raises(ValueError, match="agree exactly"):
        solve(x, controller=GRID, t_end=times(1.0, 0.9))


def test_a_path_that_cannot_be_refined_needs_a_grid():
    reverse, path = sdekit.ReverseSDE(MODEL), sdekit.IndependentIncrements(0, torch.arange(2))
    with pytest.raises(ValueError, match=r"FixedGrid"):
        sdekit.integrate(reverse, sdekit.EulerMaruyama(), PID, data(2), 1.0, 1e-5, path)
    with pytest.raises(ValueError, match=r"cannot be refined.*biases the law"):
        sdekit.integrate(reverse, sdekit.Heun(), PID, data(2), 1.0, 1e-5, path)


BAD = {
    "time outside": (ValueError, "t0=2.0", {"t0": 2.0}),
    "nan time": (ValueError, "t_end", {"t_end": float("nan")}),
    "times of another batch": (ValueError, r"t0\.shape=\(3,\)", {"t0": times(0.1, 0.2, 0.3)}),
    "no estimate": (ValueError, "no error estimate", {"solver": sdekit.RK4()}),
    "no budget": (ValueError, "max_evaluations=0", {"max_evaluations": 0}),
    "budget": (TypeError, "max_evaluations", {"max_evaluations": 1e4}),
    "no time": (ValueError, "wall_time", {"wall_time": -1.0}),
    "indices": (ValueError, "indices.shape", {"indices": torch.arange(3)}),
    "float indices": (TypeError, "indices", {"indices": times(0.0, 1.0)}),
}


@pytest.mark.parametrize(("error", "message", "options"), BAD.values(), ids=BAD.keys())
def test_arguments_that_do_not_fit_are_refused(error, message, options):
    with pytest.raises(error, match=message):
        solve(data(2), **options)


def test_states_that_are_none_are_refused():
    for x, error in ((data(2)[0], ValueError), (data(2).long(), TypeError), (data(2).tolist(), TypeError)):
        with pytest.raises(error, match="x0"):
            solve(x)


def test_float32_states_stay_float32_and_are_solved_in_float64_time():
    x = data(3)
    single, double = solve(x.float()), solve(x.float().double())
    assert single.x.dtype == torch.float32
    assert single.t.dtype == torch.float64
    torch.testing.assert_close(single.x.double(), double.x, rtol=1e-3, atol=1e-3)


def test_events_of_any_shape_are_one_event():
    net = Function(lambda x, label: x / (1.0 + x.square()))
    model, x = sdekit.ScoreModel(net, SDE), draw(1, 3, 2, 2, 2)
    whole = sdekit.integrate(sdekit.ProbabilityFlow(model), sdekit.Tsit5(), PID, x, 0.1, 0.9)
    flat = sdekit.integrate(sdekit.ProbabilityFlow(model), sdekit.Tsit5(), PID, x.flatten(1), 0.1, 0.9)
    torch.testing.assert_close(whole.x.flatten(1), flat.x, rtol=1e-12, atol=1e-13)


def test_a_progress_bar_changes_nothing(capsys):
    x = data(2)
    assert torch.equal(solve(x, progress=True).x, solve(x).x)
    assert "100%" in capsys.readouterr().err


def test_watching_is_not_acting():
    model, watch = watched(MODEL)
    assert isinstance(watch, Watch)
    assert torch.equal(solve(data(3), model=model).x, solve(data(3)).x)


def test_equations_and_controllers_that_run_one_way_are_not_run_the_other():
    # Nats would take the whole way as one last step, and the reverse equation has no meaning from data to noise.
    exact = sdekit.LikelihoodFlow(MODEL, sdekit.Exact(), torch.Size([2]), KEYS)
    with pytest.raises(ValueError, match="t_min to t_max: exchange t0 and t_end"):
        sdekit.integrate(exact, sdekit.Adams(), sdekit.Nats(), data(3), SDE.t_max, SDE.t_min)
    path = sdekit.IndependentIncrements(0, torch.arange(3))
    with pytest.raises(ValueError, match="t_max to t_min: exchange t0 and t_end"):
        sdekit.integrate(sdekit.ReverseSDE(MODEL), sdekit.EulerMaruyama(), GRID, data(3), SDE.t_min, SDE.t_max, path)


def test_a_solver_that_draws_needs_something_to_draw_from():
    with pytest.raises(ValueError, match="EulerMaruyama draws noise"):
        sdekit.integrate(sdekit.ReverseSDE(MODEL), sdekit.EulerMaruyama(), GRID, data(3), SDE.t_max, SDE.t_min)


def test_a_path_has_as_many_samples_as_the_batch():
    for count in (1, 2, 4):
        path = sdekit.IndependentIncrements(0, torch.arange(count))
        with pytest.raises(ValueError, match=f"path is for {count} samples, x0 has 3"):
            sdekit.integrate(
                sdekit.ReverseSDE(MODEL), sdekit.EulerMaruyama(), GRID, data(3), SDE.t_max, SDE.t_min, path
            )


def test_a_solver_without_noise_does_not_take_an_equation_with_it():
    grid = sdekit.FixedGrid(GRID.times.flip(0))
    for solver in (sdekit.Heun(), sdekit.Adams(3)):
        with pytest.raises(TypeError, match=r"without noise.*eta=0\.5"):
            sdekit.integrate(sdekit.ReverseSDE(MODEL, 0.5), solver, grid, data(3), SDE.t_max, SDE.t_min)
        still = sdekit.integrate(sdekit.ReverseSDE(MODEL, 0.0), solver, grid, data(3), SDE.t_max, SDE.t_min)
        plain = sdekit.integrate(flow(), solver, grid, data(3), SDE.t_max, SDE.t_min)
        torch.testing.assert_close(still.x, plain.x, rtol=1e-10, atol=1e-11)

"""Playing back a recording gives what the loop gives, for every method, and hands over to it where it has to."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import PARAMETERIZATIONS, SDES, draw, gaussian, mixture, times

import sdekit
from sdekit import playback, recording, tape

TARGET = mixture(2, 1)
METHODS = [
    sdekit.Euler(),
    sdekit.RK4(),
    sdekit.Dopri5(),
    sdekit.Adams(3),
    sdekit.Adams(5, "inside"),
    sdekit.DDIM(),
    sdekit.DPMSolver(3),
    sdekit.DPMSolverPP(3),
    sdekit.DPMSolverPP(3, compat=True),
    sdekit.DEIS(4),
    sdekit.UniPC(3),
    sdekit.SASolver(3, 3),
    sdekit.EDMChurn(),
    sdekit.EulerMaruyama(),
    sdekit.DDIM(0.5),
    sdekit.SDEDPMSolver(),
    sdekit.SDEDPMSolverPP(2),
    sdekit.SEEDS(),
    sdekit.Ancestral(),
    sdekit.ReverseDiffusion(),
    sdekit.StochasticHeun(),
    sdekit.SRA3(),
]


@pytest.fixture
def by_the_loop(monkeypatch):
    """Makes `sample` use the loop."""
    return lambda: monkeypatch.setattr(playback, "usable", lambda *_: False)


def drawn(model, solver, steps=9, **options):
    return sdekit.sample(model, (4, 2), solver=solver, steps=steps, return_path=True, **options)


@pytest.mark.parametrize("solver", METHODS, ids=repr)
@pytest.mark.parametrize(("sde", "kind"), [("vp", "noise"), ("ve", "edm"), ("flow", "velocity")])
def test_it_gives_what_the_loop_gives(solver, sde, kind, by_the_loop):
    model = TARGET.score_model(SDES[sde], PARAMETERIZATIONS[kind])
    judge = sdekit.FixedGrid(sdekit.grid.karras(model.sde, 9))
    term = sdekit.sampling.equation_of(model, solver, float(solver.equation == "reverse"), draw(1, 4, 2))
    if isinstance(solver, sdekit.DDIM) and solver.eta:
        term = sdekit.ReverseSDE(model, solver.eta)
    assert playback.usable(solver, judge, term)
    assert recording.recorded(term, solver, judge) is not None
    played = drawn(model, solver, dtype=torch.float64)
    by_the_loop()
    looped = drawn(model, solver, dtype=torch.float64)
    for a, b in zip(played.stats, looped.stats, strict=True):
        assert a == b if isinstance(a, int) else torch.equal(a, b)
    assert torch.equal(played.status, looped.status)
    torch.testing.assert_close(played.path.t, looped.path.t, rtol=1e-14, atol=0)
    scale = float(looped.path.x.abs().max())
    torch.testing.assert_close(played.path.x, looped.path.x, rtol=0, atol=1e-9 * scale)


def test_a_tape_is_a_page_of_numbers_with_short_sums():
    model = TARGET.score_model(SDES["vp"])
    grid = sdekit.FixedGrid(sdekit.grid.karras(model.sde, 20))
    found = recording.recorded(sdekit.ProbabilityFlow(model), sdekit.DPMSolverPP(2), grid)
    assert found.calls == 20
    assert [len(step.after.terms) for step in found.steps] == [1] + [3] * 19  # the prediction before, at its state
    assert all(call.given == tape.SAME for step in found.steps for call in step.calls)
    assert recording.recorded(sdekit.ProbabilityFlow(model), sdekit.DPMSolverPP(2), grid) is found  # not recorded twice


@pytest.mark.parametrize("kind", ["noise", "data", "edm"])
def test_a_corrector_costs_a_term_for_each_slope_and_no_state_between(kind):
    model = sdekit.ScoreModel(torch.nn.Identity(), SDES["vp"], PARAMETERIZATIONS[kind])
    grid = sdekit.FixedGrid(sdekit.grid.likelihood(model.sde, 30, model.data_std))
    for order in (3, 5):
        solver = sdekit.Adams(order)
        found = recording.recorded(sdekit.sampling.equation_of(model, solver, 0.0, draw(1, 4, 2)), solver, grid)
        assert found.chained
        calls = [step.calls[0] for step in found.steps[2 * order :]]
        assert all(len(call.given.terms) <= order for call in calls)  # the slopes of the corrector, and no inputs
        assert all(call.tilt == 0.0 for call in calls) == (kind == "edm")  # whose slopes are its outputs


@pytest.mark.parametrize("solver", [None, sdekit.Adams(5, "inside")], ids=repr)
def test_whoever_stops_between_chained_calls_finds_the_state_that_the_loop_has(solver, by_the_loop):
    model = TARGET.score_model(SDES["vp"], sdekit.data())
    options = {"solver": solver, "steps": 14, "dtype": torch.float64, "denoise": False}
    whole = sdekit.sample(model, (4, 2), return_path=True, **options)
    assert torch.equal(whole.x, sdekit.sample(model, (4, 2), **options).x)  # with all states between, and without
    for late in (0, 1, 6, 9):
        odd = sdekit.ScoreModel(Odd(model, late, "shape"), model.sde, model.parameterization, model.data_std)
        stopped = []
        for _ in range(2):
            with pytest.raises(sdekit.SolveError) as caught:
                sdekit.sample(odd, (4, 2), **options)
            stopped.append(caught.value.solution)
            odd.net.calls = 0
            by_the_loop()
        assert torch.equal(stopped[0].stats.accepted, stopped[1].stats.accepted)
        torch.testing.assert_close(stopped[0].t, stopped[1].t, rtol=1e-12, atol=0)
        torch.testing.assert_close(stopped[0].x, stopped[1].x, rtol=1e-9, atol=1e-9)


def test_a_network_that_writes_into_its_labels_spoils_no_later_solve():
    class Scales(torch.nn.Module):
        def forward(self, x, label):
            return torch.tanh(x + label.mul_(3.0)[:, None])

    model = sdekit.ScoreModel(Scales(), SDES["vp"], sdekit.data(), data_std=0.5)
    first, second = (sdekit.sample(model, (4, 2), steps=8, solver=sdekit.DDIM(), seed=3).x for _ in range(2))
    assert torch.equal(first, second)


def test_a_grid_that_was_written_to_is_recorded_again(by_the_loop):
    model = TARGET.score_model(SDES["vp"])
    grid = sdekit.FixedGrid(sdekit.grid.karras(model.sde, 9))
    sdekit.sample(model, (4, 2), solver=sdekit.DDIM(), controller=grid)
    grid.times[4] = 0.5 * (grid.times[3] + grid.times[5])
    assert grid.numbers == tuple(grid.times.tolist())
    assert agrees(model, by_the_loop, solver=sdekit.DDIM(), controller=grid)


def test_recordings_differ_by_the_noise_level_and_can_be_forgotten():
    model = TARGET.score_model(SDES["vp"])
    grid, solver = sdekit.FixedGrid(sdekit.grid.karras(model.sde, 9)), sdekit.EulerMaruyama()
    half, whole, same = (recording.recorded(sdekit.ReverseSDE(model, eta), solver, grid) for eta in (0.5, 1.0, 1.0))
    assert half is not whole
    assert whole is same
    recording.forget()
    assert recording.recorded(sdekit.ReverseSDE(model, 1.0), solver, grid) is not whole


def test_what_is_not_linear_or_not_on_a_grid_is_left_to_the_loop():
    model = TARGET.score_model(SDES["vp"])
    flow, grid = sdekit.ProbabilityFlow(model), sdekit.FixedGrid(sdekit.grid.karras(model.sde, 9))
    assert not playback.usable(sdekit.Heun(), sdekit.PID(), flow)
    snr = sdekit.PredictorCorrector(sdekit.Heun(), sdekit.Langevin())
    assert not playback.usable(snr, grid, flow)  # it reports what its corrector did
    keys = sdekit.Hutchinson.keys(0, torch.arange(2))
    assert not playback.usable(
        sdekit.Adams(), grid, sdekit.LikelihoodFlow(model, sdekit.Exact(), torch.Size([2]), keys)
    )
    long = sdekit.FixedGrid(sdekit.grid.karras(model.sde, 2 * recording.MOST_CALLS))
    assert not playback.usable(sdekit.Heun(), long, flow)


class Odd(torch.nn.Module):
    """A network that answers NaN for one sample, or the wrong shape, from its `late`-th call on."""

    def __init__(self, model, late, wrong):
        super().__init__()
        self.model, self.late, self.wrong, self.calls = model, late, wrong, 0

    def forward(self, x, label):
        self.calls += 1
        out = self.model.net(x, label)
        if self.calls <= self.late:
            return out
        if self.wrong == "shape":
            return out[:, :1]
        return torch.where(((torch.arange(len(x)) == 1) & (label < 0.5))[:, None], torch.nan, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [None, sdekit.DPMSolverPP(2), sdekit.EulerMaruyama()])
def test_nan_is_reported_for_its_own_sample_and_time_and_moves_no_bit_of_others(solver, dtype, by_the_loop):
    model = TARGET.score_model(SDES["vp"])
    odd = sdekit.ScoreModel(Odd(model, 0, "nan"), model.sde, model.parameterization, model.data_std)
    options = {"solver": solver, "steps": 8, "dtype": dtype, "return_path": True, "throw": False, "denoise": False}
    good, found = (sdekit.sample(model, (3, 2), **options) for model in (model, odd))
    done, failed = int(sdekit.Status.DONE), int(sdekit.Status.NOT_FINITE)
    assert found.status.tolist() == [done, failed, done]
    for a, b in ((found.x, good.x), (found.t, good.t), (found.path.x, good.path.x), (found.path.t, good.path.t)):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    with pytest.raises(sdekit.SolveError, match="1 of 3 samples") as caught:
        sdekit.sample(odd, (3, 2), **{**options, "throw": True})
    assert torch.equal(caught.value.solution.x[[0, 2]], good.x[[0, 2]])
    by_the_loop()
    looped = sdekit.sample(odd, (3, 2), **options)
    assert torch.equal(found.t, looped.t)
    assert torch.equal(found.stats.evaluations, looped.stats.evaluations)
    assert torch.equal(found.x[1], looped.x[1])
    assert found.stats.calls == good.stats.calls + looped.stats.calls
    torch.testing.assert_close(found.path.x[1], looped.path.x[1], rtol=1e-5, atol=1e-5)


def test_a_network_that_breaks_keeps_what_there_is():
    model = TARGET.score_model(SDES["vp"])
    odd = sdekit.ScoreModel(Odd(model, 5, "shape"), model.sde, model.parameterization, model.data_std)
    with pytest.raises(sdekit.SolveError, match=r"shape \(3, 1\)") as caught:
        sdekit.sample(odd, (3, 2), solver=sdekit.DDIM(), steps=8, denoise=False)
    grid = sdekit.grid.likelihood(model.sde, 8, model.data_std)
    torch.testing.assert_close(caught.value.solution.t, grid[5].expand(3), rtol=1e-12, atol=0)
    assert caught.value.solution.stats.evaluations.tolist() == [5] * 3


def test_time_limits_and_budgets_hold():
    model = TARGET.score_model(SDES["vp"])
    with pytest.warns(sdekit.PartialResultWarning, match="wall_time"):
        found = sdekit.sample(model, (3, 2), solver=sdekit.DDIM(), steps=8, wall_time=1e-9)
    assert found.status.tolist() == [sdekit.Status.TIME_LIMIT] * 3
    found = sdekit.sample(model, (3, 2), solver=sdekit.DDIM(), steps=8, max_evaluations=5, throw=False, denoise=False)
    assert found.status.tolist() == [sdekit.Status.BUDGET] * 3
    assert found.stats.evaluations.tolist() == [5] * 3


def test_conditions_are_passed_and_states_keep_their_dtype():
    class Shifted(torch.nn.Module):
        def forward(self, x, label, shift):
            return gaussian(2).score_model(SDES["vp"]).net(x, label) + 0.1 * shift[:, None].to(x.dtype)

    model = sdekit.ScoreModel(Shifted(), SDES["vp"], sdekit.noise(), data_std=0.5).condition(
        shift=times(1.0, -1.0, 0.0)
    )
    found = sdekit.sample(model, (3, 2), solver=sdekit.DPMSolverPP(2), steps=8)
    assert found.x.dtype == torch.float32
    with pytest.raises(ValueError, match="leading size of 2"):
        sdekit.sample(model, (2, 2), solver=sdekit.DPMSolverPP(2), steps=8)


def agrees(model, by_the_loop, **options):
    """Whether a solve with this model gives what the loop gives."""
    played = sdekit.sample(model, (4, 2), dtype=torch.float64, denoise=False, **options).x
    by_the_loop()
    looped = sdekit.sample(model, (4, 2), dtype=torch.float64, denoise=False, **options).x
    return float((played - looped).abs().max()) < 1e-9 * float(looped.abs().max())


class Guided(sdekit.ScoreModel):
    def output(self, x, t):
        return 1.5 * super().output(x, t)


class Reuses(torch.nn.Module):
    """Answers in the same buffer every time, or writes into its input."""

    def __init__(self, how):
        super().__init__()
        self.how, self.buffer = how, None

    def forward(self, x, label):
        out = torch.tanh(x + label[:, None].to(x.dtype)) + 0.1 * x
        if self.how == "input":
            x.mul_(0.3)
            return out
        self.buffer = torch.empty_like(out) if self.buffer is None else self.buffer
        return self.buffer.copy_(out)


@pytest.mark.parametrize("solver", [None, sdekit.DPMSolverPP(2), sdekit.UniPC(3), sdekit.Dopri5()])
def test_networks_that_reuse_their_memory_are_played_back_right(solver, by_the_loop):
    for how in ("input", "output"):
        model = sdekit.ScoreModel(Reuses(how), SDES["vp"], sdekit.edm(0.5))
        assert agrees(model, by_the_loop, solver=solver, steps=12)


class Later(torch.nn.Module):
    """Begins to answer in one buffer after so many calls."""

    def __init__(self, well):
        super().__init__()
        self.well, self.calls, self.buffer = well, 0, None

    def forward(self, x, label):
        out = torch.tanh(x + label[:, None].to(x.dtype)) + 0.1 * x
        self.calls += 1
        if self.calls <= self.well:
            return out
        self.buffer = torch.empty_like(out) if self.buffer is None else self.buffer
        return self.buffer.copy_(out)


def test_a_network_that_begins_to_answer_in_one_buffer_is_refused_and_named():
    model = sdekit.ScoreModel(Later(12), SDES["vp"], sdekit.edm(0.5))
    sdekit.sample(model, (4, 2), steps=12, denoise=False)  # found to answer in memory of its own
    with pytest.raises(sdekit.SolveError, match="memory that it has answered in before"):
        sdekit.sample(model, (4, 2), steps=12, denoise=False)
    again = sdekit.ScoreModel(model.net, model.sde, model.parameterization)
    assert sdekit.sample(again, (4, 2), steps=12, denoise=False).status.tolist() == [sdekit.Status.DONE] * 4


def test_what_was_seen_of_a_network_holds_until_it_is_compiled():
    model = sdekit.ScoreModel(Later(99), SDES["vp"], sdekit.edm(0.5))
    sdekit.sample(model, (4, 2), steps=12, denoise=False)
    memory = model._memory
    assert memory.about(model.net).shared is False
    assert model.condition()._memory is memory
    model.net.compile(backend="eager")
    assert memory.about(model.net).shared is None
    memory.shared = False
    assert copy.deepcopy(model)._memory.shared is None
    assert memory.about(torch.nn.Identity()).shared is None


def test_encoding_leaves_its_input_alone():
    x = draw(1, 3, 2)
    kept = x.clone()
    sdekit.encode(sdekit.ScoreModel(Reuses("input"), SDES["vp"], data_std=0.5), x, steps=6)
    assert torch.equal(x, kept)


def test_what_users_write_is_left_to_the_loop(by_the_loop):
    # It may keep a state that no key of a cache sees.
    level, scale = [0.2], [1.0]
    base = TARGET.score_model(SDES["vp"])
    labelled = sdekit.noise(lambda sde, t: scale[0] * t)
    net = base.net
    models = [
        (base, {"eta": lambda t: torch.full_like(t, level[0])}),
        (sdekit.ScoreModel(Reuses("output"), SDES["vp"], labelled, 0.5), {}),
        (Guided(net, SDES["vp"], base.parameterization, 0.5), {}),
    ]
    for model, options in models:
        first = sdekit.sample(model, (4, 2), steps=9, dtype=torch.float64, denoise=False, **options).x
        level[0], scale[0] = 0.9, 2.0
        second = sdekit.sample(model, (4, 2), steps=9, dtype=torch.float64, denoise=False, **options).x
        if not isinstance(model, Guided):
            assert not torch.equal(first, second)
        level[0], scale[0] = 0.2, 1.0
    assert agrees(models[2][0], by_the_loop, steps=9)


def test_ctrl_c_while_recording_is_heard_and_nothing_is_kept(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    model = TARGET.score_model(SDES["vp"])
    monkeypatch.setattr(recording, "_record", stop)
    with pytest.warns(sdekit.PartialResultWarning):
        found = sdekit.sample(model, (3, 2), solver=sdekit.DEIS(3, "rho"), steps=17)
    assert found.status.tolist() == [sdekit.Status.INTERRUPTED] * 3
    assert found.stats.calls <= 1
    monkeypatch.undo()
    assert sdekit.sample(model, (3, 2), solver=sdekit.DEIS(3, "rho"), steps=17).status.tolist() == [1] * 3


def test_single_precision_loses_nothing_in_long_sums(by_the_loop):
    model = TARGET.score_model(SDES["vp"], sdekit.data())
    for solver in (sdekit.Adams(5, "inside"), sdekit.DEIS(4, "rho"), sdekit.DPMSolverPP(3)):
        grid = sdekit.FixedGrid(sdekit.grid.karras(model.sde, 10))
        found = recording.recorded(sdekit.sampling.equation_of(model, solver, 0.0, draw(1, 4, 2)), solver, grid)
        sums = [terms for step in found.steps for terms in (*(call.given for call in step.calls), step.after)]
        assert max(abs(c) for terms in sums for c, _ in terms.terms) < 100.0


def test_encoding_and_decoding_play_back_too():
    model, x = TARGET.score_model(SDES["vp"]), TARGET.sample(4)
    latent = sdekit.encode(model, x, solver=sdekit.UniPC(3), steps=40).x
    back = sdekit.decode(model, latent, solver=sdekit.UniPC(3), steps=40).x
    assert float((back - x).abs().max()) < 2e-2

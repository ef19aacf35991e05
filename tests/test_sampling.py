"""Samples that follow the law, whatever else is in the batch; latents that come back."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import SDES, draw, gaussian, mixture, perceptron, times, watched
from torch import nn

import sdekit
from sdekit import Status

TARGET = gaussian(3)
MODEL = TARGET.score_model(SDES["vp"])
SOLVERS = {
    "default": {},
    "dpm-solver++": {"solver": sdekit.DPMSolverPP(2), "steps": 20},
    "unipc": {"solver": sdekit.UniPC(3), "steps": 9},
    "adaptive noise": {"solver": sdekit.StochasticHeun(), "controller": sdekit.PID(0.1, 0.1)},
    "churn": {"solver": sdekit.EDMChurn(), "steps": 9},
    "corrected": {"solver": sdekit.PredictorCorrector(sdekit.DPMSolverPP(1), sdekit.Langevin(0.1)), "steps": 6},
    "sde-dpm-solver++": {"solver": sdekit.SDEDPMSolverPP(2), "steps": 9},
    "tsit5": {"solver": sdekit.Tsit5(), "controller": sdekit.PID(1e-4, 1e-4)},
    "heun": {"solver": sdekit.Heun(), "steps": 10},
    "euler-maruyama": {"eta": 1.0, "steps": 15},
    "half the noise": {"eta": 0.5, "steps": 15},
}
every_solver = pytest.mark.parametrize("options", SOLVERS.values(), ids=SOLVERS.keys())


@every_solver
def test_a_sample_is_the_same_alone_in_a_batch_and_shuffled(options):
    together = sdekit.sample(MODEL, (6, 3), dtype=torch.float64, seed=5, **options)
    rows = torch.tensor([4, 0, 3])
    shuffled = sdekit.sample(MODEL, (3, 3), dtype=torch.float64, seed=5, indices=rows, **options)
    torch.testing.assert_close(shuffled.x, together.x[rows], rtol=1e-12, atol=1e-12)
    alone = sdekit.sample(MODEL, (1, 3), dtype=torch.float64, seed=5, indices=torch.tensor([4]), **options)
    torch.testing.assert_close(alone.x, together.x[4:5], rtol=1e-12, atol=1e-12)
    again = sdekit.sample(MODEL, (6, 3), dtype=torch.float64, seed=5, **options)
    assert torch.equal(again.x, together.x)


@every_solver
def test_another_seed_gives_other_samples(options):
    one, other = (sdekit.sample(MODEL, (2, 3), dtype=torch.float64, seed=seed, **options).x for seed in (0, 1))
    assert ((one - other).abs() > 1e-3).any(1).all()


def test_the_noise_itself_is_the_same_to_the_bit_in_any_batch():
    # A flow over no way at all leaves the prior draw as it is.
    model = TARGET.score_model(SDES["ve"])
    whole = sdekit.sampling.draw_prior(model, (5, 3), 7, torch.arange(5), torch.float64)
    part = sdekit.sampling.draw_prior(model, (2, 3), 7, torch.tensor([3, 1]), torch.float64)
    assert torch.equal(part, whole[[3, 1]])
    path = sdekit.IndependentIncrements(7, torch.arange(5))
    s, step = torch.zeros(5, dtype=torch.float64), torch.arange(5)
    increments = path.increment(s, s + 0.5, step, whole)
    few = path.take(torch.tensor([3, 1])).increment(s[:2], s[:2] + 0.5, step[[3, 1]], part)
    assert torch.equal(few, increments[[3, 1]])


def test_the_global_generator_is_neither_read_nor_moved():
    before = torch.random.get_rng_state()
    sdekit.sample(MODEL, (2, 3), eta=1.0, steps=4)
    assert torch.equal(before, torch.random.get_rng_state())


def check_law(x, target):
    """n samples' mean and covariance, each within 6 standard errors: 3 + 9 statistics, false alarm 3e-8."""
    n, mean = x.shape[0], target._components.means[0]
    basis, values = target._components.basis[0], target._components.values[0]
    covariance = (basis * values) @ basis.T
    assert ((x.mean(0) - mean).abs() < 6.0 * (covariance.diagonal() / n).sqrt()).all()
    spread = covariance.diagonal()[:, None] * covariance.diagonal() + covariance**2
    found = (x - mean).T @ (x - mean) / n
    assert ((found - covariance).abs() < 6.0 * (spread / n).sqrt()).all()


def at_t_min(sde):
    alpha, sigma = float(sde.alpha(sde.t_min)), float(sde.sigma(sde.t_min))
    basis, values = TARGET._components.basis[0], TARGET._components.values[0]
    eye = torch.eye(3, dtype=torch.float64)
    return sdekit.targets.Gaussian(
        alpha * TARGET._components.means[0], alpha**2 * (basis * values) @ basis.T + sigma**2 * eye
    )


@pytest.mark.parametrize("name", ["vp", "ve", "sub-vp", "flow"])
def test_the_flow_samples_the_law(name):
    sde = SDES[name]
    found = sdekit.sample(TARGET.score_model(sde), (4_000, 3), dtype=torch.float64, denoise=False, seed=1)
    check_law(found.x, at_t_min(sde))
    assert (found.t == sde.t_min).all()


@pytest.mark.parametrize(("name", "eta"), [("vp", 1.0), ("karras", 0.6)])
def test_the_reverse_equation_samples_the_law_at_every_noise_level(name, eta):
    # Weak order 1: at 250 steps the bias is below 1.5 standard errors of 2,000 samples, so 7.5 stand for 6.
    sde = SDES[name]
    model = TARGET.score_model(sde)
    found = sdekit.sample(model, (2_000, 3), eta=eta, steps=250, dtype=torch.float64, denoise=False, seed=2)
    mean, n = TARGET._components.means[0], 2_000
    basis, values = TARGET._components.basis[0], TARGET._components.values[0]
    variance = ((basis * values) @ basis.T).diagonal()
    assert ((found.x.mean(0) - mean).abs() < 7.5 * (variance / n).sqrt()).all()
    assert ((found.x.var(0) / variance - 1.0).abs() < 7.5 * math.sqrt(2.0 / n)).all()


@every_solver
def test_denoising_costs_one_evaluation_and_says_so(options):
    model, watch = watched(MODEL)
    raw = sdekit.sample(model, (2, 3), dtype=torch.float64, denoise=False, **options)
    before = watch.calls
    assert raw.stats.calls == before
    clean = sdekit.sample(model, (2, 3), dtype=torch.float64, **options)
    assert watch.calls == 2 * before + 1
    assert clean.stats.calls == before + 1
    assert torch.equal(clean.stats.evaluations, raw.stats.evaluations + 1)
    torch.testing.assert_close(clean.x, MODEL.data(raw.x, raw.t), rtol=0, atol=0)


class StopsAt(torch.nn.Module):
    """A network that behaves until its `call`-th call and raises or detaches from there on."""

    def __init__(self, model, call, error):
        super().__init__()
        self.model, self.left, self.error = model, call, error

    def forward(self, x, label):
        self.left -= 1
        if self.left < 0 and self.error is not None:
            raise self.error
        out = self.model.net(x, label)
        return out if self.left >= 0 else out[:, :1]


def test_what_stops_the_last_denoising_keeps_the_states():
    raw, rest = (
        sdekit.sample(MODEL, (2, 3), steps=9, denoise=False),
        (MODEL.sde, MODEL.parameterization, MODEL.data_std),
    )
    stopped = sdekit.ScoreModel(StopsAt(MODEL, raw.stats.calls, KeyboardInterrupt()), *rest)
    with pytest.warns(sdekit.PartialResultWarning, match="states at t_min"):
        found = sdekit.sample(stopped, (2, 3), steps=9)
    assert found.status.tolist() == [sdekit.Status.INTERRUPTED] * 2
    assert torch.equal(found.x, raw.x)
    broken = sdekit.ScoreModel(StopsAt(MODEL, raw.stats.calls, None), *rest)
    with pytest.raises(sdekit.SolveError, match="last denoising step") as caught:
        sdekit.sample(broken, (2, 3), steps=9)
    assert torch.equal(caught.value.solution.x, raw.x)


def test_the_noise_level_is_the_solvers_unless_it_is_given():
    for solver, eta in (
        (sdekit.EulerMaruyama(), 1.0),
        (sdekit.SDEDPMSolverPP(2), 1.0),
        (sdekit.DDIM(0.6), 0.6),
        (sdekit.DDIM(), 0.0),
        (sdekit.SASolver(2, 2), 0.0),
        (sdekit.Heun(), 0.0),
    ):
        told = sdekit.sample(MODEL, (2, 3), solver=solver, steps=5, eta=eta)
        assert torch.equal(sdekit.sample(MODEL, (2, 3), solver=solver, steps=5).x, told.x)
    ode = sdekit.sample(MODEL, (2, 3), solver=sdekit.SDEDPMSolverPP(2), steps=5, eta=0.0, dtype=torch.float64)
    plain = sdekit.sample(MODEL, (2, 3), solver=sdekit.DPMSolverPP(2), steps=5, dtype=torch.float64)
    torch.testing.assert_close(ode.x, plain.x, rtol=1e-12, atol=1e-13)


def test_the_noise_level_may_be_a_function_of_time():
    still = sdekit.sample(MODEL, (2, 3), eta=0.7, steps=8)
    moving = sdekit.sample(MODEL, (2, 3), eta=lambda t: torch.full_like(t, 0.7), steps=8)
    torch.testing.assert_close(moving.x, still.x)
    inside = sdekit.sample(
        MODEL, (2, 3), eta=lambda t: ((t > 0.2) & (t < 0.8)).double(), solver=sdekit.SASolver(3, 3), steps=8
    )
    flow = sdekit.sample(MODEL, (2, 3), eta=lambda t: torch.zeros_like(t), solver=sdekit.SASolver(3, 3), steps=8)
    assert ((inside.x - flow.x).abs() > 1e-3).any()
    torch.testing.assert_close(flow.x, sdekit.sample(MODEL, (2, 3), solver=sdekit.SASolver(3, 3), steps=8).x)


def test_the_default_rises_with_the_steps():
    for steps, order in ((5, 3), (11, 3), (12, 4), (20, 4), (21, 5), (40, 5)):
        told = sdekit.sample(MODEL, (2, 3), solver=sdekit.Adams(order), steps=steps)
        assert torch.equal(sdekit.sample(MODEL, (2, 3), steps=steps).x, told.x)
    noisy = sdekit.sample(MODEL, (2, 3), eta=0.7, steps=8)
    assert torch.equal(noisy.x, sdekit.sample(MODEL, (2, 3), solver=sdekit.SDEDPMSolverPP(2), eta=0.7, steps=8).x)
    adaptive = sdekit.sample(MODEL, (2, 3), eta=0.7, controller=sdekit.PID(0.1, 0.1))
    assert adaptive.stats.evaluations.tolist() == (2 * (adaptive.stats.accepted + adaptive.stats.rejected) + 1).tolist()


@every_solver
def test_the_path_leads_from_the_noise_to_the_sample(options):
    found = sdekit.sample(MODEL, (4, 3), denoise=False, return_path=True, dtype=torch.float64, **options)
    assert sdekit.sample(MODEL, (4, 3), denoise=False, dtype=torch.float64, **options).path is None
    n = int(found.stats.accepted.max())
    assert found.path.x.shape == (4, n + 1, 3)
    assert torch.equal(found.path.x[:, -1], found.x)
    start = sdekit.sampling.draw_prior(MODEL, (4, 3), 0, torch.arange(4), torch.float64)
    torch.testing.assert_close(found.path.x[:, 0], start, rtol=1e-13, atol=1e-13)
    assert (found.path.t[:, 0] == MODEL.sde.t_max).all()
    assert torch.equal(found.path.t[:, -1], found.t)
    for row, steps in enumerate(found.stats.accepted.tolist()):
        assert (found.path.t[row, : steps + 1].diff() < 0).all()
        assert (found.path.t[row, steps:] == found.t[row]).all()


def test_an_empty_path_has_a_shape():
    assert sdekit.sample(MODEL, (0, 3), return_path=True).path.x.shape == (0, 1, 3)


def test_encoding_needs_a_solver_without_noise():
    with pytest.raises(ValueError, match="without noise"):
        sdekit.encode(MODEL, torch.zeros(2, 3), solver=sdekit.EulerMaruyama(), steps=5)


def test_steps_are_steps():
    for options, calls in (
        ({"steps": 9}, 10),  # Adams fills its memory first
        ({"steps": 9, "solver": sdekit.DPMSolverPP()}, 9),
        ({"steps": 9, "eta": 1.0}, 9),
        ({"steps": 9, "solver": sdekit.Heun()}, 18),
    ):
        found = sdekit.sample(MODEL, (2, 3), denoise=False, **options)
        assert found.stats.calls == calls
        assert found.stats.accepted.tolist() == [9, 9]


def test_more_steps_come_closer_to_the_exact_flow():
    sde = SDES["vp"]
    start = sdekit.sampling.draw_prior(MODEL, (8, 3), 0, torch.arange(8), torch.float64)
    exact = TARGET.flow_map(sde, start, sde.t_max, sde.t_min)
    for options in ({}, {"solver": sdekit.DPMSolverPP(2)}):
        errors = [
            float(
                (sdekit.sample(MODEL, (8, 3), steps=n, denoise=False, dtype=torch.float64, **options).x - exact)
                .abs()
                .max()
            )
            for n in (16, 32, 64)
        ]
        assert errors[2] < errors[1] / 3.0 < errors[0] / 9.0, errors


@pytest.mark.parametrize("name", SDES)
def test_what_is_encoded_is_decoded_again(name):
    sde, target = SDES[name], mixture(2, 4)
    model, x = target.score_model(sde), target.sample(5)
    there = sdekit.encode(model, x)
    assert (there.t == sde.t_max).all()
    assert (there.status == Status.DONE).all()
    back = sdekit.decode(model, there.x)
    assert (back.t == sde.t_min).all()
    torch.testing.assert_close(back.x, x, rtol=0, atol=2e-4)


def test_a_learned_network_is_invertible_too():
    model, x = sdekit.ScoreModel(perceptron(4, 3), SDES["vp"], sdekit.edm(0.5)), draw(1, 5, 4)
    tight = {"controller": sdekit.PID(1e-8, 1e-8)}
    back = sdekit.decode(model, sdekit.encode(model, x, **tight).x, **tight)
    torch.testing.assert_close(back.x, x, rtol=0, atol=1e-5)


def test_latents_are_where_the_exact_flow_leads():
    sde, x = SDES["vp"], TARGET.sample(5)
    latent = sdekit.encode(MODEL, x).x
    torch.testing.assert_close(latent, TARGET.flow_map(sde, x, sde.t_min, sde.t_max), rtol=0, atol=1e-4)
    for solver in (sdekit.Tsit5(), sdekit.Dopri8()):
        torch.testing.assert_close(sdekit.encode(MODEL, x, solver=solver).x, latent, rtol=0, atol=1e-4)
    grid = sdekit.encode(MODEL, x, steps=60)
    assert grid.stats.calls == 61
    torch.testing.assert_close(grid.x, latent, rtol=0, atol=1e-3)
    back = sdekit.decode(MODEL, grid.x, steps=60)
    torch.testing.assert_close(back.x, x, rtol=0, atol=2e-3)


def test_samples_have_the_asked_shape_and_dtype():
    target = sdekit.targets.Gaussian(torch.zeros(2, 2, 3), torch.ones(2, 2, 3))
    model = target.score_model(SDES["vp"])
    assert sdekit.sample(model, (4, 2, 2, 3), steps=3).x.shape == (4, 2, 2, 3)
    assert sdekit.sample(model, (4, 2, 2, 3), steps=3).x.dtype == torch.get_default_dtype()
    assert sdekit.sample(model, [0, 2, 2, 3], steps=3).x.shape == (0, 2, 2, 3)
    x = draw(1, 2, 2, 2, 3).float()
    assert sdekit.encode(model, x, steps=3).x.dtype == torch.float32
    assert sdekit.encode(model, x[:0], steps=3).x.shape == (0, 2, 2, 3)


def test_the_budget_counts_the_denoising():
    model, watch = watched(MODEL)
    with pytest.raises(sdekit.SolveError, match="max_evaluations reached"):
        sdekit.sample(model, (2, 3), steps=40, max_evaluations=10)
    assert watch.calls <= 10


def test_a_failed_sample_is_reported_and_the_others_kept():
    start = sdekit.sampling.draw_prior(MODEL, (4, 3), 0, torch.arange(4), torch.float64)
    bad = float(start[2, 0])

    def act(call, x, label, answer):
        first = (x[:, 0] - bad).abs() < 1e-6
        return torch.where(first[:, None], torch.nan, answer())

    model, _ = watched(MODEL, act)
    found = sdekit.sample(model, (4, 3), dtype=torch.float64, steps=5, throw=False)
    assert found.status.tolist() == [Status.DONE, Status.DONE, Status.NOT_FINITE, Status.DONE]
    with pytest.raises(sdekit.SolveError, match="sample 2 at t=1"):
        sdekit.sample(model, (4, 3), dtype=torch.float64, steps=5)


def dropped():
    return nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2))


BAD = {
    "no event": (ValueError, "event axis", {"shape": (4,)}),
    "a negative size": (ValueError, "shape", {"shape": (-1, 3)}),
    "a size that is no int": (ValueError, "shape", {"shape": (2.0, 3)}),
    "eta": (ValueError, "eta=-0.5", {"eta": -0.5}),
    "nan eta": (ValueError, "eta=nan", {"eta": math.nan}),
    "seed": (TypeError, "seed", {"seed": 1.5}),
    "negative seed": (ValueError, "seed=-1", {"seed": -1}),
    "steps and controller": (ValueError, "one or the other", {"steps": 5, "controller": sdekit.PID()}),
    "no steps": (ValueError, "steps=0", {"steps": 0}),
    "indices": (ValueError, "indices.shape", {"indices": torch.arange(3)}),
    "adaptive noise": (ValueError, "FixedGrid", {"solver": sdekit.SRA1(), "controller": sdekit.PID()}),
    "flow solver for noise": (TypeError, "ReverseSDE|ProbabilityFlow", {"eta": 1.0, "solver": sdekit.DPMSolverPP()}),
    "another eta than the solver's": (ValueError, "must agree", {"eta": 0.3, "solver": sdekit.DDIM(0.5)}),
}


@pytest.mark.parametrize(("error", "message", "options"), BAD.values(), ids=BAD.keys())
def test_arguments_that_do_not_fit_are_refused(error, message, options):
    with pytest.raises(error, match=message):
        sdekit.sample(MODEL, **{"shape": (2, 3), **options})


def test_a_network_without_numbers_is_refused():
    model = sdekit.ScoreModel(perceptron(3, 2).to("meta"), SDES["vp"])
    with pytest.raises(ValueError, match="meta device"):
        sdekit.sample(model, (2, 3))


@pytest.mark.parametrize("solver", [sdekit.Heun(), sdekit.Adams(3), sdekit.RK4()])
def test_a_solver_that_cannot_take_noise_is_never_given_an_equation_with_it(solver):
    # It would drop the noise and keep the drift that goes with it: a wrong law without a word.
    with pytest.raises((TypeError, ValueError), match=r"noise"):
        sdekit.sample(MODEL, (2, 3), eta=1.0, solver=solver, steps=5)


def test_networks_that_are_random_are_refused():
    model = sdekit.ScoreModel(dropped(), SDES["vp"])
    for act in (
        lambda: sdekit.sample(model, (2, 3)),
        lambda: sdekit.encode(model, draw(1, 2, 3)),
        lambda: sdekit.decode(model, draw(1, 2, 3)),
    ):
        with pytest.raises(ValueError, match=r"dropout.*eval\(\)"):
            act()


def test_encoding_takes_a_grid_or_a_controller_and_not_both():
    with pytest.raises(ValueError, match="one or the other"):
        sdekit.encode(MODEL, draw(1, 2, 3), steps=5, controller=sdekit.PID())
    with pytest.raises(TypeError, match="dequantise"):
        sdekit.encode(MODEL, torch.zeros(2, 3, dtype=torch.int64))
    assert times(0.0).dtype == torch.float64

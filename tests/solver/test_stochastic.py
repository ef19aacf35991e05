"""One-step solvers with noise: their weak orders by the moments of a Gaussian, with no Monte Carlo at all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import SDES, Function, Given, draw, gaussian, mixture, observed_order, spread_times, times, uneven_times

import sdekit
from sdekit import targets
from sdekit.solver.edm import EDMChurn
from sdekit.solver.sra import SRA1, SRA2, SRA3
from sdekit.solver.stochastic import Ancestral, EulerMaruyama, ReverseDiffusion, StochasticHeun

METHODS = {
    "euler-maruyama": EulerMaruyama(),
    "ancestral-small": Ancestral("small"),
    "ancestral-large": Ancestral("large"),
    "reverse-diffusion": ReverseDiffusion(),
    "heun": StochasticHeun(),
    "sra1": SRA1(),
    "sra2": SRA2(),
    "sra3": SRA3(),
    "churn": EDMChurn(0.8),
}
NARROW = 0.3
LIMITS = {"vp": (0.8, 0.2), "sub-vp": (0.8, 0.3), "ve": (0.9, 0.5), "karras": (2.0, 0.2), "cosine": (0.8, 0.2)}


def levels(name):
    """The noise levels a method is asked for: all, or its own."""
    return [1.0] if name.startswith(("ancestral", "churn")) else [0.5, 1.0, 1.7]


def term_of(solver, model, eta=1.0):
    return sdekit.ProbabilityFlow(model) if isinstance(solver, EDMChurn) else sdekit.ReverseSDE(model, eta)


class Path:
    """A path that draws, for every sample, these numbers of standard deviations."""

    refinable = False

    def __init__(self, increment=0.0, area=0.0, fresh=0.0):
        self.sizes = increment, area, fresh

    def increment(self, s0, s1, step, like, lane=0):
        return torch.full_like(like, self.sizes[0]) * (s1 - s0).abs().sqrt()[:, None]

    def levy(self, s0, s1, step, like):
        area = torch.full_like(like, self.sizes[1]) * ((s1 - s0).abs() / 12.0).sqrt()[:, None]
        return self.increment(s0, s1, step, like), area

    def normal(self, step, like, lane=0):
        return torch.full_like(like, self.sizes[2])

    def uniform(self, step, lane=0):
        return torch.full_like(step, 0.5, dtype=torch.float64)

    def take(self, rows):
        return self

    def __len__(self):
        return 0


def step_law(solver, term, s0, s1):
    """Rows (a, b, v): x' ~ N(a x + b, v) for steps from s0 to s1 (n,), read off from the solver's own answers."""

    def answer(x, *sizes):
        state = torch.full((s0.shape[0], 1), x, dtype=torch.float64)
        return solver.propose(term, s0, s1, state, solver.init(term, state), Path(*sizes)).z[:, 0]

    base = answer(0.0)
    drawn = [answer(0.0, *sizes) - base for sizes in ((1.0,), (0.0, 1.0), (0.0, 0.0, 1.0))]
    return torch.stack((answer(1.0) - base, base, sum(part.square() for part in drawn)), 1)


def marginal(sde, t, mean, variance):
    """Mean and variance of x at t for data N(mean, variance)."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return alpha * mean, alpha**2 * variance + sigma**2


def weak_errors(solver, sde, limits, eta, counts):
    """The errors of mean and variance at the end, for each number of steps."""
    (first, last), model = limits, targets.Gaussian(times(0.7), times(NARROW)).score_model(sde)
    term, errors = term_of(solver, model, eta), []
    for n in counts:
        grid = term.coordinate(uneven_times(first, last, n))
        mean, variance = marginal(sde, first, 0.7, NARROW)
        for a, b, v in step_law(solver, term, grid[:-1], grid[1:]).tolist():
            mean, variance = a * mean + b, a * a * variance + v
        exact = marginal(sde, last, 0.7, NARROW)
        errors.append((abs(mean - exact[0]), abs(variance - exact[1])))
    return errors


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("method", METHODS)
def test_mean_and_variance_converge_at_the_order_for_every_noise_level(method, name, eta):
    if eta not in levels(method):
        return
    solver = METHODS[method]
    errors = weak_errors(solver, SDES[name], LIMITS[name], eta, (800, 1600))
    for kind in range(2):
        found = [error[kind] for error in errors]
        # On its way the mean has noise 0 and data 0.7: who predicts these, or stands still with them, is exact.
        if kind == 0 and (name in ("ve", "karras") or method.startswith(("ancestral", "churn"))):
            assert max(found) < 1e-11
            continue
        assert found[-1] < 0.02
        order = observed_order(found)[-1]
        if kind == 0 and method == "sra3":  # its drift's order is 3
            assert order > 2.5, found
        else:
            assert order == pytest.approx(solver.order, abs=0.15), found


def test_the_drift_and_noise_are_those_of_the_reverse_equation():
    for sde in SDES.values():
        target, t = gaussian(3), sde.time_at(times(1.0, 0.0, -1.0, -2.0))
        x = draw(1, 4, 3)
        for eta in (0.0, 0.7, 1.0):
            term = sdekit.ReverseSDE(target.score_model(sde), eta)
            f, g = sde.drift_rate(t)[:, None], sde.diffusion(t)[:, None]
            drift = -(f * x - 0.5 * (1.0 + eta**2) * g**2 * target.score(sde, x, t))
            torch.testing.assert_close(term.drift(-t, x), drift, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(term.noise_scale(-t), eta * g[:, 0], rtol=1e-12, atol=0)


def test_a_step_takes_drift_and_noise_where_it_starts():
    sde, x, s0, s1 = SDES["ve"], draw(1, 2, 3), times(-0.9, -0.5), times(-0.6, -0.45)
    term, solver = sdekit.ReverseSDE(gaussian(3).score_model(sde), 0.8), EulerMaruyama()
    moved = solver.propose(term, s0, s1, x, solver.init(term, x), Path(1.0)).z
    length = (s1 - s0)[:, None]
    expected = x + length * term.drift(s0, x) + 0.8 * sde.diffusion(-s0)[:, None] * length.sqrt()
    torch.testing.assert_close(moved, expected, rtol=1e-13, atol=0)


def test_the_noise_level_may_depend_on_time():
    sde, t = SDES["vp"], times(0.2, 0.7)
    term = sdekit.ReverseSDE(gaussian(3).score_model(sde), lambda t: t)
    torch.testing.assert_close(term.noise_scale(-t), t * sde.diffusion(t))
    still = sdekit.ReverseSDE(gaussian(3).score_model(sde), 0.7)
    x = draw(1, 2, 3)
    torch.testing.assert_close(term.drift(-t, x)[1], still.drift(-t, x)[1])


def test_the_equation_is_clamped_to_the_times_the_network_knows():
    sde, x = SDES["vp"], draw(1, 2, 3)
    term = sdekit.ReverseSDE(gaussian(3).score_model(sde))
    for outside, end in ((-1.4, -sde.t_max), (0.3, -sde.t_min)):
        assert torch.equal(term.f(outside, x), term.f(end, x))
        assert torch.equal(term.g(outside, x), term.g(end, x))


def test_without_noise_it_is_eulers_method():
    sde, grid = SDES["vp"], sdekit.FixedGrid(uneven_times(0.8, 0.2, 12))
    model, x = gaussian(3).score_model(sde), draw(1, 4, 3)
    path = sdekit.IndependentIncrements(0, torch.arange(4))
    reverse = sdekit.integrate(sdekit.ReverseSDE(model, 0.0), EulerMaruyama(), grid, x, 0.8, 0.2, path)
    plain = sdekit.integrate(sdekit.ProbabilityFlow(model), sdekit.Euler(), grid, x, 0.8, 0.2)
    torch.testing.assert_close(reverse.x, plain.x, rtol=1e-11, atol=1e-12)


def counts(x):
    """The memory of a solver that has made no step."""
    return torch.zeros(x.shape[0], dtype=torch.int64)


def points(solver, sde, model, t0, t1, eta=1.0):
    """(a, b, v) of one step from t0 to t1."""
    term = term_of(solver, model, eta)
    return step_law(solver, term, term.coordinate(times(t0)), term.coordinate(times(t1)))[0].tolist()


@pytest.mark.parametrize("name", SDES)
def test_an_ancestral_step_is_the_posterior(name):
    sde = SDES[name]
    t0, t1 = (float(sde.time_at(value)) for value in (-0.8, 0.7))
    alpha = float(sde.alpha(t0) / sde.alpha(t1))
    spread = float(sde.sigma(t0)) ** 2 - alpha**2 * float(sde.sigma(t1)) ** 2  # of the forward transition
    mean, variance = 0.7, 0.3
    model = targets.Gaussian(times(mean), times(variance)).score_model(sde)
    a, b, small = points(Ancestral("small"), sde, model, t0, t1)
    (m0, v0), (m1, v1) = (marginal(sde, t, mean, variance) for t in (t0, t1))
    # E[x_1 | x_0] is exact for a Gaussian: Cov(x_1, x_0) = alpha_0/alpha_1 V_1.
    assert a == pytest.approx(alpha * v1 / v0, rel=1e-10)
    assert b == pytest.approx(m1 - alpha * v1 / v0 * m0, rel=1e-9)
    # and its variance lacks that of the data given x_0, by the law of total variance
    weight = float(sde.alpha(t1)) * spread / float(sde.sigma(t0)) ** 2
    hidden = weight**2 * variance * float(sde.sigma(t0)) ** 2 / v0
    assert small == pytest.approx(v1 - a**2 * v0 - hidden, rel=1e-9)
    again, _, large = points(Ancestral("large"), sde, model, t0, t1)
    assert again == a
    assert large == pytest.approx(spread, rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("name", SDES)
def test_small_ancestral_steps_are_exact_for_data_at_a_point(name, count):
    sde, point = SDES[name], 0.7
    net = Function(lambda x, t: (x - sde.alpha(t)[:, None] * point) / sde.sigma(t)[:, None])
    term = sdekit.ReverseSDE(sdekit.ScoreModel(net, sde))
    grid = -sde.time_at(torch.linspace(-2.0, 3.0, count + 1, dtype=torch.float64))
    mean, variance = marginal(sde, -float(grid[0]), point, 0.0)
    for a, b, v in step_law(Ancestral("small"), term, grid[:-1], grid[1:]).tolist():
        mean, variance = a * mean + b, a * a * variance + v
    assert (mean, variance) == pytest.approx(marginal(sde, -float(grid[-1]), point, 0.0), rel=1e-9)


@pytest.mark.parametrize("name", ["vp", "cosine", "table"])
def test_large_ancestral_steps_are_exact_for_standard_normal_data(name):
    sde = SDES[name]
    model = targets.Gaussian(times(0.0), times(1.0)).score_model(sde)
    a, b, v = points(Ancestral("large"), sde, model, sde.t_max, sde.t_min)
    assert a * a + v == pytest.approx(1.0, rel=1e-12)
    assert b == 0


def test_on_a_table_the_steps_are_the_published_ones():
    sde, x, i = SDES["table"], draw(1, 2, 3), 400
    target = gaussian(3)
    beta = sde.betas[i - 1]
    t0, t1 = (torch.full((2,), n / 1000, dtype=torch.float64) for n in (i, i - 1))
    score, kept = target.score(sde, x, t0), math.sqrt(1.0 - beta)
    share = float((1.0 - sde.alpha(t1[0]) ** 2) / (1.0 - sde.alpha(t0[0]) ** 2))
    term = sdekit.ReverseSDE(target.score_model(sde))
    expected = {
        Ancestral("small"): (x + beta * score) / kept + math.sqrt(beta * share),
        Ancestral("large"): (x + beta * score) / kept + math.sqrt(beta),
        ReverseDiffusion(): (2.0 - kept) * x + beta * score + math.sqrt(beta),
    }
    for solver, answer in expected.items():
        moved = solver.propose(term, -t0, -t1, x, solver.init(term, x), Path(1.0)).z
        torch.testing.assert_close(moved, answer, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", SDES)
def test_reverse_diffusion_undoes_the_forward_transition(name):
    sde, x, target = SDES[name], draw(1, 2, 3), gaussian(3)
    t0, t1 = sde.time_at(times(-0.8, -0.2)), sde.time_at(times(0.4, 0.3))
    a = (sde.alpha(t0) / sde.alpha(t1))[:, None]
    spread = sde.sigma(t0)[:, None] ** 2 - a**2 * sde.sigma(t1)[:, None] ** 2
    score, model = target.score(sde, x, t0), target.score_model(sde)
    for eta in (0.0, 0.5, 1.0):
        term = sdekit.ReverseSDE(model, eta)
        moved = ReverseDiffusion().propose(term, -t0, -t1, x, counts(x), Path(1.0)).z
        expected = x + (1.0 - a) * x + 0.5 * (1.0 + eta**2) * spread * score + eta * spread.sqrt()
        torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-10)
    # a level that depends on time is asked where the step starts
    varying, still = (sdekit.ReverseSDE(model, eta) for eta in (lambda t: t, float(t0[0])))
    first = [ReverseDiffusion().propose(e, -t0, -t1, x, counts(x), Path(1.0)).z[0] for e in (varying, still)]
    torch.testing.assert_close(*first)


def test_the_error_of_stochastic_heun_is_the_distance_to_euler_and_maruyama():
    term, x = sdekit.ReverseSDE(gaussian(3).score_model(SDES["vp"]), 0.8), draw(1, 2, 3)
    ends = times(-0.5, -0.3), times(-0.4, -0.25)
    solvers = StochasticHeun(), EulerMaruyama()
    step, euler = (solver.propose(term, *ends, x, counts(x), Path(1.0)) for solver in solvers)
    torch.testing.assert_close(step.z - step.error, euler.z, rtol=1e-13, atol=1e-14)
    assert float(step.error.abs().min()) > 1e-4


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("towards", ["data", "noise"])
def test_without_churn_edm_is_heuns_method_in_the_noise_level(name, towards):
    sde, x = SDES[name], draw(1, 2, 3)
    model = mixture(3, 2).score_model(sde)
    ends = sde.time_at(times(-0.8, -0.2)), sde.time_at(times(0.1, 0.3))
    t0, t1 = ends if towards == "data" else ends[::-1]
    solver = EDMChurn(0.0) if towards == "data" else EDMChurn(0.9)  # no churn on the way to the noise
    moved = solver.propose(sdekit.ProbabilityFlow(model), t0, t1, x, counts(x), Path(1.0, 1.0, 1.0)).z

    def slope(rho, y):
        t = sde.time_at(-rho.log())
        return model.noise(sde.alpha(t)[:, None] * y, t)

    term, (rho0, rho1) = Given(slope), (torch.exp(-sde.half_log_snr(t)) for t in (t0, t1))
    y = x / sde.alpha(t0)[:, None]
    expected = sdekit.Heun().propose(term, rho0, rho1, y, sdekit.Heun().init(term, y), None).z
    torch.testing.assert_close(moved, sde.alpha(t1)[:, None] * expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["vp", "sub-vp", "karras"])
def test_churn_raises_the_level_by_gamma_with_the_variance_of_the_way_up(name):
    sde, (low, high) = SDES[name], (-0.3, 0.2)
    t0, t1 = (float(sde.time_at(value)) for value in (low, high))
    rho = math.exp(-low)

    def raised(solver):
        """The level where the first stage looks, and the noise in y that came before it."""
        seen = []
        net = Function(lambda x, t: (seen.append((float(t), float(x))), torch.zeros_like(x))[1])
        term = sdekit.ProbabilityFlow(sdekit.ScoreModel(net, sde))
        x = torch.zeros(1, 1, dtype=torch.float64)
        solver.propose(term, times(t0), times(t1), x, solver.init(term, x), Path(fresh=1.0))
        t, x = seen[0]
        return float(torch.exp(-sde.half_log_snr(t))), x / float(sde.alpha(t))

    for churn, gamma in ((0.4, 0.4 * (high - low)), (3.0, math.sqrt(2.0) - 1.0)):
        level, noise = raised(EDMChurn(churn, noise=1.1))
        assert level == pytest.approx((1.0 + gamma) * rho, rel=1e-9)
        assert noise == pytest.approx(1.1 * math.sqrt(level**2 - rho**2), rel=1e-8)
    level, noise = raised(EDMChurn(noise=1.1, gamma=0.2))  # whatever the step
    assert level == pytest.approx(1.2 * rho, rel=1e-9)
    assert noise == pytest.approx(1.1 * math.sqrt(level**2 - rho**2), rel=1e-8)
    for outside in ({"start": 0.99 * rho}, {"stop": 1.01 * rho}):
        assert raised(EDMChurn(0.4, **outside)) == (pytest.approx(rho, rel=1e-12), 0.0)
    assert raised(EDMChurn(0.4, start=1.01 * rho, stop=0.99 * rho)) == raised(EDMChurn(0.4))


@pytest.mark.parametrize("name", SDES)
def test_churn_never_looks_beyond_the_noisiest_time(name):
    sde, seen = SDES[name], []
    net = Function(lambda x, t: (seen.append(t), torch.zeros_like(x))[1])
    term = sdekit.ProbabilityFlow(sdekit.ScoreModel(net, sde))
    x, near = torch.zeros(2, 1, dtype=torch.float64), float(sde.time_at(sde.half_log_snr(sde.t_max) + 0.01))
    for solver in (EDMChurn(5.0), EDMChurn(gamma=0.4)):
        seen.clear()
        solver.propose(term, times(sde.t_max, near), times(near, sde.t_min), x, counts(x), Path())
        assert seen[0].tolist() == [sde.t_max, pytest.approx(sde.t_max, rel=1e-12)]
        assert float(seen[0].max()) <= sde.t_max


@pytest.mark.parametrize("churn", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("name", LIMITS)
def test_small_churned_steps_are_the_reverse_sde_of_that_noise_level(name, churn):
    sde = SDES[name]
    model = targets.Gaussian(times(0.7), times(NARROW)).score_model(sde)
    t0 = float(sde.time_at(0.1))
    t1 = float(sde.time_at(0.1 + 1e-5))
    one = points(EDMChurn(churn), sde, model, t0, t1)
    other = points(EulerMaruyama(), sde, model, t0, t1, math.sqrt(churn))
    for mine, its, rest in zip(one, other, (1.0, 0.0, 0.0), strict=True):
        assert (mine - rest) / (t0 - t1) == pytest.approx((its - rest) / (t0 - t1), rel=2e-4, abs=1e-7)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_no_length_goes_nowhere(method, name):
    sde, solver, x = SDES[name], METHODS[method], draw(1, 4, 3)
    term = term_of(solver, mixture(3, 2).score_model(sde))
    t = torch.cat((times(sde.t_min, sde.t_max), sde.time_at(times(-0.5, 0.5))))
    s, path = term.coordinate(t), sdekit.IndependentIncrements(0, torch.arange(4))
    assert torch.equal(solver.propose(term, s, s, x, solver.init(term, x), path).z, x)
    # nor does one that is shorter than the half log signal-to-noise ratio resolves
    t = spread_times(sde, 300)[1:]
    x, path = draw(1, len(t), 3), sdekit.IndependentIncrements(0, torch.arange(len(t)))
    ends = (term.coordinate(at) for at in (t, torch.nextafter(t, torch.zeros_like(t))))
    torch.testing.assert_close(solver.propose(term, *ends, x, counts(x), path).z, x, rtol=1e-5, atol=1e-5)


class Rough(sdekit.KarrasSDE):
    """A schedule whose rounding is not monotone, as one written by hand may be."""

    def log_sigma(self, t):
        return super().log_sigma(t) + 1e-12 * torch.sin(1e14 * t)


@pytest.mark.parametrize("method", METHODS)
def test_a_variance_below_zero_by_rounding_is_none(method):
    sde, solver = Rough(), METHODS[method]
    term, t = term_of(solver, mixture(3, 2).score_model(SDES["karras"])), torch.linspace(1.0, 2.0, 200).double()
    term.model.sde = sde
    shorter = t - 1e-14
    assert bool((sde.half_log_snr(shorter) < sde.half_log_snr(t)).any())
    x, path = draw(1, len(t), 3), sdekit.IndependentIncrements(0, torch.arange(len(t)))
    step = solver.propose(term, term.coordinate(t), term.coordinate(shorter), x, counts(x), path)
    torch.testing.assert_close(step.z, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("method", METHODS)
def test_few_steps_stay_finite_in_the_dtype_of_the_state(method, name):
    sde, solver = SDES[name], METHODS[method]
    term, path = term_of(solver, mixture(3, 2).score_model(sde)), sdekit.IndependentIncrements(0, torch.arange(2))
    x = sde.prior_std * draw(1, 2, 3).float()
    for n in (1, 2, 3, 6, 10):
        s = term.coordinate(torch.linspace(sde.t_max, sde.t_min, n + 1, dtype=torch.float64)[:, None].expand(-1, 2))
        z, memory = x, solver.init(term, x)
        for s0, s1 in itertools.pairwise(s):
            step = solver.propose(term, s0, s1, z, memory, path)
            z, memory = step.z, step.memory
            assert z.dtype == torch.float32
            assert bool(torch.isfinite(z).all()), n
        assert memory.tolist() == [n, n]


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_is_the_same_alone_and_in_a_batch(method):
    sde, solver, x = SDES["vp"], METHODS[method], draw(1, 5, 3)
    term, grid = term_of(solver, mixture(3, 2).score_model(sde)), sdekit.FixedGrid(uneven_times(0.9, 0.1, 9))
    numbers = torch.tensor([4, 8, 15, 16, 23])

    def solve(rows):
        path = sdekit.IndependentIncrements(7, numbers[rows])
        return sdekit.integrate(term, solver, grid, x[rows], 0.9, 0.1, path)

    together, alone = solve(torch.arange(5)), solve(torch.tensor([3]))
    torch.testing.assert_close(together.x[3:4], alone.x, rtol=1e-11, atol=1e-12)
    assert together.stats.evaluations.tolist() == [9 * solver.evaluations] * 5
    assert float((together.x[0] - together.x[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_needs_it_asks_for(method):
    x, solver, model = draw(1, 2, 3), METHODS[method], gaussian(3).score_model(SDES["vp"])
    needed, other = ("ProbabilityFlow", "ReverseSDE") if method == "churn" else ("ReverseSDE", "ProbabilityFlow")
    with pytest.raises(TypeError, match=f"{type(solver).__name__} integrates a {needed}, not a Given"):
        solver.init(Given(None), x)
    with pytest.raises(TypeError, match=f"not a {other}"):
        solver.init(getattr(sdekit, other)(model), x)
    term = term_of(solver, model)
    with pytest.raises(ValueError, match=f"{type(solver).__name__} needs a Brownian path"):
        solver.propose(term, term.coordinate(times(0.5, 0.3)), term.coordinate(times(0.4, 0.2)), x, counts(x), None)


def test_bad_arguments_are_named():
    model, x = gaussian(3).score_model(SDES["vp"]), draw(1, 2, 3)
    with pytest.raises(ValueError, match="eta=-1"):
        sdekit.ReverseSDE(model, -1)
    for eta in (lambda t: -t, lambda t: t / 0, lambda t: t * math.nan):
        with pytest.raises(ValueError, match=r"eta\(t\) is .*a finite eta\(t\) >= 0 is needed"):
            sdekit.sample(model, (2, 3), eta=eta)
    for eta in (0.5, 0.0, lambda t: t):
        with pytest.raises(TypeError, match="a reverse SDE of eta=1, and this ReverseSDE has eta="):
            Ancestral().init(sdekit.ReverseSDE(model, eta), x)
    with pytest.raises(ValueError, match="variance='medium'"):
        Ancestral("medium")
    for bad in ({"churn": -0.1}, {"churn": math.nan}, {"churn": math.inf}, {"noise": 0.0}, {"start": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            EDMChurn(**bad)
    with pytest.raises(ValueError, match=r"start=1.0, stop=2.0; 0 <= stop <= start"):
        EDMChurn(start=1.0, stop=2.0)
    for gamma in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match="S_churn / steps"):
            EDMChurn(gamma=gamma)


def test_increments_belong_to_their_sample_and_their_step():
    # Increments of 20,000 samples: variance of W(s1) - W(s0) within 5.5 standard errors of |s1 - s0|, 4e-8.
    n = 20_000
    path, like = sdekit.IndependentIncrements(3, torch.arange(n)), torch.zeros(n, 2, dtype=torch.float64)
    s0, s1 = torch.full((n,), -0.9), torch.full((n,), -0.4)
    step = torch.zeros(n, dtype=torch.int64)
    first = path.increment(s0, s1, step, like)
    assert abs(float(first.square().mean()) / 0.5 - 1.0) < 5.5 / n**0.5
    second = path.increment(s0, s1, step + 1, like)
    assert abs(float((first * second).mean()) / 0.5) < 5.5 / (2 * n) ** 0.5
    rows = torch.tensor([7, 3])
    taken = path.take(rows).increment(s0[rows], s1[rows], step[rows], like[rows])
    assert torch.equal(taken, first[rows])
    assert not path.refinable

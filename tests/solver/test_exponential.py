"""Methods on the exact linear part: exact where their polynomial is, of their order elsewhere, and never NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import SDES, Function, Given, draw, gaussian, mixture, observed_order, reference_flow, times, uneven_times
from scipy.integrate import quad

import sdekit
from sdekit.prior import draw_prior
from sdekit.solver import semilinear
from sdekit.solver.start import CORRECTED, EXPLICIT, held

every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())

FLOW_SOLVERS = [
    sdekit.DDIM(),
    *(sdekit.DPMSolver(p) for p in (1, 2, 3)),
    *(sdekit.DPMSolverPP(p) for p in (1, 2, 3)),
    *(sdekit.DPMSolverPP(p, multistep=False) for p in (1, 2, 3)),
    *(sdekit.DPMSolverPP(p, compat=True) for p in (2, 3)),
    *(sdekit.DEIS(p, variable) for p in (1, 2, 3, 4) for variable in ("t", "rho", "half_log_snr")),
    *(sdekit.UniPC(p, variant, form) for p in (1, 2, 3) for variant in ("bh1", "bh2") for form in ("data", "noise")),
    *(sdekit.SASolver(p, corrected) for p in (1, 2, 3) for corrected in (None, 0, p)),
]
SDE_SOLVERS = [
    sdekit.DDIM(1.0),
    sdekit.SDEDPMSolver(),
    sdekit.SDEDPMSolverPP(1),
    sdekit.SDEDPMSolverPP(2),
    sdekit.SDEDPMSolverPP(2, compat=True),
    sdekit.SEEDS(1),
    sdekit.SEEDS(2),
    sdekit.SASolver(1, None),
    sdekit.SASolver(2, 2),
    sdekit.SASolver(3, 3),
]


def pure(sde, prediction, kind=None):
    """A flow whose prediction is a function of the label t alone."""
    return sdekit.ProbabilityFlow(sdekit.ScoreModel(Function(prediction), sde, kind or sdekit.data()))


def uneven_grid(sde, first, last, n):
    """Times whose half log SNR runs from `first` to `last` on an uneven grid."""
    grid = sde.time_at(uneven_times(first, last, n))
    grid[0], grid[-1] = sde.time_at(times(first, last)).tolist()
    return sdekit.FixedGrid(grid)


def test_psi_is_its_integral_on_both_sides_of_its_branches():
    for order in (1, 2, 3, 4):
        for z in (0.0, 1e-9, -1e-3, 0.4999, 0.5001, -0.4999, -0.5001, 3.0, -12.0):

            def inside(r, k=order, z=z):
                return math.exp((1 - r) * z) * r ** (k - 1) / math.factorial(k - 1)

            exact = quad(inside, 0, 1, epsabs=0, epsrel=1e-13)[0]
            assert float(semilinear.psi(order, times(z))) == pytest.approx(exact, rel=3e-13)


@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("level", [0.0, 0.7, 1.0])
def test_the_weights_integrate_polynomials_exactly(form, level):
    sde = SDES["vp"]
    rate = 1.0 + level**2
    for first, h in ((-1.0, 0.4), (-4.5, 9.0), (1.0, 1e-4), (2.0, -0.5)):
        t0, t1 = sde.time_at(times(first)), sde.time_at(times(first + h))
        step = semilinear.linear(sde, form, t0, t1, times(level))
        nodes = first + times(0.0, -0.3, -0.7)[None]
        found = semilinear.weights(step, nodes, torch.ones(1, 3, dtype=torch.bool), lambda value: value)[0]
        for power in range(3):
            exponent = -rate if form == "data" else 1.0
            exact = quad(lambda r: rate * math.exp(exponent * (h - r)) * r**power, 0.0, h, epsabs=0, epsrel=1e-12)[0]
            gain = float(sde.alpha(t1) if form == "data" else -sde.sigma(t1))
            assert float(found @ (nodes[0] - first) ** power) == pytest.approx(gain * exact, rel=2e-8, abs=1e-14)


@pytest.mark.parametrize("name", ["vp", "ve", "karras", "flow"])
@pytest.mark.parametrize(
    ("solver", "degree"),
    [(sdekit.DPMSolverPP(p), p - 1) for p in (1, 2, 3)]
    + [(sdekit.DEIS(p, "half_log_snr"), p - 1) for p in (1, 2, 3, 4)]
    + [(sdekit.UniPC(p, prediction=form), p) for p in (2, 3) for form in ("data", "noise")]
    + [(sdekit.SASolver(p, p), p) for p in (1, 2, 3)]
    + [(sdekit.DPMSolverPP(3, multistep=False), 1), (sdekit.DPMSolver(3), 1)],
    ids=repr,
)
def test_a_polynomial_prediction_is_integrated_exactly_on_an_uneven_grid(solver, degree, name):
    # Once it has started: the last of 8 steps, the seven before it compared with the exact path by their own ends.
    sde = SDES[name]
    form = getattr(solver, "form", "noise" if isinstance(solver, sdekit.DPMSolver) else "data")
    kind = sdekit.data() if form == "data" else sdekit.noise()
    origin = -0.8
    coefficients = draw(3, degree + 1).tolist()

    def polynomial(value):
        return sum(c * (value - origin) ** k for k, c in enumerate(coefficients))

    flow = pure(sde, lambda x, t: polynomial(sde.half_log_snr(t))[:, None].expand_as(x), kind)
    grid, x = uneven_grid(sde, -2.0, 1.5, 8), draw(1, 2, 3)
    found = sdekit.integrate(flow, solver, grid, x, grid.times[0], grid.times[-1]).x
    start, end = (float(sde.half_log_snr(t)) for t in (grid.times[0], grid.times[-1]))
    if form == "data":  # x/sigma grows by int data d(alpha/sigma)
        integral = quad(lambda v: polynomial(v) * math.exp(v), start, end, epsabs=0, epsrel=1e-13)[0]
        exact = sde.sigma(grid.times[-1]) * (x / sde.sigma(grid.times[0]) + integral)
    else:  # x/alpha by int noise d(sigma/alpha)
        integral = quad(lambda v: -polynomial(v) * math.exp(-v), start, end, epsabs=0, epsrel=1e-13)[0]
        exact = sde.alpha(grid.times[-1]) * (x / sde.alpha(grid.times[0]) + integral)
    begins_low = isinstance(solver, (sdekit.UniPC, sdekit.SASolver, sdekit.DPMSolverPP)) or degree > 0
    if begins_low and degree > 0:
        # A start of lower order leaves its own error; a network that ignores x has none beyond the first two steps.
        short = sdekit.integrate(flow, solver, sdekit.FixedGrid(grid.times[:4]), x, grid.times[0], grid.times[3]).x
        reached = float(sde.half_log_snr(grid.times[3]))
        scale = sde.sigma if form == "data" else sde.alpha
        sign = 1.0 if form == "data" else -1.0
        rest = quad(lambda v: sign * polynomial(v) * math.exp(sign * v), reached, end, epsabs=0, epsrel=1e-13)[0]
        exact = scale(grid.times[-1]) * (short / scale(grid.times[3]) + rest)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)


@every_sde
def test_ddim_is_exact_on_a_point_in_one_step(sde):
    point, x = draw(1, 3), sde.prior_std * draw(2, 4, 3)
    networks = {
        sdekit.data(): lambda x, t: point.expand_as(x),
        sdekit.noise(): lambda x, t: (x - sde.alpha(t)[:, None] * point) / sde.sigma(t)[:, None],
    }
    for kind, network in networks.items():
        model = sdekit.ScoreModel(Function(network), sde, kind)
        grid = sdekit.FixedGrid(times(sde.t_max, sde.t_min))
        for solver in (sdekit.DDIM(), sdekit.DPMSolverPP(1), sdekit.DPMSolver(1), sdekit.DEIS(1), sdekit.UniPC(1)):
            found = sdekit.integrate(sdekit.ProbabilityFlow(model), solver, grid, x, sde.t_max, sde.t_min).x
            ratio = sde.sigma(sde.t_min) / sde.sigma(sde.t_max)
            exact = sde.alpha(sde.t_min) * point + ratio * (x - sde.alpha(sde.t_max) * point)
            torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


CLAIMS = {solver: solver.order for solver in FLOW_SOLVERS}
CLAIMS[sdekit.DPMSolverPP(3, compat=True)] = 2  # the published second difference lacks its factor 2
for points in (1, 2, 3):
    for corrected, deep in ((None, points), (0, 1), (points, points + 1)):
        CLAIMS[sdekit.SASolver(points, corrected)] = deep


@pytest.mark.parametrize(("solver", "order"), CLAIMS.items(), ids=[repr(solver) for solver in CLAIMS])
def test_halving_the_steps_divides_the_error_by_two_to_the_order(solver, order):
    sde, target = SDES["vp"], mixture(2, 1)
    first, last = sde.time_at(times(-2.5, 2.0)).tolist()
    x = sde.perturb(draw(1, 3, 2), first, draw(2, 3, 2))
    exact, errors = reference_flow(target, sde, x, first, last), []
    for n in (48, 96):
        term = sdekit.ProbabilityFlow(target.score_model(sde))
        found = sdekit.integrate(term, solver, uneven_grid(sde, -2.5, 2.0, n), x, first, last)
        errors.append(float((found.x - exact).square().mean().sqrt()))
    assert order - 0.35 < observed_order(errors)[-1] < order + 1.1, errors


def test_the_published_third_order_is_of_order_two_and_ours_of_three():
    sde, target = SDES["vp"], mixture(2, 1)
    first, last = sde.time_at(times(-2.5, 2.0)).tolist()
    x = sde.perturb(draw(1, 3, 2), first, draw(2, 3, 2))
    exact, term = reference_flow(target, sde, x, first, last), sdekit.ProbabilityFlow(target.score_model(sde))
    for compat, low, high in ((True, 1.9, 2.2), (False, 2.8, 3.2)):
        errors = []
        for n in (80, 160):
            grid = uneven_grid(sde, -2.5, 2.0, n)
            found = sdekit.integrate(term, sdekit.DPMSolverPP(3, compat=compat), grid, x, first, last).x
            errors.append(float((found - exact).abs().max()))
        assert low < observed_order(errors)[-1] < high


def test_the_published_third_order_adds_half_of_the_second_difference():
    # Exact for predictions of degree 1; of degree 2 it takes half of the second difference: int of m'' r^2 / 4.
    sde = SDES["vp"]
    step = semilinear.linear(sde, "data", *sde.time_at(times(0.0, 0.4))[:, None], times(0.0))
    nodes, valid = times(0.0, -0.3, -0.5)[None], torch.ones(1, 3, dtype=torch.bool)
    flow = sdekit.ProbabilityFlow(gaussian(3).score_model(sde))
    history = sdekit.DPMSolverPP(3).init(flow, draw(1, 1, 3))._replace(nodes=nodes)
    exact, published = (sdekit.DPMSolverPP(3, compat=c).weigh(flow, step, history, valid)[0] for c in (False, True))
    for power in (0, 1):
        torch.testing.assert_close(published @ nodes[0] ** power, exact @ nodes[0] ** power, rtol=1e-10, atol=1e-13)
    # m = r^2: m'' = 2, D2 = 2 h^2 enters with psi_3 whole in the exact weights, by half as published
    missing = float(step.gain[0]) * 0.4**3 * float(semilinear.psi(3, times(-0.4)))
    assert float((exact - published) @ nodes[0].square()) == pytest.approx(missing, rel=1e-9)


def test_unipc_with_two_points_and_bh2_predicts_as_the_published_2m():
    sde, x = SDES["vp"], draw(1, 2, 3)
    flow = sdekit.ProbabilityFlow(gaussian(3).score_model(sde))
    step = semilinear.linear(sde, "data", *sde.time_at(times(0.0, 0.3))[:, None], times(0.0))
    nodes, valid = times(0.0, -0.2)[None], torch.ones(1, 2, dtype=torch.bool)
    found = sdekit.UniPC(2).weigh(flow, step, nodes, valid, False)
    history = sdekit.DPMSolverPP(2).init(flow, x)._replace(nodes=nodes)
    torch.testing.assert_close(found, sdekit.DPMSolverPP(2, compat=True).weigh(flow, step, history, valid))
    for points in (3,):  # with three points both variants are the interpolation itself
        three, every = times(0.0, -0.2, -0.5)[None], torch.ones(1, 3, dtype=torch.bool)
        both = [sdekit.UniPC(points, variant).weigh(flow, step, three, every, False) for variant in ("bh1", "bh2")]
        assert torch.equal(*both)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("starts", [EXPLICIT, CORRECTED])
def test_the_start_fills_the_history_place_by_place(starts, depth):
    start = starts[depth]
    filled = [int(held(start, torch.tensor([entered]), depth).sum()) for entered in range(8)]
    expected, count = [0], 0
    for _, _, overwrite in start:
        count += not overwrite
        expected.append(min(count, depth))
    while len(expected) < 8:
        count += 1
        expected.append(min(count, depth))
    assert filled == expected


@pytest.mark.parametrize("solver", FLOW_SOLVERS, ids=repr)
@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_a_step_of_no_length_goes_nowhere(solver, name):
    sde = SDES[name]
    flow = sdekit.ProbabilityFlow(gaussian(3).score_model(sde))
    x, t = draw(1, 2, 3), sde.time_at(times(0.0, 0.5))
    memory = solver.init(flow, x)
    for _ in range(6):
        step = solver.propose(flow, t, t, x, memory, None)
        torch.testing.assert_close(step.z, x, rtol=1e-13, atol=1e-14)
        memory = step.memory
    assert torch.isfinite(solver.propose(flow, t, 0.9 * t, x, memory, None).z).all()


def few(model, solver, steps, count=3):
    """A solve from t_max to t_min in so few steps, on the flow or the reverse SDE."""
    sde = model.sde
    x = draw_prior(model, (count, 2), 0, torch.arange(count), torch.float32)
    stochastic = solver in SDE_SOLVERS
    term = sdekit.ReverseSDE(model, 1.0) if stochastic else sdekit.ProbabilityFlow(model)
    path = sdekit.IndependentIncrements(0, torch.arange(count)) if stochastic else None
    grid = sdekit.FixedGrid(sdekit.grid.karras(sde, steps))
    return sdekit.integrate(term, solver, grid, x, sde.t_max, sde.t_min, path)


@pytest.mark.parametrize("solver", FLOW_SOLVERS + SDE_SOLVERS, ids=repr)
@every_sde
def test_one_to_ten_steps_are_finite(sde, solver):
    model = mixture(2, 1).score_model(sde)
    for steps in (1, 2, 10):
        found = few(model, solver, steps)
        assert torch.isfinite(found.x).all()
        assert found.x.dtype == torch.float32
        assert found.stats.accepted.tolist() == [steps] * 3


@pytest.mark.parametrize("solver", [s for s in FLOW_SOLVERS if s.order > 1] + SDE_SOLVERS, ids=repr)
def test_a_sample_goes_the_same_way_in_any_batch(solver):
    model = mixture(2, 1).score_model(SDES["vp"])
    torch.testing.assert_close(few(model, solver, 6, 1).x, few(model, solver, 6, 5).x[:1], rtol=1e-6, atol=1e-6)


def test_they_run_from_data_to_noise_too():
    sde, target = SDES["vp"], mixture(2, 1)
    first, last = sde.time_at(times(2.0, -2.0)).tolist()
    x, term = target.sample(3), sdekit.ProbabilityFlow(target.score_model(sde))
    x = sde.perturb(x, first, draw(2, 3, 2))
    exact = reference_flow(target, sde, x, first, last)
    for solver in (sdekit.DPMSolverPP(3), sdekit.DEIS(3), sdekit.UniPC(3), sdekit.DPMSolver(3)):
        found = sdekit.integrate(term, solver, uneven_grid(sde, 2.0, -2.0, 100), x, first, last).x
        assert float((found - exact).abs().max()) < 2e-4


class Still:
    """A path whose every increment is `size` standard deviations."""

    refinable = False

    def __init__(self, size, count):
        self.size, self.count = size, count

    def increment(self, s0, s1, step, like, lane=0):
        return torch.full_like(like, self.size) * (s1 - s0).abs().sqrt()[:, None]

    def __len__(self):
        return self.count

    def take(self, rows):
        return self


@pytest.mark.parametrize("name", ["vp", "ve", "sub-vp"])
def test_at_eta_one_the_first_order_step_is_the_exact_posterior(name):
    # q(x_1 | x_0, data) = N((sigma_1/sigma_0) e^{-h} x + alpha_1 (1 - e^{-2h}) data, sigma_1^2 (1 - e^{-2h}))
    sde, data, x = SDES[name], draw(1, 1, 3), draw(2, 1, 3)
    model = sdekit.ScoreModel(Function(lambda x, t: data.expand_as(x)), sde, sdekit.data())
    term, (t0, t1) = sdekit.ReverseSDE(model, 1.0), sde.time_at(times(-0.5, 0.4))[:, None]
    for solver in (sdekit.SDEDPMSolverPP(1), sdekit.DDIM(1.0)):
        drawn = [solver.propose(term, -t0, -t1, x, solver.init(term, x), Still(size, 1)).z for size in (0.0, 1.0)]
        mean = sde.sigma(t1) / sde.sigma(t0) * math.exp(-0.9) * x - sde.alpha(t1) * math.expm1(-1.8) * data
        torch.testing.assert_close(drawn[0], mean, rtol=1e-10, atol=1e-12)
        spread = float(sde.sigma(t1)) * math.sqrt(-math.expm1(-1.8))
        torch.testing.assert_close(drawn[1] - drawn[0], torch.full_like(x, spread), rtol=1e-9, atol=0)


def test_the_conversion_between_ddims_eta_and_the_equations():
    # eta_DDIM = .6 at h = .3 has the noise of eta^2 = .2954 in the equation, not of .36
    sde, x = SDES["vp"], draw(2, 1, 3)
    t0, t1 = sde.time_at(times(0.0, 0.3))[:, None]
    model, noises = gaussian(3).score_model(sde), []
    for term, solver in (
        (sdekit.ReverseSDE(model, 0.6), sdekit.DDIM(0.6)),
        (sdekit.ReverseSDE(model, math.sqrt(0.29541)), sdekit.SDEDPMSolverPP(1)),
    ):
        drawn = [solver.propose(term, -t0, -t1, x, solver.init(term, x), Still(size, 1)).z for size in (0.0, 1.0)]
        noises.append(float((drawn[1] - drawn[0])[0, 0]))
    assert noises[0] == pytest.approx(noises[1], rel=1e-4)


def test_published_midpoint_and_exact_second_order_differ_by_their_coefficient():
    sde = SDES["vp"]
    t0, t1 = sde.time_at(times(0.0, 0.5))[:, None]
    term = sdekit.ReverseSDE(gaussian(3).score_model(sde), 1.0)
    step = semilinear.linear(sde, "data", t0, t1, times(1.0))
    history = sdekit.SDEDPMSolverPP(2).init(term, draw(1, 1, 3))._replace(nodes=times(0.0, -0.25)[None])
    valid = torch.ones(1, 2, dtype=torch.bool)
    exact, compat = (sdekit.SDEDPMSolverPP(2, compat).weigh(term, step, history, valid) for compat in (False, True))
    alpha = float(sde.alpha(t1))
    for weights, c in ((exact, math.expm1(-1.0) / 1.0 + 1.0), (compat, -0.5 * math.expm1(-1.0))):
        slope = alpha * c * 2.0  # D1 = (m0 - m1)/r0 with r0 = 1/2
        torch.testing.assert_close(weights[0], times(-alpha * math.expm1(-1.0) + slope, -slope), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sdekit.DDIM(1.2), "eta=1.2"),
        (lambda: sdekit.DPMSolver(4), "order=4"),
        (lambda: sdekit.DPMSolverPP(4), "order=4"),
        (lambda: sdekit.DPMSolverPP(2, False, True), "compat=True"),
        (lambda: sdekit.DEIS(5), "order=5"),
        (lambda: sdekit.DEIS(3, "log"), "variable='log'"),
        (lambda: sdekit.UniPC(4), "predictor=4"),
        (lambda: sdekit.UniPC(2, "bh3"), "variant='bh3'"),
        (lambda: sdekit.UniPC(2, "bh1", "v"), "prediction='v'"),
        (lambda: sdekit.SASolver(0), "predictor=0"),
        (lambda: sdekit.SASolver(2, 4), "corrector=4"),
        (lambda: sdekit.SDEDPMSolverPP(3), "order=3"),
        (lambda: sdekit.SEEDS(3), "order=3"),
    ],
)
def test_what_does_not_exist_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_they_cannot_integrate_is_refused():
    x, model = draw(1, 2, 3), gaussian(3).score_model(SDES["vp"])
    for solver in (sdekit.DDIM(), sdekit.DPMSolverPP(), sdekit.DPMSolver(), sdekit.DEIS(), sdekit.UniPC()):
        with pytest.raises(TypeError, match="ProbabilityFlow, not a Given"):
            solver.init(Given(None), x)
        with pytest.raises(TypeError, match="noise would be dropped"):
            solver.init(sdekit.ReverseSDE(model), x)
    for solver in SDE_SOLVERS:
        if isinstance(solver, sdekit.SASolver):
            continue
        with pytest.raises(TypeError, match="ReverseSDE, not a ProbabilityFlow"):
            solver.init(sdekit.ProbabilityFlow(model), x)
        term = sdekit.ReverseSDE(model)
        with pytest.raises(ValueError, match="path=None"):
            solver.propose(term, times(-0.5, -0.3), times(-0.4, -0.2), x, solver.init(term, x), None)
    with pytest.raises(ValueError, match="they must agree"):
        sdekit.DDIM(0.5).init(sdekit.ReverseSDE(model, 0.7), x)
    with pytest.raises(ValueError, match="those of eta=1"):
        sdekit.SEEDS().init(sdekit.ReverseSDE(model, 0.7), x)


def test_numpy_is_not_asked_at_every_step():
    # Gauss's rule is made once for a device.
    first, second = (semilinear._gauss(torch.device("cpu")) for _ in range(2))
    assert first[0] is second[0]
    assert first[1] is second[1]
    assert np.isclose(float(first[1].sum()), 1.0)

"""Observed orders: the estimate and its error on errors made to order, and that broken methods are not proven."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction as Q
from typing import Any

import pytest
import torch
from helpers import SDES, draw, seeded, times

import sdekit
from sdekit import targets
from sdekit._tensor import column
from sdekit.accuracy import (
    Order,
    deterministic_order,
    half_log_snr_grids,
    order_of,
    reference_endpoint,
    strong_order,
    weak_order,
)
from sdekit.accuracy.paths import SharedPath
from sdekit.accuracy.stochastic import _exact_law, _method_law
from sdekit.solver.base import Proposal, Solver, counters
from sdekit.solver.tableau import HEUN
from sdekit.terms import NO_AUX

STEPS = (1 / 24, 1 / 48, 1 / 96)
KINDS = {name: SDES[name] for name in ("vp", "sub-vp", "ve", "karras")}
AXES = targets.Gaussian(draw(1, 8), 0.1 + draw(2, 8).square())
SMOOTH = targets.GaussianMixture(
    times(0.3, 0.4, 0.3), torch.tensor([[-1.0, 0.2], [0.3, 0.9], [0.8, -0.7]]), times(0.5, 0.6, 0.4)
)
every_sde = pytest.mark.parametrize("sde", KINDS.values(), ids=KINDS.keys())


def power_law(order, constants, noise=None):
    """(3, P) errors constants h^order, times exp(noise)."""
    errors = times(*STEPS)[:, None] ** order * constants
    return errors if noise is None else errors * noise.exp()


# The estimator


def test_a_power_law_gives_its_exponent_whatever_the_problems_constants():
    # One problem's error is 10,000 times another's: it is the same on every grid and no error of the slope.
    constants = torch.logspace(-2, 2, 12, dtype=torch.float64)
    for order in (1.0, 1.5, 8.0):
        found = order_of(power_law(order, constants), STEPS, order)
        assert found.estimate == pytest.approx(order, abs=1e-12)
        assert found.std_error < 1e-12
        assert found.proven
        assert not order_of(power_law(order, constants), STEPS, order + 0.3).proven


@pytest.mark.parametrize("spread", [(0.7, 0.3), (0.0, 0.8)])
@pytest.mark.parametrize("problems", [16, 64])
def test_the_lower_bound_covers_as_often_as_it_says(spread, problems):
    # 1500 repeats: a true coverage of 0.95 is seen below 0.92 with probability 5e-7. A jackknife of 16 skewed problems
    # covers in 0.935 to 0.95, so that 0.9 is asked of it (1e-7).
    source, repeats, covered = seeded(problems), 1500, 0
    for _ in range(repeats):
        own = spread[0] * torch.randn(1, problems, generator=source, dtype=torch.float64)
        noise = spread[1] * torch.randn(3, problems, generator=source, dtype=torch.float64)
        covered += order_of(power_law(2.0, own.exp(), noise), STEPS, 2.0).lower() < 2.0
    assert (0.92 if problems == 64 else 0.90) < covered / repeats < 0.98


def test_what_is_proven_is_seldom_false():
    # The true order is the claim less 0.2: proven in 5% of 1500 repeats, above 8% with probability 3e-7.
    source, repeats, proven = seeded(3), 1500, 0
    for _ in range(repeats):
        noise = 0.3 * torch.randn(3, 64, generator=source, dtype=torch.float64)
        proven += order_of(power_law(1.8, torch.ones(1), noise), STEPS, 2.0).proven
    assert 0.02 < proven / repeats < 0.08


def test_only_the_finest_grids_count():
    errors = torch.cat((torch.full((2, 4), 3.0).double(), power_law(2.0, torch.ones(4))))
    found = order_of(errors, (1 / 6, 1 / 12, *STEPS), 2.0)
    assert found.estimate == pytest.approx(2.0, abs=1e-12)
    assert len(found.errors) == len(found.steps) == 5
    assert found.slopes == pytest.approx([0.0, math.log2(3.0 * 24**2), 2.0, 2.0])


def test_a_poor_reference_proves_nothing():
    errors = power_law(2.0, torch.ones(4))
    assert order_of(errors, STEPS, 2.0, floor=0.19 * float(errors[-1, 0])).proven
    assert not order_of(errors, STEPS, 2.0, floor=0.21 * float(errors[-1, 0])).proven


def test_an_error_that_vanishes_by_chance_proves_nothing():
    # An error h - h_2^2 / h, of order 1, on grids that end beside its zero.
    steps = times(*STEPS)[:, None]
    errors = (steps - 0.99 * steps[2] ** 2 / steps).expand(3, 4)
    found = order_of(errors, STEPS, 2.0)
    assert found.lower() > 2.0
    assert not found.proven


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_without_an_error_to_look_at_nothing_is_proven(value):
    errors = power_law(2.0, torch.ones(4))
    errors[1] = value
    found = order_of(errors, STEPS, 2.0)
    assert math.isnan(found.estimate)
    assert not found.proven


def test_what_does_not_fit_is_refused():
    good = power_law(2.0, torch.ones(4))
    with pytest.raises(ValueError, match="P >= 2"):
        order_of(good[:, :1], STEPS, 2.0)
    with pytest.raises(ValueError, match="G >= 3"):
        order_of(good[:2], STEPS[:2], 2.0)
    with pytest.raises(ValueError, match="coarsest grid first"):
        order_of(good, STEPS[::-1], 2.0)
    with pytest.raises(ValueError, match="take norms"):
        order_of(-good, STEPS, 2.0)
    with pytest.raises(ValueError, match=r"confidence=1\.0"):
        Order(1.0, 0.1, 1.0, (1.0,), (1.0,), 3).lower(1.0)
    sde = SDES["vp"]
    grids, flow = half_log_snr_grids(sde, (6, 12, 24)), sdekit.ProbabilityFlow(AXES.score_model(sde))
    x, solver = draw(3, 4, 8), sdekit.Heun()
    for wrong, text in (
        (grids[:2], "at least 3"),
        (grids[::-1], "strictly more"),
        ([*grids[:2], grids[2][:-1]], "ends"),
    ):
        with pytest.raises(ValueError, match=text):
            deterministic_order(solver, flow, x, x, wrong)
    for wrong in (x.float(), x[:1]):
        with pytest.raises(ValueError, match="float64"):
            deterministic_order(solver, flow, wrong, wrong, grids)
    with pytest.raises(ValueError, match=r"exact\.shape"):
        deterministic_order(solver, flow, x, x[:2], grids)
    with pytest.raises(ValueError, match="multiple of 4"):
        reference_endpoint(solver, flow, x, half_log_snr_grids(sde, (6,))[0])
    with pytest.raises(ValueError, match=r"uneven=0\.5"):
        half_log_snr_grids(sde, (6,), uneven=0.5)
    full = targets.Gaussian(times(0.0, 1.0), torch.tensor([[1.0, 0.3], [0.3, 0.5]]))
    with pytest.raises(ValueError, match="depend on one another"):
        weak_order(sdekit.EulerMaruyama(), sdekit.ReverseSDE(full.score_model(sde)), full, grids)


@every_sde
def test_grids_are_uneven_halved_by_doubling_and_end_alike(sde):
    grids = half_log_snr_grids(sde, (24, 48))
    lengths = [sde.half_log_snr(grid).diff() for grid in grids]
    torch.testing.assert_close(lengths[1][:12], 0.5 * lengths[0][:12], rtol=1e-9, atol=0)
    torch.testing.assert_close(lengths[0][:3] * 24 / 5.5, times(1.2, 0.6, 1.2), rtol=1e-9, atol=0)
    assert grids[0][0] == grids[1][0]
    assert grids[0][-1] == grids[1][-1]
    assert float(sde.half_log_snr(grids[1][-1])) == pytest.approx(2.5, abs=1e-9)


# Flows


def gaussian_flow(solver, sde, counts, uneven=0.2, claimed=None):
    """The order of a flow solver on a Gaussian of 8 axes, against the exact flow."""
    grids = half_log_snr_grids(sde, counts, uneven=uneven)
    first, last = float(grids[0][0]), float(grids[0][-1])
    x = sde.perturb(AXES.sample(16), first, draw(4, 16, 8))
    exact = AXES.flow_map(sde, x, first, last)
    return deterministic_order(solver, sdekit.ProbabilityFlow(AXES.score_model(sde)), x, exact, grids, claimed=claimed)


@every_sde
@pytest.mark.parametrize(
    ("solver", "counts"),
    [(sdekit.Euler(), (48, 96, 192)), (sdekit.Heun(), (24, 48, 96)), (sdekit.RK4(), (24, 48, 96))],
    ids=["Euler", "Heun", "RK4"],
)
def test_flow_solvers_have_the_order_they_claim(sde, solver, counts):
    found = gaussian_flow(solver, sde, counts)
    assert found.proven, found
    assert found.claimed == solver.order
    assert found.estimate == pytest.approx(solver.order, abs=0.25)


def test_a_method_that_starts_up_in_place_is_measured_in_its_own_variable():
    sde = SDES["sub-vp"]
    grids = half_log_snr_grids(sde, (24, 48, 96))
    first, last = float(grids[0][0]), float(grids[0][-1])
    x = sde.perturb(AXES.sample(16), first, draw(4, 16, 8))
    keys = sdekit.Hutchinson.keys(0, torch.arange(16))
    term = sdekit.LikelihoodFlow(AXES.score_model(sde), None, x.shape[1:], keys)
    exact = AXES.flow_map(sde, x, first, last)
    assert deterministic_order(sdekit.Adams(3), term, x, exact, grids).proven
    assert not deterministic_order(sdekit.Adams(2), term, x, exact, grids, claimed=3).proven


def test_heun_with_other_weights_is_not_proven():
    bent = sdekit.Tableau("bent", 2, None, HEUN.c, HEUN.a, (Q(9, 20), Q(11, 20)), None, "a test")
    found = gaussian_flow(sdekit.RungeKutta(bent), SDES["vp"], (24, 48, 96))
    assert not found.proven, found
    assert found.estimate < 1.3


@dataclass(frozen=True)
class EqualSteps(Solver):
    """DPM-Solver++(2M) that takes the step before for as long as this one."""

    inner = sdekit.DPMSolverPP(2)
    order, error_order, evaluations = 2, None, 1

    def init(self, term: Any, z: Any) -> Any:
        return self.inner.init(term, z)

    def propose(self, term: Any, s0: Any, s1: Any, z: Any, memory: Any, path: Any) -> Proposal:
        here, there = (term.model.sde.half_log_snr(term.time(s)) for s in (s0, s1))
        before = torch.cat(((2.0 * here - there)[:, None], memory.nodes[:, 1:]), 1)
        return self.inner.propose(term, s0, s1, z, memory._replace(nodes=before), path)


def test_a_multistep_method_with_the_coefficients_of_equal_steps_passes_on_equal_steps_only():
    counts = (24, 48, 96)
    assert gaussian_flow(sdekit.DPMSolverPP(2), SDES["vp"], counts).proven
    assert gaussian_flow(EqualSteps(), SDES["vp"], counts, uneven=0.0).proven
    assert not gaussian_flow(EqualSteps(), SDES["vp"], counts).proven


def test_on_a_mixture_the_reference_is_a_finer_solve():
    sde, target = SDES["vp"], SMOOTH
    grids = half_log_snr_grids(sde, (24, 48, 96))
    fine = half_log_snr_grids(sde, (192,))[0]
    flow = sdekit.ProbabilityFlow(target.score_model(sde))
    x = sde.perturb(target.sample(16), float(fine[0]), draw(5, 16, 2))
    known = reference_endpoint(sdekit.Dopri8(), flow, x, fine)
    assert known.floor < 1e-9
    found = deterministic_order(sdekit.Heun(), flow, x, known, grids)
    assert found.proven, found
    poor = reference_endpoint(sdekit.Heun(), flow, x, fine)
    found = deterministic_order(sdekit.Heun(), flow, x, poor, grids)
    assert found.estimate > 1.8  # as if nothing were wrong: the floor says what is
    assert not found.proven


def test_a_solve_that_fails_is_not_proven_and_does_not_raise():
    grids = half_log_snr_grids(SDES["karras"], (2, 4, 8))
    wild = sdekit.Tableau("wild", 1, None, (Q(0),), ((),), (Q(10) ** 200,), None, "a test")
    x = draw(6, 4, 8)
    found = deterministic_order(
        sdekit.RungeKutta(wild), sdekit.ProbabilityFlow(AXES.score_model(SDES["karras"])), x, x, grids
    )
    assert not found.proven
    assert math.isinf(found.errors[-1])


# Laws


@dataclass(frozen=True)
class Maruyama(Solver):
    """Euler and Maruyama's method with `gain` times its noise."""

    gain: float = 1.0
    order, error_order, evaluations = 1, None, 1

    def init(self, term: Any, z: Any) -> Any:
        return counters(z)

    def propose(self, term: Any, s0: Any, s1: Any, z: Any, memory: Any, path: Any) -> Proposal:
        moved = z + column(s1 - s0, z) * term.drift(s0, z)
        moved = moved + self.gain * column(term.noise_scale(s0), z) * path.increment(s0, s1, memory, z)
        return Proposal(moved, None, NO_AUX, memory + 1, torch.ones_like(s0, dtype=torch.bool))


@dataclass(frozen=True)
class StochasticRungeKutta(Solver):
    """SRA1 of Roessler; `sign` -1 turns the correction of its noise around, which constant g would not show."""

    sign: float = 1.0
    order, error_order, evaluations = 2, None, 2

    def init(self, term: Any, z: Any) -> Any:
        return counters(z)

    def propose(self, term: Any, s0: Any, s1: Any, z: Any, memory: Any, path: Any) -> Proposal:
        h = s1 - s0
        w, area = path.levy(s0, s1, memory, z)
        tilt = 0.5 * w + area
        early, late = (column(term.noise_scale(s), z) for s in (s0, s1))
        first = term.drift(s0, z)
        second = term.drift(s0 + 0.75 * h, z + column(0.75 * h, z) * first + 1.5 * late * tilt)
        moved = z + column(h, z) * (first + 2.0 * second) / 3.0 + late * w + self.sign * (early - late) * tilt
        return Proposal(moved, None, NO_AUX, memory + 1, torch.ones_like(s0, dtype=torch.bool))


def weak(solver, sde, eta=1.0, counts=(48, 96, 192), **options):
    """The weak order on a Gaussian of 8 axes."""
    return weak_order(
        solver, sdekit.ReverseSDE(AXES.score_model(sde), eta), AXES, half_log_snr_grids(sde, counts), **options
    )


@every_sde
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_law_of_the_equation_is_the_known_one(sde, eta):
    first, last = (float(t) for t in sde.time_at(times(-3.0, 2.5)))
    found = _exact_law(sdekit.ReverseSDE(AXES.score_model(sde), eta), AXES, first, last)
    alpha, sigma = sde.alpha(times(first, last)), sde.sigma(times(first, last))
    center, data = AXES._components.means[0], AXES._components.values[0]
    v0, v1 = (alpha[i] ** 2 * data + sigma[i] ** 2 for i in range(2))
    gain = (v1 / v0).sqrt() * ((v1 / alpha[1] ** 2) / (v0 / alpha[0] ** 2)) ** (0.5 * eta**2)
    torch.testing.assert_close(found.gain, gain, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.shift, alpha[1] * center - gain * alpha[0] * center, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.variance, v1 - gain**2 * v0, rtol=1e-8, atol=1e-12)


@every_sde
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_euler_maruyama_is_of_weak_order_one(sde, eta):
    found = weak(sdekit.EulerMaruyama(), sde, eta)
    assert found.proven, found
    assert found.estimate == pytest.approx(1.0, abs=0.15)
    assert found.errors[-1] < 0.06


def test_the_noise_level_may_depend_on_time():
    found = weak(sdekit.EulerMaruyama(), SDES["vp"], lambda t: 0.3 + t)
    assert found.proven, found


@pytest.mark.parametrize("sde", ["vp", "karras"])
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (sdekit.EulerMaruyama(), 1),
        (sdekit.ReverseDiffusion(), 1),
        (sdekit.SDEDPMSolver(), 1),
        (sdekit.SDEDPMSolverPP(1), 1),
        (sdekit.SDEDPMSolverPP(2), 2),
        (sdekit.SASolver(2, 2), 2),
        (sdekit.SASolver(3, 3), 2),
        (sdekit.StochasticHeun(), 2),
        (sdekit.SRA1(), 2),
        (sdekit.SRA2(), 2),
        (sdekit.SRA3(), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, sdekit.Solver) else str(value),
)
def test_solvers_keep_their_order_under_a_noise_level_of_time(solver, order, sde):
    process = SDES[sde]
    found = weak(solver, process, lambda t: 0.6 + 0.4 * torch.tanh(0.7 * process.half_log_snr(t)), claimed=order)
    assert found.proven, found


def test_a_noise_level_that_jumps_at_a_time_of_the_grid_costs_exponential_solvers_no_order():
    sde = SDES["vp"]
    grids = half_log_snr_grids(sde, (96, 192, 384))
    model, jump = AXES.score_model(sde), float(grids[0][48])
    # The exact law, piece by piece: up to the jump, and from there.
    pieces = [
        _exact_law(sdekit.ReverseSDE(model, level), AXES, a, b)
        for level, a, b in ((1.0, float(grids[0][0]), jump), (0.3, jump, float(grids[0][-1])))
    ]
    gain = pieces[0].gain * pieces[1].gain
    term = sdekit.ReverseSDE(model, lambda t: torch.where(t < jump * (1.0 - 1e-12), 0.3, 1.0).double())

    def order(solver):
        first, *_, last = (float((_method_law(solver, term, 8, grid).gain - gain).square().mean()) for grid in grids)
        return math.log2(first / last) / 4.0

    assert order(sdekit.SASolver(2, 2)) > 1.8
    assert order(sdekit.SDEDPMSolverPP(2)) > 1.8
    assert order(sdekit.StochasticHeun()) < 1.3


def test_two_draws_a_step_and_their_areas_are_followed():
    found = weak(StochasticRungeKutta(), SDES["vp"], counts=(24, 48, 96))
    assert found.proven, found
    assert found.claimed == 2
    assert not weak(StochasticRungeKutta(-1.0), SDES["vp"], counts=(24, 48, 96)).proven


def test_noise_ten_percent_too_large_is_not_proven():
    counts = (24, 48, 96)
    assert weak(Maruyama(), SDES["vp"], counts=counts).proven
    assert not weak(Maruyama(1.1), SDES["vp"], counts=counts).proven
    assert not weak(Maruyama(1.1), SDES["vp"], counts=counts, transition=False).proven


@dataclass(frozen=True)
class Drifting(Maruyama):
    """Euler and Maruyama's method with a constant added to its drift: the mean alone is wrong."""

    def propose(self, term: Any, s0: Any, s1: Any, z: Any, memory: Any, path: Any) -> Proposal:
        found = Maruyama.propose(self, term, s0, s1, z, memory, path)
        return found._replace(z=found.z + column(2.0 * (s1 - s0), z))


@pytest.mark.parametrize("transition", [True, False])
def test_a_mean_that_is_wrong_is_not_proven(transition):
    assert not weak(Drifting(), SDES["vp"], counts=(24, 48, 96), transition=transition).proven


@dataclass(frozen=True)
class OtherEta(Maruyama):
    """Euler and Maruyama's method for noise level 1, whatever the equation's."""

    def propose(self, term: Any, s0: Any, s1: Any, z: Any, memory: Any, path: Any) -> Proposal:
        return Maruyama.propose(self, sdekit.ReverseSDE(term.model, 1.0), s0, s1, z, memory, path)


def test_the_noise_of_another_eta_keeps_the_marginal_and_not_the_transition():
    assert weak(OtherEta(), SDES["vp"], 0.5, (24, 48, 96), transition=False).proven
    assert not weak(OtherEta(), SDES["vp"], 0.5, (24, 48, 96)).proven


@dataclass(frozen=True)
class Scribble(Solver):
    """Draws of every kind and lane, in part remembered from the steps before: no method, but affine."""

    order, error_order, evaluations = 1, None, 1

    def init(self, term: Any, z: Any) -> Any:
        return (counters(z), torch.zeros_like(z))

    def propose(self, term: Any, s0: Any, s1: Any, z: Any, memory: Any, path: Any) -> Proposal:
        step, past = memory
        half = 0.5 * (s0 + s1)
        w, area = path.levy(s0, s1, step, z)
        more = path.increment(s0, half, step, z, lane=1) - 0.5 * path.increment(half, s1, step, z, lane=2)
        kept = path.normal(step, z) + 0.4 * path.normal(step, z, lane=3) + 2.0 * path.increment(s0, s1, step, z)
        moved = 0.8 * z + w - 3.0 * area + more + 0.3 * past + 0.1
        return Proposal(moved, None, NO_AUX, (step + 1, kept), torch.ones_like(s0, dtype=torch.bool))


def test_the_law_read_off_is_that_of_the_draws_themselves():
    # 40,000 samples of 2 axes, |z| < 5.5 of a mean and a variance: false alarm 2e-7.
    sde, n = SDES["karras"], 40_000
    grid = half_log_snr_grids(sde, (5,))[0]
    flow = sdekit.ProbabilityFlow(AXES.score_model(sde))
    law = _method_law(Scribble(), flow, 8, grid)
    assert torch.allclose(law.gain, torch.tensor(0.8**5, dtype=torch.float64))
    like = torch.full((n, 2), 0.7, dtype=torch.float64)
    path = sdekit.IndependentIncrements(0, torch.arange(n))
    flow = sdekit.ProbabilityFlow(targets.Gaussian(times(0.0, 0.0), times(1.0, 1.0)).score_model(sde))
    x = sdekit.integrate(flow, Scribble(), sdekit.FixedGrid(grid), like, float(grid[0]), float(grid[-1]), path).x
    mean, variance = law.shift[0] + 0.7 * law.gain[0], law.variance[0]
    assert abs(float(x.mean() - mean)) < 5.5 * float((variance / (2 * n)).sqrt())
    assert abs(float((x - mean).square().mean() / variance) - 1.0) < 5.5 / math.sqrt(n)


@dataclass(frozen=True)
class Normed(Maruyama):
    """A step as long as the state's norm: not affine."""

    def propose(self, term: Any, s0: Any, s1: Any, z: Any, memory: Any, path: Any) -> Proposal:
        found = Maruyama.propose(self, term, s0, s1, z, memory, path)
        return found._replace(z=found.z * (1.0 + 0.01 * found.z.norm(dim=1, keepdim=True)))


def test_a_method_that_is_not_affine_is_refused():
    with pytest.raises(ValueError, match="not affine"):
        weak(Normed(), SDES["vp"], counts=(3, 6, 12))


# Paths


@dataclass(frozen=True)
class Drawing(Maruyama):
    """Normals in place of increments, or uniforms besides."""

    uniform: bool = False

    def propose(self, term: Any, s0: Any, s1: Any, z: Any, memory: Any, path: Any) -> Proposal:
        drawn = path.uniform(memory) if self.uniform else path.normal(memory, z)
        return Proposal(z + column(drawn, z), None, NO_AUX, memory + 1, torch.ones_like(s0, dtype=torch.bool))


@dataclass(frozen=True)
class TwoHalves(Maruyama):
    """Two half steps, so that the path is asked for within the step."""

    evaluations = 2

    def propose(self, term: Any, s0: Any, s1: Any, z: Any, memory: Any, path: Any) -> Proposal:
        half = s0 + 0.4 * (s1 - s0)
        for lane, (a, b) in enumerate(((s0, half), (half, s1))):
            noise = path.increment(a, b, memory, z, lane=lane)
            z = z + column(b - a, z) * term.drift(a, z) + column(term.noise_scale(a), z) * noise
        return Proposal(z, None, NO_AUX, memory + 1, torch.ones_like(s0, dtype=torch.bool))


def strong(solver, claimed, sde=KINDS["vp"], counts=(12, 24, 48), finer=2):
    """The strong order on a smooth mixture in 2 dimensions, 256 paths, by SRA1 on a grid `finer` times the finest."""
    target = SMOOTH
    grids = half_log_snr_grids(sde, (*counts, finer * counts[-1]))
    term = sdekit.ReverseSDE(target.score_model(sde))
    x = sde.perturb(target.sample(256), float(grids[0][0]), draw(7, 256, 2))
    return strong_order(
        solver, term, x, grids[:-1], reference=StochasticRungeKutta(), finest=grids[-1], claimed=claimed, seed=1
    )


@pytest.mark.parametrize("name", ["vp", "karras"])
def test_euler_maruyama_is_of_strong_order_one_and_not_more(name):
    found = strong(sdekit.EulerMaruyama(), 1.0, KINDS[name])
    assert found.proven, found
    assert found.estimate < 1.25
    assert 0.0 < found.std_error < 0.15


def test_sra1_is_of_strong_order_three_halves_and_not_with_the_other_sign():
    found = strong(StochasticRungeKutta(), 1.5, finer=6)
    assert found.proven, found
    turned = strong(StochasticRungeKutta(-1.0), 1.5)
    assert not turned.proven
    assert turned.estimate == pytest.approx(1.0, abs=0.25)


def test_a_method_that_asks_within_its_steps_is_on_the_same_path():
    assert strong(TwoHalves(), 1.0).proven


def test_a_method_off_the_path_is_not_proven_or_refused():
    assert not strong(Maruyama(1.2), 1.0).proven
    with pytest.raises(ValueError, match="no strong order"):
        strong(Drawing(), 1.0, counts=(3, 6, 12))
    with pytest.raises(ValueError, match="draws uniforms"):
        strong(Drawing(1.0, True), 1.0, counts=(3, 6, 12))
    with pytest.raises(ValueError, match="draws uniforms"):
        weak(Drawing(1.0, True), SDES["vp"], counts=(3, 6, 12))


def test_a_shared_path_has_the_law_of_a_path_and_adds_up():
    n = 20_000
    like = torch.zeros(n, 1, dtype=torch.float64)
    nodes = times(-1.0, -0.7, -0.55, 0.1)
    path = SharedPath.draw(3, nodes, like)
    at = [s.expand(n) for s in nodes]
    none = torch.zeros(n, dtype=torch.int64)
    (wab, hab), (wbc, hbc), (wac, hac) = (path.levy(at[i], at[j], none, like) for i, j in ((0, 2), (2, 3), (0, 3)))
    torch.testing.assert_close(wab + wbc, wac, rtol=0, atol=1e-13)
    whole = 0.45 * (0.5 * wab + hab) + 0.65 * (0.5 * wbc + hbc) + 0.65 * wab
    torch.testing.assert_close(whole, 1.1 * (0.5 * wac + hac), rtol=0, atol=1e-13)
    # 20,000 samples, |z| < 5.5 each: false alarm 2e-7.
    for drawn, variance in ((wac, 1.1), (hac, 1.1 / 12.0), (hab, 0.45 / 12.0)):
        assert abs(float(drawn.square().mean()) / variance - 1.0) < 5.5 * math.sqrt(2.0 / n)
    assert abs(float((wac * hac).mean())) < 5.5 * 1.1 / math.sqrt(12.0 * n)
    rows = torch.tensor([5, 2])
    taken = path.take(rows).levy(at[0][:2], at[2][:2], none[:2], like[:2])
    assert torch.equal(taken[1], hab[rows])
    still = path.levy(at[1], at[1], none, like)
    assert not still[0].any()
    assert not still[1].any()
    with pytest.raises(ValueError, match=r"s=-0\.6"):
        path.increment(at[0] + 0.4, at[2], none, like)

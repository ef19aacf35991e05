"""Explicit Runge-Kutta methods converge at their order, with an error estimate of its own order."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import SDES, Given, draw, gaussian, mixture, observed_order, reference_flow, times, uneven_times

import sdekit

SDE, FIRST, LAST = SDES["vp"], 0.75, 0.2
# Method, and numbers of steps between the pre-asymptotic range and rounding.
METHODS = {
    "Euler": (sdekit.Euler(), (128, 256)),
    "Heun": (sdekit.Heun(), (64, 128)),
    "Midpoint": (sdekit.Midpoint(), (64, 128)),
    "RK4": (sdekit.RK4(), (32, 64)),
    "BogackiShampine": (sdekit.BogackiShampine(), (32, 64)),
    "Dopri5": (sdekit.Dopri5(), (24, 48)),
    "Tsit5": (sdekit.Tsit5(), (24, 48)),
    "Dopri8": (sdekit.Dopri8(), (7, 14)),
}
every_method = pytest.mark.parametrize(("solver", "steps"), METHODS.values(), ids=METHODS.keys())
GAUSSIAN, MIXTURE = gaussian(3), mixture(2, 4)


def errors_of(solver, steps, model, x, exact):
    errors = []
    for n in steps:
        grid = sdekit.FixedGrid(uneven_times(FIRST, LAST, n))
        found = sdekit.integrate(sdekit.ProbabilityFlow(model), solver, grid, x, FIRST, LAST)
        errors.append(float((found.x - exact).abs().max()))
    return errors


@every_method
def test_halving_the_steps_divides_the_error_by_two_to_the_order(solver, steps):
    x = SDE.perturb(draw(1, 2, 3), FIRST, draw(2, 2, 3))
    errors = errors_of(solver, steps, GAUSSIAN.score_model(SDE), x, GAUSSIAN.flow_map(SDE, x, FIRST, LAST))
    assert errors[-1] > 1e-13, "the error is rounding: take fewer steps"
    assert observed_order(errors)[-1] == pytest.approx(solver.order, abs=0.35 if solver.order < 5 else 0.7), errors


@pytest.mark.parametrize("name", ["Heun", "RK4", "BogackiShampine", "Dopri5"])
def test_a_mixtures_flow_is_approached_at_least_as_fast(name):
    # Terms of the error cancel at some step counts, so the order is bounded from below only.
    solver, steps = METHODS[name]
    x = SDE.perturb(draw(1, 1, 2), FIRST, draw(2, 1, 2))
    errors = errors_of(solver, steps, MIXTURE.score_model(SDE), x, reference_flow(MIXTURE, SDE, x, FIRST, LAST))
    assert errors[-1] < 2e-3
    assert observed_order(errors)[-1] > solver.order - 0.75, errors


@every_method
def test_a_step_costs_its_evaluations_and_starts_with_no_more(solver, steps):
    term = Given(lambda s, z: -z)
    z = draw(1, 2, 3)
    memory = solver.init(term, z)
    assert term.asked == []
    s = times(0.0, 0.5)
    for _ in range(3):
        before = len(term.asked)
        memory = solver.propose(term, s, s + 0.1, z, memory, None).memory
        assert len(term.asked) - before == solver.evaluations


@every_method
def test_the_error_estimate_vanishes_at_the_order_of_the_lower_solution(solver, steps):
    if solver.error_order is None:
        return
    sizes = []
    for h in (0.8, 0.4) if solver.order == 8 else (0.1, 0.05):
        # z' = cos(s) z from s = 0.3; a first advance in place fills the memory of methods that reuse a slope.
        term, z, s = Given(lambda s, z: torch.cos(s)[:, None] * z), torch.ones(1, 1, dtype=torch.float64), times(0.3)
        memory = solver.propose(term, s, s, z, solver.init(term, z), None).memory
        step = solver.propose(term, s, s + h, z, memory, None)
        exact = math.exp(math.sin(0.3 + h) - math.sin(0.3))
        sizes.append(float(step.error.abs()))
        lower = float(step.z - step.error)
        # z - error is the lower-order solution, so its own error is the estimate plus that of z.
        assert lower - exact == pytest.approx(float(step.z) - exact - float(step.error), abs=1e-14)
        assert bool(step.settled.all())
    assert observed_order(sizes)[-1] > solver.error_order + 0.6, sizes


@every_method
def test_polynomial_slopes_below_the_order_are_integrated_exactly(solver, steps):
    power = solver.order - 1
    term, z = Given(lambda s, z: (s**power)[:, None]), torch.zeros(2, 1, dtype=torch.float64)
    s0, s1 = times(0.3, 0.7), times(1.1, 0.2)
    memory = solver.propose(term, s0, s0, z, solver.init(term, z), None).memory
    step = solver.propose(term, s0, s1, z, memory, None)
    torch.testing.assert_close(step.z[:, 0], (s1 ** (power + 1) - s0 ** (power + 1)) / (power + 1), rtol=1e-12, atol=0)


@every_method
def test_a_step_of_no_length_goes_nowhere(solver, steps):
    term, z, s = Given(lambda s, z: torch.sin(z) + s[:, None]), draw(1, 2, 3), times(0.3, 0.8)
    memory = solver.init(term, z)
    for _ in range(3):
        step = solver.propose(term, s, s, z, memory, None)
        assert torch.equal(step.z, z)
        assert step.error is None or not bool(step.error.any())
        memory = step.memory


@every_method
def test_no_stage_is_evaluated_outside_of_the_step(solver, steps):
    for s0, s1 in ((times(0.1), times(0.9)), (times(0.9), times(0.1))):
        term, z = Given(lambda s, z: z), torch.ones(1, 1, dtype=torch.float64)
        solver.propose(term, s0, s1, z, solver.init(term, z), None)
        low, high = min(float(s0), float(s1)), max(float(s0), float(s1))
        assert all(low <= float(s) <= high for s in term.asked)

"""DPM-Solver++(2M): exact where its two exact pieces suffice, of order 2 elsewhere."""

from __future__ import annotations

import pytest
import torch
from helpers import SDES, Function, Given, draw, gaussian, mixture, observed_order, reference_flow, times, uneven_times
from scipy.integrate import quad

import sdekit
from sdekit.solver.exponential import Memory

every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


def pure(sde, data):
    """A flow whose data prediction is `data(t)`, whatever the state."""
    return sdekit.ProbabilityFlow(sdekit.ScoreModel(Function(data), sde, sdekit.data()))


@every_sde
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_constant_data_prediction_is_solved_exactly_in_any_number_of_steps(sde, order, steps):
    c, x = draw(1, 3), sde.prior_std * draw(2, 4, 3)
    flow = pure(sde, lambda x, label: c.expand_as(x))
    grid = sdekit.FixedGrid(sdekit.grid.karras(sde, steps))
    found = sdekit.integrate(flow, sdekit.DPMSolverPP(order), grid, x, sde.t_max, sde.t_min).x
    ratio = sde.sigma(sde.t_min) / sde.sigma(sde.t_max)
    exact = sde.alpha(sde.t_min) * c + ratio * (x - sde.alpha(sde.t_max) * c)
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)


@every_sde
@pytest.mark.parametrize("back", [0.1, 0.8])
def test_a_data_prediction_linear_in_half_log_snr_is_solved_exactly(sde, back):
    first, last = float(sde.half_log_snr(sde.t_max)), float(sde.half_log_snr(sde.t_min))
    lam0 = first + 0.4 * (last - first)
    lam1, older = lam0 + 0.9, lam0 - back
    t0, t1 = sde.time_at(times(lam0)), sde.time_at(times(lam1))
    a, b, x = draw(1, 1, 3), draw(2, 1, 3), draw(3, 1, 3)
    flow = pure(sde, lambda x, label: a + b * lam0)
    memory = Memory(torch.tensor([1]), a + b * older, times(older))
    found = sdekit.DPMSolverPP(2).propose(flow, t0, t1, x, memory, None).z
    # x_1 = (sigma_1/sigma_0) x_0 + alpha_1 int_0^h e^{-(h - r)} (a + b (lam0 + r)) dr by quadrature.
    h = lam1 - lam0
    zeroth = quad(lambda r: float(torch.exp(times(r - h))), 0.0, h, epsabs=1e-13)[0]
    oneth = quad(lambda r: float(torch.exp(times(r - h))) * (lam0 + r), 0.0, h, epsabs=1e-13)[0]
    exact = (sde.sigma(t1) / sde.sigma(t0)) * x + sde.alpha(t1) * (a * zeroth + b * oneth)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)


def test_the_second_coefficient_is_smooth_at_small_steps():
    # Its two formulas meet at h = 1e-3: neither may lose digits there.
    sde, x = SDES["karras"], torch.zeros(1, 1, dtype=torch.float64)
    lam0, values = 0.0, []
    for h in (9.99e-4, 1.001e-3):
        flow = pure(sde, lambda x, label: torch.ones_like(x))
        t0, t1 = sde.time_at(times(lam0)), sde.time_at(times(lam0 + h))
        memory = Memory(torch.tensor([1]), torch.zeros_like(x), times(lam0 - h))
        moved = sdekit.DPMSolverPP(2).propose(flow, t0, t1, x, memory, None).z
        plain = sdekit.DPMSolverPP(1).propose(flow, t0, t1, x, memory, None).z
        values.append(float(moved - plain) / h)
    assert values[0] == pytest.approx(0.5, rel=1e-3)
    assert values[1] / values[0] == pytest.approx(1.0, abs=2e-6)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["vp", "karras"])
def test_halving_the_steps_divides_the_error_by_two_to_the_order(order, name):
    sde, target = SDES[name], mixture(2, 4) if name == "vp" else gaussian(3)
    first, last = sde.time_at(times(-2.5, 2.0)).tolist()
    x = sde.perturb(draw(1, 1, target.dim), first, draw(2, 1, target.dim))
    exact, errors = reference_flow(target, sde, x, first, last), []
    for n in (60, 120):
        lam = uneven_times(-2.5, 2.0, n)
        grid = sde.time_at(lam)
        grid[0], grid[-1] = first, last
        term = sdekit.ProbabilityFlow(target.score_model(sde))
        found = sdekit.integrate(term, sdekit.DPMSolverPP(order), sdekit.FixedGrid(grid), x, first, last)
        assert found.stats.evaluations.tolist() == [n]
        errors.append(float((found.x - exact).abs().max()))
    assert observed_order(errors)[-1] == pytest.approx(order, abs=0.25), errors


@every_sde
def test_a_step_of_no_length_goes_nowhere(sde):
    flow = sdekit.ProbabilityFlow(gaussian(3).score_model(sde))
    solver, x, t = sdekit.DPMSolverPP(2), draw(1, 2, 3), sde.time_at(times(0.0, 0.5))
    memory = solver.init(flow, x)
    for _ in range(3):
        step = solver.propose(flow, t, t, x, memory, None)
        torch.testing.assert_close(step.z, x, rtol=1e-14, atol=1e-15)
        memory = step.memory
    assert torch.isfinite(solver.propose(flow, t, 0.9 * t, x, memory, None).z).all()


def test_what_it_cannot_integrate_is_refused():
    with pytest.raises(ValueError, match="order=3"):
        sdekit.DPMSolverPP(3)
    with pytest.raises(TypeError, match="ProbabilityFlow, not a Given"):
        sdekit.DPMSolverPP().init(Given(None), draw(1, 2, 3))

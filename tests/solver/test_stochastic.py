"""Euler-Maruyama: of weak order 1, by the moments of a Gaussian with no Monte Carlo at all."""

from __future__ import annotations

import pytest
import torch
from helpers import SDES, Given, draw, gaussian, observed_order, times, uneven_times

import sdekit
from sdekit import targets

NARROW, LIMITS = 0.3, {"vp": (0.8, 0.2), "sub-vp": (0.8, 0.3), "karras": (2.0, 0.2), "cosine": (0.8, 0.2)}


class Path:
    """A path whose every increment is `size` standard deviations."""

    refinable = False

    def __init__(self, size):
        self.size = size

    def increment(self, s0, s1, step, like):
        return torch.full_like(like, self.size) * (s1 - s0).abs().sqrt()[:, None]

    def take(self, rows):
        return self


def step_law(term, s0, s1):
    """(a, b, q) with x' = a x + b + q z for steps from s0 to s1 (n,), read off from the solver's own answers."""
    solver = sdekit.EulerMaruyama()

    def answer(x, size):
        state = torch.full((s0.shape[0], 1), x, dtype=torch.float64)
        return solver.propose(term, s0, s1, state, solver.init(term, state), Path(size)).z[:, 0]

    base = answer(0.0, 0.0)
    return torch.stack((answer(1.0, 0.0) - base, base, answer(0.0, 1.0) - base), 1).tolist()


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("name", LIMITS)
def test_mean_and_variance_converge_at_order_one_for_every_noise_level(name, eta):
    sde, (first, last) = SDES[name], LIMITS[name]
    target = targets.Gaussian(times(0.7), times(NARROW))
    term = sdekit.ReverseSDE(target.score_model(sde), eta)
    errors = []
    for n in (200, 400, 800):
        grid = term.coordinate(uneven_times(first, last, n))
        alpha, sigma = float(sde.alpha(first)), float(sde.sigma(first))
        mean, variance = 0.7 * alpha, alpha**2 * NARROW + sigma**2
        for a, b, q in step_law(term, grid[:-1], grid[1:]):
            mean, variance = a * mean + b, a * a * variance + q * q
        alpha, sigma = float(sde.alpha(last)), float(sde.sigma(last))
        errors.append((abs(mean - 0.7 * alpha), abs(variance - alpha**2 * NARROW - sigma**2)))
    for kind in range(2):
        found = [error[kind] for error in errors]
        if kind == 0 and name == "karras":  # the mean stays where it is, and the method keeps it there
            assert max(found) < 1e-12
            continue
        assert found[-1] < 0.05
        assert observed_order(found)[-1] == pytest.approx(1.0, abs=0.15), found


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
    term, solver = sdekit.ReverseSDE(gaussian(3).score_model(sde), 0.8), sdekit.EulerMaruyama()
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
    reverse = sdekit.integrate(sdekit.ReverseSDE(model, 0.0), sdekit.EulerMaruyama(), grid, x, 0.8, 0.2, path)
    plain = sdekit.integrate(sdekit.ProbabilityFlow(model), sdekit.Euler(), grid, x, 0.8, 0.2)
    torch.testing.assert_close(reverse.x, plain.x, rtol=1e-11, atol=1e-12)


def test_a_step_of_no_length_goes_nowhere():
    term, x, s = sdekit.ReverseSDE(gaussian(3).score_model(SDES["vp"])), draw(1, 2, 3), times(-0.5, -0.3)
    solver = sdekit.EulerMaruyama()
    step = solver.propose(term, s, s, x, solver.init(term, x), sdekit.IndependentIncrements(0, torch.arange(2)))
    assert torch.equal(step.z, x)


def test_what_it_needs_it_asks_for():
    x, solver = draw(1, 2, 3), sdekit.EulerMaruyama()
    with pytest.raises(TypeError, match="ReverseSDE, not a Given"):
        solver.init(Given(None), x)
    term = sdekit.ReverseSDE(gaussian(3).score_model(SDES["vp"]))
    with pytest.raises(ValueError, match="needs a Brownian path"):
        solver.propose(term, times(-0.5, -0.3), times(-0.4, -0.2), x, solver.init(term, x), None)
    with pytest.raises(ValueError, match="eta=-1"):
        sdekit.ReverseSDE(gaussian(3).score_model(SDES["vp"]), -1)


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

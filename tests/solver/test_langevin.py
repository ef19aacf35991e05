"""Correctors: what law their moves keep, exactly where one move is affine, and by exact balance where it is not."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import SDES, Function, Given, draw, gaussian, mixture, times, watched
from scipy.linalg import solve_discrete_lyapunov

import sdekit
from sdekit import targets
from sdekit.solver.langevin import MALA, AnnealedLangevin, BatchSNRLangevin, Langevin, SNRLangevin, Underdamped
from sdekit.solver.predictor_corrector import StepNoise

TIMES = {"vp": 0.4, "sub-vp": 0.4, "cosine": 0.5, "ve": 0.6, "karras": 0.8, "flow": 0.5}


class Draws:
    """A path whose draws in step 0 are given: a (B, D) tensor for each lane, and one uniform (B,) for all."""

    refinable = False

    def __init__(self, normals, uniform=None):
        self.normals = normals
        self.given = uniform

    def normal(self, step, like, lane=0):
        return self.normals[lane].to(like) if lane in self.normals else torch.zeros_like(like)

    def uniform(self, step, lane=0):
        return self.given


def affine(corrector, term, t, dim, lanes):
    """(a, b, q): one move takes the state y, x with what is remembered behind it, to a y + b + q (all its draws)."""
    size = dim * (2 if isinstance(corrector, Underdamped) else 1)
    count = 1 + size + dim * len(lanes)
    state = torch.zeros(count, size, dtype=torch.float64)
    state[1 : 1 + size] = torch.eye(size, dtype=torch.float64)
    normals = {}
    for k, lane in enumerate(lanes):
        first = 1 + size + k * dim
        normals[lane] = torch.zeros(count, dim, dtype=torch.float64)
        normals[lane][first : first + dim] = torch.eye(dim, dtype=torch.float64)
    s, ones = term.coordinate(torch.full((count,), t, dtype=torch.float64)), torch.ones(count, dtype=torch.int64)
    memory = state[:, dim:] if size > dim else None
    moved = corrector.move(term, s, state[:, :dim], memory, ones, Draws(normals))
    after = moved.z if memory is None else torch.cat((moved.z, moved.memory), 1)
    base = after[0]
    return (after[1 : 1 + size] - base).mT.numpy(), base.numpy(), (after[1 + size :] - base).mT.numpy()


def marginal(target, sde, t):
    """Mean and covariance of p_t."""
    parts, alpha, sigma = target._components, float(sde.alpha(t)), float(sde.sigma(t))
    basis, values = parts.basis[0], alpha**2 * parts.values[0] + sigma**2
    return (alpha * parts.means[0]).numpy(), ((basis * values) @ basis.mT).numpy()


@pytest.mark.parametrize("moves", [1, 3])
@pytest.mark.parametrize("name", TIMES)
def test_langevin_ends_at_the_variance_known_in_closed_form(name, moves):
    sde, t, target, delta = SDES[name], TIMES[name], gaussian(3), 0.4
    for term in (sdekit.ProbabilityFlow(target.score_model(sde)), sdekit.ReverseSDE(target.score_model(sde))):
        a, b, q = affine(Langevin(delta, moves), term, t, 3, range(4, 4 + moves))
        mean, covariance = marginal(target, sde, t)
        e = delta * float(sde.sigma(t)) ** 2
        inverse = np.linalg.inv(covariance)
        np.testing.assert_allclose(a, np.linalg.matrix_power(np.eye(3) - e * inverse, moves), atol=1e-9)
        np.testing.assert_allclose(a @ mean + b, mean, rtol=1e-9, atol=1e-9)
        expected = covariance @ np.linalg.inv(np.eye(3) - 0.5 * e * inverse)
        np.testing.assert_allclose(solve_discrete_lyapunov(a, q @ q.T), expected, rtol=1e-8, atol=1e-10)


def test_the_default_step_inflates_no_variance_by_more_than_one_percent():
    # Worst where the data have no variance at all: V = sigma^2.
    sde, t = SDES["vp"], 0.3
    for variance in (1e-9, 0.1, 4.0):
        term = sdekit.ProbabilityFlow(targets.Gaussian(times(0.0), times(variance)).score_model(sde))
        (a,), _, (q,) = affine(Langevin(), term, t, 1, [4])
        true = float(sde.alpha(t)) ** 2 * variance + float(sde.sigma(t)) ** 2
        inflation = float(q @ q) / (1.0 - float(a[0]) ** 2) / true - 1.0
        assert 0.0 < inflation < 0.01 + 0.0002
        if variance == 1e-9:
            assert inflation == pytest.approx(0.02 / 1.98, rel=1e-6)
            assert 1.0 - float(a[0]) ** 2 == pytest.approx(0.04, abs=0.001)


@pytest.mark.parametrize("step", [0.1, 0.7, 1.9])
@pytest.mark.parametrize("friction", [0.2, 2.0, 60.0])
def test_underdamped_moves_keep_the_law_of_x_exactly_on_gaussians(step, friction):
    for name, t in TIMES.items():
        sde, target = SDES[name], gaussian(3)
        term = sdekit.ProbabilityFlow(target.score_model(sde))
        mean, covariance = marginal(target, sde, t)
        for moves in (1, 3):
            a, b, q = affine(Underdamped(step, friction, moves), term, t, 3, range(4, 5 + moves))
            law = solve_discrete_lyapunov(a, q @ q.T)
            scale = np.abs(covariance).max()
            np.testing.assert_allclose(law[:3, :3] / scale, covariance / scale, atol=1e-9)
            # The momentum's own law shows why it is kept: under a finite step it is not a standard normal.
            h = step * float(sde.sigma(t))
            np.testing.assert_allclose(law[3:, 3:], np.eye(3) - 0.25 * h**2 * np.linalg.inv(covariance), atol=1e-8)
            np.testing.assert_allclose(law[:3, 3:] / math.sqrt(scale), np.zeros((3, 3)), atol=1e-8)
            fixed = np.concatenate((mean, np.zeros(3)))
            np.testing.assert_allclose(a @ fixed + b, fixed, atol=1e-8 * (1.0 + np.abs(mean).max()))


def test_underdamped_moves_under_strong_friction_are_langevin_moves_of_the_size_reported():
    sde, t, target, h = SDES["vp"], 0.4, gaussian(3), 0.05
    term = sdekit.ProbabilityFlow(target.score_model(sde))
    corrector, x = Underdamped(h, 1e3), draw(1, 1, 3)
    path = sdekit.IndependentIncrements(0, torch.arange(1))
    size = corrector.move(term, times(t), x, corrector.init(term, x), torch.tensor([0]), path).size
    a, _, _ = affine(corrector, term, t, 3, [4, 5])
    slow = np.sort(np.linalg.eigvals(a).real)[3:]  # the others forget the momentum
    expected = 1.0 - float(size) / np.sort(np.linalg.eigvalsh(marginal(target, sde, t)[1]))
    np.testing.assert_allclose((1.0 - slow) / (1.0 - expected), 1.0, atol=2e-3)


def test_underdamped_moves_begin_with_a_momentum_drawn_and_then_keep_it():
    term, x = sdekit.ProbabilityFlow(gaussian(3).score_model(SDES["vp"])), draw(1, 2, 3)
    corrector, s, path = Underdamped(), times(0.4, 0.5), sdekit.IndependentIncrements(0, torch.arange(2))
    zero, other = corrector.init(term, x), draw(2, 2, 3)
    first, later = torch.tensor([0, 0]), torch.tensor([0, 5])
    for memory in (zero, other):  # whatever was there
        drawn = corrector.move(term, s, x, path.normal(first, x, 4), first + 1, Draws({5: path.normal(first, x, 5)}))
        assert torch.equal(corrector.move(term, s, x, memory, first, path).z, drawn.z)
    ends = [corrector.move(term, s, x, memory, later, path).z for memory in (zero, other)]
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], ends[1][1])


def test_annealed_langevin_is_langevin_in_other_words():
    assert AnnealedLangevin(0.16, 3) == Langevin(2 * 0.16**2, 3)
    assert AnnealedLangevin().delta == pytest.approx(0.0512)


def isotropic(dim, sde, t, variance=1.0):
    """The Gaussian whose marginal at t is N(0, variance I)."""
    rest = (variance - float(sde.sigma(t)) ** 2) / float(sde.alpha(t)) ** 2
    return targets.Gaussian(torch.zeros(dim), torch.full((dim,), rest, dtype=torch.float64))


@pytest.mark.parametrize("rule", [SNRLangevin, BatchSNRLangevin])
def test_the_norm_rule_inflates_the_variance_by_the_square_of_its_ratio_in_high_dimension(rule):
    # A fixed point of P <- (1 - e/V)^2 P + 2e with e = 2 r^2 V^2 / P, as |score|^2 = D P / V^2: P = (1 + r^2) V.
    # 80,000 squares: their mean is off by 5 standard errors, 2.5%, once in 2e6; the norms add 4/D = 0.02%.
    sde, t, dim, ratio, variance = SDES["vp"], 0.5, 20_000, 0.5, 1.3
    term = sdekit.ProbabilityFlow(isotropic(dim, sde, t, variance).score_model(sde))
    path, s = sdekit.IndependentIncrements(3, torch.arange(4)), torch.full((4,), t, dtype=torch.float64)
    x = draw(5, 4, dim) * 0.7
    for step in range(30):
        x = rule(ratio).move(term, s, x, None, torch.full((4,), step), path).z
    assert float(x.square().mean()) / variance == pytest.approx(1.0 + ratio**2, rel=0.025)


def test_the_norm_rule_inflates_more_where_norms_vary():
    # From N(0, I): E|x'|^2 / D - 1 = 4 r^2 [(1 + r^2) (D + 2) / (D - 2) - 1], from E 1/|x|^2 = 1 / (D - 2). Seen within
    # 5.5 standard errors, 4e-8, in 20,000 samples of 12 dimensions.
    sde, t, dim, ratio, n = SDES["vp"], 0.5, 12, 0.4, 20_000
    term = sdekit.ProbabilityFlow(isotropic(dim, sde, t).score_model(sde))
    path, s = sdekit.IndependentIncrements(3, torch.arange(n)), torch.full((n,), t, dtype=torch.float64)
    x = draw(5, n, dim)
    grown = (SNRLangevin(ratio).move(term, s, x, None, torch.zeros(n, dtype=torch.int64), path).z.square() - x**2).mean(
        1
    )
    expected = 4 * ratio**2 * ((1 + ratio**2) * (dim + 2) / (dim - 2) - 1)
    assert abs(float(grown.mean()) - expected) < 5.5 * float(grown.std()) / n**0.5
    assert expected > 20 * float(grown.std()) / n**0.5


def test_the_norm_rules_take_the_norms_they_say():
    sde, target, t, x = SDES["ve"], gaussian(5), times(0.4, 0.5, 0.6), draw(1, 3, 5)
    term, none = sdekit.ReverseSDE(target.score_model(sde)), torch.zeros(3, dtype=torch.int64)
    path = sdekit.IndependentIncrements(0, torch.arange(3))
    score, noise = target.score(sde, x, t).norm(dim=1), path.normal(none, x, 4).norm(dim=1)
    alone = SNRLangevin(0.2).move(term, -t, x, None, none, path)
    torch.testing.assert_close(alone.size, 2.0 * (0.2 * noise / score) ** 2, rtol=1e-9, atol=0)
    together = BatchSNRLangevin(0.2).move(term, -t, x, None, none, path)
    torch.testing.assert_close(together.size, 2.0 * (0.2 * noise.mean() / score.mean()).square().expand(3))
    for moved in (alone, together):
        e = moved.size[:, None]
        expected = x + e * target.score(sde, x, t) + (2.0 * e).sqrt() * path.normal(none, x, 4)
        torch.testing.assert_close(moved.z, expected, rtol=1e-10, atol=1e-12)


def test_the_published_rule_couples_samples_and_a_batch_of_one_does_not_show_it():
    term, s, none = sdekit.ProbabilityFlow(gaussian(3).score_model(SDES["vp"])), times(0.4, 0.4), torch.tensor([0, 0])
    path, x, other = sdekit.IndependentIncrements(0, torch.arange(2)), draw(1, 2, 3), draw(2, 2, 3)
    other[0] = x[0]
    for rule, coupled in ((BatchSNRLangevin(), True), (SNRLangevin(), False)):
        assert rule.couples_samples is coupled
        first, second = (rule.move(term, s, state, None, none, path).z[0] for state in (x, other))
        assert torch.equal(first, second) is not coupled
    one = path.take(torch.tensor([1]))
    ends = [rule.move(term, s[:1], x[1:], None, none[:1], one).z for rule in (BatchSNRLangevin(), SNRLangevin())]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def test_a_sample_that_is_lost_does_not_take_the_batch_with_it():
    term, s, none = sdekit.ProbabilityFlow(gaussian(3).score_model(SDES["vp"])), times(0.4, 0.4), torch.tensor([0, 0])
    path, x = sdekit.IndependentIncrements(0, torch.arange(2)), draw(1, 2, 3)
    x[1, 0] = math.nan
    moved = BatchSNRLangevin().move(term, s, x, None, none, path)
    alone = BatchSNRLangevin().move(term, s[:1], x[:1], None, none[:1], path.take(torch.tensor([0])))
    torch.testing.assert_close(moved.z[:1], alone.z, rtol=1e-12, atol=0)
    assert not bool(torch.isfinite(moved.z[1]).all())


def test_where_the_score_vanishes_the_norm_rules_stay():
    sde, s, none = SDES["vp"], times(0.4), torch.tensor([0])
    term, x = sdekit.ProbabilityFlow(isotropic(3, sde, 0.4).score_model(sde)), torch.zeros(1, 3, dtype=torch.float64)
    path = sdekit.IndependentIncrements(0, torch.arange(1))
    for rule in (SNRLangevin(), BatchSNRLangevin()):
        assert torch.equal(rule.move(term, s, x, None, none, path).z, x)


@pytest.mark.parametrize("name", ["vp", "ve", "karras"])
@pytest.mark.parametrize("honest", [True, False])
def test_mala_is_in_detailed_balance_whatever_the_score(name, honest):
    # p(x) q(y|x) a(x, y) is symmetric. q is written down here; the chance a is read off by bisecting the uniform that
    # still accepts, for every pair of points of a grid.
    sde, t, delta = SDES[name], TIMES[name], 1.3
    target, guide = mixture(1, 3), mixture(1, 3 if honest else 8)
    term = sdekit.ProbabilityFlow(guide.score_model(sde))
    corrector = MALA(delta, partial(target.marginal_log_prob, sde))
    width = 2.0 * math.sqrt(float(sde.sigma(t)) ** 2 + 0.5 * float(sde.alpha(t)) ** 2)
    points = torch.linspace(-width, width, 13, dtype=torch.float64)
    x, y = (part.reshape(-1, 1) for part in torch.meshgrid(points, points, indexing="ij"))
    time, e = torch.full((x.shape[0],), t, dtype=torch.float64), delta * float(sde.sigma(t)) ** 2
    noise = (y - x - e * guide.score(sde, x, time)) / math.sqrt(2.0 * e)
    low, high = torch.full_like(time, -80.0), torch.zeros_like(time)
    for _ in range(48):
        middle = 0.5 * (low + high)
        moved = corrector.move(term, time, x, None, torch.zeros_like(time).long(), Draws({4: noise}, middle.exp()))
        took = moved.accepted == 1
        torch.testing.assert_close(moved.z, torch.where(took[:, None], y, x), rtol=1e-9, atol=1e-9)
        low, high = torch.where(took, middle, low), torch.where(took, high, middle)
    flux = (target.marginal_log_prob(sde, x, time) - 0.5 * noise[:, 0].square() + low).reshape(13, 13)
    assert float(low.min()) > -79.0
    assert float(low.min()) < -0.3  # there is something to refuse
    torch.testing.assert_close(flux, flux.mT, rtol=0, atol=1e-7)


def waves(x):
    """(B, 8) bounded functions of x (B, 2)."""
    phases = torch.stack((x[:, 0], x[:, 1], x[:, 0] + x[:, 1], 3.0 * x[:, 0] - x[:, 1]), 1)
    return torch.cat((phases.cos(), phases.sin()), 1)


def drift_of(corrector, guide, seed):
    """(8,) standardized means of f(moved) - f(x), x drawn from p_t of a mixture; and the shares accepted."""
    sde, t, n, target = SDES["vp"], 0.25, 20_000, mixture(2, 4)
    x = sde.perturb(target.sample(n), t, draw(seed, n, 2))
    path = sdekit.IndependentIncrements(seed, torch.arange(n))
    term, s = sdekit.ProbabilityFlow(guide.score_model(sde)), torch.full((n,), t, dtype=torch.float64)
    moved = corrector.move(term, s, x, corrector.init(term, x), torch.zeros(n, dtype=torch.int64), path)
    change = waves(moved.z) - waves(x)
    return change.mean(0) / change.std(0) * n**0.5, moved.accepted


def test_mala_keeps_the_law_of_a_mixture_even_with_the_wrong_score():
    # Eight means within 5.5 standard errors of 0: a false alarm in 3e-7. Without acceptance the same moves are seen.
    sde, target, wrong = SDES["vp"], mixture(2, 4), gaussian(2)
    density = partial(target.marginal_log_prob, sde)
    for guide in (target, wrong):
        found, accepted = drift_of(MALA(0.8, density, 5), guide, 7)
        assert float(found.abs().max()) < 5.5
        assert 0.2 < float(accepted.mean()) < 0.95
    assert float(drift_of(Langevin(0.8, 5), wrong, 7)[0].abs().max()) > 10.0
    assert float(drift_of(Langevin(0.8, 5), target, 7)[0].abs().max()) > 10.0


def test_mala_moves_the_accepted_and_leaves_the_others():
    sde, target, x, t = SDES["vp"], gaussian(3), draw(1, 3, 3), times(0.4, 0.5, 0.6)
    term, path = sdekit.ProbabilityFlow(target.score_model(sde)), sdekit.IndependentIncrements(0, torch.arange(3))
    none = torch.zeros(3, dtype=torch.int64)

    def density(y, t):  # sample 1 is offered nothing but losses, sample 2 nonsense
        return torch.where((y == x).all(1), 0.0, times(0.0, -math.inf, math.nan))

    moved = MALA(1e-4, density, 2).move(term, t, x, None, none, path)
    assert moved.accepted.tolist() == [1.0, 0.0, 0.0]
    assert torch.equal(moved.z[1:], x[1:])
    plain = Langevin(1e-4, 2).move(
        term, t, x, None, none, Draws({4: path.normal(none, x, 4), 5: path.normal(none, x, 6)})
    )
    torch.testing.assert_close(moved.z[0], plain.z[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moved.size, 1e-4 * sde.sigma(t) ** 2, rtol=1e-12, atol=0)


class Ledger:
    """A path that notes every draw it is asked for."""

    def __init__(self):
        self.asked = []

    def normal(self, step, like, lane=0):
        self.asked += [(int(number), lane) for number in step]
        return torch.zeros_like(like)

    def uniform(self, step, lane=0):
        self.asked += [(int(number), lane) for number in step]
        return torch.ones_like(step, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 12, 13, 24, 25, 40])
def test_no_two_draws_of_a_sample_meet_nor_any_of_the_predictors(count):
    path, like = Ledger(), torch.zeros(1, 2)
    for step in range(9):
        noise = StepNoise(path, torch.tensor([step]), count)
        for k in range(count):
            noise.normal(k, like) if k % 2 else noise.uniform(k)
    assert len(set(path.asked)) == len(path.asked) == 9 * count
    assert {lane for _, lane in path.asked} <= set(range(4, 16))


def all_correctors(sde, target, moves):
    density = partial(target.marginal_log_prob, sde)
    rules = [Langevin(0.1, moves), SNRLangevin(0.2, moves), BatchSNRLangevin(0.2, moves), Underdamped(0.5, 1.0, moves)]
    return [*rules, MALA(0.3, density, moves)]


@pytest.mark.parametrize("moves", [1, 3, 15])
def test_evaluations_are_those_made_and_draws_those_planned(moves):
    sde, target = SDES["vp"], gaussian(3)
    for corrector in all_correctors(sde, target, moves):
        model, watch = watched(target.score_model(sde))
        term, path, x = sdekit.ProbabilityFlow(model), Ledger(), draw(1, 1, 3)
        memory = corrector.init(term, x)
        assert watch.calls == 0
        for step in range(3):
            corrector.move(term, times(0.4), x, memory, torch.tensor([step]), path)
        assert watch.calls == 3 * corrector.evaluations
        assert len(set(path.asked)) == len(path.asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (0, 2, 4, 4), (0, 5), (2, 5)])
def test_shape_and_dtype_are_kept(shape, dtype):
    sde, n = SDES["vp"], shape[0]
    target = targets.Gaussian(torch.zeros(shape[1:]), torch.ones(shape[1:]))
    term, x = sdekit.ReverseSDE(target.score_model(sde)), draw(1, *shape).to(dtype)
    path, s = sdekit.IndependentIncrements(0, torch.arange(n)), torch.full((n,), -0.4, dtype=torch.float64)
    for corrector in all_correctors(sde, target, 2):
        moved = corrector.move(term, s, x, corrector.init(term, x), torch.zeros(n, dtype=torch.int64), path)
        assert moved.z.shape == x.shape
        assert moved.z.dtype == dtype
        assert moved.memory is None or (moved.memory.dtype == dtype and moved.memory.shape == x.shape)
        for number in (moved.accepted, moved.size):
            assert number.shape == (n,)
            assert number.dtype == torch.float64
        flat = x.flatten(1)
        if n:  # an image is a long vector
            model = targets.Gaussian(torch.zeros(flat.shape[1]), torch.ones(flat.shape[1])).score_model(sde)
            long = corrector.move(
                *(sdekit.ReverseSDE(model), s, flat, corrector.init(term, flat)),
                *(torch.zeros(n, dtype=torch.int64), path),
            )
            torch.testing.assert_close(moved.z.flatten(1), long.z)


def test_half_the_digits_give_the_same_moves():
    sde, target, x = SDES["vp"], gaussian(6), draw(1, 5, 6)
    term, path = sdekit.ProbabilityFlow(target.score_model(sde)), sdekit.IndependentIncrements(0, torch.arange(5))
    s, none = torch.full((5,), 0.3, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    for corrector in all_correctors(sde, target, 2):
        full, half = (
            corrector.move(term, s, state, corrector.init(term, state), none, path).z for state in (x, x.float())
        )
        torch.testing.assert_close(half.double(), full, rtol=1e-5, atol=1e-5)


def test_every_sample_moves_as_if_it_were_alone():
    sde, n = SDES["vp"], 7
    net = Function(lambda x, label: torch.tanh(x) + 0.3 * label[:, None] * x)
    term, x = sdekit.ProbabilityFlow(sdekit.ScoreModel(net, sde)), draw(1, n, 4)
    s, step = torch.linspace(0.2, 0.8, n, dtype=torch.float64), torch.arange(n)
    path = sdekit.IndependentIncrements(3, torch.arange(n) + 5)

    def density(y, t):
        return -0.5 * y.square().sum(1)

    for corrector in (Langevin(moves=2), SNRLangevin(moves=2), Underdamped(moves=2), MALA(0.5, density, 2)):
        memory = corrector.init(term, x)
        together = corrector.move(term, s, x, memory, step, path)
        for row in range(n):
            one = torch.tensor([row])
            kept = None if memory is None else memory[one]
            alone = corrector.move(term, s[one], x[one], kept, step[one], path.take(one))
            assert torch.equal(alone.z[0], together.z[row])
            assert torch.equal(alone.size[0], together.size[row])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Langevin(0.0), r"delta=0.0; a finite number above 0"),
        (lambda: Langevin(2.0), r"delta=2.0; a number below 2"),
        (lambda: Langevin(moves=0), r"moves=0; at least 1"),
        (lambda: AnnealedLangevin(1.0), r"snr=1.0; a number below 1"),
        (lambda: AnnealedLangevin(-0.1), r"snr=-0.1"),
        (lambda: SNRLangevin(1.2), r"snr=1.2"),
        (lambda: BatchSNRLangevin(math.nan), r"snr=nan"),
        (lambda: Underdamped(2.5), r"step=2.5; a number below 2"),
        (lambda: Underdamped(friction=-1.0), r"friction=-1.0"),
        (lambda: MALA(0.0, len), r"delta=0.0"),
        (lambda: MALA(0.1, len, 0), r"moves=0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_is_refused():
    sde, target, x = SDES["vp"], gaussian(2), draw(1, 2, 2)
    term = sdekit.ProbabilityFlow(target.score_model(sde))
    with pytest.raises(TypeError, match=r"log_prob=None; a function of \(x, t\)"):
        MALA(0.1, None)
    with pytest.raises(TypeError, match="delta='small'"):
        Langevin("small")
    with pytest.raises(ValueError, match=r"x.shape=\(2, 2\); SNRLangevin needs 3 dimensions or more"):
        SNRLangevin().init(term, x)
    assert BatchSNRLangevin().init(term, x) is None
    for corrector in all_correctors(sde, target, 1):
        with pytest.raises(TypeError, match=f"{type(corrector).__name__} moves x, and a Given"):
            corrector.init(Given(None), x)
    path = sdekit.IndependentIncrements(0, torch.arange(2))
    for answer, found in ((lambda x, t: x, r"\(2, 2\)"), (lambda x, t: 0.0, "float")):
        with pytest.raises(ValueError, match=f"log_prob returned {found}; a tensor of shape"):
            MALA(0.1, answer).move(term, times(0.4, 0.4), x, None, torch.tensor([0, 0]), path)

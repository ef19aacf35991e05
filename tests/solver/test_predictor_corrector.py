"""Predictor-corrector: the law at the end by exact propagation of every draw, and the bookkeeping around it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from helpers import SDES, Function, draw, gaussian, mixture, observed_order, times, uneven_times, watched

import sdekit
from sdekit import targets
from sdekit.solver.langevin import MALA, BatchSNRLangevin, Langevin, SNRLangevin, Underdamped
from sdekit.solver.predictor_corrector import Corrector, Moved, PredictorCorrector

MEAN, VARIANCE = 0.7, 0.3
TARGET = targets.Gaussian(times(MEAN), times(VARIANCE))


class Sources:
    """A path with one draw switched on a sample: row i + 2 has the i-th of `listed`, and rows 0 and 1 have none.

    It notes what it is asked for; all samples are at the same step.
    """

    refinable = False

    def __init__(self, listed=()):
        self.rows = {draw: row + 2 for row, draw in enumerate(listed)}
        self.asked = []

    def __len__(self):
        return 2 + len(self.rows)

    def _draw(self, kind, step, like, lane):
        draw = (kind, int(step[0]), lane)
        self.asked.append(draw)
        drawn = torch.zeros_like(like)
        if draw in self.rows:
            drawn[self.rows[draw]] = 1.0
        return drawn

    def increment(self, s0, s1, step, like, lane=0):
        return self._draw("increment", step, like, lane) * (s1 - s0).abs().sqrt()[:, None]

    def normal(self, step, like, lane=0):
        return self._draw("normal", step, like, lane)


def law_at_the_end(term, solver, grid, mean, variance):
    """Mean and variance at the end of a solve on a 1-D Gaussian, exactly.

    Everything is affine in the start and in each draw: solving once for each of them alone gives all coefficients.
    """

    def ends(path, start):
        return sdekit.integrate(term, solver, sdekit.FixedGrid(grid), start, grid[0], grid[-1], path).x[:, 0]

    ask = Sources()
    ends(ask, torch.zeros(2, 1, dtype=torch.float64))
    if solver.ready(solver.init(term, torch.zeros(2, 1))) is None:
        assert len(set(ask.asked)) == len(ask.asked), "a draw was used twice"
    path = Sources(dict.fromkeys(ask.asked))
    start = torch.zeros(len(path), 1, dtype=torch.float64)
    start[1] = 1.0
    found = ends(path, start)
    moved = found[1:] - found[0]
    return float(found[0] + moved[0] * mean), float(moved[0] ** 2 * variance + moved[1:].square().sum())


def law_of(sde, t):
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return MEAN * alpha, alpha**2 * VARIANCE + sigma**2


FLOWS = {
    "dpm++": sdekit.DPMSolverPP(),
    "heun": sdekit.Heun(),
    "adams": sdekit.Adams(4),
    "bogacki-shampine": sdekit.BogackiShampine(),
}
PREDICTORS = {"euler-maruyama": sdekit.EulerMaruyama(), **FLOWS}


def term_for(name, sde, target=TARGET):
    return (sdekit.ProbabilityFlow if name in FLOWS else sdekit.ReverseSDE)(target.score_model(sde))


@pytest.mark.parametrize("name", PREDICTORS)
def test_with_steps_the_law_tends_to_the_correctors_own(name):
    # A step moves the law by O(h) and a corrector draws it in by a factor that does not depend on h: what is left is
    # O(h), whatever the predictor remembers, and from a start that is wrong. Langevin's own law is V / (1 - e / 2V),
    # that of underdamped moves V.
    sde, first, last = SDES["vp"], 0.8, 0.3
    mean, variance = law_of(sde, last)
    e = 0.3 * float(sde.sigma(last)) ** 2
    for corrector, limit in ((Langevin(0.3), variance / (1 - e / (2 * variance))), (Underdamped(0.8), variance)):
        solver, errors = PredictorCorrector(PREDICTORS[name], corrector), []
        for n in (48, 96):
            found = law_at_the_end(term_for(name, sde), solver, uneven_times(first, last, n), 0.0, 1.5)
            assert found[0] == pytest.approx(mean, abs=5e-4)
            errors.append(abs(found[1] - limit))
        assert errors[1] < min(0.006, errors[0])
        if name in ("heun", "adams", "bogacki-shampine"):
            assert observed_order(errors)[0] == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("name", ["euler-maruyama", "dpm++"])
def test_with_short_moves_the_law_tends_to_the_predictors_own(name):
    sde, grid = SDES["karras"], uneven_times(1.5, 0.3, 12)
    term, start = term_for(name, sde), law_of(sde, 1.5)
    alone = law_at_the_end(term, PREDICTORS[name], grid, *start)
    apart = []
    for delta in (2e-3, 1e-3):
        found = law_at_the_end(term, PredictorCorrector(PREDICTORS[name], Langevin(delta)), grid, *start)
        apart.append(abs(found[1] - alone[1]))
    assert 0.0 < apart[1] < 0.01
    assert observed_order(apart)[0] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("predictor", [sdekit.EulerMaruyama(), sdekit.Heun(), sdekit.DPMSolverPP(1)])
def test_a_corrector_mends_what_a_coarse_predictor_leaves(predictor):
    sde, grid = SDES["vp"], uneven_times(0.8, 0.3, 6)
    term = term_for("euler-maruyama" if predictor == sdekit.EulerMaruyama() else "dpm++", sde)
    start, (_, variance) = law_of(sde, 0.8), law_of(sde, 0.3)
    alone = law_at_the_end(term, predictor, grid, *start)[1]
    mended = law_at_the_end(term, PredictorCorrector(predictor, Underdamped(0.5, 2.0, 5)), grid, *start)[1]
    assert abs(mended - variance) < 0.15 * abs(alone - variance)


class Same:
    """A path that draws the same at every step: what a lane holds."""

    refinable = False

    def __init__(self, *lanes):
        self.lanes = lanes

    def __len__(self):
        return self.lanes[0].shape[0]

    def increment(self, s0, s1, step, like, lane=0):
        return self.lanes[lane] * (s1 - s0).abs().sqrt()[:, None]

    def normal(self, step, like, lane=0):
        return self.lanes[lane % len(self.lanes)]


@pytest.mark.parametrize("name", ["euler-maruyama", "heun"])
def test_corrector_first_is_the_same_chain_begun_one_move_earlier(name):
    sde, grid, x = SDES["vp"], uneven_times(0.8, 0.3, 7), draw(1, 3, 3)
    term, path = term_for(name, sde, gaussian(3)), Same(*draw(2, 5, 3, 3))
    corrector, none = Langevin(0.1, 2), torch.zeros(3, dtype=torch.int64)
    ends = {}
    for first in (True, False):
        solver, start = PredictorCorrector(PREDICTORS[name], corrector, first), x
        s0, s1 = (term.coordinate(t.expand(3)) for t in (grid[0], grid[-1]))
        if not first:
            start = corrector.move(term, s0, x, None, none, path).z
        end = sdekit.integrate(term, solver, sdekit.FixedGrid(grid), start, grid[0], grid[-1], path).x
        ends[first] = corrector.move(term, s1, end, None, none, path).z if first else end
    torch.testing.assert_close(ends[True], ends[False], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["heun", "euler-maruyama"])
def test_a_mixture_is_reached_in_many_steps(name):
    # E cos(w x) and E sin(w x), w = 1, 2, 4, against closed forms: 12 numbers of 4,000 samples, each within 5.5
    # standard errors. Of these the bias takes 0.7 at most (measured with 100,000): a false alarm in 2e-5.
    sde, target, n, first, last = SDES["vp"], mixture(1, 3), 4_000, 0.8, 0.15
    x = sde.perturb(target.sample(n), first, draw(5, n, 1))
    density = partial(target.marginal_log_prob, sde)
    parts, alpha, sigma = target._components, float(sde.alpha(last)), float(sde.sigma(last))
    for corrector in (MALA(0.5, density, 2), Underdamped(0.5)):
        solver = PredictorCorrector(PREDICTORS[name], corrector)
        path, grid = sdekit.IndependentIncrements(2, torch.arange(n)), uneven_times(first, last, 60)
        solution = sdekit.integrate(term_for(name, sde, target), solver, sdekit.FixedGrid(grid), x, first, last, path)
        for w in (1.0, 2.0, 4.0):
            phase = torch.polar(torch.exp(-0.5 * w**2 * (alpha**2 * parts.values + sigma**2)), w * alpha * parts.means)
            expected = target.weights.to(phase) @ phase[:, 0]
            for found, true in ((torch.cos(w * solution.x), expected.real), (torch.sin(w * solution.x), expected.imag)):
                assert abs(float(found.mean() - true)) < 5.5 * float(found.std()) / n**0.5
        assert 0.5 < float(solution.report["acceptance"].mean()) <= 1.0


@dataclass(frozen=True)
class Scripted(Corrector):
    """Adds 1, accepts half of its moves in sample 0 and all in others, and steps by its count of steps."""

    seen: list
    moves: int = 2

    @property
    def evaluations(self):
        return 3

    def _memory(self, z):
        return torch.zeros(z.shape[0])

    def move(self, term, s, z, memory, step, path):
        self.seen.append((s.clone(), step.clone(), z.clone()))
        share = torch.ones_like(s)
        share[:1] = 0.5
        return Moved(z + 1.0, memory + 1.0, share, step.double() + 1.0)


@pytest.mark.parametrize("name", ["euler-maruyama", "dpm++"])
def test_each_step_is_corrected_once_where_it_should_be(name):
    sde, grid, x = SDES["vp"], uneven_times(0.8, 0.3, 3), draw(1, 2, 3)
    term, path = term_for(name, sde, gaussian(3)), sdekit.IndependentIncrements(0, torch.arange(2))
    for first in (False, True):
        corrector = Scripted([])
        solver = PredictorCorrector(PREDICTORS[name], corrector, first)
        solution = sdekit.integrate(term, solver, sdekit.FixedGrid(grid), x, grid[0], grid[-1], path)
        at, steps, states = zip(*corrector.seen, strict=True)
        torch.testing.assert_close(
            torch.stack(at), term.coordinate(grid[:-1] if first else grid[1:])[:, None].expand(3, 2)
        )
        assert torch.equal(torch.stack(steps), torch.arange(3)[:, None].expand(3, 2))
        assert torch.equal(solution.report["acceptance"], times(0.5, 1.0))
        assert torch.equal(solution.report["corrector_step"], times(2.0, 2.0))
        assert solution.stats.evaluations.tolist() == [12, 12]
        assert torch.equal(states[0], x) is first
        assert torch.equal(solution.x, states[-1] + 1.0) is not first


@pytest.mark.parametrize("name", ["adams", "bogacki-shampine"])
def test_an_advance_that_fills_the_memory_is_not_corrected(name):
    sde, x, s0, s1 = SDES["vp"], draw(1, 2, 3), times(0.8, 0.7), times(0.7, 0.6)
    term, path = term_for(name, sde, gaussian(3)), sdekit.IndependentIncrements(0, torch.arange(2))
    for first in (False, True):
        solver = PredictorCorrector(PREDICTORS[name], Underdamped(), first)
        memory = solver.init(term, x)
        assert not bool(solver.ready(memory).any())
        filled = solver.propose(term, s0, s1, x, memory, path)
        assert torch.equal(filled.z, x)
        assert filled.memory.steps.tolist() == [0, 0]
        assert torch.equal(filled.memory.corrector, memory.corrector)
        assert bool(solver.ready(filled.memory).all())
        moved = solver.propose(term, s0, s1, x, filled.memory, path)
        assert moved.memory.steps.tolist() == [1, 1]
        assert not bool((moved.z == x).any())
        solution = sdekit.integrate(term, solver, sdekit.FixedGrid(times(0.8, 0.7, 0.6)), x, 0.8, 0.6, path)
        assert solution.stats.accepted.tolist() == [2, 2]
        assert solution.stats.evaluations.tolist() == [3 * solver.evaluations] * 2


@pytest.mark.parametrize("name", PREDICTORS)
def test_evaluations_are_those_made(name):
    sde, target, x = SDES["vp"], gaussian(3), draw(1, 2, 3)
    density = partial(target.marginal_log_prob, sde)
    for corrector in (Langevin(moves=2), SNRLangevin(), BatchSNRLangevin(), Underdamped(), MALA(0.1, density, 3)):
        model, watch = watched(target.score_model(sde))
        term = (sdekit.ProbabilityFlow if name in FLOWS else sdekit.ReverseSDE)(model)
        solver = PredictorCorrector(PREDICTORS[name], corrector)
        assert solver.evaluations == PREDICTORS[name].evaluations + corrector.evaluations
        path = sdekit.IndependentIncrements(0, torch.arange(2))
        grid = sdekit.FixedGrid(times(0.8, 0.7, 0.6))
        stats = sdekit.integrate(term, solver, grid, x, 0.8, 0.6, path).stats
        assert watch.calls == stats.calls == int(stats.evaluations[0])
        assert solver.couples_samples is isinstance(corrector, BatchSNRLangevin)


def density_of_none(x, t):
    return -0.5 * x.square().sum(1)


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sample_is_solved_as_if_it_were_alone(name, dtype):
    # To the bit: the network works number by number.
    net = Function(lambda x, label: torch.tanh(x) + 0.3 * label[:, None] * x)
    model, n = sdekit.ScoreModel(net, SDES["vp"]), 5
    term = (sdekit.ProbabilityFlow if name in FLOWS else sdekit.ReverseSDE)(model)
    x, numbers, grid = draw(1, n, 4).to(dtype), torch.arange(n) + 3, sdekit.FixedGrid(uneven_times(0.8, 0.3, 4))
    solve = partial(sdekit.integrate, term)
    for corrector in (Langevin(moves=2), SNRLangevin(), Underdamped(), MALA(0.5, density_of_none)):
        for first in (False, True):
            solver = PredictorCorrector(PREDICTORS[name], corrector, first)
            together = solve(solver, grid, x, 0.8, 0.3, sdekit.IndependentIncrements(9, numbers))
            for row in (0, 3):
                path = sdekit.IndependentIncrements(9, numbers[row : row + 1])
                alone = solve(solver, grid, x[row : row + 1], 0.8, 0.3, path)
                assert torch.equal(alone.x[0], together.x[row])
                assert alone.report["acceptance"][0] == together.report["acceptance"][row]


@pytest.mark.parametrize("name", PREDICTORS)
def test_samples_that_fail_leave_the_others_as_they_are(name):
    term, grid = term_for(name, SDES["vp"], gaussian(3)), sdekit.FixedGrid(uneven_times(0.8, 0.3, 6))
    solver, path = (
        PredictorCorrector(PREDICTORS[name], Underdamped()),
        sdekit.IndependentIncrements(0, torch.arange(10)),
    )
    x = draw(1, 10, 3)
    whole = sdekit.integrate(term, solver, grid, x, 0.8, 0.3, path)
    x[:4] = torch.inf
    rest = sdekit.integrate(term, solver, grid, x, 0.8, 0.3, path, throw=False)
    assert rest.status.tolist() == [int(sdekit.Status.NOT_FINITE)] * 4 + [int(sdekit.Status.DONE)] * 6
    torch.testing.assert_close(rest.x[4:], whole.x[4:], rtol=1e-12, atol=1e-12)


def test_the_published_rule_alone_makes_samples_depend_on_one_another():
    term, grid = term_for("euler-maruyama", SDES["vp"], gaussian(3)), sdekit.FixedGrid(uneven_times(0.8, 0.3, 4))
    x, other = draw(1, 2, 3), draw(2, 2, 3)
    other[0] = x[0]
    for corrector, coupled in ((BatchSNRLangevin(), True), (SNRLangevin(), False)):
        solver, path = (
            PredictorCorrector(sdekit.EulerMaruyama(), corrector),
            sdekit.IndependentIncrements(0, torch.arange(2)),
        )
        first, second = (sdekit.integrate(term, solver, grid, start, 0.8, 0.3, path).x[0] for start in (x, other))
        assert torch.equal(first, second) is not coupled


def test_the_report_holds_mean_steps_and_acceptance():
    sde, grid, x = SDES["vp"], uneven_times(0.8, 0.3, 5), draw(1, 3, 3)
    term, path = term_for("heun", sde, gaussian(3)), sdekit.IndependentIncrements(0, torch.arange(3))
    for first, nodes in ((False, grid[1:]), (True, grid[:-1])):
        solver = PredictorCorrector(sdekit.Heun(), Langevin(0.05, 3), first)
        report = sdekit.integrate(term, solver, sdekit.FixedGrid(grid), x, grid[0], grid[-1], path).report
        expected = (0.05 * sde.sigma(nodes) ** 2).mean().expand(3)
        torch.testing.assert_close(report["corrector_step"], expected, rtol=1e-12, atol=0)
        assert report["acceptance"].tolist() == [1.0] * 3
    never = MALA(0.05, lambda y, t: torch.where((y == y.round()).all(1), 0.0, -torch.inf).double())
    solver = PredictorCorrector(sdekit.Heun(), never, True)
    still = sdekit.integrate(term, solver, sdekit.FixedGrid(grid[:2]), x.round(), grid[0], grid[1], path)
    assert still.report["acceptance"].tolist() == [0.0] * 3
    nowhere = sdekit.integrate(
        term, solver, sdekit.FixedGrid(grid), x, grid[0], grid[-1], path, max_evaluations=1, throw=False
    )
    assert all(bool(torch.isnan(value).all()) for value in nowhere.report.values())


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (0, 2, 3, 3), (1, 5)])
def test_shape_and_dtype_are_kept(name, shape):
    target = targets.Gaussian(torch.zeros(shape[1:]), torch.ones(shape[1:]))
    term, path = term_for(name, SDES["vp"], target), sdekit.IndependentIncrements(0, torch.arange(shape[0]))
    density = partial(target.marginal_log_prob, SDES["vp"])
    for corrector in (Langevin(), SNRLangevin(), BatchSNRLangevin(), Underdamped(), MALA(0.1, density)):
        solver, x = PredictorCorrector(PREDICTORS[name], corrector), draw(1, *shape).float()
        solution = sdekit.integrate(term, solver, sdekit.FixedGrid(times(0.8, 0.7, 0.6)), x, 0.8, 0.6, path)
        assert solution.x.shape == shape
        assert solution.x.dtype == torch.float32
        assert bool(torch.isfinite(solution.x).all())
        assert {value.shape for value in solution.report.values()} == {(shape[0],)}


def test_a_step_of_no_length_is_corrected_all_the_same():
    x, s = draw(1, 2, 3), times(0.5, 0.3)
    path = sdekit.IndependentIncrements(0, torch.arange(2))
    for name in ("dpm++", "heun"):
        term = term_for(name, SDES["vp"], gaussian(3))
        solver = PredictorCorrector(PREDICTORS[name], Langevin())
        step = solver.propose(term, s, s, x, solver.init(term, x), path)
        moved = Langevin().move(term, s, x, None, torch.zeros(2, dtype=torch.int64), path)
        torch.testing.assert_close(step.z, moved.z, rtol=1e-12, atol=1e-14)


def test_what_does_not_fit_is_refused():
    sde, target, x, s0, s1 = SDES["vp"], gaussian(3), draw(1, 2, 3), times(0.8, 0.7), times(0.7, 0.6)
    plain = PredictorCorrector(sdekit.Heun(), Langevin())
    with pytest.raises(TypeError, match="predictor=3; a Solver is needed"):
        PredictorCorrector(3, Langevin())
    with pytest.raises(TypeError, match="corrector='Langevin'; a Corrector is needed"):
        PredictorCorrector(sdekit.Heun(), "Langevin")
    with pytest.raises(TypeError, match="corrector_first=1"):
        PredictorCorrector(sdekit.Heun(), Langevin(), 1)
    with pytest.raises(TypeError, match="both correctors would draw the same noise"):
        PredictorCorrector(plain, Langevin())
    flow, reverse = sdekit.ProbabilityFlow(target.score_model(sde)), sdekit.ReverseSDE(target.score_model(sde))
    with pytest.raises(ValueError, match="path=None; the corrector draws noise"):
        plain.propose(flow, s0, s1, x, plain.init(flow, x), None)
    with pytest.raises(TypeError, match="RungeKutta integrates equations without noise"):
        plain.init(reverse, x)
    with pytest.raises(TypeError, match="EulerMaruyama integrates a ReverseSDE"):
        PredictorCorrector(sdekit.EulerMaruyama(), Langevin()).init(flow, x)
    keys = sdekit.Hutchinson.keys(0, torch.arange(2))
    with pytest.raises(TypeError, match="Langevin moves x, and a LikelihoodFlow has other coordinates"):
        plain.init(sdekit.LikelihoodFlow(target.score_model(sde), None, x.shape[1:], keys), x)
    path = sdekit.IndependentIncrements(0, torch.arange(2))
    with pytest.raises(ValueError, match="has no error estimate, so PID cannot control it"):
        sdekit.integrate(flow, plain, sdekit.PID(), x, 0.8, 0.6, path)
    assert plain.order == 2
    assert plain.error_order is None
    assert not plain.weighs_nodes

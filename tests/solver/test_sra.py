"""Solutions on one path: strong orders, and the order conditions of the SRA tableaus in rationals."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction as Q

import pytest
import torch
from helpers import SDES, draw, mixture, observed_order, reference_flow, uneven_times

import sdekit
from sdekit.solver.sra import SRA, SRA1, SRA2, SRA3, SRA_1, SRA_2, SRA_3
from sdekit.solver.stochastic import Ancestral, EulerMaruyama, ReverseDiffusion, StochasticHeun

FINEST, BATCH = 512, 64
TABLES = {"sra1": SRA_1, "sra2": SRA_2, "sra3": SRA_3}
FIRST_ORDER = {
    "euler-maruyama": EulerMaruyama(),
    "ancestral-small": Ancestral("small"),
    "ancestral-large": Ancestral("large"),
    "reverse-diffusion": ReverseDiffusion(),
    "heun": StochasticHeun(),
}
PROBLEMS = {"vp": ("vp", 1.0), "vp-varying": ("vp", lambda t: 0.5 + t), "karras": ("karras", 1.0)}


def mirrored(table):
    """The tableau with beta2 of the other sign, as torchsde 0.2 has it for SRA2 and SRA3."""
    return dataclasses.replace(table, beta2=tuple(-weight for weight in table.beta2))


class Drawn:
    """A path drawn once on fine nodes, with its area: asked for longer steps between nodes, it adds up exactly.

    W adds, and the integral of W - W(s0) over [s0, s2] is that over [s0, s1], plus that of W - W(s1) over [s1, s2],
    plus (s2 - s1) (W(s1) - W(s0)); so both follow from their running sums.
    """

    refinable = False

    def __init__(self, nodes, count, dim, seed):
        h = nodes.diff()[:, None, None]
        w = h.sqrt() * draw(seed, len(nodes) - 1, count, dim)
        area = h * (0.5 * w + (h / 12.0).sqrt() * draw(seed + 1, len(nodes) - 1, count, dim))
        none = torch.zeros(1, count, dim, dtype=torch.float64)
        self.nodes, self.w = nodes, torch.cat((none, w.cumsum(0)))
        self.integral = torch.cat((none, (area + h * self.w[:-1]).cumsum(0)))

    def _places(self, s0, s1):
        # every sample of these tests takes the same steps
        return torch.searchsorted(self.nodes, s0[0] - 1e-12), torch.searchsorted(self.nodes, s1[0] - 1e-12)

    def increment(self, s0, s1, step, like, lane=0):
        first, last = self._places(s0, s1)
        return self.w[last] - self.w[first]

    def levy(self, s0, s1, step, like):
        first, last = self._places(s0, s1)
        w, h = self.w[last] - self.w[first], (s1 - s0)[:, None]
        return w, (self.integral[last] - self.integral[first]) / h - self.w[first] - 0.5 * w

    def normal(self, step, like, lane=0):
        raise AssertionError("a strong solution draws nothing besides its path")

    uniform = normal

    def take(self, rows):
        raise AssertionError("no sample leaves the batch before the end")

    def __len__(self):
        return self.w.shape[1]


class Interpolated(Drawn):
    """The same path, straight between its nodes: any step may be divided later."""

    refinable = True

    def __init__(self, nodes, w):
        self.nodes, self.w = nodes, w

    def _value(self, s):
        right = torch.searchsorted(self.nodes, s).clamp(1, len(self.nodes) - 1)
        share = (s - self.nodes[right - 1]) / (self.nodes[right] - self.nodes[right - 1])
        rows = torch.arange(len(s))
        return torch.lerp(self.w[right - 1, rows], self.w[right, rows], share[:, None])

    def increment(self, s0, s1, step, like, lane=0):
        return self._value(s1) - self._value(s0)

    def take(self, rows):
        return Interpolated(self.nodes, self.w[:, rows])


class Problem:
    """The reverse SDE of a bimodal target, a path, and where it leads: the answer of SRA3 on the finest grid."""

    def __init__(self, name, eta, finest=FINEST, batch=BATCH):
        sde, target = SDES[name], mixture(2, 5, count=2)
        self.times = sde.time_at(torch.linspace(-1.5, 1.0, finest + 1, dtype=torch.float64))
        first = float(self.times[0])
        self.term = sdekit.ReverseSDE(target.score_model(sde), eta)
        self.path = Drawn(-self.times, batch, 2, 11)
        self.start = sde.alpha(first) * target.sample(batch) + sde.sigma(first) * draw(3, batch, 2)
        self.known = {}
        self.end = self.solve(SRA3(), finest)

    def solve(self, solver, n, path=None):
        grid = self.times[:: (len(self.times) - 1) // n]
        ends = float(grid[0]), float(grid[-1])
        return sdekit.integrate(self.term, solver, sdekit.FixedGrid(grid), self.start, *ends, path or self.path).x

    def errors(self, solver):
        """Root mean square over the samples, in 16 and in 64 steps."""
        if solver not in self.known:
            apart = [self.solve(solver, n) - self.end for n in (16, 64)]
            self.known[solver] = [float(difference.square().sum(1).mean().sqrt()) for difference in apart]
        return self.known[solver]

    def order(self, solver):
        """Observed; over other draws of the paths its standard deviation is 0.07. The draw here is always the same."""
        coarse, fine = self.errors(solver)
        return 0.5 * math.log2(coarse / fine)


@pytest.fixture(scope="module")
def problems():
    return {name: Problem(*chosen) for name, chosen in PROBLEMS.items()}


@pytest.mark.parametrize("name", TABLES)
def test_the_order_conditions_hold_exactly(name):
    """Those of drift and noise apart, from matching the expansion of the solution to order 1.5.

    With sum beta1 b W + beta2 b I/h for b linear in s, b(s0) W + (b(s1) - b(s0)) (W - I/h) is exact; the last of the
    drift, 3/2, makes E (a'' b^2 (I/h)^2) h/2 that of the integral of a'' b^2 W^2/2, from Var(I/h) = h/3.
    """
    table = TABLES[name]
    ahead = [sum(row, Q(0)) for row in table.b]
    assert [sum(row, Q(0)) for row in table.a] == list(table.c0)
    assert sum(table.alpha) == 1
    assert sum(w * c for w, c in zip(table.alpha, table.c0, strict=True)) == Q(1, 2)
    assert sum(w * b for w, b in zip(table.alpha, ahead, strict=True)) == 1
    assert sum(w * b**2 for w, b in zip(table.alpha, ahead, strict=True)) == Q(3, 2)
    assert sum(table.beta1) == 1
    assert sum(w * c for w, c in zip(table.beta1, table.c1, strict=True)) == 1
    assert sum(table.beta2) == 0
    assert sum(w * c for w, c in zip(table.beta2, table.c1, strict=True)) == -1
    assert [len(row) for row in table.a] == [len(row) for row in table.b] == list(range(table.stages))


@pytest.mark.parametrize("name", TABLES)
def test_the_coefficients_are_torchsdes_up_to_the_sign_of_the_area(name):
    peer, table = pytest.importorskip(f"torchsde._core.methods.tableaus.{name}"), TABLES[name]
    mine = (table.alpha, table.c0, table.c1, *table.a, *table.b, table.beta1, tuple(map(abs, table.beta2)))
    its = (peer.alpha, peer.C0, peer.C1, *peer.A0, *peer.B0, peer.beta1, tuple(map(abs, peer.beta2)))
    for ours, theirs in zip(mine, its, strict=True):
        assert [float(value) for value in ours] == pytest.approx(list(theirs), rel=1e-15)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("table", TABLES)
def test_sra_has_strong_order_one_and_a_half(problems, table, name):
    assert problems[name].order(SRA(TABLES[table])) > SRA(TABLES[table]).strong_order - 0.1


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", FIRST_ORDER)
def test_the_other_methods_have_strong_order_one(problems, method, name):
    if not (method.startswith("ancestral") and problems[name].term.eta != 1):
        solver = FIRST_ORDER[method]
        assert problems[name].order(solver) == pytest.approx(solver.strong_order, abs=0.15)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("table", TABLES)
def test_the_other_sign_of_the_area_costs_half_an_order(problems, table, name):
    problem = problems[name]
    wrong, right = SRA(mirrored(TABLES[table])), SRA(TABLES[table])
    assert problem.order(wrong) < 1.2
    assert problem.errors(wrong)[1] > 10.0 * problem.errors(right)[1]


@pytest.mark.parametrize("table", TABLES)
def test_constant_noise_would_not_show_the_sign(table):
    sde = SDES["vp"]
    problem = Problem("vp", lambda t: 0.7 / sde.diffusion(t), finest=16, batch=4)
    torch.testing.assert_close(
        problem.solve(SRA(mirrored(TABLES[table])), 16), problem.solve(SRA(TABLES[table]), 16), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize(("solver", "order"), [(SRA1(), 2), (SRA2(), 2), (SRA3(), 3)])
def test_without_noise_the_drift_has_its_own_order(solver, order):
    sde, target = SDES["vp"], mixture(2, 5, count=2)
    term, x = sdekit.ReverseSDE(target.score_model(sde), 0.0), draw(4, 4, 2)
    path, exact = sdekit.IndependentIncrements(0, torch.arange(4)), reference_flow(target, sde, x, 0.7, 0.3)
    errors = []
    for n in (24, 48, 96):
        grid = sdekit.FixedGrid(uneven_times(0.7, 0.3, n))
        errors.append(float((sdekit.integrate(term, solver, grid, x, 0.7, 0.3, path).x - exact).square().mean().sqrt()))
    assert observed_order(errors)[-1] == pytest.approx(order, abs=0.2), errors


def test_error_control_of_stochastic_heun_follows_its_tolerance():
    # The fine grid takes 8 steps between two nodes of the path, where it is straight.
    problem = Problem("vp", 1.0, finest=256, batch=16)
    path = Interpolated(problem.path.nodes, problem.path.w)
    first, last = float(problem.times[0]), float(problem.times[-1])
    fine = torch.lerp(problem.times[:-1, None], problem.times[1:, None], torch.arange(8).double() / 8.0).flatten()
    fine = sdekit.FixedGrid(torch.cat((fine, problem.times[-1:])))
    exact = sdekit.integrate(problem.term, StochasticHeun(), fine, problem.start, first, last, path).x
    errors, costs = [], []
    for tolerance in (1e-1, 3e-2, 1e-2):
        control = sdekit.PID(rtol=tolerance, atol=tolerance)
        found = sdekit.integrate(problem.term, StochasticHeun(), control, problem.start, first, last, path)
        errors.append(float((found.x - exact).square().sum(1).mean().sqrt()))
        costs.append(float(found.stats.accepted.double().mean()))
        assert errors[-1] < 3.0 * tolerance
        assert int(found.stats.rejected.sum()) > 0  # so refusing a step and dividing it is part of what is tested
    assert errors == sorted(errors, reverse=True)
    assert costs == sorted(costs)

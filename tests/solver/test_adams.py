"""Variable-step Adams: exact on polynomials over any nodes, of its order on problems, each sample on its own nodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import SDES, Given, draw, gaussian, mixture, observed_order, reference_flow, seeded, times, uneven_times
from numpy.polynomial import Polynomial

import sdekit
from sdekit._numbers import to_host
from sdekit._tensor import tree_map
from sdekit.solver.adams import begin_choice, choose
from sdekit.solver.newton import Formula, by_columns, stacked

every_depth = pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 6])


def random_nodes(seed, batch, count):
    """(B, count) increasing nodes with steps that differ by up to 12 times."""
    steps = 0.05 + 0.6 * torch.rand(batch, count, generator=seeded(seed), dtype=torch.float64)
    return steps.cumsum(1)


def lagrange_integrals(nodes, start, end):
    """The integral over [start, end] of each Lagrange polynomial of the nodes, by numpy."""
    found = []
    for j, own in enumerate(nodes):
        others = np.delete(nodes, j)
        basis = Polynomial.fromroots(others) / np.prod(own - others) if len(others) else Polynomial([1.0])
        found.append(basis.integ()(end) - basis.integ()(start))
    return np.array(found)


def on_the_host(past, formula, s0, s1):
    """`stacked` with arrays in the place of tensors."""
    return tree_map(torch.from_numpy, stacked(*to_host((past, formula, s0, s1))))


every_way = pytest.mark.parametrize("way", [stacked, on_the_host, by_columns])


@every_way
@every_depth
def test_newtons_weights_are_those_of_the_interpolating_polynomial(depth, way):
    past, every = random_nodes(depth, 3, depth).flip(1), torch.full((3,), depth)  # newest first
    start, end = past[:, 0], past[:, 0] + times(0.3, 0.02, 0.7)
    nodes = torch.cat((end[:, None], past), 1)
    for terms in range(1, depth + 1):
        # The predictor's terms interpolate the first of the past nodes, the corrector's one more with the step's end.
        found = way(past, Formula(every, torch.full((3,), terms), False, every > 0), start, end)
        for row in range(3):
            span = float(start[row]), float(end[row])
            for given, known, used in ((found.predict, past, terms), (found.correct[:, 0], nodes, terms + 1)):
                expected = lagrange_integrals(known[row, :used].numpy(), *span)
                np.testing.assert_allclose(given[row, :used].numpy(), expected, rtol=1e-8, atol=1e-9)
                assert not given[row, used:].any()
            less = lagrange_integrals(nodes[row, :terms].numpy(), *span)
            np.testing.assert_allclose(found.correct[row, 1, : terms + 1].numpy(), expected - [*less, 0.0], atol=1e-8)


@every_way
def test_nodes_that_are_not_known_change_nothing_and_stay_finite(way):
    past = random_nodes(1, 4, 5).flip(1)
    formula = Formula(torch.full((4,), 3), torch.tensor([3, 3, 2, 1]), True, torch.ones(4, dtype=torch.bool))
    empty = past.clone()
    empty[:, 3:] = 0.0  # what a fresh memory holds: equal nodes
    full, part = (way(nodes, formula, past[:, 0], past[:, 0] + 0.2) for nodes in (past, empty))
    for ours, theirs in zip(part, full, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
        assert torch.isfinite(ours).all()
    assert not part.correct[0, 3].any()  # the fourth term would need a node more than there are


@every_depth
def test_every_way_the_weights_are_the_same(depth):
    # Of samples that know from no node to all, with formulas of every length.
    known = torch.arange(depth + 1).repeat(depth + 2)
    terms = torch.minimum(known, torch.arange(depth + 2).repeat_interleave(depth + 1))
    past = random_nodes(depth, len(known), depth).flip(1)
    past = torch.where(torch.arange(depth) < known[:, None], past, 0.0)
    formula, s0 = Formula(known, terms, True, known > 0), past[:, 0]
    found = by_columns(past, formula, s0, s0 + 0.3)
    for way in (stacked, on_the_host):
        for ours, theirs in zip(found, way(past, formula, s0, s0 + 0.3), strict=True):
            assert torch.isfinite(ours).all()
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    one = formula._replace(around=False)  # as a method of one order asks
    torch.testing.assert_close(by_columns(past, one, s0, s0 + 0.3).correct, found.correct[:, [0, 2]], rtol=0, atol=0)


@every_depth
def test_on_the_host_a_samples_weights_do_not_depend_on_the_batch(depth):
    past = random_nodes(depth, 40, depth).flip(1)
    known = torch.arange(40) % (depth + 1)
    formula, s0, s1 = Formula(known, known, True, known > 0), past[:, 0], past[:, 0] + 0.3
    found = on_the_host(past, formula, s0, s1)
    for rows in ([0], [7], [3, 1], list(range(5, 38))):
        alone = on_the_host(*tree_map(lambda part, at=rows: part[at], (past, formula, s0, s1)))
        for ours, theirs in zip(alone, found, strict=True):
            torch.testing.assert_close(ours, theirs[rows], rtol=0, atol=0)


@pytest.mark.parametrize("solver", [sdekit.Adams(2), sdekit.Adams(5), sdekit.Adams(7, adaptive=True)], ids=repr)
def test_a_method_written_for_a_compiler_takes_the_same_steps(solver):
    nodes, z = random_nodes(3, 4, 12), draw(5, 4, 3)
    for ours, theirs in zip(
        *(march(way, lambda s, z: -z * s[:, None] ** 2, nodes, z) for way in (solver.for_compiler(), solver)),
        strict=True,
    ):
        torch.testing.assert_close(ours[3].z, theirs[3].z, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(ours[3].error, theirs[3].error, rtol=1e-9, atol=1e-13)
    with pytest.raises(ValueError, match="columns=True"):
        sdekit.Adams(5, "inside", columns=True)


def march(solver, slope, nodes, z):
    """Proposals of the solver over the nodes (B, n), from a memory filled in place."""
    term, memory = Given(slope), solver.init(Given(slope), z)
    s, found = nodes[:, 0], []
    for s1 in [s, *nodes[:, 1:].unbind(1)]:
        step = solver.propose(term, s, s1, z, memory, None)
        found.append((s, s1, z, step))
        s, z, memory = s1, step.z, step.memory
    assert len(term.asked) == nodes.shape[1]
    return found


@every_depth
def test_polynomial_slopes_are_integrated_exactly_over_any_nodes(depth):
    batch = 4
    coefficients = draw(depth, batch, depth + 1)  # of degree `depth`: the corrector has order depth + 1

    def slope(s, z):
        return sum(coefficients[:, k] * s**k for k in range(depth + 1))[:, None]

    def integral(s):
        return sum(coefficients[:, k] * s ** (k + 1) / (k + 1) for k in range(depth + 1))[:, None]

    z = draw(9, batch, 1)
    steps = march(sdekit.Adams(depth + 1), slope, random_nodes(depth, batch, depth + 6), z)
    for number, (s, s1, before, step) in enumerate(steps):
        assert bool(step.settled.all()) == (number >= depth)
        if number >= depth:
            torch.testing.assert_close(step.z - before, integral(s1) - integral(s), rtol=1e-9, atol=1e-10)


@every_depth
def test_the_error_estimate_is_that_of_the_corrector_of_one_order_less(depth):
    def run(degree):
        nodes = random_nodes(3, 2, depth + 5)
        return march(
            sdekit.Adams(depth + 1), lambda s, z: (s**degree)[:, None], nodes, torch.zeros(2, 1, dtype=torch.float64)
        )

    for number, (_, _, _, step) in enumerate(run(depth - 1)):
        if number >= depth:
            assert float(step.error.abs().max()) < 1e-11
    for number, (s, s1, before, step) in enumerate(run(depth)):
        if number >= depth:
            exact = ((s1 ** (depth + 1) - s ** (depth + 1)) / (depth + 1))[:, None]
            lower = step.z - step.error - before
            torch.testing.assert_close(step.error, exact - lower, rtol=1e-8, atol=1e-11)
            assert float(step.error.abs().min()) > 1e-9


@every_depth
def test_every_sample_walks_on_its_own_nodes(depth):
    nodes, z = random_nodes(5, 4, 9), draw(6, 4, 3)

    def slope(s, z):
        return torch.sin(s[:, None] + z)

    together = march(sdekit.Adams(depth + 1), slope, nodes, z)
    for i in range(4):
        alone = march(sdekit.Adams(depth + 1), slope, nodes[i : i + 1], z[i : i + 1])
        for (_, _, _, one), (_, _, _, all_) in zip(alone, together, strict=True):
            torch.testing.assert_close(one.z, all_.z[i : i + 1], rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(one.error, all_.error[i : i + 1], rtol=1e-9, atol=1e-14)


def graded(first, last, n, start=26):
    """n uneven steps, the first of them divided in a geometric sequence so that the low-order start costs nothing."""
    grid = uneven_times(first, last, n)
    shares = 2.0 ** -torch.arange(start, 0, -1, dtype=torch.float64)
    return torch.cat((grid[:1], grid[0] + (grid[1] - grid[0]) * shares, grid[1:]))


SDE, FIRST, LAST = SDES["vp"], 0.75, 0.2


def errors_of(depth, target, exact, x, counts):
    term, errors = sdekit.ProbabilityFlow(target.score_model(SDE)), []
    for n in counts:
        grid = sdekit.FixedGrid(graded(FIRST, LAST, n))
        found = sdekit.integrate(term, sdekit.Adams(depth + 1), grid, x, FIRST, LAST)
        errors.append(float((found.x - exact).abs().max()))
    return errors


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_halving_the_steps_divides_the_error_by_two_to_the_order(depth):
    target = gaussian(3)
    x = SDE.perturb(draw(1, 2, 3), FIRST, draw(2, 2, 3))
    counts = (96, 192) if depth < 4 else (144, 288)
    errors = errors_of(depth, target, target.flow_map(SDE, x, FIRST, LAST), x, counts)
    assert observed_order(errors)[-1] == pytest.approx(depth + 1, abs=0.5), errors


@pytest.mark.parametrize("depth", [2, 4])
def test_a_mixtures_flow_is_approached_at_least_as_fast(depth):
    target = mixture(2, 4)
    x = SDE.perturb(draw(1, 1, 2), FIRST, draw(2, 1, 2))
    errors = errors_of(depth, target, reference_flow(target, SDE, x, FIRST, LAST), x, (96, 192))
    assert observed_order(errors)[-1] > depth + 0.5, errors


def test_without_a_graded_start_the_first_step_limits_the_order_to_three():
    errors = []
    for n in (64, 128, 256):
        s = uneven_times(0.0, 3.0, n)[None]
        steps = march(sdekit.Adams(6), lambda s, z: torch.cos(s)[:, None] * z, s, torch.ones(1, 1, dtype=torch.float64))
        errors.append(abs(float(steps[-1][3].z) - float(torch.sin(s[0, -1]).exp())))
    assert observed_order(errors)[-1] == pytest.approx(3.0, abs=0.4), errors


@pytest.mark.parametrize(("order", "more"), [(2, 0), (3, 0), (4, 2), (5, 5)])
def test_begun_inside_of_the_first_step_it_keeps_its_order_on_a_plain_grid(order, more):
    target, errors = gaussian(3), []
    x = SDE.perturb(draw(1, 2, 3), FIRST, draw(2, 2, 3))
    term, exact = sdekit.ProbabilityFlow(target.score_model(SDE)), target.flow_map(SDE, x, FIRST, LAST)
    for n in (48, 96, 192):
        grid = sdekit.FixedGrid(uneven_times(FIRST, LAST, n))
        found = sdekit.integrate(term, sdekit.Adams(order, "inside"), grid, x, FIRST, LAST)
        assert found.stats.evaluations.tolist() == [n + 1 + more] * 2
        assert found.stats.accepted.tolist() == [n] * 2
        errors.append(float((found.x - exact).abs().max()))
    assert order - 0.4 < observed_order(errors)[-1] < order + 0.8, errors


def test_what_cannot_begin_inside_is_refused():
    with pytest.raises(ValueError, match="start='middle'"):
        sdekit.Adams(4, "middle")
    with pytest.raises(ValueError, match="order=6 with start='inside'"):
        sdekit.Adams(6, "inside")
    model = gaussian(3).score_model(SDE)
    with pytest.raises(ValueError, match="fresh probes"):
        sdekit.log_likelihood(model, draw(1, 2, 3), solver=sdekit.Adams(4, "inside"), divergence=sdekit.Hutchinson())


@every_depth
def test_a_step_of_no_length_goes_nowhere(depth):
    solver, z, s = sdekit.Adams(depth + 1), draw(1, 2, 3), times(0.2, 0.7)
    step = solver.propose(Given(lambda s, z: z + 1.0), s, s, z, solver.init(Given(None), z), None)
    assert torch.equal(step.z, z)
    assert torch.isfinite(step.error).all()
    # Only the start is in place: the next step must be finite and right to first order.
    after = solver.propose(Given(lambda s, z: z + 1.0), s, s + 1e-3, z, step.memory, None)
    torch.testing.assert_close(after.z, z + 1e-3 * (z + 1.0), rtol=0, atol=1e-5)


def after(costs, terms=4, entered=9, most=6, steps=1):
    """The choice after so many steps whose terms m - 1, m, m + 1 cost the same each time."""
    count = torch.full((1,), terms)
    choice = begin_choice(count)._replace(terms=count)
    for _ in range(steps):
        choice = choose(choice, torch.full((1,), entered), most, times(*costs)[None])
    return choice


class TestTheChoiceOfAnOrder:
    def test_terms_that_shrink_quickly_make_the_formula_longer_until_it_is_at_its_longest(self):
        quickly = (1.0, 1e-2, 1e-4)
        assert after(quickly).terms.item() == 4  # one step is no evidence
        assert after(quickly, steps=60).terms.item() == 6
        assert after(quickly, steps=60, most=4).terms.item() == 4

    def test_terms_that_grow_make_it_shorter_down_to_two(self):
        assert after((1.0, 3.0, 9.0), steps=4).terms.item() == 4
        assert after((1.0, 3.0, 9.0), steps=60).terms.item() == 2

    def test_terms_that_hardly_shrink_leave_it_alone(self):
        assert after((1.0, 0.8, 0.6), steps=200).terms.item() == 4

    def test_a_single_small_term_changes_nothing(self):
        choice = after((1.0, 0.5, 0.4), steps=20)
        for costs in ((1.0, 1e-9, 1e-18), (1e-9, 1.0, 0.5), *[(1.0, 0.5, 0.4)] * 20):
            choice = choose(choice, torch.full((1,), 9), 6, times(*costs)[None])
            assert choice.terms.item() == 4

    def test_nothing_is_chosen_while_it_begins_nor_longer_than_the_history(self):
        assert after((1.0, 3.0, 9.0), entered=3, steps=60).terms.item() == 4
        assert after((1.0, 1e-2, 1e-4), entered=4, steps=60).terms.item() == 4

    def test_rounding_and_what_is_not_a_number_move_nothing(self):
        """Terms that are nothing but rounding depend on the size of the batch; the order must not."""
        noise = torch.rand(300, 1, 3, generator=seeded(0), dtype=torch.float64) * 1e-13
        choice = begin_choice(torch.zeros(1, dtype=torch.int64))
        for costs in noise:
            choice = choose(choice, torch.full((1,), 9), 6, costs)
        assert choice.terms.item() == 4
        assert torch.isfinite(torch.stack(after((1.0, float("nan"), float("inf")), steps=3)[1:])).all()


class TestAdaptiveOrder:
    @pytest.mark.parametrize("terms", [2, 3, 4, 5, 6])
    def test_with_so_many_terms_it_is_the_method_of_that_order(self, terms):
        nodes, z = random_nodes(5, 4, 9), draw(6, 4, 3)
        term = Given(lambda s, z: torch.sin(s[:, None] + z))
        *_, (_, _, _, step) = march(sdekit.Adams(7), term.slope, nodes, z)
        memory, s0, s1 = step.memory, nodes[:, -1], nodes[:, -1] + 0.2
        kept = slice(0, terms)
        shorter = memory._replace(nodes=memory.nodes[:, kept], slopes=memory.slopes[:, kept])
        fixed = sdekit.Adams(terms + 1).propose(term, s0, s1, step.z, shorter, None)
        chosen = memory._replace(choice=begin_choice(torch.full((4,), terms))._replace(terms=torch.full((4,), terms)))
        found = sdekit.Adams(7, adaptive=True).propose(term, s0, s1, step.z, chosen, None)
        torch.testing.assert_close(found.z, fixed.z, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(found.error, fixed.error, rtol=1e-9, atol=1e-14)
        assert found.error_order.tolist() == [terms] * 4

    def test_it_costs_less_than_every_fixed_order_where_steps_are_bound_by_stability(self):
        """Far out, twice as far as the data: the flow contracts, and longer formulas are less stable."""
        target = mixture(16, 4)
        model, x = target.score_model(sdekit.VPSDE()), 3.0 * target.sample(4, generator=seeded(1))
        truth = sdekit.log_likelihood(model, x, tolerance=1e-6, solver=sdekit.Tsit5()).log_prob

        def solve(solver):
            found = sdekit.log_likelihood(model, x, tolerance=1e-2, solver=solver)
            assert ((found.log_prob - truth).abs() < 1e-2).all()
            return found.stats.evaluations.double().mean()

        chosen = solve(sdekit.Adams(7, adaptive=True))
        assert chosen < 0.75 * min(solve(sdekit.Adams(order)) for order in (5, 6, 7))

    def test_where_paths_are_smooth_it_takes_fewer_evaluations_than_order_five(self):
        target = mixture(2, 4)
        model, x = target.score_model(sdekit.VPSDE()), target.sample(16, generator=seeded(1))
        truth = sdekit.log_likelihood(model, x, tolerance=1e-7, solver=sdekit.Dopri8()).log_prob
        found, five = (
            sdekit.log_likelihood(model, x, tolerance=1e-5, solver=solver)
            for solver in (sdekit.Adams(7, adaptive=True), sdekit.Adams(5))
        )
        assert ((found.log_prob - truth).abs() < 1e-5).all()
        assert found.stats.evaluations.sum() < 0.8 * five.stats.evaluations.sum()

    def test_it_also_chooses_by_the_states_norm(self):
        model, x = mixture(2, 4).score_model(SDE), draw(1, 5, 2)
        ends = [
            sdekit.encode(model, x, solver=solver, controller=sdekit.PID(1e-9, 1e-9))
            for solver in (sdekit.Adams(7, adaptive=True), sdekit.Adams(5))
        ]
        torch.testing.assert_close(ends[0].x, ends[1].x, rtol=1e-6, atol=1e-6)
        assert ends[0].stats.evaluations.sum() < ends[1].stats.evaluations.sum()

    def test_a_fixed_grid_is_refused(self):
        """Its derivative and the density of its samples would have jumps that nothing sees."""
        model, x = mixture(2, 4).score_model(SDE), draw(1, 3, 2)
        solver = sdekit.Adams(7, adaptive=True)
        for solve in (
            lambda: sdekit.log_prob(model, x, nodes=16, solver=solver),
            lambda: sdekit.sample(model, (3, 2), steps=16, solver=solver),
            lambda: sdekit.sampler_log_density(model, x, steps=16, solver=solver),
            lambda: sdekit.log_likelihood(
                model, x, solver=solver, controller=sdekit.FixedGrid(sdekit.grid.likelihood(SDE, 16).flip(0))
            ),
        ):
            with pytest.raises(ValueError, match="for controlled steps"):
                solve()

    def test_what_it_cannot_be_is_refused(self):
        for order, start in ((4, "ramp"), (5, "inside")):
            with pytest.raises(ValueError, match="adaptive=True"):
                sdekit.Adams(order, start, adaptive=True)


@pytest.mark.parametrize("order", [1, 8, 3.0, True])
def test_orders_without_a_formula_are_refused(order):
    with pytest.raises(ValueError, match="order="):
        sdekit.Adams(order)

"""Increments: the law of a Brownian path and its area, keyed by sample and by step or time, and by nothing else."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import SDES, draw, gaussian, observed_order, times, uneven_times
from hypothesis import given
from hypothesis import strategies as st

import sdekit
from sdekit import brownian_motion as brownian
from sdekit.brownian_motion import BrownianMotion

COUNT = 40_000
LIKE = torch.zeros(COUNT, 1, dtype=torch.float64)


def path_of(count=COUNT, seed=0):
    return sdekit.IndependentIncrements(seed, torch.arange(count))


def steps(number, count=COUNT):
    return torch.full((count,), number, dtype=torch.int64)


def close(drawn, expected, std):
    """Whether a mean of COUNT draws is the expected one: |z| < 6, false alarm 2e-9."""
    return abs(float(drawn.mean()) - expected) < 6.0 * std / math.sqrt(COUNT)


def test_increment_and_area_have_the_law_of_a_brownian_path():
    s0, s1 = torch.full((COUNT,), -0.7).double(), torch.full((COUNT,), -0.2).double()
    w, h = path_of().levy(s0, s1, steps(3), LIKE)
    assert torch.equal(w, path_of().increment(s0, s1, steps(3), LIKE))
    variance = {"w": 0.5, "h": 0.5 / 12.0}
    for name, drawn in (("w", w), ("h", h)):
        assert close(drawn, 0.0, math.sqrt(variance[name]))
        assert close(drawn.square(), variance[name], math.sqrt(2.0) * variance[name])
    assert close(w * h, 0.0, math.sqrt(variance["w"] * variance["h"]))
    # so the integral I = h (W/2 + H) has Var I = h^3/3 and Cov(W, I) = h^2/2
    area = 0.5 * (0.5 * w + h)
    assert close(area.square(), 0.125 / 3.0, math.sqrt(2.0) * 0.125 / 3.0)


def test_steps_lanes_and_uses_draw_independently():
    ends = torch.zeros(COUNT).double(), torch.ones(COUNT).double()
    path = path_of()
    drawn = [
        path.increment(*ends, steps(0), LIKE),
        path.increment(*ends, steps(1), LIKE),
        path.increment(*ends, steps(0), LIKE, lane=1),
        path.normal(steps(0), LIKE),
        path.normal(steps(0), LIKE, lane=15),
        path.normal(steps(1), LIKE),
        path_of(seed=1).increment(*ends, steps(0), LIKE),
        math.sqrt(12.0) * path.levy(*ends, steps(0), LIKE)[1],
        math.sqrt(12.0) * (path.uniform(steps(0), lane=2)[:, None] - 0.5),
    ]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert close(first * second, 0.0, 1.0)


@pytest.mark.parametrize("ask", ["increment", "levy", "normal", "uniform"])
def test_a_sample_draws_the_same_in_any_batch(ask):
    def drawn(rows, indices):
        path = sdekit.IndependentIncrements(5, indices)
        like, number = torch.zeros(len(rows), 2, 3), torch.tensor([4, 5, 6])[rows]
        ends = torch.zeros(len(rows)).double(), torch.tensor([0.1, 0.2, 0.3]).double()[rows]
        if ask in ("normal", "uniform"):
            return path.normal(number, like, 2) if ask == "normal" else path.uniform(number, 2)
        found = getattr(path, ask)(*ends, number, like)
        return found[1] if ask == "levy" else found

    whole = drawn(torch.arange(3), torch.tensor([10, 20, 30]))
    assert whole.shape == ((3,) if ask == "uniform" else (3, 2, 3))
    for rows in (torch.tensor([2]), torch.tensor([2, 0])):
        assert torch.equal(drawn(rows, torch.tensor([10, 20, 30])[rows]), whole[rows])
    kept = sdekit.IndependentIncrements(5, torch.tensor([10, 20, 30])).take(torch.tensor([1]))
    assert len(kept) == 1
    assert kept.indices.tolist() == [20]


START, END = -2.0, -0.5


def motion(count=COUNT, seed=0, depth=24):
    return BrownianMotion(seed, torch.arange(count), START, END, depth)


def spread(seed, count=COUNT):
    """Pairs s0 < s1 (count,) all over the path, for each sample its own."""
    return (START + (END - START) * torch.rand(count, 2, generator=seeded(seed), dtype=torch.float64)).sort(1).values.T


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def weights(monkeypatch):
    """increment and levy of paths of some depth whose normals are unit vectors, so that inner products of what they
    return are covariances, exactly: no Monte Carlo.
    """

    def unit(keys, counter, size, dtype):
        drawn, node, row = torch.zeros(len(keys), 2, size // 2, dtype=dtype), -1 - counter, torch.arange(len(keys))
        drawn[row, 0, 2 * node] = drawn[row, 1, 2 * node + 1] = 1.0
        return drawn.flatten(1)

    monkeypatch.setattr(brownian._random, "normal", unit)

    def ask(s0, s1, depth):
        path, like = motion(len(s0), depth=depth), torch.zeros(len(s0), 2 << depth, dtype=torch.float64)
        increment, area = path.levy(s0, s1, steps(0, len(s0)), like)
        assert torch.equal(increment, path.increment(s0, s1, steps(0, len(s0)), like))
        return increment, area

    return ask


def test_between_dividing_points_the_path_is_brownian_exactly(weights):
    points = torch.linspace(START, END, 17, dtype=torch.float64)
    first, last = points[torch.triu_indices(17, 17, 1)]
    increment, area = weights(first, last, 4)
    shared = (torch.minimum(last[:, None], last) - torch.maximum(first[:, None], first)).clamp_min(0.0)
    torch.testing.assert_close(increment @ increment.T, shared, rtol=0, atol=1e-14)
    # W(s) over one step against the mean of W over another: the integral of the overlap up to s.
    torch.testing.assert_close((area * increment).sum(1), torch.zeros_like(first), rtol=0, atol=1e-14)
    torch.testing.assert_close(area.square().sum(1), (last - first) / 12.0, rtol=1e-13, atol=0)
    integral = (last - first)[:, None] * (0.5 * increment + area)
    torch.testing.assert_close((integral * increment).sum(1), (last - first).square() / 2.0, rtol=1e-13, atol=0)
    torch.testing.assert_close(integral.square().sum(1), (last - first) ** 3 / 3.0, rtol=1e-13, atol=0)
    apart = last[:, None] <= first
    for one, other in ((area, area), (area, increment), (increment, area)):
        assert (one @ other.T)[apart].abs().max() < 1e-14


def test_elsewhere_a_step_lacks_what_is_documented(weights):
    # At x within a cell each end lacks q (1 - 3 q), q = x (1 - x), of a cell: 1/12 at most, 1/15 on average.
    depth = 6
    s0, s1 = spread(1, 4000)
    cells = (s1 - s0) / (END - START) * 2.0**depth
    kept = cells > 2.0
    lacking = (1.0 - weights(s0, s1, depth)[0].square().sum(1) / (s1 - s0))[kept] * cells[kept]
    assert lacking.min() > 0.0
    assert 1.0 / 6.0 - 2e-3 < lacking.max() <= 1.0 / 6.0
    assert abs(float(lacking.mean()) - 2.0 / 15.0) < 2e-3
    area = weights(s0, s1, depth)[1].square().sum(1)[kept] / (s1 - s0)[kept] * 12.0
    assert ((1.0 - area).abs() < 1.0 / cells[kept]).all()


def test_the_area_is_that_of_the_path(weights):
    # With 8 cells W is a quadratic on each of the 16 halves: Simpson's rule there is the integral.
    s0, s1 = spread(2, 300)
    increment, area = weights(s0, s1, 3)
    edges = torch.linspace(START, END, 17, dtype=torch.float64)
    mean = torch.zeros_like(increment)
    for low, high in itertools.pairwise(edges):
        a, b = s0.clamp(low, high), s1.clamp(low, high)
        values = [weights(s0, s, 3)[0] for s in (a, 0.5 * (a + b), b)]
        mean += ((b - a) / (s1 - s0))[:, None] * (values[0] + 4.0 * values[1] + values[2]) / 6.0
    torch.testing.assert_close(0.5 * increment + area, mean, rtol=0, atol=2e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("depth", [1, 5, 24, 45])
def test_steps_add_up(depth, scale):
    # On [0, 1], where times are not rounded on their way to the series, it holds for the shortest steps too.
    a, b, c = torch.rand(3, 500, generator=seeded(3), dtype=torch.float64).sort(0).values
    b, c = a + scale * (b - a), a + scale * (c - a)
    path, like = BrownianMotion(0, torch.arange(500), 0.0, 1.0, depth), torch.zeros(500, 3, dtype=torch.float64)
    (first, left), (second, right), (whole, area) = (
        path.levy(*ends, steps(0, 500), like) for ends in ((a, b), (b, c), (a, c))
    )
    torch.testing.assert_close(first + second, whole, rtol=0, atol=1e-15)
    share = ((c - b) / (c - a))[:, None]
    mean = (1.0 - share) * (0.5 * first + left) + share * (0.5 * second + right + first)
    torch.testing.assert_close(mean, 0.5 * whole + area, rtol=0, atol=3e-15)


def test_a_path_runs_either_way():
    s0, s1 = spread(5, 200)
    path, like = motion(200), torch.zeros(200, 2, dtype=torch.float64)
    (there, area), (back, same) = path.levy(s0, s1, steps(0, 200), like), path.levy(s1, s0, steps(0, 200), like)
    assert torch.equal(back, -there)
    # int_{s1}^{s0} (W - W(s1)) ds = (s0 - s1) (W(s0) - W(s1)) - (mean of W - W(s0) over the step) (s0 - s1)
    torch.testing.assert_close(same, area, rtol=1e-9, atol=1e-15)


def test_increments_of_any_steps_have_the_law_of_a_brownian_path():
    # 10 statistics of 40,000 samples, each sample with steps of its own.
    a, b = spread(6)
    c, d = spread(7)
    path = motion(seed=3)
    (first, area), (second, other) = (
        tuple(drawn[:, 0] for drawn in path.levy(*ends, steps(0), LIKE)) for ends in ((a, b), (c, d))
    )
    h, k = b - a, d - c
    overlap = (torch.minimum(b, d) - torch.maximum(a, c)).clamp_min(0.0) / (h * k).sqrt()
    first, second, area, other = first / h.sqrt(), second / k.sqrt(), area / (h / 12).sqrt(), other / (k / 12).sqrt()
    for drawn in (first, second, area, other):
        assert close(drawn, 0.0, 1.0)
        assert close(drawn.square(), 1.0, math.sqrt(2.0))
    assert close(first * area, 0.0, 1.0)
    assert close(first * second - overlap, 0.0, math.sqrt(2.0))


@pytest.mark.parametrize("place", [0.5, 0.25 + 0.1, 0.75 + 1e-5])
def test_the_shortest_steps_have_areas_too(place):
    # Steps of 1e-12, about the middle of the path, where differences of the integral would have cancelled to nothing.
    s0 = torch.full((COUNT,), START + place * (END - START) - 0.4e-12, dtype=torch.float64)
    s1 = torch.full((COUNT,), START + place * (END - START) + 0.6e-12, dtype=torch.float64)
    increment, area = motion(depth=45, seed=1).levy(s0, s1, steps(0), LIKE)
    length = s1[0] - s0[0]
    cells = float(length) / (END - START) * 2.0**45  # 23: up to 1 in 6 n is lacking of W, up to 1 in n of H
    for drawn, lacking in ((increment.square() / length, 1.0 / 6.0), (12.0 * area.square() / length, 1.0)):
        low, high = 1.0 - lacking / cells, 1.0
        assert low - 6.0 * math.sqrt(2.0 / COUNT) < float(drawn.mean()) < high + 6.0 * math.sqrt(2.0 / COUNT)
    assert close(increment * area / length, 0.0, math.sqrt(1.0 / 12.0))


def test_a_step_divided_is_a_bridge():
    # Given W over a step, its half has mean W/2 and variance h/4, whatever was known: 4 statistics.
    s0, s1 = spread(8)
    path, middle, length = motion(seed=4), 0.5 * (s0 + s1), (s1 - s0)[:, None].sqrt()
    whole = path.increment(s0, s1, steps(0), LIKE) / length
    half = path.increment(s0, middle, steps(1), LIKE) / length - 0.5 * whole
    assert close(half, 0.0, 0.5)
    assert close(half.square(), 0.25, 0.25 * math.sqrt(2.0))
    assert close(half * whole, 0.0, 0.5)
    assert close(half.square() * whole.square(), 0.25, 0.25 * math.sqrt(8.0))


def test_a_deeper_path_is_the_same_path():
    points = torch.linspace(START, END, 65, dtype=torch.float64)
    like = torch.zeros(64, 5, dtype=torch.float64)
    coarse, fine = (
        BrownianMotion(0, torch.full((64,), 7), START, END, depth).levy(points[:-1], points[1:], steps(0, 64), like)
        for depth in (6, 14)
    )
    torch.testing.assert_close(fine[0], coarse[0], rtol=0, atol=1e-14)
    assert (fine[1] - coarse[1]).abs().max() < 1e-2 * coarse[1].abs().max()


@given(order=st.permutations(range(6)), count=st.integers(1, 6), shape=st.sampled_from([(1,), (67,), (2, 3, 5)]))
def test_a_motion_is_the_same_in_any_batch_order_and_company(order, count, shape):
    indices, (s0, s1) = torch.arange(6) * 1000 + 3, spread(9, 6)
    start, end = s0 - torch.arange(6) / 7.0, s1 + torch.arange(6) / 5.0
    path, like = BrownianMotion(2**40, indices, start, end), torch.zeros(6, *shape, dtype=torch.float64)
    whole = path.levy(s0, s1, steps(0, 6), like)
    rows = torch.tensor(order[:count])
    fresh = BrownianMotion(2**40, indices[rows], start[rows], end[rows])
    for part in (path.take(rows), fresh):
        part.levy(s1[rows], end[rows], steps(5, count), like[rows])
        part.increment(start[rows], s0[rows], steps(5, count), like[rows])
        found = part.levy(s0[rows], s1[rows], steps(9, count), like[rows])
        assert torch.equal(found[0], whole[0][rows])
        assert torch.equal(found[1], whole[1][rows])
        assert torch.equal(part.increment(s0[rows], s1[rows], steps(2, count), like[rows], lane=3), whole[0][rows])
        assert len(part) == count


def test_how_many_normals_are_drawn_at_once_changes_no_bit(monkeypatch):
    (s0, s1), like = spread(10, 4), torch.zeros(4, 3, 7, dtype=torch.float64)
    found = []
    for at_once in (1, 1000, 1 << 30):
        monkeypatch.setitem(brownian._AT_ONCE, "cpu", at_once)
        found.append(torch.stack(motion(4).levy(s0, s1, steps(0, 4), like)))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def test_a_motion_shares_nothing_with_other_draws_and_other_seeds():
    ends = torch.full((COUNT,), START).double(), torch.full((COUNT,), END).double()
    span = math.sqrt(END - START)
    path = motion()
    base = path.increment(*ends, steps(0), LIKE) / span
    rest = [
        motion(seed=1).increment(*ends, steps(0), LIKE) / span,
        BrownianMotion(0, torch.arange(1, COUNT + 1), START, END).increment(*ends, steps(0), LIKE) / span,
        path.normal(steps(0), LIKE),
        path_of().increment(*ends, steps(0), LIKE) / span,
    ]
    for other in rest:
        assert close(base * other, 0.0, 1.0)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 3)])
def test_a_float32_state_gets_the_same_path_rounded(shape):
    (s0, s1), like = spread(11, 3), torch.zeros(3, *shape)
    for single, double in zip(
        motion(3).levy(s0, s1, steps(0, 3), like), motion(3).levy(s0, s1, steps(0, 3), like.double()), strict=True
    ):
        assert single.dtype == torch.float32
        assert single.shape == like.shape
        # The same normals to float32's rounding, of size 6 at most, 50 to an increment.
        torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=5e-6)


def test_nothing_moves_without_time_without_samples_or_beyond_the_ends():
    (s0, s1), like = spread(12, 3), torch.zeros(3, 2, dtype=torch.float64)
    path = motion(3)
    for still in (s0, torch.full_like(s0, START), torch.full_like(s0, END), torch.full_like(s0, 0.5 * (START + END))):
        for drawn in path.levy(still, still, steps(0, 3), like):
            assert torch.equal(drawn, torch.zeros_like(like))
    for outside, end in ((START - 1e-15, START), (END + 0.1, END)):
        beyond, at_end = (path.increment(s0, torch.full_like(s0, s), steps(0, 3), like) for s in (outside, end))
        assert torch.equal(beyond, at_end)
    nowhere = BrownianMotion(0, torch.arange(3), START, START)
    assert torch.equal(nowhere.increment(s0, s1, steps(0, 3), like), torch.zeros_like(like))
    none = motion(0).levy(s0[:0], s1[:0], steps(0, 0), like[:0])
    assert none[0].shape == none[1].shape == (0, 2)


def test_a_motion_refuses_what_is_no_path():
    three = torch.arange(3)
    for bad, text in (
        ((0, three, -0.5, -2.0), r"start=-0.5, end=-2.0; start <= end"),
        ((0, three, times(0.0, 1.0, 2.0), 1.5), "start <= end"),
        ((0, three, math.nan, 1.0), "start=nan"),
        ((0, three, 0.0, math.inf), "end=inf"),
        ((0, three, times(0.0, 0.1), 1.0), r"start.shape=\(2,\)"),
        ((-1, three, 0.0, 1.0), "seed=-1"),
        ((0, three, 0.0, 1.0, 0), "depth=0"),
        ((0, three, 0.0, 1.0, 46), "depth=46"),
    ):
        with pytest.raises(ValueError, match=text):
            BrownianMotion(*bad)
    for bad in ([0, 1], three.double(), three[:, None]):
        with pytest.raises(TypeError, match="int64 tensor"):
            BrownianMotion(0, bad, 0.0, 1.0)
        with pytest.raises(TypeError, match="int64 tensor"):
            sdekit.IndependentIncrements(0, bad)


def test_solves_on_finer_grids_approach_the_solution_on_the_same_path():
    # Additive noise: Euler and Maruyama's method is of strong order 1, which only one path for all grids can show.
    sde, count = SDES["vp"], 50
    term, x = sdekit.ReverseSDE(gaussian(3).score_model(sde), 1.0), draw(1, count, 3)
    path = BrownianMotion(5, torch.arange(count), -0.8, -0.2)

    def solve(n):
        grid = sdekit.FixedGrid(uneven_times(0.8, 0.2, n))
        return sdekit.integrate(term, sdekit.EulerMaruyama(), grid, x, 0.8, 0.2, path).x

    finest = solve(1536)
    errors = [float((solve(n) - finest).square().mean().sqrt()) for n in (24, 48, 96)]
    for order in observed_order(errors):
        assert order == pytest.approx(1.0, abs=0.15)

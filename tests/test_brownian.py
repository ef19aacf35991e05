"""Increments: the law of a Brownian path and its area, keyed by sample, step and lane, and by nothing else."""

from __future__ import annotations

import math

import pytest
import torch

import sdekit

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

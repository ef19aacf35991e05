"""The demo's numbers: its uncertainties against draws of known spread, and its two exact traces against each other."""

from __future__ import annotations

import math

import pytest
import torch

from sdekit import demo
from sdekit.divergence import Exact
from sdekit.zoo import digits


def test_uncertainties_are_those_of_the_draws():
    # Draws with a known spread within, between and of the trace. 2000 images: a standard deviation estimated from
    # them is off by less than 8% except once in 10^5.
    count, images, dequantisation, trace = 2000, 0.2, 0.03, 0.02
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    truth = 1.8 + images * normal(count)
    draws = []
    for _ in range(3):
        bits = truth + dequantisation * normal(count) + trace * normal(count)
        row = demo.Row("", bits, torch.ones(count), 1, 1.0)
        std_error = torch.full((count,), trace / demo._PER_NAT, dtype=torch.float64)
        draws.append(demo.Draw(row, std_error, torch.full((count,), 0.01, dtype=torch.float64)))
    errors = demo.uncertainties(draws)
    root = math.sqrt(count)
    assert errors.trace == pytest.approx(trace / root, rel=1e-9)
    assert errors.solver == pytest.approx(0.01 * demo._PER_NAT, rel=1e-9)
    assert errors.dequantisation == pytest.approx(dequantisation / root, rel=0.08)
    assert errors.images == pytest.approx(math.hypot(images, dequantisation, trace) / root, rel=0.08)


def test_torchdiffeq_and_sdekit_agree_on_the_digits():
    model = digits.load()
    x = demo.dequantised(digits.load_split().test, 0)[:2]
    ours, error, bound = demo.with_sdekit("", model, x, Exact(), 0)
    theirs = demo.with_torchdiffeq(model, x)
    assert (error == 0).all()
    assert ((ours.bits - theirs.bits).abs() / demo._PER_NAT < bound + 0.05).all()
    assert ours.calls < theirs.calls

"""Levels, and what cannot have bits per dimension."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdekit.units import Levels, bits_per_dim, require_dequantized


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class TestLevels:
    def test_bins_are_side_by_side_from_end_to_end(self):
        cells = Levels(5, -0.5, 2.0)
        k = torch.arange(5)
        lower, upper = cells.place(k, 0.0), cells.place(k, 1.0)
        torch.testing.assert_close(upper[:-1], lower[1:])
        torch.testing.assert_close(upper - lower, torch.full((5,), cells.width))
        assert (float(lower[0]), float(upper[-1])) == (-0.5, 2.0)
        torch.testing.assert_close(cells.place(k), 0.5 * (lower + upper))

    @pytest.mark.parametrize(("levels", "low", "high"), [(256, -1.0, 1.0), (17, 0.0, 1.0)])
    def test_a_uniform_density_costs_the_logarithm_of_their_number(self, levels, low, high):
        density = torch.tensor([-3 * math.log(high - low)], dtype=torch.float64)
        bits = bits_per_dim(density, 3, levels, low, high)
        torch.testing.assert_close(bits, torch.tensor([math.log2(levels)], dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
    def test_dequantised_values_are_in_the_bins_of_their_levels(self, dtype):
        cells, k = Levels(16, -1.0, 3.0), torch.arange(16).repeat(50).to(dtype)
        x = cells.dequantise(k, seeded(0))
        assert torch.equal(((x - cells.low) / cells.width).floor().to(dtype), k)

    @pytest.mark.parametrize(
        ("count", "low", "high", "dtype"),
        [
            *((17, -1.0, 1.0, torch.float32), (256, -1.0, 1.0, torch.float32), (4096, 0.0, 1.0, torch.float32)),
            *((1000, -0.3, 0.1, torch.float32), (65536, -1.0, 1.0, torch.float64), (256, 1e6, 1e6 + 1, torch.float64)),
        ],
    )
    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0 - 2.0**-24])
    def test_no_dequantised_value_leaves_its_bin_by_rounding(self, monkeypatch, count, low, high, dtype, share):
        cells, k = Levels(count, low, high), torch.arange(count)
        monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, share))
        x = cells.dequantise(k, seeded(0))
        assert x.dtype == dtype
        assert bool((x.double() >= cells.place(k.double(), 0.0)).all())
        assert bool((x.double() < cells.place(k.double(), 1.0)).all())
        torch.testing.assert_close(x.double(), cells.place(k.double(), share), rtol=2e-7, atol=1e-8)

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ((1,), ValueError, "levels=1; at least 2"),
            ((2.0,), TypeError, "levels=2.0"),
            ((4, 1.0, 1.0), ValueError, "low < high"),
            ((4, math.nan, 1.0), ValueError, "low < high"),
            ((4, 0.0, math.inf), ValueError, "finite"),
        ],
    )
    def test_senseless_bins_are_refused(self, arguments, error, words):
        with pytest.raises(error, match=words):
            Levels(*arguments)

    @pytest.mark.parametrize("k", [torch.tensor([[0, 4]]), torch.tensor([[-1, 0]]), torch.zeros(1, 2)])
    def test_what_is_no_level_is_refused(self, k):
        with pytest.raises(ValueError, match=r"k holds .*integers 0\.\.3 are needed"):
            Levels(4).check(k, "k")


class TestRequireDequantized:
    @given(
        count=st.integers(2, 300),
        low=st.floats(-100.0, 100.0),
        size=st.floats(0.1, 300.0),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        share=st.sampled_from([0.0, 0.5, 1.0]),
        seed=st.integers(0, 99),
    )
    def test_lattices_are_found_in_any_units(self, count, low, size, dtype, share, seed):
        cells = Levels(count, low, low + size)
        k = torch.randint(0, count, (4, 8), generator=seeded(seed))
        for x in (cells.place(k, torch.tensor(share, dtype=dtype)), low + size * (k.double() / (count - 1))):
            with pytest.raises(ValueError, match="not dequantised"):
                require_dequantized(x.to(dtype), cells)

    @given(count=st.integers(2, 300), dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99))
    def test_dequantised_values_pass(self, count, dtype, seed):
        """The truth fails with probability below 1e-9: 16 values, each within 2.5e-4 of a lattice point or less."""
        cells = Levels(count)
        k = torch.randint(0, count, (2, 8), generator=seeded(seed))
        u = torch.rand(2, 8, generator=seeded(seed + 1000), dtype=dtype)
        require_dequantized(cells.place(k, u).to(dtype), cells)
        require_dequantized(cells.place(k, u).to(dtype))

    def test_integers_are_found_without_knowing_their_levels(self):
        with pytest.raises(ValueError, match="every value of images is an integer"):
            require_dequantized(torch.tensor([[3.0, 255.0]]), name="images")

    def test_one_value_between_the_levels_is_enough_to_pass(self):
        x = Levels(8).place(torch.arange(8)[None])
        x[0, 3] += 0.3 * Levels(8).width
        require_dequantized(x, Levels(8))

    @pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.full((2, 2), math.nan)])
    def test_nothing_is_said_of_what_holds_no_levels(self, x):
        require_dequantized(x, Levels(4))

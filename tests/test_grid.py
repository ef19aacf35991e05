"""Variables of integration and grids: exact ends, strictly monotone, inverted to rounding."""

from __future__ import annotations

import pytest
import torch
from helpers import SDES, times
from hypothesis import given
from hypothesis import strategies as st

import sdekit
from sdekit.grid import MixedTime

ALL = {**SDES, "short table": sdekit.TableVPSDE([0.1, 0.3, 0.05, 0.7]), "narrow": sdekit.KarrasSDE(0.5, 0.8)}
every_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
GRIDS = {
    "uniform_time": sdekit.grid.uniform_time,
    "uniform_half_log_snr": sdekit.grid.uniform_half_log_snr,
    "karras": sdekit.grid.karras,
    "karras 1": lambda sde, n: sdekit.grid.karras(sde, n, rho=1.0),
    "likelihood": sdekit.grid.likelihood,
    "likelihood, tiny data": lambda sde, n: sdekit.grid.likelihood(sde, n, data_std=1e-3),
    "likelihood, huge data": lambda sde, n: sdekit.grid.likelihood(sde, n, data_std=1e3),
}
every_grid = pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS.keys())


@every_sde
@every_grid
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_grids_run_strictly_from_t_max_to_t_min_with_exact_ends(sde, make, n):
    grid = make(sde, n)
    assert grid.shape == (n + 1,)
    assert grid.dtype == torch.float64
    assert float(grid[0]) == sde.t_max
    assert float(grid[-1]) == sde.t_min
    assert (grid.diff() < 0).all()


def mapped(sde, grid, power=None):
    ratio = torch.exp(-sde.half_log_snr(grid))
    return ratio if power is None else ratio**power


@every_sde
def test_grids_are_equally_spaced_in_what_their_names_say(sde):
    spaced = {
        "time": sdekit.grid.uniform_time(sde, 40),
        "half_log_snr": sde.half_log_snr(sdekit.grid.uniform_half_log_snr(sde, 40)),
        "karras": mapped(sde, sdekit.grid.karras(sde, 40), 1.0 / 7.0),
        "karras 3": mapped(sde, sdekit.grid.karras(sde, 40, rho=3.0), 1.0 / 3.0),
        "likelihood": MixedTime(sde, 0.3).position(-sde.half_log_snr(sdekit.grid.likelihood(sde, 40, 0.3))),
    }
    for name, values in spaced.items():
        gaps = values.diff()
        span = float((values[-1] - values[0]).abs())
        torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=0.0, atol=1e-9 * span, msg=name)


def test_the_karras_grid_is_the_published_one():
    sde, n = sdekit.KarrasSDE(0.002, 80.0), 17
    i = torch.arange(n + 1, dtype=torch.float64)
    published = (80.0 ** (1 / 7) + i / n * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
    torch.testing.assert_close(sdekit.grid.karras(sde, n), published, rtol=1e-12, atol=0.0)


def steps(count=2001):
    """s in [0, 1], crowded at both ends."""
    even = torch.linspace(0.0, 1.0, count, dtype=torch.float64)
    tiny = torch.logspace(-12, -3, 200, dtype=torch.float64)
    return torch.cat((even, tiny, 1.0 - tiny)).sort().values


@every_sde
@pytest.mark.parametrize("data_std", [1e-3, 0.05, 0.5, 3.0, 1e3])
def test_the_mixed_variable_is_inverted_to_rounding(sde, data_std):
    mixed, s = MixedTime(sde, data_std), steps()
    q, rate = mixed.log_ratio(s)
    torch.testing.assert_close(mixed.position(q), s, rtol=0.0, atol=1e-13)
    assert float(mixed.position(-sde.half_log_snr(times(sde.t_min)))) == pytest.approx(0.0, abs=1e-14)
    assert float(mixed.position(-sde.half_log_snr(times(sde.t_max)))) == pytest.approx(1.0, abs=1e-14)
    torch.testing.assert_close(mixed.coordinate(mixed.time(s)), s, rtol=0.0, atol=1e-12)
    assert (mixed.time(s) >= sde.t_min).all()
    assert (mixed.time(s) <= sde.t_max).all()
    assert (rate > 0).all()


@every_sde
@pytest.mark.parametrize("data_std", [1e-3, 0.5, 1e3])
def test_for_a_compiler_the_table_is_searched_otherwise_and_the_same_is_found(sde, data_std):
    mixed = MixedTime(sde, data_std)
    s = torch.cat((steps(), mixed._table_s, torch.nextafter(mixed._table_s, torch.tensor(2.0, dtype=torch.float64))))
    s = torch.cat((s, torch.tensor([-1.0, -1e-9, 1.0 + 1e-9, 3.0, float("nan")], dtype=torch.float64)))
    for way in (mixed, MixedTime(sde, data_std, downward=True)):
        for found, wanted in zip(way.for_compiler().log_ratio(s), way.log_ratio(s), strict=True):
            assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@every_sde
@pytest.mark.parametrize("data_std", [1e-3, 0.5, 1e3])
def test_the_ends_of_the_mixed_variable_are_exact(sde, data_std):
    mixed = MixedTime(sde, data_std)
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    assert mixed.coordinate(ends).tolist() == [0.0, 1.0]
    assert mixed.time(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [sde.t_min, sde.t_max]


@every_sde
def test_the_mixed_variable_downward_is_the_same_from_the_other_end(sde):
    up, down, s = MixedTime(sde, 0.5), MixedTime(sde, 0.5, downward=True), steps()
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    assert down.coordinate(ends).tolist() == [0.0, 1.0]
    assert down.time(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == ends.tolist()
    assert torch.equal(down.time(s), up.time(1.0 - s))
    (q, rate), (wanted, opposite) = down.log_ratio(s), up.log_ratio(1.0 - s)
    assert torch.equal(q, wanted)
    assert torch.equal(rate, -opposite)


@every_sde
@pytest.mark.parametrize("data_std", [1e-3, 0.5, 1e3])
def test_the_rate_of_the_mixed_variable_is_its_derivative(sde, data_std):
    mixed = MixedTime(sde, data_std)
    s = torch.linspace(0.003, 0.997, 401, dtype=torch.float64)
    h = 1e-4
    ahead, behind = mixed.log_ratio(s + h)[0], mixed.log_ratio(s - h)[0]
    further, before = mixed.log_ratio(s + 2 * h)[0], mixed.log_ratio(s - 2 * h)[0]
    central = (8.0 * (ahead - behind) - (further - before)) / (12.0 * h)
    torch.testing.assert_close(mixed.log_ratio(s)[1], central, rtol=1e-6, atol=0.0)
    q = mixed.log_ratio(s)[0].requires_grad_()
    slope = torch.autograd.grad(mixed.position(q).sum(), q)[0]
    torch.testing.assert_close(mixed.slope(q.detach()), slope, rtol=1e-12, atol=0.0)


@every_sde
def test_the_mixed_variable_is_the_documented_mean(sde):
    data_std = 0.4
    low, high = (-float(sde.half_log_snr(t)) for t in (sde.t_min, sde.t_max))
    q = torch.linspace(low, high, 50, dtype=torch.float64)

    def saturating(q):
        return -torch.log(1.0 + 2.0 * data_std / (q.exp() + 0.02 * data_std))

    base, top = saturating(q[0]), saturating(q[-1])
    expected = 0.5 * (q - low) / (high - low) + 0.5 * (saturating(q) - base) / (top - base)
    torch.testing.assert_close(MixedTime(sde, data_std).position(q), expected, rtol=1e-11, atol=1e-12)


@given(
    name=st.sampled_from(sorted(ALL)),
    log_std=st.floats(-6.9, 6.9),
    s=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20),
)
def test_the_mixed_variable_is_inverted_for_any_data_std(name, log_std, s):
    mixed = MixedTime(ALL[name], float(torch.tensor(log_std).exp()))
    here = torch.tensor(s, dtype=torch.float64)
    torch.testing.assert_close(mixed.coordinate(mixed.time(here)), here, rtol=0.0, atol=1e-12)


def test_grids_of_no_steps_are_refused():
    sde = SDES["vp"]
    for make in GRIDS.values():
        with pytest.raises(ValueError, match="n=0"):
            make(sde, 0)
        with pytest.raises(TypeError, match="n="):
            make(sde, 2.5)
    with pytest.raises(ValueError, match="rho"):
        sdekit.grid.karras(sde, 4, rho=0.0)
    with pytest.raises(ValueError, match="data_std"):
        sdekit.grid.likelihood(sde, 4, data_std=-1.0)

"""Counter-based noise: the same numbers wherever a sample is, and numbers that are as good as random."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from sdekit import _random
from sdekit._random import Stream

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
DRAWS = {"rademacher": _random.rademacher, "normal": _random.normal, "sphere": _random.sphere}


def finalise(word):
    """SplitMix64's output function on Python integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def signed(word):
    word &= MASK
    return word - (1 << 64) if word >> 63 else word


def test_the_finaliser_gives_splitmix64s_published_sequence():
    # The first outputs of SplitMix64 from the state 1234567 (Rosetta Code's test vector).
    published = [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423),
        *(4593380528125082431, 16408922859458223821),
    ]
    states = [1234567 + i * GAMMA for i in range(1, 6)]
    assert [finalise(state & MASK) for state in states] == published
    found = _random._finalise(torch.tensor([signed(state) for state in states], dtype=torch.int64))
    assert found.tolist() == [signed(word) for word in published]


@given(
    seed=st.integers(0, 2**63 - 1),
    stream=st.sampled_from(Stream),
    index=st.integers(0, 2**62),
    counter=st.integers(0, 2**45),
)
def test_words_are_the_documented_function_of_their_key(seed, stream, index, counter):
    root = finalise(finalise(seed + GAMMA & MASK) + stream * GAMMA & MASK)
    key = finalise(root + (index + 1) * GAMMA & MASK)
    here = finalise(key + (counter + 1) * GAMMA & MASK)
    expected = [signed(finalise(here + lane * GAMMA & MASK)) for lane in range(1, 5)]
    keys = _random.sample_keys(seed, stream, torch.tensor([index]))
    assert _random.words(keys, torch.tensor([counter]), 4)[0].tolist() == expected


def test_normals_and_signs_are_the_documented_functions_of_the_words():
    keys, counter = _random.sample_keys(5, Stream.PRIOR, torch.arange(3)), torch.tensor([0, 7, 2])
    words = [[w & MASK for w in row] for row in _random.words(keys, counter, 4).tolist()]
    normals = _random.normal(keys, counter, 4, torch.float64)
    signs = _random.rademacher(keys, counter, 200, torch.float64)
    for row, drawn in enumerate(words):
        u = [((w >> 11) + 1) / 2**53 for w in drawn]
        for i in range(2):
            radius, angle = math.sqrt(-2.0 * math.log(u[i])), 2.0 * math.pi * u[2 + i]
            assert float(normals[row, i]) == pytest.approx(radius * math.cos(angle), abs=1e-14)
            assert float(normals[row, i + 2]) == pytest.approx(radius * math.sin(angle), abs=1e-14)
        assert signs[row].tolist() == [2.0 * (drawn[i // 64] >> i % 64 & 1) - 1.0 for i in range(200)]


@pytest.mark.parametrize("count", [1, 4, 5, 70])
@pytest.mark.parametrize("size", [1, 7, 64, 40_001])
def test_what_numpy_draws_on_the_cpu_is_what_torch_draws_elsewhere(count, size, monkeypatch):
    # Words, signs and uniforms to the bit; normals to the last digits of a logarithm and a square root.
    def drawn():
        keys, counter = (
            _random.sample_keys(9, Stream.BROWNIAN, torch.arange(count) * 5 - 2),
            torch.arange(count) * 3 - 1,
        )
        exact = [keys, _random.words(keys, counter, size), _random.uniforms(keys, counter, size)]
        exact.append(_random.rademacher(keys, counter, size, torch.float32))
        return exact, [_random.normal(keys, counter, size, dtype) for dtype in (torch.float64, torch.float32)]

    host, (host_double, host_single) = drawn()
    monkeypatch.setattr(_random, "_on_host", lambda keys: False)
    device, (device_double, device_single) = drawn()
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(host, device, strict=True))
    torch.testing.assert_close(host_double, device_double, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(host_single, device_single, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normals_of_fewer_digits_are_those_of_float64_to_rounding(dtype, on_host, monkeypatch):
    if not on_host:
        monkeypatch.setattr(_random, "_on_host", lambda keys: False)
    keys = _random.sample_keys(4, Stream.BROWNIAN, torch.arange(500))
    single, double = (_random.normal(keys, torch.zeros_like(keys), 999, kind) for kind in (dtype, torch.float64))
    assert single.dtype is dtype
    # An angle within half a turn of 0 is rounded by 2^-23 at most, times a radius below 6; then the number itself is.
    assert float((single.double() - double).abs().max()) < 6.0 * 2.0**-22 + 3.0 * torch.finfo(dtype).eps


def test_a_radius_keeps_its_digits_where_its_uniform_is_next_to_1(monkeypatch):
    # In float32, u = 1 - 2^-30 would be 1, and its radius 0.
    monkeypatch.setattr(_random, "_finalise_host", lambda words: words)
    word = ((1 << 53) - (1 << 23) - 1) << 11
    radius = _random._host_single(np.array([[word], [word]], np.uint64))[0]
    assert float(radius[0]) == pytest.approx(math.sqrt(-2.0 * math.log1p(-(2.0**-30))), rel=1e-6)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
@given(order=st.permutations(range(8)), size=st.integers(1, 9), seed=st.integers(0, 10**9))
def test_a_samples_numbers_do_not_depend_on_its_batch(draw, order, size, seed):
    indices, counter = torch.arange(8) * 1000 + 3, torch.arange(8) * 5
    rows = torch.tensor(order)
    pick = rows[:1]
    for dtype in (torch.float64, torch.float32):
        together = draw(_random.sample_keys(seed, Stream.PROBE, indices), counter, size, dtype)
        shuffled = draw(_random.sample_keys(seed, Stream.PROBE, indices[rows]), counter[rows], size, dtype)
        assert torch.equal(shuffled, together[rows])
        alone = draw(_random.sample_keys(seed, Stream.PROBE, indices[pick]), counter[pick], size, dtype)
        assert torch.equal(alone, together[pick])


def test_functions_of_numpy_round_a_number_alike_at_every_place():
    # What `_host_single` takes of numpy: vectors, and the numbers that fill none, by the same code.
    drawn = np.random.default_rng(0)
    uniform = drawn.random(4099)
    angle = ((drawn.random(4099) - 0.5) * 2.0 * math.pi).astype(np.float32)
    for function, x in ((np.log, uniform), (np.cos, angle), (np.sin, angle), (np.sqrt, uniform.astype(np.float32))):
        whole = function(x)
        for start in (*range(1, 70), 4000):
            assert np.array_equal(function(x[start:]), whole[start:])
            assert np.array_equal(function(x[:start]), whole[:start])
        assert all(function(x[i : i + 1])[0] == whole[i] for i in range(4099))


@given(
    seed=st.integers(0, 2**60), index=st.integers(0, 2**40), counter=st.integers(0, 2**40), other=st.integers(1, 2**40)
)
def test_another_seed_stream_sample_or_counter_gives_other_numbers(seed, index, counter, other):
    def words(seed, stream, index, counter):
        return _random.words(_random.sample_keys(seed, stream, torch.tensor([index])), torch.tensor([counter]), 2)

    base = words(seed, Stream.PROBE, index, counter)
    for changed in (
        words(seed + other, Stream.PROBE, index, counter),
        words(seed, Stream.PROBE, index + other, counter),
        words(seed, Stream.PROBE, index, counter + other),
        *(words(seed, stream, index, counter) for stream in Stream if stream != Stream.PROBE),
    ):
        assert (changed != base).all()


def test_no_two_of_many_words_are_equal():
    # 1.6 million words of six streams: a collision among independent words has probability 7e-8.
    words = [
        _random.words(_random.sample_keys(1, stream, torch.arange(512)), torch.zeros(512, dtype=torch.int64), 512)
        for stream in Stream
    ]
    assert torch.cat(words).flatten().unique().numel() == len(Stream) * 512 * 512


def z_scores(values, mean, std, axis):
    return (values.mean(axis) - mean) / (std / math.sqrt(values.shape[axis]))


def test_each_of_the_64_bits_is_fair_and_ignores_its_neighbours():
    # 64 bits and 63 pairs of neighbours, 65,536 words: |z| < 6 fails by chance with probability 3e-7.
    signs = _random.rademacher(
        _random.sample_keys(0, Stream.PROBE, torch.arange(256)),
        torch.zeros(256, dtype=torch.int64),
        64 * 256,
        torch.float64,
    ).reshape(-1, 64)
    assert z_scores(signs, 0.0, 1.0, 0).abs().max() < 6.0
    assert z_scores(signs[:, 1:] * signs[:, :-1], 0.0, 1.0, 0).abs().max() < 6.0


def test_neighbouring_samples_counters_lanes_and_seeds_are_uncorrelated():
    # Correlations of 65,536 products each, in 5 directions and at 3 lags: |z| < 5.5 fails with probability 6e-7.
    def block(seed, first, counter):
        keys = _random.sample_keys(seed, Stream.BROWNIAN, torch.arange(first, first + 256))
        return _random.normal(keys, torch.full((256,), counter), 256, torch.float64)

    base = block(7, 0, 0)
    for lag in (1, 2, 64):
        pairs = [
            (base, block(7, lag, 0)),
            (base, block(7, 0, lag)),
            (base, block(7 + lag, 0, 0)),
            (base[:, lag:], base[:, :-lag]),
            (base[:, :128], base[:, 128:]),
        ]
        for one, other in pairs:
            assert abs(float((one * other).mean())) * math.sqrt(one.numel()) < 5.5


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def normals(request):
    keys = _random.sample_keys(11, Stream.PRIOR, torch.arange(4000))
    return _random.normal(keys, torch.zeros_like(keys), 100, request.param).flatten().double()


def test_normals_have_the_moments_of_the_normal_law(normals):
    # Four moments beyond 5.5 standard errors: false alarm 2e-7. Var of x^k is E x^2k - (E x^k)^2.
    x = normals
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((x**power).mean()) - mean) < 5.5 * math.sqrt(variance / x.numel()), power


def test_normals_fill_a_hundred_equal_cells_evenly(normals):
    # Chi-square with 99 degrees of freedom: false alarm 1e-7 on either side.
    cells = torch.histc(torch.special.ndtr(normals), 100, 0.0, 1.0)
    statistic = float(((cells - 4000.0) ** 2 / 4000.0).sum())
    assert chi2.ppf(1e-7, 99) < statistic < chi2.isf(1e-7, 99)


def test_normals_have_their_tail(normals):
    # Beyond 3.5: 400,000 * 4.65e-4 = 186 expected, Poisson: within 6 standard deviations, false alarm 1e-8.
    x = normals
    expected = x.numel() * math.erfc(3.5 / math.sqrt(2.0))
    assert abs(float((x.abs() > 3.5).sum()) - expected) < 6.0 * math.sqrt(expected)
    assert 4.2 < float(x.abs().max()) < 6.5
    assert torch.isfinite(x).all()


def test_the_extreme_words_still_give_finite_normals():
    drawn = (_random._shift(torch.tensor([0, -1, 1 << 63 - 1, -(1 << 63)]), 11).double() + 1.0) * 2.0**-53
    assert (drawn > 0).all()
    assert (drawn <= 1).all()


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64])
def test_the_sphere_has_exactly_its_radius_and_no_direction(size):
    n = 4096
    keys = _random.sample_keys(2, Stream.PROBE, torch.arange(n))
    x = _random.sphere(keys, torch.zeros_like(keys), size, torch.float64)
    torch.testing.assert_close(
        x.square().sum(1), torch.full((n,), float(size), dtype=torch.float64), rtol=1e-13, atol=0
    )
    # E x = 0, E x x' = I: at most 64 + 64^2 statistics beyond 7 standard errors, false alarm 1e-8.
    assert x.mean(0).abs().max() < 7.0 / math.sqrt(n)
    second = x.T @ x / n - torch.eye(size, dtype=torch.float64)
    assert second.abs().max() < 7.0 * math.sqrt(2.0 / n)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 129])
def test_any_size_is_drawn_and_cast(draw, size):
    keys = _random.sample_keys(2, Stream.PROBE, torch.arange(5))
    for dtype in (torch.float64, torch.float32):
        assert draw(keys, torch.zeros_like(keys), size, dtype).shape == (5, size)
        assert draw(keys, torch.zeros_like(keys), size, dtype).dtype == dtype
    assert draw(keys[:0], torch.zeros_like(keys[:0]), size, torch.float64).shape == (0, size)


def test_signs_are_signs():
    keys = _random.sample_keys(2, Stream.PROBE, torch.arange(50))
    x = _random.rademacher(keys, torch.zeros_like(keys), 100, torch.float32)
    assert torch.equal(x.abs(), torch.ones_like(x))
    assert x.untyped_storage().nbytes() == 4 * 50 * 100  # and nothing more is kept of the words they came from


def test_known_answers_do_not_change():
    # Computed once, on Linux x86-64; a change here changes every published number.
    keys = _random.sample_keys(2026, Stream.PROBE, torch.tensor([0, 1, 123456789]))
    counter = torch.tensor([0, 5, 10**6])
    root = finalise(finalise(2026 + GAMMA & MASK) + 1 * GAMMA & MASK)
    assert keys.tolist() == [signed(finalise(root + (i + 1) * GAMMA & MASK)) for i in (0, 1, 123456789)]
    assert _random.words(keys, counter, 1).flatten().tolist() == [
        -5353177137907339383,
        -1915720388033763014,
        -8637048188792571477,
    ]


def test_uniforms_are_uniform():
    keys = _random.sample_keys(3, Stream.CHAIN, torch.arange(40_000))
    drawn = _random.uniform(keys, torch.zeros(40_000, dtype=torch.int64))
    assert float(drawn.min()) > 0.0
    assert float(drawn.max()) <= 1.0
    for power in (1, 2, 3):  # |z| < 6: false alarm 6e-9
        std = math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        assert abs(float(drawn.pow(power).mean()) - 1 / (power + 1)) < 6.0 * std / math.sqrt(40_000)

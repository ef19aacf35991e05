"""Forward processes: every formula against another way to the same number."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from helpers import SDES, draw, seeded, spread_times, times
from hypothesis import given
from hypothesis import strategies as st

import sdekit

TABLES = {
    "linear": sdekit.TableVPSDE.linear(1000),
    "quadratic": sdekit.TableVPSDE.scaled_linear(1000, 1e-4, 0.02),
    "cosine": sdekit.TableVPSDE.cosine(1000),
    "linear 200": sdekit.TableVPSDE.linear(200),
    "stds": sdekit.TableVPSDE.from_stds(torch.linspace(0.01, 0.3, 60, dtype=torch.float64)),
}
ALL = {**SDES, **{f"table {name}": table for name, table in TABLES.items()}}
every_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())


def slope(function, t):
    """d/dt by autograd; 0 where the function does not depend on t."""
    leaf = t.clone().requires_grad_()
    value = function(leaf)
    return torch.autograd.grad(value.sum(), leaf)[0] if value.requires_grad else torch.zeros_like(t)


def interior(sde, count=400):
    """Times all over the range, off the knots of tables, where the slope jumps."""
    t = spread_times(sde, count)
    return t[:-1] + 0.377 * t.diff()


@every_sde
def test_closed_derivatives_are_those_of_log_alpha_and_log_sigma(sde):
    t = interior(sde)
    torch.testing.assert_close(sde.dlog_alpha(t), slope(sde.log_alpha, t), rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(sde.dlog_sigma(t), slope(sde.log_sigma, t), rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(sde.drift_rate(t), slope(sde.log_alpha, t), rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(sde.dhalf_log_snr(t), slope(sde.half_log_snr, t), rtol=1e-11, atol=1e-300)


@every_sde
def test_g_squared_has_its_three_forms(sde):
    t = interior(sde)
    g2, f = sde.diffusion(t) ** 2, sde.drift_rate(t)
    by_logs = 2.0 * sde.sigma(t) ** 2 * (slope(sde.log_sigma, t) - slope(sde.log_alpha, t))
    by_variance = slope(lambda s: sde.sigma(s) ** 2, t) - 2.0 * f * sde.sigma(t) ** 2
    by_ratio = sde.alpha(t) ** 2 * slope(lambda s: (sde.sigma(s) / sde.alpha(s)) ** 2, t)
    for other in (by_logs, by_variance, by_ratio):
        torch.testing.assert_close(g2, other, rtol=1e-10, atol=0.0)
    assert (g2 > 0).all()


PLAIN = {
    "vp": (lambda t: -0.5 * (0.1 + 19.9 * t), lambda t: 0.1 + 19.9 * t),
    "sub-vp": (
        lambda t: -0.5 * (0.1 + 19.9 * t),
        lambda t: (0.1 + 19.9 * t) * -torch.expm1(-2.0 * (0.1 * t + 0.5 * 19.9 * t**2)),
    ),
    "ve": (lambda t: 0.0 * t, lambda t: 2.0 * (0.01 * 5000.0**t) ** 2 * math.log(5000.0)),
    "karras": (lambda t: 0.0 * t, lambda t: 2.0 * t),
    "flow": (lambda t: -1.0 / (1.0 - t), lambda t: 2.0 * t / (1.0 - t)),
    "cosine": (
        lambda t: -(0.5 * math.pi / 1.008) * torch.tan((t + 0.008) / 1.008 * 0.5 * math.pi),
        lambda t: (math.pi / 1.008) * torch.tan((t + 0.008) / 1.008 * 0.5 * math.pi),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_f_and_g_squared_are_those_of_the_papers(name):
    sde, (drift, squared) = SDES[name], PLAIN[name]
    t = interior(sde)
    torch.testing.assert_close(sde.drift_rate(t), drift(t), rtol=1e-11, atol=0.0)
    torch.testing.assert_close(sde.diffusion(t) ** 2, squared(t), rtol=1e-10, atol=0.0)


def test_the_default_processes_end_where_the_papers_say():
    vp, sub = SDES["vp"], SDES["sub-vp"]
    assert float(vp.alpha(1.0)) == pytest.approx(0.0065716, abs=5e-8)
    assert float(vp.sigma(1.0)) == pytest.approx(0.9999784, abs=5e-8)
    assert float(vp.half_log_snr(1.0)) == pytest.approx(-5.02498, abs=5e-6)
    assert float(sub.sigma(1.0)) == pytest.approx(0.9999568, abs=5e-8)
    assert float(SDES["ve"].sigma(0.0)) == pytest.approx(0.01, rel=1e-14)
    assert SDES["ve"].prior_std == pytest.approx(50.0, rel=1e-14)
    assert SDES["karras"].prior_std == 80.0
    assert (SDES["karras"].sigma_min, SDES["karras"].sigma_max) == (0.002, 80.0)


@every_sde
def test_half_log_snr_strictly_decreases(sde):
    values = sde.half_log_snr(spread_times(sde, 4000))
    assert (values.diff() < 0).all()
    assert (sde.dhalf_log_snr(spread_times(sde, 4000)) < 0).all()


@every_sde
def test_time_at_inverts_half_log_snr(sde):
    t = spread_times(sde, 1000)
    torch.testing.assert_close(sde.time_at(sde.half_log_snr(t)), t, rtol=1e-10, atol=0.0)


positive = st.floats(0.02, 3.0)
RANGE = {
    "vp": st.builds(
        lambda low, gap, end: sdekit.VPSDE(low, low + gap, t_max=end), positive, st.floats(0.1, 40.0), positive
    ),
    "sub-vp": st.builds(lambda low, gap: sdekit.SubVPSDE(low, low + gap), positive, st.floats(0.1, 40.0)),
    "cosine": st.builds(lambda s: sdekit.CosineVPSDE(s), st.floats(0.0, 0.2)),
    "ve": st.builds(lambda low, ratio: sdekit.VESDE(low, low * ratio), positive, st.floats(2.0, 1e5)),
    "karras": st.builds(lambda low, ratio: sdekit.KarrasSDE(low, low * ratio), positive, st.floats(1.5, 1e6)),
    "flow": st.builds(lambda low: sdekit.RectifiedFlow(low), st.floats(1e-6, 0.5)),
    "table": st.builds(sdekit.TableVPSDE, st.lists(st.floats(1e-4, 0.9), min_size=2, max_size=30)),
}


@pytest.mark.parametrize("name", RANGE)
@given(data=st.data(), share=st.floats(0.0, 1.0))
def test_time_at_inverts_half_log_snr_for_any_parameters(name, data, share):
    sde = data.draw(RANGE[name])
    t = times(sde.t_min + share * (sde.t_max - sde.t_min)).clamp(sde.t_min, sde.t_max)
    torch.testing.assert_close(sde.time_at(sde.half_log_snr(t)), t, rtol=1e-9, atol=0.0)
    assert float(sde.dhalf_log_snr(t)) < 0.0


def decimal_sine(x):
    term, total, n = x, x, 1
    while abs(term) > Decimal(10) ** -45:
        term = -term * x * x / ((n + 1) * (n + 2))
        total, n = total + term, n + 2
    return total


def decimal_levels(sde, t):
    """alpha and sigma at float t by 50-digit arithmetic, from the definitions."""
    time = Decimal(t)
    if isinstance(sde, (sdekit.VPSDE, sdekit.SubVPSDE)):
        low, high = Decimal(sde.beta_min), Decimal(sde.beta_max)
        integral = low * time + (high - low) * time * time / 2
        squared = 1 - (-integral).exp()
        return (-integral / 2).exp(), squared.sqrt() if isinstance(sde, sdekit.VPSDE) else squared
    if isinstance(sde, sdekit.CosineVPSDE):
        half_pi = Decimal("1.57079632679489661923132169163975144209858469968755")
        turn, start = (half_pi * (part + Decimal(sde.s)) / (1 + Decimal(sde.s)) for part in (time, Decimal(0)))
        alpha = decimal_sine(half_pi - turn) / decimal_sine(half_pi - start)
        return alpha, (1 - alpha * alpha).sqrt()
    if isinstance(sde, sdekit.VESDE):
        low, high = Decimal(sde.sigma_min), Decimal(sde.sigma_max)
        return Decimal(1), low * ((high / low).ln() * time).exp()
    return (Decimal(1), time) if isinstance(sde, sdekit.KarrasSDE) else (1 - time, time)


@pytest.mark.parametrize("name", ["vp", "sub-vp", "cosine", "ve", "karras", "flow"])
@pytest.mark.parametrize("t", [1e-7, 1e-5, 3.3e-4, 0.02, 0.37, 0.98])
def test_nothing_cancels_at_any_time(name, t):
    sde = SDES[name]
    with localcontext() as context:
        context.prec = 50
        alpha, sigma = decimal_levels(sde, t)
        log_alpha, ratio = float(alpha.ln()), float((alpha / sigma).ln())
    assert float(sde.log_alpha(t)) == pytest.approx(log_alpha, rel=1e-13, abs=1e-300)
    assert float(sde.alpha(t)) == pytest.approx(float(alpha), rel=1e-14)
    assert float(sde.sigma(t)) == pytest.approx(float(sigma), rel=2e-14)
    assert float(sde.half_log_snr(t)) == pytest.approx(ratio, rel=1e-14, abs=1e-14)


def test_sigma_is_exact_where_float32_would_lose_two_percent():
    t = torch.tensor([1e-5], dtype=torch.float32)
    with localcontext() as context:
        context.prec = 50
        _, sigma = decimal_levels(SDES["vp"], float(t))
    assert SDES["vp"].sigma(t).dtype == torch.float64
    assert float(SDES["vp"].sigma(t)) == pytest.approx(float(sigma), rel=1e-14)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_a_table_has_exactly_the_levels_of_its_chain(table):
    steps = len(table.betas)
    chain, variance = [], 0.0
    with localcontext() as context:
        context.prec = 40
        level = Decimal(1)
        for beta in table.betas:
            level *= 1 - Decimal(beta)
            chain.append((float(level.ln() / 2), float((1 - level).sqrt()), float((level / (1 - level)).ln() / 2)))
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    log_alpha, sigma, ratio = (torch.tensor(column, dtype=torch.float64) for column in zip(*chain, strict=True))
    torch.testing.assert_close(table.log_alpha(t), log_alpha, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(table.sigma(t), sigma, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(table.half_log_snr(t), ratio, rtol=0.0, atol=1e-11)
    assert table.t_min == 1.0 / steps
    assert table.t_max == 1.0
    # The chain x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps itself, run from variance 0.
    for i, beta in enumerate(table.betas):
        variance = (1.0 - beta) * variance + beta
        assert variance == pytest.approx(float(sigma[i]) ** 2, rel=1e-11)


@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_the_table_label_counts_from_zero(steps):
    sde = sdekit.TableVPSDE([0.1] * steps)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(
        sdekit.table_label(steps)(sde, t), torch.arange(steps, dtype=torch.float64), rtol=0.0, atol=1e-9
    )
    assert float(sdekit.table_label(steps)(sde, times(sde.t_min))) == pytest.approx(0.0, abs=1e-12)
    assert float(sdekit.table_label(steps)(sde, times(sde.t_max))) == steps - 1


def squared_alpha(table, t):
    return float(table.alpha(t)) ** 2


def test_the_known_tables_have_their_published_figures():
    linear, quadratic, cosine = TABLES["linear"], TABLES["quadratic"], TABLES["cosine"]
    assert squared_alpha(linear, 1.0) == pytest.approx(4.0358e-5, rel=2e-5)
    assert squared_alpha(quadratic, 1.0) == pytest.approx(7.334e-4, rel=1e-4)
    assert squared_alpha(cosine, 1.0) == pytest.approx(2.43e-9, rel=2e-3)
    assert squared_alpha(linear, 1e-3) == pytest.approx(0.9999, rel=1e-12)
    assert squared_alpha(cosine, 1e-3) == pytest.approx(0.99995872, abs=5e-9)
    assert sum(beta == 0.999 for beta in cosine.betas) == 1
    ends = [(float(sde.half_log_snr(1e-3)), float(sde.half_log_snr(1.0))) for sde in (linear, quadratic, cosine)]
    for found, published in zip(ends, [(4.605, -5.059), (4.605, -3.609), (5.047, -9.918)], strict=True):
        assert found == pytest.approx(published, abs=6e-4)
    # Matching lambda is not matching t: the continuous process at t = i/N is 6.8% away.
    assert squared_alpha(SDES["vp"], 1.0) == pytest.approx(4.3186e-5, rel=2e-5)


def test_tables_of_other_lengths_scale_their_ends():
    table = sdekit.TableVPSDE.linear(250)
    assert table.betas[0] == pytest.approx(4e-4)
    assert table.betas[-1] == pytest.approx(0.08)
    stable = sdekit.TableVPSDE.scaled_linear()
    assert stable.betas[0] == pytest.approx(0.00085)
    assert stable.betas[-1] == pytest.approx(0.012)
    roots = torch.tensor(stable.betas, dtype=torch.float64).sqrt().diff()
    torch.testing.assert_close(roots, roots[:1].expand_as(roots), rtol=1e-9, atol=0.0)


def test_a_table_of_standard_deviations_keeps_alpha_squared_plus_beta_squared_one():
    stds = torch.linspace(0.02, 0.4, 50, dtype=torch.float64)
    table = sdekit.TableVPSDE.from_stds(stds)
    t = torch.arange(1, 51, dtype=torch.float64) / 50
    torch.testing.assert_close(table.alpha(t), (1.0 - stds**2).sqrt().cumprod(0), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(table.alpha(t) ** 2 + table.sigma(t) ** 2, torch.ones_like(t), rtol=1e-13, atol=0.0)


def test_between_its_levels_a_table_is_linear_in_log_alpha():
    table, steps = TABLES["stds"], 60
    t = torch.arange(1, steps, dtype=torch.float64) / steps
    middle = table.log_alpha(t + 0.5 / steps)
    torch.testing.assert_close(
        middle, 0.5 * (table.log_alpha(t) + table.log_alpha(t + 1.0 / steps)), rtol=1e-12, atol=0
    )


@every_sde
def test_the_prior_is_the_normal_law_of_its_std(sde):
    x = 2.0 * draw(1, 7, 3, 2) * sde.prior_std
    reference = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), sde.prior_std).log_prob(x).sum((1, 2))
    torch.testing.assert_close(sde.prior_log_prob(x), reference, rtol=1e-13, atol=1e-12)
    assert sde.prior_log_prob(x.float()).dtype == torch.float64


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_prior_samples_follow_the_prior_and_their_generator(name):
    # False alarm: the mean of 60,000 squares off by 5.5 standard errors, 4e-8.
    sde = SDES[name]
    x = sde.sample_prior((20_000, 3), generator=seeded(3), dtype=torch.float64) / sde.prior_std
    assert abs(float(x.mean())) < 5.5 / math.sqrt(60_000)
    assert abs(float(x.square().mean()) - 1.0) < 5.5 * math.sqrt(2.0 / 60_000)
    again = sde.sample_prior((20_000, 3), generator=seeded(3), dtype=torch.float64) / sde.prior_std
    assert torch.equal(x, again)


def test_prior_samples_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, second = SDES["vp"].sample_prior((4, 2)), SDES["vp"].sample_prior((4, 2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.random.get_rng_state())


@every_sde
def test_perturbed_data_have_the_marginals_moments(sde):
    # 40,000 draws at each of three times; six statistics beyond 5.5 standard errors: false alarm 2e-7.
    n, x0 = 40_000, times(0.7, -1.3)
    for number, share in enumerate((0.05, 0.4, 0.9)):
        t = sde.t_min + share * (sde.t_max - sde.t_min)
        x = sde.perturb(x0.expand(n, 2), t, draw(number, n, 2))
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        z = (x - alpha * x0) / sigma
        assert float(z.mean().abs()) < 5.5 / math.sqrt(2 * n)
        assert abs(float(z.square().mean()) - 1.0) < 5.5 / math.sqrt(n)


def test_perturb_is_per_sample_and_keeps_the_dtype():
    sde, t = SDES["vp"], times(0.01, 0.5, 1.0)
    x0, noise = draw(1, 3, 2, 2).float(), draw(2, 3, 2, 2).float()
    x = sde.perturb(x0, t, noise)
    assert x.dtype == torch.float32
    for i in range(3):
        torch.testing.assert_close(x[i : i + 1], sde.perturb(x0[i : i + 1], float(t[i]), noise[i : i + 1]))
    expected = sde.alpha(t)[:, None, None] * x0.double() + sde.sigma(t)[:, None, None] * noise.double()
    torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-6)


BAD = {
    "beta order": lambda: sdekit.VPSDE(2.0, 1.0),
    "beta zero": lambda: sdekit.VPSDE(0.0, 1.0),
    "beta nan": lambda: sdekit.SubVPSDE(0.1, math.nan),
    "t_min zero": lambda: sdekit.VPSDE(t_min=0.0),
    "t_max below": lambda: sdekit.SubVPSDE(t_min=0.5, t_max=0.4),
    "t_max infinite": lambda: sdekit.VESDE(t_max=math.inf),
    "sigma order": lambda: sdekit.VESDE(1.0, 0.5),
    "sigma zero": lambda: sdekit.KarrasSDE(0.0, 80.0),
    "sigma equal": lambda: sdekit.KarrasSDE(1.0, 1.0),
    "cosine at one": lambda: sdekit.CosineVPSDE(t_max=1.0),
    "cosine offset": lambda: sdekit.CosineVPSDE(s=-0.1),
    "flow at one": lambda: sdekit.RectifiedFlow(t_max=1.0),
    "beta one": lambda: sdekit.TableVPSDE([0.1, 1.0]),
    "beta negative": lambda: sdekit.TableVPSDE([0.1, -0.2]),
    "one beta": lambda: sdekit.TableVPSDE([0.1]),
    "before the table": lambda: sdekit.TableVPSDE([0.1, 0.2], t_min=0.1),
    "after the table": lambda: sdekit.TableVPSDE([0.1, 0.2], t_max=1.5),
    "short table": lambda: sdekit.TableVPSDE.linear(10),
    "noise shape": lambda: SDES["vp"].perturb(torch.zeros(2, 3), 0.5, torch.zeros(2, 1)),
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_bad_parameters_are_refused_with_their_value(make):
    with pytest.raises(ValueError, match=r"needed"):
        make()


def test_numbers_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="beta_min"):
        sdekit.VPSDE(beta_min="0.1")
    with pytest.raises(TypeError, match="steps"):
        sdekit.TableVPSDE.linear(100.0)
    with pytest.raises(TypeError, match="dequantise"):
        SDES["vp"].prior_log_prob(torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("t", ["a", None, [0.1, "b"], object()])
def test_what_is_no_time_is_named(t):
    for ask in (sdekit.VPSDE().alpha, sdekit.TableVPSDE([0.1, 0.2]).sigma, sdekit.KarrasSDE().diffusion):
        with pytest.raises(TypeError, match="; a number or a tensor of times is needed"):
            ask(t)


def test_processes_are_values():
    assert sdekit.VPSDE() == sdekit.VPSDE(0.1, 20.0)
    assert sdekit.KarrasSDE() == sdekit.KarrasSDE(0.002, 80.0)
    assert sdekit.TableVPSDE([0.1, 0.2]) == sdekit.TableVPSDE(torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert len({sdekit.VESDE(), sdekit.VESDE(0.01, 50.0), sdekit.RectifiedFlow()}) == 2


def test_cumulated_alphas_are_not_taken_for_betas():
    table = sdekit.TableVPSDE.linear()
    levels = (1.0 - torch.tensor(table.betas, dtype=torch.float64)).cumprod(0)
    with pytest.raises(ValueError, match="alphas_cumprod"):
        sdekit.TableVPSDE(levels)
    before = torch.cat((torch.ones(1, dtype=torch.float64), levels[:-1]))
    assert torch.tensor(sdekit.TableVPSDE(1.0 - levels / before).betas) == pytest.approx(
        torch.tensor(table.betas), rel=1e-9
    )

"""Dequantisers against exact densities: laws, entropies, decoders, and bounds that are bounds.

Statistical tests have fixed seeds; |z| < 5 has a false-alarm probability of 6e-7 each, one-sided half of that.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import SDES, cell_log_prob, gaussian
from scipy import integrate, stats

import sdekit
from sdekit import _random
from sdekit._random import Stream
from sdekit.dequantize import TruncatedNormalDequantizer, UniformDequantizer, VariationalDequantizer, _log_decoder
from sdekit.units import Levels

VP = SDES["vp"]
LAWS = {"uniform": UniformDequantizer(), "truncated": TruncatedNormalDequantizer(), "v": VariationalDequantizer()}
STATED = 5.0


def times(t, count):
    return torch.full((count,), t, dtype=torch.float64)


def drawn(law, k, levels, t, count=1, sde=VP, seed=0):
    """`count` draws for the levels `k` (D,)."""
    keys = _random.sample_keys(seed, Stream.DEQUANTISE, torch.arange(count))
    return law.draw(sde, times(t, count), k.expand(count, -1), levels, keys, torch.zeros(count, dtype=torch.int64))


def time_of(tau, levels, sde=VP):
    """The noise level at which half a cell is `tau` of the noise."""
    return float(sde.time_at(math.log(2.0 * tau / levels.width)))


class TestLaws:
    CELLS = Levels(9, -1.5, 1.0)
    K = torch.tensor([0, 8, 3])

    @pytest.mark.parametrize("tau", [1e-3, 0.1, 1.0, 3.0, 9.0])
    def test_a_truncated_normal_has_scipys_density_and_entropy(self, tau):
        t = time_of(tau, self.CELLS)
        out = drawn(TruncatedNormalDequantizer(), self.K, self.CELLS, t, 50)
        alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
        centres = alpha * (self.CELLS.low + self.CELLS.width * (self.K.double() + 0.5))
        law = [stats.truncnorm(-tau, tau, loc=float(centre), scale=sigma) for centre in centres]
        logs = sum(torch.from_numpy(one.logpdf(x.numpy())) for one, x in zip(law, out.x.T, strict=True))
        inside = logs.isfinite()  # an end of the cell, by rounding
        assert inside.double().mean() > 0.9
        torch.testing.assert_close(out.surprise[inside], -logs[inside], rtol=1e-7, atol=1e-7)
        entropy = torch.full_like(out.entropy, sum(one.entropy() for one in law))
        torch.testing.assert_close(out.entropy, entropy, rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("tau", [0.05, 1.0, 3.0])
    @pytest.mark.parametrize("name", LAWS)
    def test_draws_follow_their_law(self, name, tau):
        """Kolmogorov and Smirnov's test, p > 1e-6: that is its false-alarm probability in each of 27 tests."""
        t = time_of(tau, self.CELLS)
        out = drawn(LAWS[name], self.K, self.CELLS, t, 4000)
        alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
        for level, x in zip(self.K.tolist(), out.x.T, strict=True):
            edge = alpha * (self.CELLS.low + self.CELLS.width * level)
            width = alpha * self.CELLS.width
            law = {
                "uniform": stats.uniform(edge, width),
                "truncated": stats.truncnorm(-tau, tau, loc=edge + 0.5 * width, scale=sigma),
                "v": stats.norm(edge + 0.5 * width, sigma),
            }[name]
            assert stats.kstest(x.numpy(), law.cdf).pvalue > 1e-6
            if name != "v":
                assert float(x.min()) >= edge - 1e-12
                assert float(x.max()) <= edge + width + 1e-12
        assert abs(float(torch.corrcoef(out.x.T)[0, 1])) < STATED / math.sqrt(4000)

    @pytest.mark.parametrize("name", LAWS)
    def test_the_entropy_is_the_mean_surprise(self, name):
        out = drawn(LAWS[name], torch.zeros(6, dtype=torch.int64), self.CELLS, 0.05, 20_000)
        spread = float(out.surprise.std()) / math.sqrt(20_000)
        assert abs(float((out.surprise - out.entropy).mean())) <= STATED * spread + 1e-9

    @pytest.mark.parametrize("tau", [0.01, 0.5, 3.0, 30.0])
    def test_the_decoder_s_probabilities_sum_to_one_wherever_the_state_is(self, tau):
        e = torch.linspace(-8.0, 8.0, 41, dtype=torch.float64)[:, None]  # from the centre of cell 2
        shares = []
        for level in range(6):
            away = e - 2.0 * tau * (level - 2)
            shares.append(_log_decoder(torch.full((41, 1), level), away, torch.full((41, 1), tau), 6).exp())
        total = torch.stack(shares).sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-9, atol=0)

    def test_a_decoder_far_from_its_neighbours_is_sure_to_the_last_digit(self):
        e = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        value = _log_decoder(torch.tensor([[0], [0]]), e, torch.tensor([[4.0], [4.0]], dtype=torch.float64), 2)
        torch.testing.assert_close(value, -torch.exp(8.0 * (e[:, 0] - 4.0)), rtol=1e-9, atol=0)


class TestNoiseLevels:
    @pytest.mark.parametrize("name", SDES)
    @pytest.mark.parametrize("tau", [1.0, 3.0])
    def test_the_default_level_is_where_half_a_cell_is_tau_of_the_noise(self, name, tau):
        sde, cells = SDES[name], Levels(16)
        for law in (TruncatedNormalDequantizer(tau), VariationalDequantizer(tau)):
            t = law.time(sde, cells)
            assert sde.t_min <= t <= sde.t_max
            half = 0.5 * cells.width * float(sde.alpha(t)) / float(sde.sigma(t))
            assert half == pytest.approx(tau, rel=1e-9)
        assert UniformDequantizer().time(sde, cells) == sde.t_min

    @pytest.mark.parametrize("kind", [TruncatedNormalDequantizer, VariationalDequantizer])
    def test_a_level_the_process_never_has_is_refused_with_a_way_out(self, kind):
        short = sdekit.VPSDE(t_min=1e-3)
        with pytest.raises(ValueError, match=r"half_log_snr=6\.644.*4\.\d+ at t_min=0\.001.*pass t="):
            kind().time(short, Levels(256))
        with pytest.raises(ValueError, match=r"t_max"):
            kind(1e-4).time(short, Levels(2))

    @pytest.mark.parametrize("kind", [TruncatedNormalDequantizer, VariationalDequantizer])
    @pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
    def test_a_senseless_tau_is_refused(self, kind, tau):
        with pytest.raises(ValueError, match="tau="):
            kind(tau)


class TestKeys:
    @pytest.mark.parametrize("name", LAWS)
    def test_a_draw_depends_on_seed_sample_and_number_alone(self, name):
        cells, t = Levels(5), times(0.02, 6)
        k = torch.randint(0, 5, (6, 4), generator=torch.Generator().manual_seed(0))

        def draw(rows, seed=0, number=0):
            keys = _random.sample_keys(seed, Stream.DEQUANTISE, rows)
            return LAWS[name].draw(VP, t[rows], k[rows], cells, keys, torch.full_like(rows, number))

        every = torch.arange(6)
        whole = draw(every)
        some = draw(torch.tensor([4, 1]))
        for one, other in zip(whole, some, strict=True):
            assert torch.equal(one[[4, 1]], other)
        for different in (draw(every, seed=1), draw(every, number=1)):
            assert (different.x != whole.x).all()


def weights(law, target, k, levels, t, count, entropy=False, sde=VP):
    """(count,) log weights under the exact density."""
    out = drawn(law, k, levels, t, count, sde)
    return target.marginal_log_prob(sde, out.x, t) + out.decoder + (out.entropy if entropy else out.surprise)


class TestBounds:
    """On a Gaussian whose cells have known probabilities; cells a standard deviation wide, so that bounds have gaps."""

    TARGET = sdekit.targets.Gaussian(torch.tensor([0.3, -0.2]), torch.tensor([0.2, 0.05]))
    CELLS = Levels(6, -1.2, 1.2)
    K = torch.tensor([4, 1])

    @pytest.mark.parametrize(
        ("name", "t"), [("uniform", 1e-5), ("uniform", 0.02), ("uniform", 0.2), ("truncated", 0.02), ("truncated", 0.2)]
    )
    def test_weights_average_to_the_probability_of_the_cell(self, name, t):
        value = weights(LAWS[name], self.TARGET, self.K, self.CELLS, t, 40_000)
        truth = cell_log_prob(self.TARGET, self.K, self.CELLS, VP, t)
        share = (value - truth).exp()
        assert abs(float(share.mean()) - 1.0) < STATED * float(share.std()) / math.sqrt(40_000)

    def test_variational_weights_average_to_the_probability_under_the_decoder(self):
        one = sdekit.targets.Gaussian(torch.tensor([0.3]), torch.tensor([0.2]))
        t, level = 0.05, torch.tensor([4])
        alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
        centres = [alpha * float(self.CELLS.place(torch.tensor(float(j)))) for j in range(6)]
        law = stats.norm(alpha * 0.3, math.sqrt(alpha**2 * 0.2 + sigma**2))

        def inside(x):
            pulls = [math.exp(-((x - centre) ** 2) / (2.0 * sigma**2)) for centre in centres]
            return law.pdf(x) * pulls[4] / sum(pulls)

        truth = integrate.quad(inside, centres[4] - 6 * sigma, centres[4] + 6 * sigma, epsabs=1e-11)[0]
        share = weights(LAWS["v"], one, level, self.CELLS, t, 40_000).exp() / truth
        assert abs(float(share.mean()) - 1.0) < STATED * float(share.std()) / math.sqrt(40_000)

    @pytest.mark.parametrize("name", LAWS)
    def test_bounds_hold_and_tighten_with_every_draw(self, name):
        """Each gap is positive and above the next by more than 5 standard errors; entropies agree within 5."""
        t = 0.05
        truth = cell_log_prob(self.TARGET, self.K, self.CELLS, VP, t)
        value = weights(LAWS[name], self.TARGET, self.K, self.CELLS, t, 36_000)
        if name == "v":  # its own probability, by many draws
            truth = float(
                torch.logsumexp(weights(LAWS[name], self.TARGET, self.K, self.CELLS, t, 400_000), 0)
            ) - math.log(400_000)
        gaps = []
        for count in (1, 5, 20):
            bound = torch.logsumexp(value.reshape(-1, count), 1) - math.log(count)
            gaps.append((truth - float(bound.mean()), float(bound.std()) / math.sqrt(len(bound))))
        for (gap, error), (less, other) in itertools.pairwise(gaps):
            assert gap - less > STATED * math.hypot(error, other)
        assert gaps[-1][0] > -STATED * gaps[-1][1]
        assert gaps[-1][0] < 0.1 * gaps[0][0]
        closed = weights(LAWS[name], self.TARGET, self.K, self.CELLS, t, 36_000, entropy=True)
        apart = closed - value
        assert abs(float(apart.mean())) <= STATED * float(apart.std()) / math.sqrt(36_000) + 1e-12


class TestWhichIsBest:
    """One dimension; the average bound's gap is the divergence of q from p_t within the cell, by quadrature."""

    CELLS = Levels(4, -1.0, 1.0)
    T = time_of(3.0, CELLS)

    def gap(self, name, density):
        """KL(q | p_t restricted to the cell of level 2), nats."""
        alpha, sigma = float(VP.alpha(self.T)), float(VP.sigma(self.T))
        low, high = 0.0, alpha * self.CELLS.width
        mass = integrate.quad(density, low, high)[0]
        law = stats.uniform(low, high) if name == "uniform" else stats.truncnorm(-3, 3, loc=0.5 * high, scale=sigma)
        return integrate.quad(lambda x: law.pdf(x) * (law.logpdf(x) - math.log(density(x) / mass)), low, high)[0]

    def test_of_noisy_integers_the_truncated_normal(self):
        """p_t is nearly a normal within the cell, and the truncated normal nearly that. The uniform law pays tau^2/6 +
        log(Z sqrt(2 pi)/(2 tau)) for it, a little less since the neighbours' tails flatten p_t at the edges."""
        sharp = sdekit.targets.GaussianMixture(
            torch.tensor([0.1, 0.2, 0.4, 0.3]), self.CELLS.place(torch.arange(4.0))[:, None], torch.full((4,), 1e-6)
        )

        def density(x):
            return float(sharp.marginal_log_prob(VP, torch.tensor([[x]], dtype=torch.float64), self.T).exp())

        uniform, truncated = self.gap("uniform", density), self.gap("truncated", density)
        assert truncated < 2e-3
        expected = 9.0 / 6.0 + math.log(math.erf(3.0 / math.sqrt(2.0)) * math.sqrt(2.0 * math.pi) / 6.0)
        assert uniform == pytest.approx(expected, abs=0.04)
        # the weights say the same, and drawn entropies have next to no spread where closed ones have
        k = torch.full((8,), 2)
        value = {
            (name, entropy): weights(LAWS[name], _independent(sharp), k, self.CELLS, self.T, 2000, entropy)
            for name in ("uniform", "truncated")
            for entropy in (False, True)
        }
        mean = {key: float(one.mean()) / 8 for key, one in value.items()}
        assert mean["truncated", False] - mean["uniform", False] == pytest.approx(uniform - truncated, abs=0.02)
        assert float(value["truncated", False].std()) < 0.1 * float(value["truncated", True].std())

    def test_of_a_density_flat_within_its_cells_the_uniform_law(self):
        alpha, sigma = float(VP.alpha(self.T)), float(VP.sigma(self.T))
        high = alpha * self.CELLS.width

        def density(x):  # uniform on the cell, then noised
            return (stats.norm.cdf(x / sigma) - stats.norm.cdf((x - high) / sigma)) / high

        flat = self.gap("truncated", lambda x: 1.0)
        assert flat == pytest.approx(0.389, abs=1e-3)
        assert self.gap("uniform", lambda x: 1.0) == pytest.approx(0.0, abs=1e-12)
        assert self.gap("uniform", density) < self.gap("truncated", density)


class _Independent:
    """Independent copies of a one-dimensional target: what a product of densities is."""

    def __init__(self, target):
        self.target = target

    def marginal_log_prob(self, sde, x, t):
        return self.target.marginal_log_prob(sde, x.reshape(-1, 1), t).reshape(x.shape).sum(1)


def _independent(target):
    return _Independent(target)


def test_cell_probabilities_of_a_gaussian_add_up_to_its_mass():
    target, cells = gaussian(1), Levels(40, -6.0, 6.0)
    total = sum(math.exp(cell_log_prob(target, torch.tensor([level]), cells, VP, 0.1)) for level in range(40))
    assert total == pytest.approx(1.0, abs=1e-9)

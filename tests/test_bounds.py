"""Bounds and estimates without a solve: what each is below or equal to, and whether its error bar tells.

A statistical test compares z, a mean error over its own standard error, with 4.5: a false alarm has probability 7e-6
for normal errors, and the seeds are fixed.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from helpers import PARAMETERIZATIONS, SDES, Function, draw, gaussian, mixture, moments, perceptron, seeded, watched
from scipy.integrate import solve_ivp

from sdekit import VPSDE, Exact, Hutchinson, NetworkError, ScoreModel, log_likelihood
from sdekit.bounds import sde_bound, variational_bound
from sdekit.loss import LogNormalSigma, UniformHalfLogSNR
from sdekit.model.nets import MLP
from sdekit.pointwise import i_mmse, path_integral
from sdekit.sandwich import sandwich
from sdekit.targets import Gaussian
from sdekit.training import Batch, Recipe, train
from sdekit.zoo import digits

VP = VPSDE()
SHORT = VPSDE(t_max=0.2)  # noise that leaves much of the data: the terminal law matters
COARSE = VPSDE(t_min=0.05)  # noise at t_min that is no small matter
ALL = {"variational": variational_bound, "sde": sde_bound, "path": path_integral, "i-mmse": i_mmse}
every_estimate = pytest.mark.parametrize("estimate", ALL.values(), ids=ALL.keys())
every_process = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
from_t_min = pytest.mark.parametrize("estimate", [sde_bound, path_integral], ids=["sde", "path"])
LIMIT = 4.5
TAUGHT = mixture(2, seed=8)


def z_of(found, truth):
    """The mean error over its standard error."""
    return float((found.value - truth).sum() / found.std_error.square().sum().sqrt())


def at_data(target, sde, x):
    """E[log p_{t_min}(x_t)] over the noise of t_min given x, of a Gaussian, plus D log alpha: in units of the data."""
    alpha, variance = sde.alpha(sde.t_min), sde.sigma(sde.t_min).square()
    inside = target.marginal_log_prob(sde, alpha * x, sde.t_min)
    return inside + 0.5 * variance * target.divergence(sde, alpha * x, sde.t_min) + x.shape[1] * alpha.log()


def mismatch(target, sde, x, from_data):
    """E[log (prior / p_T)(x_T)] given x, of a Gaussian target, on the nodes of a cubature exact for quadratics."""
    end, size = sde.t_max, x.shape[1]
    scale = sde.alpha(end) if from_data else sde.alpha(end) / sde.alpha(sde.t_min)
    spread = sde.sigma(end).square() - (0.0 if from_data else 1.0) * (scale * sde.sigma(sde.t_min)).square()
    nodes = math.sqrt(size) * torch.cat((torch.eye(size), -torch.eye(size))).double()
    far = scale * x[:, None] + spread.sqrt() * nodes
    flat = far.reshape(-1, size)
    gain = sde.prior_log_prob(flat) - target.marginal_log_prob(sde, flat, end)
    return gain.reshape(x.shape[0], -1).mean(1)


def cubature(target, sde, t):
    """Points whose mean is the expectation of every quadratic under the target's marginal at time t (0: the data)."""
    parts, size = target._components, target.dim
    alpha, sigma = (1.0, 0.0) if t == 0 else (sde.alpha(t), sde.sigma(t))
    stds = (alpha**2 * parts.values[0] + sigma**2).sqrt()
    axes = math.sqrt(size) * (parts.basis[0] * stds).T
    return alpha * parts.means + torch.cat((axes, -axes))


class TestExactScores:
    @every_process
    def test_a_gaussian_compared_with_itself_has_its_density_without_noise(self, sde):
        target = gaussian(3)
        model, x = target.score_model(sde), target.sample(5, generator=seeded(1))
        options = {"draws": 8, "data_moments": target}
        there = target.marginal_log_prob(sde, x, sde.t_min)
        for estimate in (sde_bound, path_integral):
            found = estimate(model, x, **options)
            torch.testing.assert_close(found.value, there, rtol=0, atol=1e-5)
            assert found.std_error.max() < 1e-5
        torch.testing.assert_close(i_mmse(model, x, **options).value, target.log_prob(x), rtol=0, atol=1e-7)
        bound = variational_bound(model, x, **options)
        torch.testing.assert_close(bound.value, at_data(target, sde, x), rtol=0, atol=1e-5)

    @every_process
    def test_a_gaussian_has_its_density_less_what_the_prior_is_off_by(self, sde):
        target = gaussian(3)
        model, x = target.score_model(sde), target.sample(24, generator=seeded(2))
        there = target.marginal_log_prob(sde, x, sde.t_min) + mismatch(target, sde, x, from_data=False)
        from_data = mismatch(target, sde, x, from_data=True)
        assert abs(z_of(sde_bound(model, x), there)) < LIMIT
        assert abs(z_of(path_integral(model, x, seed=1), there)) < LIMIT
        assert abs(z_of(variational_bound(model, x, seed=2), at_data(target, sde, x) + from_data)) < LIMIT
        assert abs(z_of(i_mmse(model, x, seed=3), target.log_prob(x) + from_data)) < LIMIT

    @pytest.mark.parametrize("meaning", PARAMETERIZATIONS.values(), ids=PARAMETERIZATIONS.keys())
    def test_nor_does_it_matter_what_the_network_predicts(self, meaning):
        target = gaussian(3)
        model, x = target.score_model(SDES["flow"], meaning), target.sample(3, generator=seeded(1))
        truth = target.marginal_log_prob(SDES["flow"], x, SDES["flow"].t_min)
        for estimate in (sde_bound, path_integral):
            found = estimate(model, x, draws=8, data_moments=target)
            torch.testing.assert_close(found.value, truth, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("sde", [SDES["ve"], SDES["flow"]], ids=["ve", "flow"])
    @pytest.mark.parametrize("matched", [True, False], ids=["moments", "prior"])
    def test_a_mixture_has_its_density_within_the_error_bars(self, sde, matched):
        """Left out: what the terminal law is off by, of third order in alpha(t_max) or, unmatched, below 0.01 here."""
        target = mixture(4, seed=1)
        model, x = target.score_model(sde), target.sample(64, generator=seeded(3))
        options = {"draws": 512, "data_moments": moments(target) if matched else None}
        for number, (estimate, t) in enumerate(
            ((sde_bound, 1), (path_integral, 1), (variational_bound, 0), (i_mmse, 0))
        ):
            truth = target.marginal_log_prob(sde, x, sde.t_min) if t else target.log_prob(x)
            assert abs(z_of(estimate(model, x, seed=number, **options), truth)) < LIMIT

    def test_so_has_it_where_t_min_is_no_small_noise(self):
        """Levels close to t_min count here: where the two forms have another kappa than from the data."""
        target = mixture(4, seed=1)
        model, x = target.score_model(COARSE), target.sample(128, generator=seeded(3))
        truth = target.marginal_log_prob(COARSE, x, COARSE.t_min)
        for seed, estimate in enumerate((sde_bound, path_integral)):
            assert abs(z_of(estimate(model, x, draws=256, seed=seed), truth)) < LIMIT

    def test_at_one_point_the_noise_averages_out(self):
        target = mixture(1, seed=4)
        model, x = target.score_model(VP), target.sample(1, generator=seeded(5))
        truth = target.log_prob(x)
        error = []
        for draws in (64, 64 * 256):
            found = i_mmse(model, x.expand(16, 1), draws=draws, data_moments=moments(target))
            error.append(float((found.value - truth).square().mean().sqrt()))
        assert error[1] < error[0] / 8
        assert error[1] < 0.02

    def test_the_gap_to_the_datas_density_is_the_divergence_of_the_terminal_laws(self):
        """Averaged over the data, by a cubature exact for Gaussians; at single points the gap has either sign."""
        target, size = gaussian(3), 3
        model, options = target.score_model(SHORT), {"draws": 4096}
        alpha, sigma = SHORT.alpha(SHORT.t_max), SHORT.sigma(SHORT.t_max)
        values, means = target._components.values[0], target._components.means[0]
        spread = alpha**2 * values + sigma**2
        gap = 0.5 * float((spread + (alpha * means) ** 2 - 1.0 - spread.log()).sum())
        assert gap > 0.1

        at = cubature(target, SHORT, SHORT.t_min)
        bound = sde_bound(model, at, **options)
        off = target.marginal_log_prob(SHORT, at, SHORT.t_min) - bound.value
        error = float(bound.std_error.square().sum().sqrt()) / (2 * size)
        assert abs(float(off.mean()) - gap) < LIMIT * error < 0.3 * gap
        far = 3.0 * at - 2.0 * at.mean(0)
        for points, sign in ((at, -1), (far, 1)):
            pointwise = mismatch(target, SHORT, points, from_data=False)
            assert (sign * pointwise).max() > 0.2
            truth = target.marginal_log_prob(SHORT, points, SHORT.t_min) + pointwise
            assert abs(z_of(sde_bound(model, points, **options), truth)) < LIMIT

        x = cubature(target, SHORT, 0)
        found = variational_bound(model, x, seed=1, **options)
        off = at_data(target, SHORT, x) - found.value
        assert abs(float(off.mean()) - gap) < LIMIT * float(found.std_error.square().sum().sqrt()) / (2 * size)

    def test_every_law_of_the_levels_gives_the_same_mean(self):
        target = mixture(2, seed=6)
        model, x = target.score_model(VP), target.sample(32, generator=seeded(6))
        truth = target.log_prob(x)
        for seed, levels in enumerate((UniformHalfLogSNR(), LogNormalSigma(mean=-1.0, std=2.5), None)):
            found = i_mmse(model, x, times=levels, data_moments=moments(target), seed=seed)
            assert abs(z_of(found, truth)) < LIMIT

    @every_estimate
    @pytest.mark.parametrize("draws", [8, 128])
    def test_the_error_bar_is_that_of_the_draws(self, estimate, draws):
        """Mean squared errors over the mean claimed variance, 1024 samples: 1 within 0.3, 5 times its own error."""
        target = mixture(2, seed=7)
        model, x = target.score_model(VP), target.sample(1024, generator=seeded(7))
        found = estimate(model, x, draws=draws, data_moments=moments(target))
        t_min = estimate in (sde_bound, path_integral)
        truth = target.marginal_log_prob(VP, x, VP.t_min) if t_min else target.log_prob(x)
        ratio = float((found.value - truth).square().mean() / found.std_error.square().mean())
        assert 0.7 < ratio < 1.3


class TestAnyNetwork:
    MODEL = ScoreModel(perceptron(2, seed=3), COARSE, data_std=0.5)

    def test_both_forms_have_one_mean(self):
        x = draw(8, 48, 2)
        by_trace, plain = sde_bound(self.MODEL, x, draws=512), path_integral(self.MODEL, x, draws=512, seed=1)
        apart = by_trace.value - plain.value
        spread = (by_trace.std_error.square() + plain.std_error.square()).sum().sqrt()
        assert abs(float(apart.sum() / spread)) < LIMIT
        assert float(spread) / 48 < 0.02 * by_trace.value.abs().mean()

    def test_the_variational_bound_is_the_mean_of_the_sdes_bound_over_the_noise_of_t_min(self):
        x, count = draw(9, 2, 2), 256
        noisy = COARSE.alpha(COARSE.t_min) * x + COARSE.sigma(COARSE.t_min) * draw(10, count, 2, 2)
        inside = sde_bound(self.MODEL, noisy.reshape(-1, 2), draws=64).value.reshape(count, 2)
        mean, error = inside.mean(0), inside.std(0) / math.sqrt(count)
        found = variational_bound(self.MODEL, x, draws=8192, seed=1)
        apart = found.value - 2 * COARSE.log_alpha(COARSE.t_min) - mean
        assert (apart.abs() / (error.square() + found.std_error.square()).sqrt()).max() < LIMIT
        assert (sde_bound(self.MODEL, COARSE.alpha(COARSE.t_min) * x, draws=2048).value - mean).abs().max() > 0.1

    def test_the_variational_bound_is_the_sum_of_its_parts(self):
        x = draw(11, 3, 2)
        found = variational_bound(self.MODEL, x, draws=8192)
        torch.testing.assert_close(found.value, found.reconstruction - found.prior - found.diffusion)
        ratio = COARSE.sigma(COARSE.t_min) / COARSE.alpha(COARSE.t_min)
        assert float(found.reconstruction[0]) == pytest.approx(-math.log(2 * math.pi * math.e) - 2 * math.log(ratio))
        alpha, variance = COARSE.alpha(COARSE.t_max), COARSE.sigma(COARSE.t_max).square()
        prior = 0.5 * (alpha**2 * x.square().sum(1) + 2 * (variance - 1 - variance.log()))
        torch.testing.assert_close(found.prior, prior)
        # The diffusion loss itself, by plain sampling.
        level = COARSE.half_log_snr(torch.tensor([COARSE.t_max, COARSE.t_min], dtype=torch.float64))
        count = 20_000
        t = COARSE.time_at(level[0] + (level[1] - level[0]) * torch.rand(count, generator=seeded(1)).double())
        noise, first = draw(12, count, 2), x[:1].expand(count, 2)
        wrong = noise - self.MODEL.noise(COARSE.perturb(first, t, noise), t)
        losses = (level[1] - level[0]) * wrong.square().sum(1).detach()
        error = math.hypot(float(losses.std()) / math.sqrt(count), float(found.std_error[0]))
        assert abs(float(losses.mean() - found.diffusion[0])) < LIMIT * error

    def test_a_wrong_score_is_bounded_below_its_own_density_by_a_gap_in_closed_form(self):
        """eps = 1.3 times that of N(0, v I): the reverse SDE is linear, and its law at t_min normal with variance P.

        P by an ordinary equation, the bound by quadrature over half_log_snr.
        """
        v, size = 0.4, 2

        def rate(t):
            return 1.3 * VP.sigma(t) / (VP.alpha(t).square() * v + VP.sigma(t).square())

        def slope(t, spread):
            now = torch.tensor(t, dtype=torch.float64)
            g2 = VP.diffusion(now).square()
            return 2.0 * float(VP.drift_rate(now) + g2 * rate(now) / VP.sigma(now)) * spread - float(g2)

        ends = (VP.t_max, VP.t_min)
        p = float(solve_ivp(slope, ends, [1.0], method="LSODA", rtol=1e-10, atol=1e-12).y[0, -1])
        net = Function(lambda x, t: rate(t)[:, None] * x)
        model = ScoreModel(net, VP, data_std=v**0.5)
        x = math.sqrt(v) * draw(13, 32, size)
        own = -0.5 * x.square().sum(1) / p - 0.5 * size * math.log(2 * math.pi * p)

        level = torch.linspace(*(float(VP.half_log_snr(t)) for t in ends), 40001, dtype=torch.float64)
        t = VP.clamp(VP.time_at(level))
        scale = VP.alpha(t) / VP.alpha(VP.t_min)
        spread = VP.sigma(t).square() - (scale * VP.sigma(VP.t_min)).square()
        radius = scale.square() * x.square().sum(1, keepdim=True) + size * spread
        drop = torch.trapezoid(rate(t).square() * radius - 2 * VP.sigma(t) * rate(t) * size, level, dim=1)
        far = -0.5 * radius[:, 0] - 0.5 * size * math.log(2 * math.pi)
        bound = far + size * (VP.log_alpha(VP.t_max) - VP.log_alpha(VP.t_min)) - drop
        assert (own - bound).min() > 0.05

        for estimate in (sde_bound, path_integral):
            found = estimate(model, x, draws=1024)
            assert abs(z_of(found, bound)) < LIMIT
            assert z_of(found, own) < -LIMIT

    @from_t_min
    def test_a_bound_lies_below_the_entropy_of_the_data_for_a_learned_network(self, estimate):
        """E[log p of any model] <= E[log p of the data]; less training, lower. 256 samples, paired: z below 4.5."""
        x = TAUGHT.sample(256, generator=seeded(9))
        truth = TAUGHT.marginal_log_prob(VP, x, VP.t_min)
        below = []
        for steps in (25, 250):
            off = truth - estimate(learned(steps), x, draws=32).value
            below.append(float(off.mean()))
            assert below[-1] > -LIMIT * float(off.std()) / 16
        assert below[0] > below[1] + 0.1


@cache
def learned(steps):
    """A small network trained on samples of `TAUGHT`."""
    torch.manual_seed(0)  # of the initial weights
    model = ScoreModel(MLP((2,), 32, 2), VP, data_std=TAUGHT.std)

    def batches(generator):
        return Batch(TAUGHT.sample(256, generator=generator).float(), {})

    return train(model, batches, Recipe(steps, learning_rate=5e-3), progress=False).model.double().eval()


class TestDigits:
    def test_the_default_levels_and_the_datas_moments_take_variance_away(self):
        """Standard errors are root means over 4 images: 10% of noise each, where 0.9 and 0.8 are asked for."""
        split = digits.load_split()
        x = digits.dequantise(split.test[:4], seeded(0))
        seen = digits.dequantise(split.train, seeded(1)).double()
        model, spread = digits.load(), []
        for options in ({"times": UniformHalfLogSNR()}, {}, {"data_moments": Gaussian.fit(seen)}):
            found = variational_bound(model, x, draws=256, **options)
            spread.append(float(found.std_error.square().mean().sqrt()))
        assert spread[1] < 0.95 * spread[0]
        assert spread[2] < 0.85 * spread[1]

    def test_all_are_near_the_flow(self):
        """This network is near a score: within 5 nats of 64 dimensions, and the errors of the draws."""
        x = digits.dequantise(digits.load_split().test[:3], seeded(0))
        found = sandwich(digits.load(), x, draws=32, tolerance=0.1)
        flow = found.flow.log_prob
        for other in (found.sde_bound, found.path_integral, found.variational_bound, found.i_mmse):
            error = float(other.std_error.square().sum().sqrt()) / 3
            assert abs(float((other.value - flow).mean())) < 5.0 + LIMIT * error


class TestSandwich:
    def test_holds_what_each_gives_alone_and_tells_it_in_a_table(self):
        target = mixture(2, seed=10)
        model, x = target.score_model(VP), target.sample(7, generator=seeded(10))
        found = sandwich(model, x, draws=32, seed=4, batch=50)
        torch.testing.assert_close(found.flow.log_prob, log_likelihood(model, x, seed=4).log_prob, rtol=0, atol=1e-12)
        for name, estimate in (("sde_bound", sde_bound), ("path_integral", path_integral), ("i_mmse", i_mmse)):
            torch.testing.assert_close(getattr(found, name).value, estimate(model, x, draws=32, seed=4).value)
        lines = found.table().splitlines()
        assert lines[0].startswith("7 samples")
        assert f"{float(found.flow.log_prob.mean()):.3f}" in lines[1]
        for line, part in zip(lines[2:6], found[1:], strict=True):
            assert f"{float(part.value.mean()):.3f}" in line
            assert f"{float((part.value - found.flow.log_prob).mean()):.3f}" in line

    def test_an_empty_batch_has_an_empty_table(self):
        found = sandwich(gaussian(3).score_model(VP), torch.zeros(0, 3), draws=4)
        assert found.table().startswith("0 samples")


class TestEachSampleAlone:
    @every_estimate
    def test_company_order_and_the_size_of_a_call_change_nothing(self, estimate):
        target = mixture(2, seed=11)
        model, x = target.score_model(VP), target.sample(9, generator=seeded(11))
        whole = estimate(model, x, draws=16, seed=2)
        for rows, batch in ((torch.tensor([7, 2]), 1024), (torch.tensor([5]), 7), (torch.arange(9), 13)):
            part = estimate(model, x[rows], draws=16, seed=2, indices=rows, batch=batch)
            for mine, theirs in zip(part, whole, strict=True):
                torch.testing.assert_close(mine, theirs[rows], rtol=1e-9, atol=1e-9)
        other = estimate(model, x, draws=16, seed=3)
        assert (other.value != whole.value).all()

    @every_estimate
    def test_a_condition_follows_its_sample_and_a_nan_stays_with_its_own(self, estimate):
        shift = draw(14, 5, 2)
        net = Function(lambda x, t, shift: 0.3 * (x + shift))
        model = ScoreModel(net, VP).condition(shift=shift)
        x = draw(15, 5, 2)
        whole = estimate(model, x, draws=8, batch=6)
        rows = torch.tensor([4, 1])
        part = estimate(model.take(rows), x[rows], draws=8, indices=rows)
        torch.testing.assert_close(part.value, whole.value[rows], rtol=1e-9, atol=1e-9)
        broken = shift.clone()
        broken[3] = math.nan
        found = estimate(ScoreModel(net, VP).condition(shift=broken), x, draws=8, batch=6).value
        good = torch.tensor([0, 1, 2, 4])
        assert found[3].isnan()
        torch.testing.assert_close(found[good], whole.value[good], rtol=1e-9, atol=1e-9)

    @every_estimate
    def test_an_empty_batch_gives_an_empty_answer(self, estimate):
        for part in estimate(gaussian(3).score_model(VP), torch.zeros(0, 3)):
            assert part.shape == (0,)

    @every_estimate
    def test_single_precision_differs_by_its_rounding(self, estimate):
        target = mixture(2, seed=12)
        x = target.sample(8, generator=seeded(12)).float()
        model = target.score_model(VP)
        single, double = (estimate(model, state, draws=32).value for state in (x, x.double()))
        assert single.dtype == torch.float64
        torch.testing.assert_close(single, double, rtol=0, atol=2e-3)

    @every_estimate
    def test_evaluations_are_what_the_network_saw(self, estimate):
        model, watch = watched(gaussian(3).score_model(VP))
        found = estimate(model, draw(16, 5, 3), draws=14, batch=32)
        assert watch.rows == int(found.evaluations.sum())
        assert watch.calls <= 5
        seen = torch.cat(watch.labels)
        assert VP.t_min <= seen.min() < seen.max() <= VP.t_max


class TestTrace:
    def test_probes_give_the_exact_traces_mean_and_more_noise(self):
        target = mixture(6, seed=13)
        model, x = target.score_model(VP), target.sample(64, generator=seeded(13))
        truth = target.marginal_log_prob(VP, x, VP.t_min)
        exact = sde_bound(model, x, divergence=Exact())
        for law in ("rademacher", "gaussian", "sphere"):
            found = sde_bound(model, x, divergence=Hutchinson(probes=2, law=law), seed=1)
            assert abs(z_of(found, truth)) < LIMIT
            assert found.std_error.mean() > exact.std_error.mean()

    def test_beyond_128_dimensions_the_default_is_a_probe(self):
        target = Gaussian(torch.zeros(130), torch.linspace(0.1, 1.0, 130))
        model, x = target.score_model(VP), target.sample(2, generator=seeded(14))
        exact, default = (sde_bound(model, x, draws=4, divergence=d) for d in (Exact(), None))
        probe = sde_bound(model, x, draws=4, divergence=Hutchinson())
        assert torch.equal(default.value, probe.value)
        # A diagonal Jacobian has no Rademacher variance.
        torch.testing.assert_close(default.value, exact.value, rtol=1e-9, atol=1e-6)

    @pytest.mark.parametrize("divergence", [Hutchinson(fresh=False), Hutchinson(control=True)])
    def test_probes_that_are_kept_are_refused(self, divergence):
        with pytest.raises(ValueError, match="probes of its own"):
            sde_bound(gaussian(3).score_model(VP), draw(0, 2, 3), divergence=divergence)

    def test_what_is_no_divergence_is_refused(self):
        with pytest.raises(TypeError, match="Exact"):
            sde_bound(gaussian(3).score_model(VP), draw(0, 2, 3), divergence="exact")


@every_estimate
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 7}, ValueError, "even"),
        ({"draws": 0}, ValueError, "draws=0"),
        ({"draws": 2.0}, TypeError, "int"),
        ({"batch": 0}, ValueError, "batch=0"),
        ({"seed": -1}, ValueError, "seed"),
        ({"times": "uniform"}, TypeError, "times"),
        ({"indices": torch.arange(3)}, ValueError, "indices"),
        ({"data_moments": gaussian(2)}, ValueError, "2 dimensions"),
        ({"data_moments": mixture(3, 0)}, TypeError, "Gaussian"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else None,
)
def test_arguments_that_do_not_fit_are_refused(estimate, options, error, message):
    with pytest.raises(error, match=message):
        estimate(gaussian(3).score_model(VP), draw(0, 2, 3), **options)


@every_estimate
def test_data_and_networks_that_cannot_be_used_are_refused(estimate):
    model = gaussian(3).score_model(VP)
    with pytest.raises(TypeError, match="dequantise"):
        estimate(model, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="dropout"):
        estimate(ScoreModel(torch.nn.Sequential(torch.nn.Dropout(0.1)), VP), draw(0, 2, 3))
    with pytest.raises(NetworkError, match="shape"):
        estimate(ScoreModel(Function(lambda x, t: x[:, :1]), VP), draw(0, 2, 3))
    with pytest.raises(ValueError, match="condition"):
        estimate(ScoreModel(Function(lambda x, t, y: x), VP).condition(y=torch.zeros(3)), draw(0, 2, 3))

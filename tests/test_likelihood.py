"""log p: against closed forms, to the tolerance asked for, whatever else is in the batch."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import PARAMETERIZATIONS, SDES, draw, gaussian, mixture, moments, perceptron, seeded, watched
from torch import nn

import sdekit

VP, VE = sdekit.VPSDE(), sdekit.VESDE()
TEN = torch.arange(10)


class TestAgainstClosedForms:
    @pytest.mark.parametrize("meaning", PARAMETERIZATIONS.values(), ids=PARAMETERIZATIONS.keys())
    @pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
    def test_a_gaussian_has_its_density_under_every_process_and_parameterization(self, sde, meaning):
        target = gaussian(3)
        x = target.sample(6, generator=seeded(1))
        out = sdekit.log_likelihood(target.score_model(sde, meaning), x, tolerance=1e-3, data_moments=target)
        torch.testing.assert_close(out.log_prob, target.marginal_log_prob(sde, x, sde.t_min), rtol=0, atol=1e-3)
        torch.testing.assert_close(
            out.latent, target.flow_map(sde, x, sde.t_min, sde.t_max), rtol=0, atol=1e-3 * sde.prior_std
        )
        assert (out.std_error == 0).all()
        torch.testing.assert_close(out.log_prior + out.log_det, out.log_prob)

    @pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
    @pytest.mark.parametrize("sde", [VP, VE], ids=["vp", "ve"])
    @pytest.mark.parametrize("dim", [2, 16])
    def test_fresh_mixtures_are_within_the_tolerance_asked_for(self, dim, sde, tolerance):
        target = mixture(dim, seed=100 + dim)
        means = target._components.means
        middle = 0.5 * (means[0] + means[1])  # where the flow divides, nearly
        x = torch.cat((target.sample(24, generator=seeded(dim)), middle + 1e-3 * draw(3, 4, dim)))
        out = sdekit.log_likelihood(target.score_model(sde), x, tolerance=tolerance, data_moments=moments(target))
        # What the terminal law is off by is not the solver's: the exact one takes its place.
        solved = out.log_det + target.marginal_log_prob(sde, out.latent, sde.t_max)
        error = (solved - target.marginal_log_prob(sde, x, sde.t_min)).abs()
        assert (error <= tolerance).all()
        assert (error <= out.solver_error).double().mean() > 0.9
        assert (out.solver_error <= tolerance).all()

    @pytest.mark.parametrize("scale", [0.1, 10.0])
    def test_the_tolerance_holds_for_data_of_any_scale(self, scale):
        target = mixture(4, seed=5, scale=scale)
        x = target.sample(16, generator=seeded(0))
        out = sdekit.log_likelihood(target.score_model(VP), x, tolerance=1e-3)
        solved = out.log_det + target.marginal_log_prob(VP, out.latent, VP.t_max)
        assert (solved - target.marginal_log_prob(VP, x, VP.t_min)).abs().max() < 1e-3

    def test_a_smaller_tolerance_costs_more_and_gives_less_error(self):
        target = mixture(2, seed=9)
        x = target.sample(32, generator=seeded(0))
        truth = target.marginal_log_prob(VP, x, VP.t_min)
        error, cost = [], []
        for tolerance in (1e-1, 1e-2, 1e-3):
            out = sdekit.log_likelihood(target.score_model(VP), x, tolerance=tolerance, data_moments=moments(target))
            error.append(float((out.log_prob - truth).abs().mean()))
            cost.append(float(out.stats.evaluations.double().mean()))
        assert error[0] > 3 * error[1] > 9 * error[2]
        assert cost[0] < cost[1] < cost[2] < 120

    @pytest.mark.parametrize("solver", [sdekit.Tsit5(), sdekit.Dopri5(), sdekit.Dopri8(), sdekit.Adams(5)])
    def test_every_solver_agrees_in_the_norm_of_the_state(self, solver):
        target = mixture(2, seed=2)
        x = target.sample(4, generator=seeded(0))
        out = sdekit.log_likelihood(
            target.score_model(VP), x, solver=solver, controller=sdekit.PID(1e-4, 1e-4), data_moments=moments(target)
        )
        torch.testing.assert_close(out.log_prob, target.marginal_log_prob(VP, x, VP.t_min), rtol=0, atol=1e-2)
        assert out.solver_error.isnan().all()  # this control keeps no estimate in nats

    def test_runge_kutta_takes_the_control_in_nats_too(self):
        target = mixture(2, seed=2)
        x = target.sample(8, generator=seeded(0))
        out = sdekit.log_likelihood(
            target.score_model(VP), x, solver=sdekit.Tsit5(), tolerance=1e-2, data_moments=moments(target)
        )
        assert (out.log_prob - target.marginal_log_prob(VP, x, VP.t_min)).abs().max() < 1e-2

    def test_the_density_at_any_noise_level_is_the_marginal_there(self):
        target = mixture(3, seed=4)
        t = torch.tensor([1e-5, 1e-3, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
        x = VP.perturb(target.sample(6, generator=seeded(0)), t, draw(1, 6, 3))
        out = sdekit.log_likelihood(target.score_model(VP), x, t=t, tolerance=1e-3, data_moments=moments(target))
        torch.testing.assert_close(out.log_prob, target.marginal_log_prob(VP, x, t), rtol=0, atol=1e-3)
        assert out.stats.evaluations[-1] == 0  # x is there already


class TestEnds:
    def test_heat_and_extrapolation_come_closer_to_the_data_density_by_orders(self):
        target = mixture(3, seed=11)
        x = target.sample(24, generator=seeded(2))
        bias = {}
        for t_min in (4e-3, 2e-3):
            model = target.score_model(sdekit.KarrasSDE(0.5 * math.sqrt(t_min), 80.0))
            for end in ("marginal", "heat", "extrapolate"):
                options = {"tolerance": 1e-5, "data_moments": moments(target), "end": end}
                if end == "marginal":
                    out = sdekit.log_likelihood(model, x, **options)
                else:
                    with pytest.warns(sdekit.SmoothnessWarning):
                        out = sdekit.log_likelihood(model, x, **options)
                bias[end, t_min] = float((out.log_prob - target.log_prob(x)).abs().mean())
        assert bias["marginal", 2e-3] > 5 * bias["heat", 2e-3] > 25 * bias["extrapolate", 2e-3]
        # halving sigma^2: first order, second order
        assert 1.6 < bias["marginal", 4e-3] / bias["marginal", 2e-3] < 2.4
        assert 3.0 < bias["heat", 4e-3] / bias["heat", 2e-3] < 5.5

    def test_the_corrections_spend_the_evaluations_they_say(self):
        target = mixture(2, seed=1)
        model, watch = watched(target.score_model(VP))
        x = target.sample(3, generator=seeded(0))
        sdekit.log_likelihood(model, x, nodes=10)
        assert watch.calls == 10
        for end, more in (("heat", 1), ("extrapolate", 3)):
            watch.calls = 0
            with pytest.warns(sdekit.SmoothnessWarning):
                out = sdekit.log_likelihood(model, x, nodes=10, end=end)
            assert watch.calls == 10 + more == out.stats.calls
            assert (out.stats.evaluations == 10 + more).all()

    def test_moments_of_the_data_replace_the_prior(self):
        target = gaussian(3, scale=4.0)
        x = target.sample(16, generator=seeded(0))
        truth = target.marginal_log_prob(VP, x, VP.t_min)
        with_prior = sdekit.log_likelihood(target.score_model(VP), x, tolerance=1e-4)
        matched = sdekit.log_likelihood(target.score_model(VP), x, tolerance=1e-4, data_moments=target)
        assert (matched.log_prob - truth).abs().max() < 1e-4
        assert (with_prior.log_prob - truth).abs().max() > 1e-3


class TestUnits:
    def test_an_affine_transform_changes_the_density_by_its_jacobian(self):
        target = mixture(3, seed=3)
        x = target.sample(5, generator=seeded(0))
        scale, shift = torch.tensor([2.0, -0.5, 3.0]), torch.tensor([1.0, 0.0, -2.0])
        units = sdekit.Affine(scale, shift)
        users = units.inverse(x)
        torch.testing.assert_close(units.forward(users), x)
        mine = sdekit.log_likelihood(target.score_model(VP), x, tolerance=1e-4)
        theirs = sdekit.log_likelihood(target.score_model(VP), users, tolerance=1e-4, transform=units)
        torch.testing.assert_close(theirs.log_prob, mine.log_prob + scale.double().abs().log().sum(), rtol=0, atol=1e-9)

    @pytest.mark.parametrize(("low", "high", "offset"), [(-1.0, 1.0, 7.0), (0.0, 1.0, 8.0), (0.0, 256.0, 0.0)])
    def test_bits_per_dimension_count_the_width_of_a_bin(self, low, high, offset):
        target = gaussian(3)
        out = sdekit.log_likelihood(target.score_model(VP), target.sample(2, generator=seeded(0)), nodes=8)
        expected = -out.log_prob / (3 * math.log(2)) + offset
        torch.testing.assert_close(out.bits_per_dim(256, low, high), expected)

    def test_a_uniform_density_over_the_bins_costs_the_logarithm_of_their_number(self):
        from sdekit.units import bits_per_dim

        density = torch.full((2,), -5 * math.log(2.0), dtype=torch.float64)  # uniform on [-1, 1]^5
        torch.testing.assert_close(
            bits_per_dim(density, 5, 17, -1.0, 1.0), torch.full((2,), math.log2(17), dtype=torch.float64)
        )

    @pytest.mark.parametrize(("levels", "low", "high"), [(1, -1.0, 1.0), (256, 1.0, 1.0)])
    def test_senseless_bins_are_refused(self, levels, low, high):
        out = sdekit.log_likelihood(gaussian(2).score_model(VP), draw(0, 2, 2), nodes=4)
        with pytest.raises(ValueError, match="needed"):
            out.bits_per_dim(levels, low, high)

    @pytest.mark.parametrize("scale", [0.0, math.nan, torch.tensor([1.0, 0.0])])
    def test_a_singular_transform_is_refused(self, scale):
        with pytest.raises(ValueError, match="nonzero"):
            sdekit.Affine(scale)


class TestOneSampleAndTheOthers:
    @pytest.mark.parametrize("divergence", [sdekit.Exact(), sdekit.Hutchinson(), sdekit.Hutchinson(2, fresh=False)])
    def test_a_sample_has_the_same_density_alone_in_a_batch_and_shuffled(self, divergence):
        target = mixture(4, seed=8)
        model, x = target.score_model(VP), target.sample(40, generator=seeded(0))
        whole = sdekit.log_likelihood(model, x, divergence=divergence, seed=3)
        alone = sdekit.log_likelihood(model, x[7:8], divergence=divergence, seed=3, indices=torch.tensor([7]))
        order = torch.randperm(40, generator=seeded(1))
        mixed = sdekit.log_likelihood(model, x[order], divergence=divergence, seed=3, indices=order)
        torch.testing.assert_close(alone.log_prob[0], whole.log_prob[7], rtol=0, atol=1e-10)
        torch.testing.assert_close(alone.std_error[0], whole.std_error[7], rtol=0, atol=1e-10)
        torch.testing.assert_close(mixed.log_prob, whole.log_prob[order], rtol=0, atol=1e-10)
        assert (mixed.stats.evaluations == whole.stats.evaluations[order]).all()

    def test_not_a_number_fails_its_own_sample_only(self):
        target = mixture(3, seed=8)
        model, x = target.score_model(VP), target.sample(9, generator=seeded(0))
        good = sdekit.log_likelihood(model, x)
        x[4, 1] = math.nan
        out = sdekit.log_likelihood(model, x, throw=False)
        rest = torch.arange(9) != 4
        torch.testing.assert_close(out.log_prob[rest], good.log_prob[rest], rtol=0, atol=1e-10)
        assert out.status.tolist() == [3 if i == 4 else 1 for i in range(9)]
        for value in (out.log_prob, out.std_error, out.solver_error, out.log_prior, out.log_det):
            assert value[4].isnan()
        with pytest.raises(sdekit.SolveError, match=r"1 of 9 .*\n  sample 104 at t=1e-05: .*not finite") as caught:
            sdekit.log_likelihood(model, x, indices=100 + torch.arange(9))
        torch.testing.assert_close(caught.value.solution.log_prob[rest], good.log_prob[rest], rtol=0, atol=1e-10)

    def test_another_seed_gives_other_probes_and_the_same_path(self):
        target = mixture(6, seed=8)
        model, x = target.score_model(VP), target.sample(5, generator=seeded(0))
        one, two = (sdekit.log_likelihood(model, x, divergence=sdekit.Hutchinson(), seed=seed) for seed in (0, 1))
        assert (one.log_prob != two.log_prob).all()
        assert torch.equal(one.latent, two.latent)
        assert torch.equal(one.stats.evaluations, two.stats.evaluations)

    def test_the_global_generator_is_left_alone(self):
        before = torch.get_rng_state()
        sdekit.log_likelihood(mixture(2, 0).score_model(VP), draw(0, 2, 2), divergence=sdekit.Hutchinson())
        assert torch.equal(before, torch.get_rng_state())


class TestStandardErrors:
    """600 draws on 4 samples. The truth passes each bound below with probability above 1 - 1e-4: z-scores under 4.5,
    and counts of covered draws more than 4 standard deviations inside the nominal coverage, widened where the claim
    itself is an estimate of few degrees of freedom."""

    DRAWS = 600

    def _draws(self, divergence):
        target = mixture(8, seed=21)
        x = target.sample(4, generator=seeded(0))
        model = target.score_model(VP)
        exact = sdekit.log_likelihood(model, x, tolerance=1e-4).log_prob
        out = sdekit.log_likelihood(model, x.repeat_interleave(self.DRAWS, 0), divergence=divergence, tolerance=1e-2)
        return exact, out.log_prob.reshape(4, -1), out.std_error.reshape(4, -1)

    @pytest.mark.parametrize(
        "divergence",
        [
            sdekit.Hutchinson(),
            sdekit.Hutchinson(4),
            sdekit.Hutchinson(control=True),
            sdekit.Hutchinson(law="gaussian"),
            sdekit.Hutchinson(2, law="sphere"),
        ],
        ids=lambda d: f"{d.probes}-{d.law}-{d.control}",
    )
    def test_fresh_probes_are_unbiased_and_know_their_error(self, divergence):
        exact, value, claimed = self._draws(divergence)
        true = value.std(1)
        z = (value.mean(1) - exact) / (true / math.sqrt(self.DRAWS))
        assert z.abs().max() < 4.5  # the solver's own 1e-2 nats adds at most half
        ratio = claimed.square().mean(1).sqrt() / true
        assert (ratio > 0.88).all()
        assert (ratio < 1.35).all()
        covered = ((value - exact[:, None]).abs() < 1.96 * claimed).double().mean()
        assert 0.92 < covered < 0.995

    def test_fixed_probes_are_unbiased_and_their_spread_or_bound_covers(self):
        for divergence, least in ((sdekit.Hutchinson(fresh=False), 0.93), (sdekit.Hutchinson(8, fresh=False), 0.80)):
            exact, value, claimed = self._draws(divergence)
            z = (value.mean(1) - exact) / (value.std(1) / math.sqrt(self.DRAWS))
            assert z.abs().max() < 4.5
            covered = ((value - exact[:, None]).abs() < 1.96 * claimed).double().mean()
            assert covered > least

    def test_fresh_probes_beat_a_fixed_one_at_equal_calls(self):
        fresh, fixed = (self._draws(sdekit.Hutchinson(fresh=flag))[1].std(1) for flag in (True, False))
        assert (fresh < 0.6 * fixed).all()

    def test_more_probes_lower_the_error_and_never_change_the_mean(self):
        (exact, one, _), (_, nine, _) = self._draws(sdekit.Hutchinson(1)), self._draws(sdekit.Hutchinson(9))
        ratio = one.std(1) / nine.std(1)
        assert (ratio > 2.4).all()
        assert (ratio < 3.7).all()
        assert ((nine.mean(1) - exact).abs() < 4.5 * nine.std(1) / math.sqrt(self.DRAWS)).all()

    @pytest.mark.parametrize(
        "divergence", [sdekit.Hutchinson(4), sdekit.Hutchinson(4, control=True), sdekit.Hutchinson(4, fresh=False)]
    )
    def test_each_probe_has_a_value_of_its_own_and_none_knows_of_the_others(self, divergence):
        # 500 draws of 4 probes: independence makes the ratio of variances 1 +- 0.073 (one sd); 5 of them: 6e-7.
        target = mixture(8, seed=3)
        x = target.sample(1, generator=seeded(0)).expand(500, 8)
        out = sdekit.log_likelihood(target.score_model(VP), x, nodes=16, divergence=divergence)
        torch.testing.assert_close(out.by_probe.mean(1), out.log_prob, rtol=1e-12, atol=1e-12)
        single, averaged = out.by_probe.var(1).mean(), out.log_prob.var()
        assert float(averaged / (single / 4)) == pytest.approx(1.0, abs=5 * 0.073)
        one = sdekit.log_likelihood(target.score_model(VP), x[:2], nodes=16, divergence=sdekit.Hutchinson(1))
        assert one.by_probe is None


class TestSolverError:
    def test_a_kinked_network_reaches_the_cap_says_so_and_ends(self):
        model = sdekit.ScoreModel(perceptron(2, 5, nn.ReLU), VP).eval()
        x = draw(3, 6, 2)
        with pytest.warns(sdekit.ToleranceWarning, match="above tolerance=1e-05"):
            out = sdekit.log_likelihood(model, x, solver=sdekit.Adams(5), controller=sdekit.Nats(1e-5, cap=64))
        truth = [
            sdekit.log_likelihood(
                model, x, solver=sdekit.Midpoint(), controller=sdekit.FixedGrid(grid.flip(0))
            ).log_prob
            for grid in (sdekit.grid.likelihood(VP, n, 0.5) for n in (300, 900))
        ]
        slack = (truth[1] - truth[0]).abs()  # what the truth itself is off by, and more
        loose = out.status == sdekit.Status.LOOSE
        assert loose.any()
        assert torch.equal(loose, out.solver_error > 1e-5)
        assert 64 < out.stats.evaluations.max() < 900
        # An untrained network's output is no gradient and its divergence jumps: an order of magnitude is what holds.
        assert ((out.log_prob - truth[1]).abs() < 12.0 * out.solver_error + slack).all()

    def test_a_fixed_grid_gives_an_indicator_that_falls_with_the_grid(self):
        target = mixture(2, seed=2)
        model, x = target.score_model(VP), target.sample(16, generator=seeded(0))
        coarse, fine = (sdekit.log_likelihood(model, x, nodes=n) for n in (30, 90))
        assert (fine.solver_error < coarse.solver_error).double().mean() > 0.9
        assert (fine.stats.evaluations == 90).all()


class TestReach:
    @pytest.mark.parametrize("name", ["vp", "ve", "karras"])
    def test_it_is_one_on_data_and_tells_what_lies_far_off_them(self, name):
        """The mean of 300 samples in 4-D has a standard deviation of sqrt(2 / 1200): six of them, false alarm 2e-9."""
        target = mixture(4, 6)
        model, x = target.score_model(SDES[name]), target.sample(300, generator=seeded(3))
        out = sdekit.log_likelihood(model, x)
        assert abs(float(out.reach.mean()) - 1.0) < 6.0 * (2.0 / 1200.0) ** 0.5
        far = sdekit.log_likelihood(model, x[:5] + 5.0, nodes=40)
        assert (far.reach > 5.0).all()
        expected = out.latent.square().mean(1) / SDES[name].prior_std ** 2
        torch.testing.assert_close(out.reach, expected, rtol=1e-12, atol=0.0)

    def test_it_is_unknown_where_a_sample_did_not_arrive(self):
        x = mixture(4, 6).sample(3)
        x[1] = torch.nan
        out = sdekit.log_likelihood(mixture(4, 6).score_model(SDES["vp"]), x, throw=False)
        assert out.reach.isnan().tolist() == [False, True, False]


class TestStates:
    def test_states_keep_their_dtype_and_densities_are_float64(self):
        target = mixture(3, seed=1)
        model, x = target.score_model(VP), target.sample(4, generator=seeded(0))
        single, double = (sdekit.log_likelihood(model, x.to(kind)) for kind in (torch.float32, torch.float64))
        assert single.latent.dtype == torch.float32
        assert double.latent.dtype == torch.float64
        assert single.log_prob.dtype == single.std_error.dtype == single.solver_error.dtype == torch.float64
        torch.testing.assert_close(single.log_prob, double.log_prob, rtol=0, atol=1e-2)

    def test_an_event_of_any_shape_is_a_flat_one(self):
        target = gaussian(6)
        x = target.sample(3, generator=seeded(0))
        flat = sdekit.log_likelihood(target.score_model(VP), x)
        shaped = sdekit.log_likelihood(target.score_model(VP), x.reshape(3, 1, 2, 3))
        torch.testing.assert_close(shaped.log_prob, flat.log_prob, rtol=0, atol=1e-10)
        assert shaped.latent.shape == (3, 1, 2, 3)

    def test_above_128_dimensions_the_default_is_one_fresh_probe(self):
        target = sdekit.targets.Gaussian(torch.zeros(130), torch.linspace(0.1, 1.0, 130))
        out = sdekit.log_likelihood(target.score_model(VP), target.sample(2, generator=seeded(0)), nodes=12)
        small = sdekit.targets.Gaussian(torch.zeros(128), torch.linspace(0.1, 1.0, 128))
        exact = sdekit.log_likelihood(small.score_model(VP), small.sample(2, generator=seeded(0)), nodes=12)
        assert (exact.std_error == 0).all()
        # The Jacobian is diagonal, so the probe is exact but its error bar does not know: small against sqrt(D).
        assert (out.std_error >= 0).all()
        rotated = gaussian(130, seed=3)
        other = sdekit.log_likelihood(rotated.score_model(VP), rotated.sample(2, generator=seeded(0)), nodes=12)
        assert (other.std_error > 0.05).all()

    def test_an_empty_batch_gives_empty_results(self):
        out = sdekit.log_likelihood(gaussian(3).score_model(VP), torch.zeros(0, 3))
        assert out.log_prob.shape == out.std_error.shape == out.solver_error.shape == (0,)
        assert out.latent.shape == (0, 3)
        assert out.bits_per_dim().shape == (0,)

    def test_conditions_follow_their_samples(self):
        class Shifted(nn.Module):
            def forward(self, x, label, mean):
                variance = 1.0 + 0.0 * label[:, None]  # unit Gaussians keep variance 1 under VP
                return VP.sigma(label)[:, None] * (x - VP.alpha(label)[:, None] * mean) / variance

        mean = draw(1, 20, 2)
        x = mean + draw(2, 20, 2)
        model = sdekit.ScoreModel(Shifted(), VP, data_std=1.0).condition(mean=mean)
        out = sdekit.log_likelihood(model, x, tolerance=1e-3)
        expected = torch.distributions.Normal(VP.alpha(VP.t_min) * mean, 1.0).log_prob(x).sum(1)
        torch.testing.assert_close(out.log_prob, expected, rtol=0, atol=0.05)  # the prior's share
        latent_law = torch.distributions.Normal(VP.alpha(VP.t_max) * mean, 1.0).log_prob(out.latent).sum(1)
        torch.testing.assert_close(out.log_det + latent_law, expected, rtol=0, atol=1e-3)


class _Fixed(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, label):
        return self.answer(x)


class TestBadInput:
    MODEL = gaussian(3).score_model(VP)

    @pytest.mark.parametrize(
        ("x", "error", "words"),
        [
            (torch.zeros(3), ValueError, "event axis"),
            (torch.zeros(2, 4), sdekit.SolveError, "3 numbers a sample"),
            (torch.zeros(2, 3, dtype=torch.int64), TypeError, "dequantise"),
            (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "real"),
            ([[0.0, 0.0, 0.0]], TypeError, "torch.Tensor"),
            (torch.full((2, 3), math.nan), sdekit.SolveError, "2 of 2 samples"),
            (torch.full((2, 3), math.inf), sdekit.SolveError, "2 of 2 samples"),
        ],
    )
    def test_of_data_is_named(self, x, error, words):
        with pytest.raises(error, match=words):
            sdekit.log_likelihood(self.MODEL, x)

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"tolerance": 0.0}, ValueError, "tolerance=0.0"),
            ({"tolerance": math.nan}, ValueError, "tolerance=nan"),
            ({"tolerance": "tight"}, TypeError, "tolerance='tight'"),
            ({"nodes": 1}, ValueError, "nodes=1"),
            ({"nodes": 8, "solver": sdekit.Heun()}, ValueError, "one or the other"),
            ({"solver": sdekit.RK4()}, ValueError, "no error estimate"),
            ({"solver": sdekit.Tsit5(), "divergence": sdekit.Hutchinson()}, ValueError, "fresh=False"),
            ({"divergence": "exact"}, TypeError, "sdekit.Exact"),
            ({"t": 2.0}, ValueError, "t_min, t_max"),
            ({"t": torch.zeros(5)}, ValueError, r"t.shape=\(5,\)"),
            ({"t": 0.5, "end": "heat"}, ValueError, "leave t out"),
            ({"end": "tweedie"}, ValueError, "end='tweedie'"),
            ({"seed": -1}, ValueError, "seed=-1"),
            ({"seed": 1.5}, TypeError, "seed=1.5"),
            ({"indices": torch.arange(3)}, ValueError, "indices.shape"),
            ({"indices": torch.zeros(2)}, TypeError, "integer"),
            ({"max_evaluations": 0}, ValueError, "max_evaluations=0"),
            ({"wall_time": -1.0}, ValueError, "wall_time"),
        ],
    )
    def test_of_options_is_named(self, options, error, words):
        with pytest.raises(error, match=words):
            sdekit.log_likelihood(self.MODEL, torch.zeros(2, 3), **options)

    @pytest.mark.parametrize(
        ("answer", "words"),
        [
            (lambda x: x[:, :1], "the same shape is needed"),
            (lambda x: x.detach(), "does not depend on its input"),
            (lambda x: torch.ones_like(x), "does not depend on its input"),
            (lambda x: x.long(), "floating"),
            (lambda x: None, "NoneType"),
            (lambda x: 1 / 0, "ZeroDivisionError"),
        ],
        ids=["shape", "detached", "constant", "integer", "none", "raises"],
    )
    @pytest.mark.parametrize("divergence", [sdekit.Exact(), sdekit.Hutchinson(), sdekit.Hutchinson(mode="jvp")])
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:a kernel of the network has no forward mode")
    def test_networks_that_cannot_be_used_are_refused_with_the_reason(self, answer, words, divergence):
        with pytest.raises((sdekit.SolveError, sdekit.NetworkError), match=words):
            sdekit.log_likelihood(sdekit.ScoreModel(_Fixed(answer), VP), torch.zeros(2, 3), divergence=divergence)

    def test_a_network_that_gives_no_number_fails_the_samples_concerned(self):
        net = _Fixed(lambda x: torch.where(x[:, :1] > 1, torch.nan, 1.0) * x)
        out = sdekit.log_likelihood(sdekit.ScoreModel(net, VP), torch.tensor([[0.0, 0.1], [3.0, 0.0]]), throw=False)
        assert out.status.tolist() == [int(sdekit.Status.DONE), int(sdekit.Status.NOT_FINITE)]
        assert out.stats.evaluations[1] < 30

    @pytest.mark.parametrize("part", [nn.Dropout(0.2), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)])
    def test_networks_that_are_random_or_couple_samples_are_refused(self, part):
        net = nn.Sequential(nn.Linear(3, 3), part)
        model = sdekit.ScoreModel(_Wrapped(net), VP)
        with pytest.raises(ValueError, match=r"net\.eval\(\)"):
            sdekit.log_likelihood(model.train(), torch.zeros(2, 3))
        if getattr(part, "running_mean", 0) is None:
            with pytest.raises(ValueError, match="batch statistics"):
                sdekit.log_likelihood(model.eval(), torch.zeros(2, 3))
        else:
            sdekit.log_likelihood(model.eval(), torch.zeros(2, 3), nodes=4)

    def test_a_network_on_another_device_is_refused(self):
        model = sdekit.ScoreModel(_Wrapped(nn.Linear(3, 3, device="meta")), VP)
        with pytest.raises(ValueError, match="one device"):
            sdekit.log_likelihood(model, torch.zeros(2, 3))

    def test_a_device_without_float64_is_refused(self, monkeypatch):
        real = torch.zeros

        def poor(*size, dtype=None, **options):
            if dtype == torch.float64:
                raise TypeError("this device has no float64")
            return real(*size, dtype=dtype, **options)

        x = torch.zeros(2, 3)
        monkeypatch.setattr(torch, "zeros", poor)
        monkeypatch.setattr(sdekit._checks, "_WITH_FLOAT64", ())  # as if the CPU were a kind that nobody knows
        with pytest.raises(ValueError, match="has no float64"):
            sdekit.log_likelihood(self.MODEL, x)


class _Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, label):
        return self.net(x)


class TestLimits:
    def test_the_budget_is_never_exceeded_and_the_error_carries_what_there_is(self):
        target = mixture(2, seed=2)
        model, watch = watched(target.score_model(VP))
        x = torch.cat((target.sample(4, generator=seeded(0)), torch.full((1, 2), 1e-9, dtype=torch.float64)))
        whole = sdekit.log_likelihood(model, x, tolerance=1e-3)
        budget = int(whole.stats.evaluations.sort().values[2])
        watch.calls = 0
        with pytest.raises(sdekit.SolveError, match="max_evaluations reached") as caught:
            sdekit.log_likelihood(model, x, tolerance=1e-3, max_evaluations=budget)
        part = caught.value.solution
        assert watch.calls <= budget
        assert part.stats.evaluations.max() <= budget
        done = part.status == sdekit.Status.DONE
        assert 0 < done.sum() < 5
        torch.testing.assert_close(part.log_prob[done], whole.log_prob[done], rtol=0, atol=1e-10)
        assert part.log_prob[~done].isnan().all()

    def test_an_interrupt_returns_what_there_is(self):
        def stop(call, x, label, answer):
            if call == 20:
                raise KeyboardInterrupt
            return answer()

        model, _ = watched(mixture(2, seed=2).score_model(VP), stop)
        with pytest.warns(sdekit.PartialResultWarning, match="interrupted"):
            out = sdekit.log_likelihood(model, draw(0, 3, 2))
        assert (out.status == sdekit.Status.INTERRUPTED).all()
        assert (out.t > VP.t_min).all()
        assert (out.stats.evaluations == 19).all()


class TestGrids:
    def test_a_grid_in_the_wrong_direction_or_of_other_ends_is_refused(self):
        target = mixture(2, seed=9)
        model, x = target.score_model(VP), target.sample(2)
        for times in (sdekit.grid.likelihood(VP, 24), torch.linspace(0.3, 0.9, 24, dtype=torch.float64)):
            with pytest.raises(ValueError, match=r"agree exactly.*flip"):
                sdekit.log_likelihood(model, x, controller=sdekit.FixedGrid(times))
        right = sdekit.FixedGrid(sdekit.grid.likelihood(VP, 96).flip(0))
        out = sdekit.log_likelihood(model, x, controller=right, data_moments=moments(target))
        solved = out.log_det + target.marginal_log_prob(VP, out.latent, VP.t_max)
        assert (solved - target.marginal_log_prob(VP, x, VP.t_min)).abs().max() < 0.05

    def test_nodes_are_laid_over_what_remains_from_the_noise_level_asked(self):
        target = mixture(2, seed=9)
        model, watch = watched(target.score_model(VP))
        t = torch.tensor([0.05, 0.3, 0.3, 1.0], dtype=torch.float64)
        x = VP.perturb(target.sample(4), t, draw(2, 4, 2))
        out = sdekit.log_likelihood(model, x, t=t, nodes=96)
        assert watch.calls == 96
        assert out.stats.evaluations.tolist() == [96, 96, 96, 0]
        solved = out.log_det + target.marginal_log_prob(VP, out.latent, VP.t_max)
        assert (solved - target.marginal_log_prob(VP, x, t)).abs().max() < 1e-2
        assert (watch.labels[0] >= 0.05 * (1.0 - 1e-12)).all()  # times come from s, to rounding

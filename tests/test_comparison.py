"""Log density ratios: against closed forms, with an error bar of the difference that is calibrated."""

from __future__ import annotations

import copy
import math
from functools import lru_cache

import pytest
import torch
from helpers import draw, mixture, seeded, watched

import sdekit
from sdekit import targets
from sdekit.comparison import log_ratio
from sdekit.zoo import digits

VP = sdekit.VPSDE()
STUDENT_3 = 3.182  # 97.5% point of t with 3 degrees of freedom


def moved(target, by):
    """The mixture with its means moved and its standard deviations stretched by the share `by`."""
    parts = target._components
    return targets.GaussianMixture(target.weights, parts.means * (1 + by), parts.values.sqrt() * (1 - by))


@lru_cache
def pair(by):
    """Two neighbouring mixtures in 8-D, a sample of the first, and both exact log densities' difference there."""
    one = mixture(8, seed=3)
    two, x = moved(one, by), one.sample(1, generator=seeded(1))
    models = one.score_model(VP), sdekit.ScoreModel(two.score_model(VP).net, VP, data_std=one.std)
    return *models, x


class TestAgainstClosedForms:
    def test_exact_traces_give_the_ratio_of_the_densities_without_a_standard_error(self):
        one, two = mixture(3, 1), mixture(3, 2)
        x = one.sample(12, generator=seeded(0))
        out = log_ratio(one.score_model(VP), two.score_model(VP), x, tolerance=1e-3)
        ends = [target.marginal_log_prob(VP, side.latent, VP.t_max) for target, side in ((one, out.a), (two, out.b))]
        starts = [target.marginal_log_prob(VP, x, VP.t_min) for target in (one, two)]
        prior = (out.a.log_prior - ends[0]) - (out.b.log_prior - ends[1])  # what N(0, I) is off by is no solver's
        error = (out.value - prior - (starts[0] - starts[1])).abs()
        assert (error <= 2e-3).all()
        assert (error <= out.solver_error).double().mean() > 0.9
        assert torch.equal(out.std_error, torch.zeros(12, dtype=torch.float64))
        assert torch.equal(out.value, out.a.log_prob - out.b.log_prob)

    @pytest.mark.parametrize("divergence", [sdekit.Exact(), sdekit.Hutchinson(2), sdekit.Hutchinson(1)])
    def test_it_is_antisymmetric_and_nothing_between_a_model_and_itself(self, divergence):
        a, b, x = pair(0.1)
        there = log_ratio(a, b, x, nodes=12, divergence=divergence)
        back = log_ratio(b, a, x, nodes=12, divergence=divergence)
        assert torch.equal(there.value, -back.value)
        assert torch.equal(there.std_error, back.std_error)
        same = log_ratio(a, a, x, nodes=12, divergence=divergence)
        assert torch.equal(same.value, torch.zeros(1, dtype=torch.float64))
        assert (float(same.std_error) == 0) == (divergence != sdekit.Hutchinson(1))  # one probe knows a bound only

    def test_units_of_each_models_own_cancel(self):
        target, x = mixture(2, 4), mixture(2, 4).sample(5, generator=seeded(0))
        wide = targets.GaussianMixture(
            target.weights, 3 * target._components.means, 3 * target._components.values.sqrt()
        )
        sde = sdekit.KarrasSDE(0.01, 80.0), sdekit.KarrasSDE(0.03, 240.0)
        out = log_ratio(
            target.score_model(sde[0]),
            wide.score_model(sde[1]),
            x,
            tolerance=1e-3,
            transforms=(None, sdekit.Affine(3.0)),
        )
        assert out.value.abs().max() < 2e-3
        torch.testing.assert_close(out.bits_per_dim(), -out.value / (2 * math.log(2)))

    def test_two_conditions_of_one_model_are_compared(self):
        class Classes(torch.nn.Module):
            def forward(self, x, label, y):
                return torch.stack([nets[k](x[i : i + 1], label[i : i + 1])[0] for i, k in enumerate(y.tolist())])

        one, two = mixture(2, 1), mixture(2, 2)
        nets = [target.score_model(VP).net for target in (one, two)]
        model, x = sdekit.ScoreModel(Classes(), VP, data_std=1.0), one.sample(9, generator=seeded(0))
        first, second = torch.zeros(9, dtype=torch.int64), torch.arange(9) % 2
        out = log_ratio(model.condition(y=first), model.condition(y=second), x)
        assert torch.equal(out.value[::2], torch.zeros(5, dtype=torch.float64))
        apart = one.marginal_log_prob(VP, x, VP.t_min) - two.marginal_log_prob(VP, x, VP.t_min)
        torch.testing.assert_close(out.value[1::2], apart[1::2], rtol=0, atol=0.1)  # N(0, I) for p_T: 1e-2 here


class TestTheErrorBar:
    @pytest.mark.parametrize("fresh", [True, False])
    def test_from_four_probes_it_is_calibrated(self, fresh):
        """600 draws. Each bound is 5 standard deviations of its statistic under exact calibration: 2e-6 in all."""
        a, b, x = pair(0.05)
        n, divergence = 600, sdekit.Hutchinson(4, fresh=fresh)
        out = log_ratio(a, b, x.expand(n, 8), nodes=16, divergence=divergence)
        exact = log_ratio(a, b, x, nodes=16, divergence=sdekit.Exact())
        off = out.value - exact.value
        assert abs(float(off.mean())) < 5 * float(off.std()) / math.sqrt(n)
        # var of a variance from n draws: 2/n; of the mean claim from 3 degrees of freedom: 2/(3 n).
        claimed = float(out.std_error.square().mean() / off.var())
        assert claimed == pytest.approx(1.0, abs=5 * math.sqrt(2 / n + 2 / (3 * n)))
        inside = float((off.abs() <= STUDENT_3 * out.std_error).double().mean())
        assert inside == pytest.approx(0.95, abs=5 * math.sqrt(0.05 * 0.95 / n))

    @pytest.mark.parametrize("by", [0.05, 0.4])
    def test_from_one_probe_it_is_a_bound(self, by):
        a, b, x = pair(by)
        out = log_ratio(a, b, x.expand(300, 8), nodes=16, divergence=sdekit.Hutchinson(1))
        assert torch.equal(out.std_error, out.a.std_error + out.b.std_error)
        # |a| + |b| bounds by Cauchy and Schwarz; a variance of 300 draws is off by 8%, once in 300 by 3 of these.
        assert float(out.std_error.square().mean()) > 0.76 * float(out.value.var())

    @pytest.mark.parametrize("fresh", [True, False])
    @pytest.mark.parametrize("steps", [{"nodes": 16}, {"tolerance": 1e-2}], ids=["grid", "adaptive"])
    def test_common_probes_cancel(self, fresh, steps):
        """Neighbours 5% apart: independent probes leave at least 3 times the noise (here 6 to 12 times)."""
        a, b, x = pair(0.05)
        many, divergence = x.expand(200, 8), sdekit.Hutchinson(1, fresh=fresh)
        common = log_ratio(a, b, many, divergence=divergence, **steps)
        other = sdekit.log_likelihood(b, many, divergence=divergence, seed=1, **steps)
        independent = (common.a.log_prob - other.log_prob).std()
        assert float(common.value.std()) < float(independent) / 3

    def test_the_shipped_network_and_a_neighbour_are_told_apart_with_a_calibrated_error(self):
        """90 draws of 3 images; bounds of 5 standard deviations as above. The sum of both errors is far too large."""
        model = digits.load()
        other = copy.deepcopy(model)
        with torch.no_grad():
            for weight in other.net.parameters():
                weight += (
                    0.01 * weight.std() * torch.randn(weight.shape, generator=seeded(1)) if weight.numel() > 1 else 0
                )
        x = digits.dequantise(digits.load_split().test[:3], seeded(0))
        rows = torch.arange(90) % 3
        out = log_ratio(model, other, x[rows], nodes=16, divergence=sdekit.Hutchinson(4), indices=torch.arange(90))
        exact = log_ratio(model, other, x, nodes=16)
        off = out.value - exact.value[rows]
        n = len(off)
        assert float(out.std_error.square().mean() / off.square().mean()) == pytest.approx(
            1.0, abs=5 * math.sqrt(8 / 3 / n)
        )
        assert float((off.abs() <= STUDENT_3 * out.std_error).double().mean()) > 0.95 - 5 * math.sqrt(0.05 * 0.95 / n)
        assert float((out.a.std_error + out.b.std_error).mean()) > 20 * float(off.std())


class TestTheMean:
    def test_it_is_that_of_paired_differences_and_leaves_out_what_did_not_arrive(self):
        a, b, _ = pair(0.2)
        many = mixture(8, seed=3).sample(40, generator=seeded(0))
        out = log_ratio(a, b, many, nodes=12)
        mean = out.mean()
        assert mean.value == pytest.approx(float(out.value.mean()), rel=1e-12)
        assert mean.std_error == pytest.approx(float(out.value.std()) / math.sqrt(40), rel=1e-12)
        assert mean.samples == 40
        unpaired = math.sqrt(float(out.a.log_prob.var() + out.b.log_prob.var()) / 40)
        assert mean.std_error < 0.7 * unpaired
        gap = out._replace(value=torch.cat((out.value[:30], torch.full((10,), math.nan, dtype=torch.float64)))).mean()
        assert gap.value == pytest.approx(float(out.value[:30].mean()), rel=1e-12)
        assert gap.samples == 30

    def test_of_one_sample_there_is_no_spread(self):
        a, b, x = pair(0.2)
        assert math.isnan(log_ratio(a, b, x, nodes=8).mean().std_error)


class TestTheRest:
    def test_a_difference_is_the_same_in_any_batch(self):
        a, b, _ = pair(0.1)
        x, rows = mixture(8, seed=3).sample(9, generator=seeded(2)), torch.tensor([7, 2])
        options = {"divergence": sdekit.Hutchinson(3), "seed": 5, "tolerance": 0.1}
        whole = log_ratio(a, b, x, **options)
        part = log_ratio(a, b, x[rows], indices=rows, **options)
        torch.testing.assert_close(part.value, whole.value[rows], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(part.std_error, whole.std_error[rows], rtol=1e-7, atol=1e-9)

    def test_above_128_dimensions_the_default_has_an_error_bar_of_its_own(self):
        model = sdekit.targets.Gaussian(torch.zeros(130), torch.linspace(0.2, 0.9, 130)).score_model(VP)
        out = log_ratio(model, model, draw(0, 2, 130), nodes=6)
        assert out.a.by_probe.shape == (2, 4)

    def test_an_empty_batch_has_empty_differences(self):
        a, b, x = pair(0.1)
        out = log_ratio(a, b, x[:0])
        assert out.value.shape == out.std_error.shape == (0,)

    def test_an_interrupt_ends_both(self):
        def stop(call, x, label, answer):
            if call == 6:
                raise KeyboardInterrupt
            return answer()

        a, b, x = pair(0.1)
        first, _ = watched(a, stop)
        second, watch = watched(b)
        with pytest.warns(sdekit.PartialResultWarning, match="interrupted"):
            out = log_ratio(first, second, x)
        assert watch.calls == 0
        assert out.value.isnan().all()
        assert out.b.reach is not None
        assert out.b.reach.isnan().all()
        assert (out.b.status == sdekit.Status.INTERRUPTED).all()
        assert (out.a.stats.evaluations == 5).all()

    def test_a_failed_sample_is_left_out_or_raised(self):
        def spoil(call, x, label, answer):
            return torch.where((torch.arange(len(x)) == 1)[:, None], torch.nan, answer())

        a, b, x = pair(0.1)
        bad, _ = watched(b, spoil)
        with pytest.raises(sdekit.SolveError):
            log_ratio(a, bad, x.expand(3, 8), nodes=8)
        out = log_ratio(a, bad, x.expand(3, 8), nodes=8, throw=False)
        assert out.value.isnan().tolist() == [False, True, False]
        assert out.mean().samples == 2

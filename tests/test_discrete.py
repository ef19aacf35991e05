"""Bounds of log-probabilities of integers: against known probabilities, in any batch, on learned networks.

Statistical tests have fixed seeds; |z| < 5 has a false-alarm probability of 6e-7 each, one-sided half of that.
"""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
from helpers import SDES, Function, cell_log_prob, draw, gaussian, mixture, moments, seeded
from torch import nn

import sdekit
from sdekit import _random
from sdekit._random import Stream
from sdekit.dequantize import TruncatedNormalDequantizer, UniformDequantizer, VariationalDequantizer
from sdekit.discrete import discrete_log_likelihood
from sdekit.loss import EDMWeight, LogNormalSigma
from sdekit.model.nets import MLP
from sdekit.training import Batch, Recipe, train
from sdekit.units import Levels
from sdekit.zoo import digits

VP = SDES["vp"]
STATED = 5.0
LAWS = {"uniform": UniformDequantizer(), "truncated": TruncatedNormalDequantizer(), "v": VariationalDequantizer()}
TARGET = sdekit.targets.Gaussian(torch.tensor([0.3, -0.2]), torch.tensor([0.2, 0.05]))
MODEL = TARGET.score_model(VP)
SIX = {"levels": 6, "low": -1.2, "high": 1.2}
CELLS = Levels(6, -1.2, 1.2)
EXACT = {**SIX, "data_moments": TARGET, "dtype": torch.float64}


def levels(seed, *shape, count=6):
    return torch.randint(0, count, shape, generator=seeded(seed))


class TestAgainstKnownProbabilities:
    @pytest.mark.parametrize("name", LAWS)
    def test_each_draw_is_the_log_weight_of_its_state(self, name):
        k, law = levels(0, 5, 2), LAWS[name]
        out = discrete_log_likelihood(
            MODEL, k, dequantizer=law, samples=3, bound="importance", tolerance=1e-4, seed=4, **EXACT
        )
        keys = _random.sample_keys(4, Stream.DEQUANTISE, torch.arange(5))
        for number in range(3):
            made = law.draw(VP, out.t, k, CELLS, keys, torch.full((5,), number))
            weight = TARGET.marginal_log_prob(VP, made.x, out.t) + made.decoder + made.surprise
            torch.testing.assert_close(out.draws[:, number], weight, rtol=0, atol=2e-4)
        assert (out.draws[:, 0] != out.draws[:, 1]).all()

    @pytest.mark.parametrize("name", LAWS)
    def test_bounds_are_below_the_probability_and_close_in_on_it(self, name):
        """The decoder's probability is taken from the weights' own average: an upper estimate of what is bounded."""
        k, t = torch.tensor([[4, 1]]).expand(600, 2), 0.05
        options = {**EXACT, "dequantizer": LAWS[name], "samples": 8, "t": t, "draws_at_once": 8, "nodes": 32}
        mean = discrete_log_likelihood(MODEL, k, bound="mean", **options)
        importance = discrete_log_likelihood(MODEL, k, bound="importance", **options)
        truth = cell_log_prob(TARGET, k[0], CELLS, VP, t)
        if name == "v":
            truth = float(torch.logsumexp(importance.draws.flatten(), 0)) - math.log(4800)
        gaps = [(truth - out.log_prob) for out in (mean, importance)]
        first, second = (float(gap.mean()) for gap in gaps)
        errors = [float(gap.std()) / math.sqrt(600) for gap in gaps]
        assert first > STATED * errors[0]
        assert second > -STATED * errors[1]
        assert second < 0.3 * first

    @pytest.mark.parametrize("bound", ["mean", "importance"])
    def test_the_standard_error_is_that_of_repeated_evaluations(self, bound):
        """The ratio of variances, from 500 evaluations of 16 draws: 5 deviations of it are below 0.3."""
        k = torch.tensor([[4, 1]]).expand(500, 2)
        out = discrete_log_likelihood(MODEL, k, samples=16, bound=bound, t=0.05, draws_at_once=16, nodes=24, **EXACT)
        ratio = float(out.std_error.square().mean() / out.log_prob.var())
        assert 0.75 < ratio < 1.33
        assert (out.trace_error == 0).all()

    def test_the_standard_error_of_one_draw_is_unknown(self):
        assert discrete_log_likelihood(MODEL, levels(0, 3, 2), **SIX).std_error.isnan().all()

    def test_results_are_what_their_draws_say(self):
        k = levels(1, 7, 2)
        options = {**SIX, "samples": 5, "dequantizer": LAWS["truncated"]}
        importance = discrete_log_likelihood(MODEL, k, bound="importance", **options)
        sampled = discrete_log_likelihood(MODEL, k, entropy="sampled", **options)
        closed = discrete_log_likelihood(MODEL, k, **options)
        torch.testing.assert_close(importance.log_prob, importance.draws.exp().mean(1).log())
        torch.testing.assert_close(sampled.log_prob, importance.draws.mean(1))
        torch.testing.assert_close(closed.log_prob, closed.draws.mean(1))
        assert (importance.log_prob > sampled.log_prob).all()
        assert (closed.draws != sampled.draws).all()
        torch.testing.assert_close(importance.bits_per_dim(), -importance.log_prob / (2 * math.log(2.0)))
        assert ((importance.effective_draws() > 1) & (importance.effective_draws() <= 5)).all()
        assert (importance.evaluations > 5 * 10).all()
        assert (importance.solver_error <= 1e-2).all()

    def test_a_uniform_draw_gives_the_number_that_others_report(self):
        k = levels(2, 6, 2)
        out = discrete_log_likelihood(MODEL, k, dtype=torch.float64, **SIX)
        keys = _random.sample_keys(0, Stream.DEQUANTISE, torch.arange(6))
        u = 1.0 - _random.uniforms(keys, torch.zeros(6, dtype=torch.int64), 2)
        plain = sdekit.log_likelihood(MODEL, CELLS.place(k, u)).bits_per_dim(6, -1.2, 1.2)
        torch.testing.assert_close(out.bits_per_dim(), plain, rtol=0, atol=1e-4)


class TestProbes:
    TARGET = gaussian(12, seed=3)
    MODEL = TARGET.score_model(VP)
    COUNT = 1500

    @functools.cached_property
    def noise(self):
        """What probes add to log p, (n,), and its variance as they claim it."""
        k = torch.full((self.COUNT, 12), 3)
        options = {"levels": 6, "low": -1.5, "high": 1.5, "data_moments": self.TARGET, "t": 0.05}
        exact = discrete_log_likelihood(self.MODEL, k, divergence=sdekit.Exact(), **options)
        probes = {"divergence": sdekit.Hutchinson(), **options}
        mean = discrete_log_likelihood(self.MODEL, k, **probes)
        debiased = discrete_log_likelihood(self.MODEL, k, bound="importance", debias=True, **probes)
        return mean.draws[:, 0] - exact.draws[:, 0], debiased.draws[:, 0] - exact.draws[:, 0], mean.trace_error

    def test_do_not_bias_the_mean_but_do_bias_exponentials_unless_debiased(self):
        """One-sided and two-sided z of 5. The noise has a deviation of 0.54 nats here, so that exponentials are 16%
        too high; debiased they are within 5 standard errors of 1, which are 7%."""
        mean, debiased, claimed = self.noise

        def z(values, expected):
            return float((values.mean() - expected) / values.std()) * math.sqrt(self.COUNT)

        assert abs(z(mean, 0.0)) < STATED
        assert z(mean.exp(), 1.0) > STATED
        assert abs(z(debiased.exp(), 1.0)) < STATED
        assert 0.8 < float(claimed.square().mean() / mean.var()) < 1.4
        torch.testing.assert_close(debiased, mean - 0.5 * claimed.square(), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("divergence", [sdekit.Hutchinson(), sdekit.Hutchinson(8, fresh=False)])
    def test_make_the_importance_bound_none_and_it_is_refused(self, divergence):
        k = torch.zeros(1, 12, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"no lower bound.*Exact\(\).*debias=True"):
            discrete_log_likelihood(self.MODEL, k, divergence=divergence, samples=2, bound="importance")
        wide = sdekit.targets.Gaussian(torch.zeros(130), torch.ones(130)).score_model(VP)
        with pytest.raises(ValueError, match="130 dimensions, traces by one probe"):
            discrete_log_likelihood(wide, torch.zeros(1, 130, dtype=torch.int64), samples=2, bound="importance")

    def test_are_new_for_every_draw(self):
        k = torch.full((1, 12), 3)
        options = {"levels": 6, "divergence": sdekit.Hutchinson(), "samples": 2, "nodes": 12}

        def errors(**more):
            out = discrete_log_likelihood(self.MODEL, k, **options, **more)
            exact = discrete_log_likelihood(self.MODEL, k, **{**options, "divergence": sdekit.Exact()}, **more)
            return out.draws[0] - exact.draws[0]

        first, other = errors(), errors(indices=torch.tensor([1]))
        assert len({round(float(value), 6) for value in (*first, *other)}) == 4


@functools.cache
def learned():
    """A small network of two dimensions, trained on two levels at the centres of their bins: (0, 0) and (0, 1) with
    probability 1/4, (1, 1) with 1/2."""

    def batches(generator):
        k = torch.randint(0, 2, (256, 2), generator=generator)
        k[:, 1] |= k[:, 0]
        return Batch(Levels(2).place(k), {})

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP((2,), 64, 2, period=4.0)
    model = sdekit.ScoreModel(net, VP, sdekit.edm(0.6, sdekit.LogSigmaLabel(0.25)))
    recipe = Recipe(1000, 3e-3, weight=EDMWeight(0.6), times=LogNormalSigma(mean=-1.5, std=1.0))
    return train(model, batches, recipe, progress=False).model.eval()


class TestOnLearnedNetworks:
    @pytest.mark.parametrize("name", LAWS)
    def test_probabilities_of_all_levels_add_up(self, name):
        """To 1: with a decoder wherever the cells end, without where they reach far beyond the data. Within 5 standard
        errors and the solver's 2e-3."""
        half = 1.0 if name == "v" else 5.0
        k = torch.cartesian_prod(torch.arange(8), torch.arange(8))
        options = {"levels": 8, "low": -half, "high": half, "t": 0.3, "nodes": 16, "dequantizer": LAWS[name]}
        out = discrete_log_likelihood(learned(), k, samples=96, bound="importance", draws_at_once=96, **options)
        total, error = out.log_prob.exp().sum(), (out.log_prob.exp() * out.std_error).square().sum().sqrt()
        assert abs(float(total) - 1.0) < STATED * float(error) + 2e-3
        assert float(error) < 0.02

    def test_of_integers_a_truncated_normal_beats_the_uniform_law(self):
        """By 0.60 nats a dimension in theory: 0.3 is asked of a network that is not exact."""
        k = levels(3, 40, 2, count=2)
        k[:, 1] |= k[:, 0]
        law = TruncatedNormalDequantizer()
        options = {"levels": 2, "samples": 8, "draws_at_once": 8, "t": law.time(VP, Levels(2)), "nodes": 24}
        uniform = discrete_log_likelihood(learned(), k, dequantizer=UniformDequantizer(), **options)
        closed = discrete_log_likelihood(learned(), k, dequantizer=law, **options)
        sampled = discrete_log_likelihood(learned(), k, dequantizer=law, entropy="sampled", **options)
        assert float((closed.log_prob - uniform.log_prob).mean()) > 2 * 0.3
        assert float(closed.log_prob.mean()) > -1.04 - 0.15  # nats: the entropy of these levels is 1.04
        assert float(sampled.std_error.mean()) < 0.5 * float(closed.std_error.mean())

    def test_of_uniform_points_the_default_beats_a_truncated_normal(self):
        """On the shipped digits network, of which the theory says 0.39 nats a dimension at most, 0.56 bits."""
        model, k = digits.load(), digits.load_split().test[:3]
        bits = {
            name: discrete_log_likelihood(model, k, levels=17, dequantizer=law, nodes=32).bits_per_dim()
            for name, law in (("default", None), ("truncated", TruncatedNormalDequantizer()))
        }
        difference = bits["truncated"] - bits["default"]
        assert (difference > 0.2).all()
        assert (difference < 0.9).all()


class TestOneSampleAndTheOthers:
    @pytest.mark.parametrize(
        ("name", "divergence"),
        [
            ("uniform", sdekit.Exact()),
            ("uniform", sdekit.Hutchinson()),
            ("truncated", sdekit.Hutchinson()),
            ("v", sdekit.Hutchinson()),
        ],
    )
    def test_a_sample_has_the_same_bound_in_any_batch_and_its_draws_in_any_number(self, name, divergence):
        target = mixture(4, seed=8)
        model, k = target.score_model(VP), levels(5, 7, 4)
        options = {**SIX, "dequantizer": LAWS[name], "divergence": divergence, "samples": 2, "seed": 7}
        options.update(dtype=torch.float64, tolerance=0.1)
        whole = discrete_log_likelihood(model, k, **options)
        for rows in (torch.tensor([6]), torch.tensor([5, 0, 3])):
            out = discrete_log_likelihood(model, k[rows], indices=rows, **options)
            torch.testing.assert_close(out.draws, whole.draws[rows], rtol=0, atol=1e-10)
            torch.testing.assert_close(out.log_prob, whole.log_prob[rows], rtol=0, atol=1e-10)
            assert torch.equal(out.evaluations, whole.evaluations[rows])
        shaped = k.reshape(7, 2, 1, 2).to(torch.uint8)
        more = discrete_log_likelihood(model, shaped, draws_at_once=2, **{**options, "samples": 3})
        torch.testing.assert_close(more.draws[:, :2], whole.draws, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("samples", [1, 3])
    def test_an_empty_batch_gives_empty_results(self, samples):
        out = discrete_log_likelihood(MODEL, torch.zeros(0, 2, dtype=torch.int64), samples=samples, draws_at_once=2)
        assert out.log_prob.shape == out.std_error.shape == out.bits_per_dim().shape == out.status.shape == (0,)
        assert out.draws.shape == (0, samples)

    def test_noise_levels_may_differ_from_sample_to_sample(self):
        k, t = levels(6, 3, 2), torch.tensor([1e-4, 0.02, 0.1], dtype=torch.float64)
        whole = discrete_log_likelihood(MODEL, k, t=t, **EXACT)
        for row in range(3):
            one = discrete_log_likelihood(MODEL, k[row][None], t=float(t[row]), indices=torch.tensor([row]), **EXACT)
            torch.testing.assert_close(one.log_prob[0], whole.log_prob[row], rtol=0, atol=1e-10)

    def test_conditions_follow_their_samples(self):
        def shifted(x, label, mean):  # unit Gaussians keep variance 1 under VP
            return VP.sigma(label)[:, None] * (x - VP.alpha(label)[:, None] * mean)

        mean, k = draw(1, 4, 2), levels(7, 4, 2)
        model = sdekit.ScoreModel(Function(shifted), VP, data_std=1.0)
        options = {**SIX, "samples": 3, "draws_at_once": 3, "dtype": torch.float64}
        whole = discrete_log_likelihood(model.condition(mean=mean), k, **options)
        for row in range(4):
            own = model.condition(mean=mean[row : row + 1])
            one = discrete_log_likelihood(own, k[row : row + 1], indices=torch.tensor([row]), **options)
            torch.testing.assert_close(one.draws[0], whole.draws[row], rtol=0, atol=1e-10)

    def test_the_global_generator_is_left_alone(self):
        before = torch.get_rng_state()
        discrete_log_likelihood(MODEL, levels(0, 2, 2), dequantizer=LAWS["v"], **SIX)
        assert torch.equal(before, torch.get_rng_state())


class TestWhatDoesNotArrive:
    def test_a_sample_that_fails_in_one_draw_is_lost_and_the_others_are_kept(self):
        def poisoned(x, label, bad):
            return torch.where(bad[:, None], math.nan, MODEL.net(x, label))

        bad = torch.tensor([False, True, False])
        model = sdekit.ScoreModel(Function(poisoned), VP).condition(bad=bad)
        good = discrete_log_likelihood(sdekit.ScoreModel(MODEL.net, VP), levels(0, 3, 2), samples=2, **SIX)
        out = discrete_log_likelihood(model, levels(0, 3, 2), samples=2, throw=False, **SIX)
        assert out.status.tolist() == [1, int(sdekit.Status.NOT_FINITE), 1]
        for value in (out.log_prob, out.std_error, out.trace_error, out.solver_error):
            assert value.isnan().tolist() == bad.tolist()
        torch.testing.assert_close(out.log_prob[~bad], good.log_prob[~bad], rtol=0, atol=1e-9)
        with pytest.raises(sdekit.SolveError, match=r"1 of 3 .*\n  sample 11 at t=1e-05: .*not finite") as caught:
            discrete_log_likelihood(model, levels(0, 3, 2), samples=2, indices=torch.arange(10, 13), **SIX)
        assert caught.value.solution.log_prob.isfinite().tolist() == [True, False, True]

    def test_ctrl_c_ends_it_and_says_so(self):
        calls = []

        def stopped(x, label):
            calls.append(1)
            if len(calls) > 60:
                raise KeyboardInterrupt
            return MODEL.net(x, label)

        with pytest.warns(sdekit.PartialResultWarning, match="interrupted"):
            out = discrete_log_likelihood(
                sdekit.ScoreModel(Function(stopped), VP), levels(0, 3, 2), samples=50, nodes=20, **SIX
            )
        assert (out.status == sdekit.Status.INTERRUPTED).all()
        assert out.log_prob.isnan().all()
        assert out.draws[:, :2].isfinite().all()
        assert out.draws[:, 4:].isnan().all()
        assert len(calls) == 61

    def test_a_network_that_breaks_leaves_the_draws_before_it(self):
        calls = []

        def breaking(x, label):
            calls.append(1)
            return MODEL.net(x, label) if len(calls) <= 30 else None

        model = sdekit.ScoreModel(Function(breaking), VP)
        with pytest.raises(sdekit.SolveError, match="NoneType") as caught:
            discrete_log_likelihood(model, levels(0, 3, 2), samples=4, nodes=20, **SIX)
        kept = caught.value.solution
        assert kept.draws[:, 0].isfinite().all()
        assert kept.draws[:, 1:].isnan().all()
        assert kept.log_prob.isnan().all()

    def test_draws_beyond_the_tolerance_are_told_once(self):
        kinked = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2)).double()
        with torch.no_grad():
            for number, parameter in enumerate(kinked.parameters()):
                parameter.copy_(0.5 * draw(number, *parameter.shape))
        model = sdekit.ScoreModel(Function(lambda x, label: kinked(x)), VP)
        options = {**SIX, "samples": 2, "tolerance": 1e-5, "t": 0.5, "dtype": torch.float64}
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            out = discrete_log_likelihood(model, levels(0, 1, 2), **options)
        told = [one for one in seen if issubclass(one.category, sdekit.ToleranceWarning)]
        assert len(told) == 1
        assert told[0].filename == __file__
        assert (out.status == sdekit.Status.LOOSE).any()
        assert out.log_prob.isfinite().all()


class TestBadInput:
    K = torch.zeros(2, 2, dtype=torch.int64)

    @pytest.mark.parametrize(
        ("k", "error", "words"),
        [
            (torch.zeros(2, 2), TypeError, r"torch.float32; integers 0\.\.5 are needed.*\.long\(\)"),
            (torch.zeros(2, 2, dtype=torch.bool), TypeError, "torch.bool"),
            (torch.zeros(2, dtype=torch.int64), ValueError, "event axis"),
            (torch.full((2, 2), 6), ValueError, r"k holds torch.int64 from 6 to 6; integers 0\.\.5"),
            (torch.full((2, 2), -1), ValueError, r"integers 0\.\.5"),
            ([[0, 1]], TypeError, "list"),
        ],
    )
    def test_of_levels_is_named(self, k, error, words):
        with pytest.raises(error, match=words):
            discrete_log_likelihood(MODEL, k, **SIX)

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"levels": 1}, ValueError, "levels=1"),
            ({"low": 1.2}, ValueError, "low < high"),
            ({"samples": 0}, ValueError, "samples=0"),
            ({"samples": 2.0}, TypeError, "samples=2.0"),
            ({"draws_at_once": 0}, ValueError, "draws_at_once=0"),
            ({"bound": "elbo"}, ValueError, "bound='elbo'"),
            ({"entropy": "exact"}, ValueError, "entropy='exact'"),
            ({"debias": True}, ValueError, "leave debias out"),
            (
                {"debias": True, "bound": "importance", "divergence": sdekit.Hutchinson(3, fresh=False)},
                ValueError,
                "too uncertain: use fresh probes",
            ),
            ({"dequantizer": "uniform"}, TypeError, r"UniformDequantizer\(\)"),
            ({"dequantizer": UniformDequantizer}, TypeError, r"UniformDequantizer\(\)"),
            ({"t": 2.0}, ValueError, "t_min, t_max"),
            ({"t": torch.full((3,), 0.1)}, ValueError, r"t.shape=\(3,\)"),
            ({"dtype": torch.int64}, TypeError, "floating dtype"),
            ({"seed": -1}, ValueError, "seed=-1"),
            ({"indices": torch.arange(3)}, ValueError, "indices.shape"),
            ({"tolerance": 0.0}, ValueError, "tolerance=0.0"),
            ({"data_moments": moments(mixture(3, 0))}, ValueError, "3 dimensions"),
        ],
    )
    def test_of_options_is_named(self, options, error, words):
        with pytest.raises(error, match=words):
            discrete_log_likelihood(MODEL, self.K, **{**SIX, **options})

    def test_a_condition_of_another_batch_is_named(self):
        model = sdekit.ScoreModel(Function(lambda x, label, y: x), VP).condition(y=torch.zeros(3))
        with pytest.raises(ValueError, match=r"condition y.shape=\(3,\)"):
            discrete_log_likelihood(model, self.K)

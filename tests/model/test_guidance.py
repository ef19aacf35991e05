"""Guided models: fields in closed form, conditions that follow their samples, everything that takes a ScoreModel."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import PARAMETERIZATIONS, SDES, Function, draw, gaussian, mixture, perceptron, seeded, spread_times, times
from torch import nn

import sdekit
from sdekit import targets
from sdekit.model.guidance import GuidanceInterval, classifier_guided, guided

VP = sdekit.VPSDE()
ONE = targets.Gaussian(torch.tensor([0.5, -0.2, 0.1]), torch.tensor([0.3, 0.05, 0.8]))
TWO = targets.Gaussian(torch.tensor([-0.1, 0.3, 0.0]), torch.tensor([0.9, 0.4, 0.5]))


def log_stretch(sde, scale, t):
    """(D,) log of dx_t/dx_{t_min} along the guided flow of ONE over TWO.

    With y = x/alpha and r = sigma/alpha the flow is dy/dr = r (w (y - m_1)/(v_1 + r^2) + (1 - w)(y - m_2)/(v_2 + r^2)),
    whose homogeneous part is solved by (v_1 + r^2)^(w/2) (v_2 + r^2)^((1 - w)/2).
    """

    def level(at):
        square = torch.exp(-2.0 * sde.half_log_snr(at))
        first, second = (target._components.values[0] + square for target in (ONE, TWO))
        return 0.5 * scale * first.log() + 0.5 * (1.0 - scale) * second.log() + sde.log_alpha(at)

    return level(t) - level(sde.t_min)


class Classes(nn.Module):
    """A network of (x, label, y) with a class of its own for "none"; y may be left out."""

    def __init__(self, dim=3, classes=4):
        super().__init__()
        self.net, self.shift = perceptron(dim, 1), nn.Parameter(0.3 * draw(7, classes + 1, dim))

    def forward(self, x, label, y=None):
        y = torch.full((len(x),), len(self.shift) - 1) if y is None else y
        return 0.2 * self.net(x, label) + torch.tanh(x + self.shift[y])


class Labelled(nn.Module):
    """The same, its class called `label`."""

    def __init__(self):
        super().__init__()
        self.inner = Classes()

    def forward(self, x, t, label=None):
        return self.inner(x, t, label)


def test_a_condition_may_be_called_label():
    named, plain = (sdekit.ScoreModel(net, VP, data_std=1.0).eval() for net in (Labelled(), Classes()))
    x, y, none = draw(3, 4, 3), torch.tensor([0, 1, 2, 3]), torch.full((4,), 4)
    one = guided(named, named.condition(label=none), 2.0).condition(label=y)
    other = guided(plain, plain.condition(y=none), 2.0).condition(y=y)
    assert torch.equal(one.score(x, 0.3), other.score(x, 0.3))


class TestTheFieldInClosedForm:
    @pytest.mark.parametrize("scale", [0.6, 3.0])
    @pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
    @pytest.mark.parametrize("kinds", [("noise", "noise"), ("v", "edm"), ("edm", "score"), ("data", "velocity")])
    def test_the_score_is_extrapolated_in_every_parameterization(self, sde, scale, kinds):
        one, two = (
            target.score_model(sde, PARAMETERIZATIONS[kind]) for target, kind in zip((ONE, TWO), kinds, strict=True)
        )
        model, t = guided(one, two, scale), spread_times(sde, 12)
        x = sde.perturb(draw(1, len(t), 3), t, draw(2, len(t), 3))
        wanted = scale * ONE.score(sde, x, t) + (1.0 - scale) * TWO.score(sde, x, t)
        size = sde.sigma(t)[:, None]  # in the noise's own units, where every schedule is of order 1
        torch.testing.assert_close(model.score(x, t) * size, wanted * size, rtol=1e-9, atol=1e-7)

    @pytest.mark.filterwarnings("ignore:the model is guided")
    @pytest.mark.parametrize("scale", [2.5])
    @pytest.mark.parametrize("sde", [VP, sdekit.VESDE()], ids=["vp", "ve"])
    def test_the_log_determinant_is_that_of_the_linear_field(self, sde, scale):
        model = guided(ONE.score_model(sde), TWO.score_model(sde), scale)
        out = sdekit.log_likelihood(model, draw(3, 5, 3), tolerance=1e-2)
        wanted = log_stretch(sde, scale, times(sde.t_max)[0]).sum()
        torch.testing.assert_close(out.log_det, wanted.expand(5), rtol=0, atol=1e-2)

    def test_samples_have_the_variance_of_the_linear_field(self):
        # 4,000 samples: a variance is off by 2% a standard deviation; 4.4 of them for 3 coordinates: 3e-5.
        model = guided(ONE.score_model(VP), TWO.score_model(VP), 2.0)
        x = sdekit.sample(model, (4000, 3), steps=40, denoise=False, dtype=torch.float64).x
        wanted = torch.exp(-2.0 * log_stretch(VP, 2.0, times(VP.t_max)[0]))
        assert ((x.var(0) / wanted - 1.0).abs() < 4.4 * (2.0 / 4000) ** 0.5).all()

    def test_a_product_of_gaussians_has_another_density(self):
        """The docstring's warning: p_1^w p_2^(1-w), normalised, is a Gaussian here, and not the guided density."""
        w, x = 2.0, draw(3, 64, 3)
        precision = w / ONE._components.values[0] + (1 - w) / TWO._components.values[0]
        mean = (
            w * (ONE._components.means / ONE._components.values)
            + (1 - w) * (TWO._components.means / TWO._components.values)
        )[0]
        product = targets.Gaussian(mean / precision, 1.0 / precision)
        out = sdekit.log_likelihood(guided(ONE.score_model(VP), TWO.score_model(VP), w), x, nodes=24)
        assert (out.log_prob - product.log_prob(x)).abs().max() > 0.5

    @pytest.mark.parametrize("scale", [1.5, 2.0, 2.5, -1.5, GuidanceInterval(7.5, -1.0, 2.0), lambda level: level])
    def test_strong_guidance_is_warned_of_where_errors_are_estimated_by_the_score(self, scale):
        strong = scale in (2.5, -1.5) or isinstance(scale, GuidanceInterval)
        model, x = guided(ONE.score_model(VP), TWO.score_model(VP), scale), draw(3, 2, 3)
        for options, warned in (({"tolerance": 0.5}, strong), ({"nodes": 8}, False)):
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                sdekit.log_likelihood(model, x, throw=False, **options)
            assert any("solve again with a tenth" in str(said.message).lower() for said in heard) == warned

    def test_the_interval_guides_inside_and_leaves_the_conditional_model_outside(self):
        scale = GuidanceInterval(3.0, -1.0, 2.0, width=0.05)
        one, two = ONE.score_model(VP), TWO.score_model(VP)
        t, x = VP.time_at(times(-3.0, 0.5, 4.0)), draw(1, 3, 3)
        found, outside, inside = (m.noise(x, t) for m in (guided(one, two, scale), one, guided(one, two, 3.0)))
        torch.testing.assert_close(found[[0, 2]], outside[[0, 2]], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[1], inside[1], rtol=1e-9, atol=1e-9)
        middle = VP.time_at(times(-1.0, 2.0))  # at an end half of the way
        half = guided(one, two, 2.0)
        torch.testing.assert_close(
            guided(one, two, scale).noise(x[:2], middle), half.noise(x[:2], middle), rtol=1e-9, atol=1e-9
        )

    def test_a_constant_function_is_that_number(self):
        one, two = ONE.score_model(VP, sdekit.edm(0.5)), TWO.score_model(VP)
        x, t = draw(1, 6, 3), spread_times(VP, 12)[:6]
        by_function = guided(one, two, lambda level: torch.full_like(level, 1.7))
        torch.testing.assert_close(by_function.data(x, t), guided(one, two, 1.7).data(x, t), rtol=1e-12, atol=1e-12)


class TestScaleOne:
    @pytest.mark.parametrize("label", [sdekit.TimeLabel(999.0), sdekit.LogSigmaLabel(), sdekit.SigmaLabel()])
    @pytest.mark.parametrize("kind", [sdekit.noise, sdekit.v, sdekit.edm])
    def test_it_is_the_conditional_model_to_the_bit(self, kind, label):
        net = Classes().float()
        model = sdekit.ScoreModel(net, VP, kind(label=label))
        y, x, t = torch.tensor([0, 3, 1, 2]), draw(1, 4, 3).float(), times(1e-5, 0.01, 0.4, 1.0)
        conditional = model.condition(y=y)
        assert torch.equal(guided(conditional, model, 1.0).noise(x, t), conditional.noise(x, t))
        assert torch.equal(guided(conditional, model, 0.0).noise(x, t), model.noise(x, t))

    def test_the_likelihood_too(self):
        model, x = sdekit.ScoreModel(Classes(), VP), draw(1, 4, 3)
        y = torch.tensor([0, 3, 1, 2])
        a = sdekit.log_likelihood(guided(model.condition(y=y), model, 1.0), x, tolerance=0.1)
        b = sdekit.log_likelihood(model.condition(y=y), x, tolerance=0.1)
        assert torch.equal(a.log_prob, b.log_prob)
        assert torch.equal(a.stats.evaluations, b.stats.evaluations)


class TestConditions:
    def test_they_follow_their_samples_through_compaction_alone_and_in_any_order(self):
        model = sdekit.ScoreModel(Classes(), VP)
        y, other, x = torch.arange(10) % 4, (torch.arange(10) + 1) % 5, draw(1, 10, 3)
        together = guided(model.condition(y=y), model.condition(y=other), 1.8)
        whole = sdekit.log_likelihood(together, x, tolerance=0.1).log_prob
        for rows in (torch.tensor([7]), torch.tensor([9, 0, 4])):
            alone = guided(model.condition(y=y[rows]), model.condition(y=other[rows]), 1.8)
            for part in (alone, together.take(rows)):
                found = sdekit.log_likelihood(part, x[rows], tolerance=0.1).log_prob
                torch.testing.assert_close(found, whole[rows], rtol=1e-10, atol=1e-10)

    def test_conditions_of_the_result_are_those_of_either_model(self):
        model, y, x = sdekit.ScoreModel(Classes(), VP), torch.tensor([0, 3]), draw(1, 2, 3)
        bare, wanted = guided(model, model, 2.0), guided(model.condition(y=y), model.condition(y=y + 1), 2.0)
        found = bare.condition(y=y, unconditional_y=y + 1)
        assert torch.equal(found.noise(x, 0.3), wanted.noise(x, 0.3))
        for name in ("y", "unconditional_y"):
            with pytest.raises(ValueError, match=rf"condition {name}\.shape=\(2,\)"):
                sdekit.sample(bare.condition(**{name: y}), (3, 3), steps=4)

    def test_the_shared_network_is_not_copied_and_moves_with_its_conditions(self):
        model = sdekit.ScoreModel(Classes(), VP).condition(y=torch.tensor([0, 3]))
        both = guided(model, model, 2.0)
        assert len(list(both.parameters())) == len(list(model.parameters()))
        assert both.to(torch.float32).noise(draw(1, 2, 3).float(), 0.3).dtype == torch.float32

    def test_evaluation_mode_is_left_alone(self):
        net = Classes().eval()
        guided(sdekit.ScoreModel(net, VP), sdekit.ScoreModel(net, VP), 2.0)
        assert not net.training


class Posterior(nn.Module):
    """log p_t(k | x) of a mixture's components, exactly; `wiggle` scales it."""

    def __init__(self, target, sde):
        super().__init__()
        self.target, self.sde = target, sde

    def forward(self, x, t, component):
        joint = self.target._pull(self.sde, x, t)[1]
        return joint.log_softmax(1).gather(1, component[:, None])[:, 0]


class TestClassifierGuidance:
    @pytest.mark.parametrize("kind", PARAMETERIZATIONS)
    @pytest.mark.parametrize("sde", [VP, sdekit.VESDE(), sdekit.RectifiedFlow()], ids=["vp", "ve", "flow"])
    def test_an_exact_classifier_turns_the_mixture_into_its_component(self, sde, kind):
        target = mixture(3, 2)
        component, x = torch.tensor([0, 3, 1, 2, 0, 1]), draw(1, 6, 3)
        model = classifier_guided(
            target.score_model(sde, PARAMETERIZATIONS[kind]), Posterior(target, sde), 1.0, component=component
        )
        t = spread_times(sde, 14)[1:12:2]
        parts = target._components
        state = sde.perturb(x, t, draw(2, 6, 3))
        for i, k in enumerate(component.tolist()):
            alone = targets.Gaussian(parts.means[k], parts.values[k])
            size = float(sde.sigma(t[i]))
            wanted = alone.score(sde, state[i : i + 1], t[i : i + 1]) * size
            found = model.take(torch.tensor([i])).score(state[i : i + 1], t[i : i + 1]) * size
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-7)

    def test_its_likelihood_is_that_of_the_component(self):
        target = mixture(2, 2)
        component, x = torch.arange(10) % 4, target.sample(10, generator=seeded(0))
        model = classifier_guided(target.score_model(VP), Posterior(target, VP), 1.0, component=component)
        out = sdekit.log_likelihood(model, x)
        parts = target._components
        for k in range(4):
            rows = component == k
            alone = targets.Gaussian(parts.means[k], parts.values[k])
            wanted = alone.marginal_log_prob(VP, out.latent[rows], VP.t_max) + out.log_det[rows]
            assert (wanted - alone.marginal_log_prob(VP, x[rows], VP.t_min)).abs().max() < 1e-2

    def test_forward_mode_gives_way_to_backward_mode(self):
        target = mixture(2, 2)
        model = classifier_guided(target.score_model(VP), Posterior(target, VP), 1.5, component=torch.tensor([1, 0, 3]))
        x, backward = draw(1, 3, 2), sdekit.Hutchinson(3, fresh=False)
        wanted = sdekit.log_likelihood(model, x, nodes=3, divergence=backward)
        with pytest.warns(sdekit.SdekitWarning, match="no forward mode"):
            found = sdekit.log_likelihood(model, x, nodes=3, divergence=sdekit.Hutchinson(3, fresh=False, mode="jvp"))
        torch.testing.assert_close(found.log_prob, wanted.log_prob, rtol=1e-12, atol=1e-12)

    def test_scale_zero_is_the_model_and_a_function_may_be_the_scale(self):
        target = mixture(2, 2)
        one, t = torch.zeros(3, dtype=torch.int64), times(0.01, 0.2, 0.8)
        x, plain = draw(1, 3, 2), target.score_model(VP)
        off = classifier_guided(plain, Posterior(target, VP), 0.0, component=one)
        torch.testing.assert_close(off.noise(x, t), plain.noise(x, t), rtol=1e-12, atol=1e-12)
        by_function = classifier_guided(
            plain, Posterior(target, VP), lambda level: torch.full_like(level, 1.5), component=one
        )
        by_number = classifier_guided(plain, Posterior(target, VP), 1.5, component=one)
        torch.testing.assert_close(by_function.noise(x, t), by_number.noise(x, t), rtol=1e-12, atol=1e-12)

    def test_a_wrong_answer_is_refused(self):
        model = classifier_guided(ONE.score_model(VP), lambda x, t: x.sum(), 1.0)
        with pytest.raises(sdekit.NetworkError, match=r"log_prob_of_label returned shape \(\)"):
            model.score(draw(1, 2, 3), 0.3)


def test_weights_of_both_networks_are_saved_and_loaded(tmp_path):
    def made(seed):
        one, two = (sdekit.ScoreModel(perceptron(3, seed + k), VP, sdekit.v()) for k in (0, 1))
        return guided(one, two, 1.7)

    made(1).save(tmp_path / "both.safetensors")
    back = sdekit.ScoreModel.load(tmp_path / "both.safetensors", made(5).net)
    x = draw(1, 4, 3)
    assert torch.equal(back.noise(x, 0.2), made(1).noise(x, 0.2))


REFUSED = {
    "no model": (lambda m: guided(m.net, m, 1.0), TypeError, "conditional is a"),
    "another sde": (lambda m: guided(m, gaussian().score_model(SDES["ve"]), 1.0), ValueError, "one SDE is needed"),
    "no scale": (lambda m: guided(m, m, "3"), TypeError, "scale='3'"),
    "infinite": (lambda m: guided(m, m, float("inf")), ValueError, "finite"),
    "shape": (lambda m: guided(m, m, lambda level: torch.tensor(1.0)), ValueError, r"shape \(2,\)"),
    "clash": (lambda m: guided(m.condition(unconditional_y=1), m, 1.0), ValueError, "rename"),
    "no classifier": (lambda m: classifier_guided(m, 3, 1.0), TypeError, "log_prob_of_label is a int"),
    "classifier clash": (
        lambda m: classifier_guided(m.condition(classifier_y=1), Function(None), 1.0),
        ValueError,
        "rename",
    ),
    "interval": (lambda m: GuidanceInterval(2.0, 1.0, -1.0), ValueError, "low < high"),
    "width": (lambda m: GuidanceInterval(2.0, -1.0, 1.0, 0.0), ValueError, "width"),
}


@pytest.mark.parametrize(("act", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(act, error, message):
    with pytest.raises(error, match=message):
        act(gaussian().score_model(VP))


class Side(nn.Module):
    def forward(self, x, t, side):
        return nn.functional.logsigmoid(4.0 * side * x[:, 0])


def test_a_classifier_guides_in_inference_mode_as_elsewhere():
    model = classifier_guided(TWO.score_model(VP), Side(), 1.5, side=torch.ones(4, dtype=torch.float64))
    x, t = draw(3, 4, 3), times(0.1, 0.2, 0.3, 0.4)
    outside = model.score(x, t), sdekit.sample(model, (4, 3), steps=6, dtype=torch.float64).x
    with torch.inference_mode():
        inside = model.score(x.clone(), t.clone()), sdekit.sample(model, (4, 3), steps=6, dtype=torch.float64).x
    for one, other in zip(outside, inside, strict=True):
        assert torch.equal(one, other)

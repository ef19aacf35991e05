"""A model that is called as it was trained is never worse than a linear prediction; one that is not, is."""

from __future__ import annotations

import pytest
import torch
from helpers import PARAMETERIZATIONS, SDES, draw, gaussian, mixture
from torch import nn

import sdekit
from sdekit.zoo import digits

TARGET = mixture(3, 2, count=4)
X = TARGET.sample(400, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", PARAMETERIZATIONS.values(), ids=PARAMETERIZATIONS.keys())
@pytest.mark.parametrize("name", SDES)
def test_exact_models_are_as_good_as_they_can_be(name, kind):
    """Four standard errors of 12 levels: one false alarm in 2,500 runs if a model were only as good as linear."""
    found = sdekit.check_model(TARGET.score_model(SDES[name], kind), X)
    assert not found.worse().any()
    assert (found.error <= found.linear + 4 * found.std_error).all()


def test_the_linear_prediction_is_a_gaussian_s():
    target = sdekit.targets.Gaussian(torch.zeros(3), torch.full((3,), 0.3))
    x = target.sample(4000, generator=torch.Generator().manual_seed(1))
    found = sdekit.check_model(target.score_model(SDES["vp"]), x)
    assert ((found.error - found.linear).abs() <= 5 * found.std_error + 0.02 * found.linear).all()


class Relabelled(nn.Module):
    """A network trained on other labels than those it is given now."""

    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x, label):
        return self.net(x, (label * self.factor).clamp(1e-3, 1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda right, sde: sdekit.ScoreModel(right.net, sde, sdekit.score()),
        lambda right, sde: sdekit.ScoreModel(right.net, sde, sdekit.data()),
        lambda right, sde: sdekit.ScoreModel(Relabelled(right.net, 1e-3), sde, sdekit.noise()),
        lambda right, sde: sdekit.ScoreModel(Relabelled(right.net, 1e3), sde, sdekit.noise()),
        lambda right, sde: sdekit.ScoreModel(right.net, sdekit.VESDE(), sdekit.noise()),
    ],
    ids=["score", "data", "label too small", "label too large", "another SDE"],
)
def test_what_is_told_wrongly_is_found(wrong):
    sde = SDES["vp"]
    right = TARGET.score_model(sde, sdekit.noise())
    assert not sdekit.check_model(right, X).worse().any()
    assert sdekit.check_model(wrong(right, sde), X).worse().any()


def test_data_of_another_scale_are_found():
    right = TARGET.score_model(SDES["vp"])
    assert sdekit.check_model(right, 127.5 * (X + 1.0)).worse().any()


def test_the_shipped_network_is_in_order_and_its_images_unscaled_are_not():
    split = digits.load_split()
    model, levels = digits.load(), split.test[:100]
    x = digits.dequantise(levels, torch.Generator().manual_seed(0))
    found = sdekit.check_model(model, x)
    assert not found.worse().any()
    assert (found.error[3:8] < 0.9 * found.linear[3:8]).all()
    assert sdekit.check_model(model, levels.float()).worse().any()
    label = model.parameterization.label
    for kind in (sdekit.score, sdekit.velocity, sdekit.v, sdekit.data):
        wrong = sdekit.ScoreModel(model.net, model.sde, kind(label), model.data_std)
        assert sdekit.check_model(wrong, x).worse().any(), kind.__name__
    wrong = sdekit.ScoreModel(model.net, model.sde, sdekit.noise(sdekit.TimeLabel(2.0)), model.data_std)
    assert sdekit.check_model(wrong, x).worse().any()


def test_noise_belongs_to_samples():
    model = gaussian().score_model(SDES["vp"])
    x, order = draw(1, 6, 3), torch.tensor([3, 0, 5, 1, 4, 2])
    one = sdekit.check_model(model, x, levels=4)
    other = sdekit.check_model(model, x[order], levels=4, indices=order)
    torch.testing.assert_close(one.error, other.error, rtol=1e-13, atol=0.0)


def test_the_table_marks_what_is_worse():
    found = sdekit.check_model(sdekit.ScoreModel(TARGET.score_model(SDES["vp"], sdekit.noise()).net, SDES["vp"]), X)
    bad = found._replace(error=found.linear + 1.0)
    assert bad.table().count("  worse") == 12
    assert len(bad.table().splitlines()) == 14
    assert "worse than linear at 12 of 12 levels" in bad.faults()[0]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_few_samples_raise_no_false_alarm(count):
    """Four standard errors of a normal law, by Student's: 3e-5 a level, so 0.1% in 40 runs of an exact model."""
    model = TARGET.score_model(SDES["vp"])
    for run in range(40):
        few = X[run * count : (run + 1) * count]
        assert not sdekit.check_model(model, few, seed=run, levels=4).worse().any()


def test_answers_that_are_not_finite_are_judged():
    broken = sdekit.ScoreModel(Relabelled(nn.Identity(), 1.0), SDES["vp"])
    broken.net.forward = lambda x, label: x * torch.nan
    found = sdekit.check_model(broken, draw(1, 4, 3))
    assert found.worse().all()
    assert len(found.faults()) >= 2


class Of(nn.Module):
    """A network by a function of (exact network, x, label)."""

    def __init__(self, inner, rule):
        super().__init__()
        self.inner, self.rule = inner, rule

    def forward(self, x, label):
        return self.rule(self.inner, x, label)


def gradient(net, x, label, twice):
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        energy = (0.5 * net(leaf, label) * leaf).sum()
        return torch.autograd.grad(energy, leaf, create_graph=twice)[0]


APART = {
    "the first label": lambda net, x, label: net(x, label[:1].expand_as(label)),
    "the batch's mean": lambda net, x, label: net(x - 0.1 * x.mean(0), label),
    "random": lambda net, x, label: net(x, label) + 0.05 * torch.randn_like(x),
}
BENT = {
    "detached": lambda net, x, label: net(x.detach(), label),
    "half detached": lambda net, x, label: 0.5 * net(x, label) + 0.5 * net(x, label).detach(),
    "straight-through": lambda net, x, label: net(x, label) + 0.2 * (x.clamp(-0.5, 0.5) - x).detach(),
    "no create_graph": lambda net, x, label: net(x, label) + gradient(net, x, label, False).detach(),
    "quantised": lambda net, x, label: net(x, label) + ((8 * x).round() / 8 - x).detach(),
}
SOUND = {
    "exact": lambda net, x, label: net(x, label),
    "a gradient": lambda net, x, label: net(x, label) + 0.1 * gradient(net, x, label, True),
    "kinks": lambda net, x, label: net(x, label) + 0.1 * torch.relu(3 * x - 1) - 0.1 * torch.relu(-3 * x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [*APART, *BENT, *SOUND])
def test_what_no_solve_could_see_is_found(rule, dtype):
    net = TARGET.score_model(SDES["vp"], sdekit.noise()).net
    made = Of(net, {**APART, **BENT, **SOUND}[rule])
    found = sdekit.check_model(sdekit.ScoreModel(made, SDES["vp"]), X.to(dtype))
    assert (found.apart > 0.01) == (rule in APART)
    assert rule == "random" or (found.bent > 0.01) == (rule in BENT)
    said = " ".join(found.faults())
    assert ("with the batch it is in" in said) == (rule in APART)
    assert rule == "random" or ("autograd's derivative is off" in said) == (rule in BENT)
    assert found.table().count("! ") == len(found.faults())


@pytest.mark.parametrize("name", SDES)
def test_exact_models_are_found_sound_at_every_scale(name):
    for scale in (0.01, 1.0, 100.0):
        target = sdekit.targets.GaussianMixture(torch.ones(2), scale * torch.eye(2), torch.full((2,), 0.3 * scale))
        x = target.sample(12, generator=torch.Generator().manual_seed(2)).float()
        found = sdekit.check_model(target.score_model(SDES[name]), x)
        assert found.apart < 1e-3
        assert found.bent < 2e-3


def test_conditions_follow_the_samples_that_are_looked_at():
    shift = 0.1 * draw(3, 30, 3)
    net = TARGET.score_model(SDES["vp"], sdekit.noise()).net

    class Shifted(nn.Module):
        def forward(self, x, label, shift):
            return net(x + shift, label)

    model = sdekit.ScoreModel(Shifted(), SDES["vp"]).condition(shift=shift)
    found = sdekit.check_model(model, X[:30])
    assert found.apart < 1e-12
    assert found.bent < 1e-6


def test_inference_mode_changes_nothing():
    model = TARGET.score_model(SDES["vp"])
    wanted = sdekit.check_model(model, X)
    with torch.inference_mode():
        found = sdekit.check_model(model, X.clone())
    assert found.faults() == []
    assert found.bent == wanted.bent


def test_a_backward_pass_that_raises_is_not_taken_for_a_detached_one():
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, given):
            raise RuntimeError("out of memory")

    class Net(nn.Module):
        def forward(self, x, label):
            return Raises.apply(x)

    with pytest.raises(sdekit.NetworkError, match="out of memory"):
        sdekit.check_model(sdekit.ScoreModel(Net(), SDES["vp"]), X)


def test_half_precision_is_not_looked_at_by_differences():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=torch.bfloat16)

        def forward(self, x, label):
            return self.layer(x)

    found = sdekit.check_model(sdekit.ScoreModel(Half(), SDES["vp"]), X.float())
    assert found.bent != found.bent
    assert not any("autograd" in fault for fault in found.faults())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": draw(1, 0, 3)}, "two samples are needed"),
        ({"x": draw(1, 1, 3)}, "two samples are needed"),
        ({"levels": 1}, "levels"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input_is_named(arguments, words):
    given = {"x": draw(1, 2, 3), **arguments}
    with pytest.raises(ValueError, match=words):
        sdekit.check_model(gaussian().score_model(SDES["vp"]), **given)

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
    assert bad.table().count("worse") == 12
    assert len(bad.table().splitlines()) == 13


def test_one_sample_and_answers_that_are_not_finite_are_judged():
    model = gaussian().score_model(SDES["vp"])
    assert sdekit.check_model(model, draw(1, 1, 3), levels=2).std_error.isnan().all()
    broken = sdekit.ScoreModel(Relabelled(nn.Identity(), 1.0), SDES["vp"])
    broken.net.forward = lambda x, label: x * torch.nan
    assert sdekit.check_model(broken, draw(1, 4, 3)).worse().all()


@pytest.mark.parametrize(
    ("arguments", "words"), [({"x": draw(1, 0, 3)}, "at least one"), ({"levels": 1}, "levels"), ({"seed": -1}, "seed")]
)
def test_bad_input_is_named(arguments, words):
    given = {"x": draw(1, 2, 3), **arguments}
    with pytest.raises(ValueError, match=words):
        sdekit.check_model(gaussian().score_model(SDES["vp"]), **given)

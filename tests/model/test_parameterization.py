"""The meaning of a network's output: one affine map, any to any."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import PARAMETERIZATIONS, SDES, Function, draw, spread_times, times
from hypothesis import given
from hypothesis import strategies as st

import sdekit
from sdekit.model.parameterization import conversion

names = st.sampled_from(sorted(PARAMETERIZATIONS))
numbers = st.floats(-5.0, 5.0)


@given(
    sde=st.sampled_from(sorted(SDES)), share=st.floats(0.0, 1.0), x0=numbers, eps=numbers, source=names, target=names
)
def test_every_output_converts_into_every_other(sde, share, x0, eps, source, target):
    process = SDES[sde]
    first, last = float(process.half_log_snr(process.t_min)), float(process.half_log_snr(process.t_max))
    t = process.clamp(process.time_at(times(first + share * (last - first))))
    alpha, sigma = process.alpha(t), process.sigma(t)
    meaning, wanted = (PARAMETERIZATIONS[name].mix(process, t) for name in (source, target))
    x, output = alpha * x0 + sigma * eps, meaning.data * x0 + meaning.noise * eps
    weights = conversion(alpha, sigma, meaning, wanted)
    expected = wanted.data * x0 + wanted.noise * eps
    # Rounding of x and F is amplified by the weights; nothing else may be lost.
    size = (weights.x * alpha * x0).abs() + (weights.x * sigma * eps).abs()
    size = size + (weights.output * meaning.data * x0).abs() + (weights.output * meaning.noise * eps).abs()
    off = (weights.x * x + weights.output * output - expected).abs()
    assert float(off) <= 1e-13 * float(size + expected.abs()) + 1e-300  # subnormal numbers have fewer digits


every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


@every_sde
def test_the_closed_conversions_are_those_of_the_literature(sde):
    t = spread_times(sde, 50)
    alpha, sigma, k = sde.alpha(t), sde.sigma(t), sde.alpha(t) ** 2 + sde.sigma(t) ** 2
    mixes = {name: kind.mix(sde, t) for name, kind in PARAMETERIZATIONS.items()}
    speed, growth = alpha * sde.dlog_alpha(t), sigma * sde.dlog_sigma(t)
    det = speed * sigma - growth * alpha
    expected = {
        ("v", "data"): (alpha / k, -sigma / k),
        ("v", "noise"): (sigma / k, alpha / k),
        ("velocity", "data"): (-growth / det, sigma / det),
        ("velocity", "noise"): (speed / det, -alpha / det),
        ("noise", "data"): (1.0 / alpha, -sigma / alpha),
        ("noise", "score"): (0.0 * t, -1.0 / sigma),
        ("score", "data"): (1.0 / alpha, sigma**2 / alpha),
        ("data", "noise"): (1.0 / sigma, -alpha / sigma),
        ("score", "velocity"): (sde.drift_rate(t), -0.5 * sde.diffusion(t) ** 2),
    }
    for (source, target), (by_x, by_output) in expected.items():
        weights = conversion(alpha, sigma, mixes[source], mixes[target])
        torch.testing.assert_close(weights.x, by_x, rtol=1e-11, atol=1e-13, msg=f"{source} to {target}, x")
        torch.testing.assert_close(weights.output, by_output, rtol=1e-11, atol=1e-300, msg=f"{source} to {target}, F")


def test_the_rectified_flow_has_its_two_lines():
    sde, t = SDES["flow"], times(1e-5, 0.3, 0.9)
    u = PARAMETERIZATIONS["velocity"].mix(sde, t)
    to_data = conversion(sde.alpha(t), sde.sigma(t), u, PARAMETERIZATIONS["data"].mix(sde, t))
    to_noise = conversion(sde.alpha(t), sde.sigma(t), u, PARAMETERIZATIONS["noise"].mix(sde, t))
    torch.testing.assert_close(u.data, -torch.ones_like(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(u.noise, torch.ones_like(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(to_data.x, torch.ones_like(t), rtol=1e-13, atol=0)
    torch.testing.assert_close(to_data.output, -t, rtol=1e-13, atol=0)
    torch.testing.assert_close(to_noise.output, 1.0 - t, rtol=1e-13, atol=0)


@every_sde
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_a_network_asked_for_its_own_kind_answers_itself_to_the_bit(sde, name):
    t = spread_times(sde, 64)
    x, output = 3.0 * draw(1, t.shape[0], 5), draw(2, t.shape[0], 5)
    model = sdekit.ScoreModel(Function(lambda x, label: output), sde, PARAMETERIZATIONS[name])
    mix = PARAMETERIZATIONS[name].mix(sde, t)
    if name in ("noise", "data"):
        assert torch.equal(getattr(model, name)(x, t), output)
    else:  # the second coefficient may round by one bit
        torch.testing.assert_close(model.as_mix(x, t, output, mix), output, rtol=1e-15, atol=0.0)


def test_edm_is_its_own_preconditioning():
    for sd in (0.5, 1.3):
        for sde in (SDES["karras"], SDES["vp"]):
            t, seen = spread_times(sde, 20), {}
            x = 2.0 * draw(3, t.shape[0], 4)
            output = draw(4, t.shape[0], 4)

            def net(x, label, seen=seen, output=output):
                seen["x"], seen["label"] = x, label
                return output

            model = sdekit.ScoreModel(Function(net), sde, sdekit.edm(sd))
            data = model.data(x, t)
            rho, y = (sde.sigma(t) / sde.alpha(t))[:, None], x / sde.alpha(t)[:, None]
            skip, out = sd**2 / (rho**2 + sd**2), rho * sd / (rho**2 + sd**2).sqrt()
            torch.testing.assert_close(data, skip * y + out * output, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(seen["x"], y / (rho**2 + sd**2).sqrt(), rtol=1e-13, atol=0)
            torch.testing.assert_close(seen["label"], rho[:, 0].log() / 4.0, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["vp", "cosine", "table"])
def test_for_variance_preserving_processes_edm_of_unit_data_is_minus_v(name):
    sde = SDES[name]
    t = spread_times(sde, 100)
    edm, v = sdekit.edm(1.0).mix(sde, t), sdekit.v().mix(sde, t)
    torch.testing.assert_close(edm.data, -v.data, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(edm.noise, -v.noise, rtol=1e-13, atol=1e-15)


def test_edm_targets_and_inputs_have_unit_variance_for_data_of_its_std():
    for sde in SDES.values():
        t, sd = spread_times(sde, 50), 0.5
        kind = sdekit.edm(sd)
        mix, scale = kind.mix(sde, t), kind.input_scale(sde, t)
        torch.testing.assert_close((sd * mix.data) ** 2 + mix.noise**2, torch.ones_like(t), rtol=1e-13, atol=0)
        seen = scale**2 * (sde.alpha(t) ** 2 * sd**2 + sde.sigma(t) ** 2)
        torch.testing.assert_close(seen, torch.ones_like(t), rtol=1e-12, atol=0)


def test_labels_are_what_their_names_say():
    sde, t = SDES["vp"], times(0.1, 0.7)
    labels = {
        sdekit.TimeLabel(): t,
        sdekit.TimeLabel(999.0): 999.0 * t,
        sdekit.TimeLabel(1000.0, -1.0): 1000.0 * t - 1.0,
        sdekit.LogSigmaLabel(): 0.25 * (sde.sigma(t) / sde.alpha(t)).log(),
        sdekit.LogSigmaLabel(1.0): (sde.sigma(t) / sde.alpha(t)).log(),
        sdekit.SigmaLabel(): sde.sigma(t),
    }
    for label, expected in labels.items():
        seen = []
        net = Function(lambda x, label, seen=seen: seen.append(label) or x)
        sdekit.ScoreModel(net, sde, sdekit.noise(label)).score(draw(1, 2, 3), t)
        torch.testing.assert_close(seen[0], expected, rtol=1e-13, atol=1e-15)


def test_any_function_of_the_time_can_be_a_label():
    seen = []
    net = Function(lambda x, label: seen.append(label) or x)
    kind = sdekit.v(label=lambda sde, t: sde.half_log_snr(t) + 7.0)
    sdekit.ScoreModel(net, SDES["flow"], kind).data(draw(1, 2, 3), 0.5)
    torch.testing.assert_close(seen[0], times(7.0, 7.0))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_edm_refuses_a_std_that_is_none(value):
    with pytest.raises(ValueError, match="sigma_data"):
        sdekit.edm(value)

"""A network bound to its process: four answers from one call, and a file that is the whole model."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from helpers import PARAMETERIZATIONS, SDES, Function, draw, gaussian, perceptron, spread_times, times, watched
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sdekit


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
@pytest.mark.parametrize("kind", PARAMETERIZATIONS.values(), ids=PARAMETERIZATIONS.keys())
@torch.no_grad()
def test_the_four_answers_are_one_answer(sde, kind):
    model = sdekit.ScoreModel(perceptron(3, 1), sde, kind)
    t = spread_times(sde, 30)
    x = sde.perturb(draw(1, t.shape[0], 3), t, draw(2, t.shape[0], 3))
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    noise, data = model.noise(x, t), model.data(x, t)
    size = 1.0 + float(noise.abs().max()) + float(data.abs().max())
    torch.testing.assert_close(alpha * data + sigma * noise, x, rtol=1e-9, atol=1e-12 * size)
    torch.testing.assert_close(model.score(x, t) * sigma, -noise, rtol=1e-9, atol=1e-12 * size)
    f, g = sde.drift_rate(t)[:, None], sde.diffusion(t)[:, None]
    flow = f * x - 0.5 * g**2 * model.score(x, t)
    torch.testing.assert_close(model.velocity(x, t), flow, rtol=1e-8, atol=1e-11 * size * float(1.0 + flow.abs().max()))


@pytest.mark.parametrize("answer", ["score", "noise", "data", "velocity"])
def test_an_answer_costs_one_network_call(answer):
    model, watch = watched(gaussian().score_model(SDES["vp"]))
    getattr(model, answer)(draw(1, 4, 3), 0.3)
    assert watch.calls == 1


def test_calling_the_model_gives_its_score():
    model, x = gaussian().score_model(SDES["ve"]), draw(1, 4, 3)
    assert torch.equal(model(x, times(0.1, 0.2, 0.3, 0.4)), model.score(x, times(0.1, 0.2, 0.3, 0.4)))


def test_any_event_shape_is_one_event_to_the_model():
    net = Function(lambda x, label: 0.3 * x + label.reshape(-1, 1, 1, 1))
    model, x, t = sdekit.ScoreModel(net, SDES["vp"]), draw(1, 3, 2, 4, 5), times(0.1, 0.5, 0.9)
    assert model.score(x, t).shape == x.shape
    for i in range(3):
        torch.testing.assert_close(model.data(x, t)[i : i + 1], model.data(x[i : i + 1], float(t[i])))


def test_a_float32_network_is_called_in_float32_and_answers_in_the_states_dtype():
    seen = []
    net = nn.Linear(3, 3)
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))

    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, label):
            assert label.dtype == x.dtype
            return self.net(x)

    for sde in SDES.values():
        for kind in PARAMETERIZATIONS.values():
            model = sdekit.ScoreModel(Labelled(), sde, kind)
            for dtype in (torch.float64, torch.float32):
                assert model.score(draw(1, 2, 3).to(dtype), 0.5).dtype == dtype
    assert set(seen) == {torch.float32}


def test_a_float32_state_loses_no_more_than_its_rounding():
    model, x = gaussian().score_model(SDES["vp"]), draw(1, 64, 3)
    x = x.float().double()
    for t in (1e-5, 1e-2, 0.5, 1.0):
        exact, rounded = model.noise(x, t), model.noise(x.float(), t)
        torch.testing.assert_close(rounded.double(), exact, rtol=2e-6, atol=2e-6)


def test_data_std_is_edms_own_else_a_half_unless_given():
    net = nn.Identity()
    assert sdekit.ScoreModel(net, SDES["vp"]).data_std == 0.5
    assert sdekit.ScoreModel(net, SDES["vp"], sdekit.edm(0.2)).data_std == 0.2
    assert sdekit.ScoreModel(net, SDES["vp"], sdekit.edm(0.2), data_std=3.0).data_std == 3.0
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="data_std"):
            sdekit.ScoreModel(net, SDES["vp"], data_std=value)


class Labelled(nn.Module):
    """A network that takes a class, a guidance strength and a time."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(draw(7, 5, 3))

    def forward(self, x, label, y=None, strength=1.0):
        return x * (1.0 + label[:, None]) + strength * self.shift[y]


def test_a_condition_is_bound_outside_of_the_solvers():
    model, x, y = sdekit.ScoreModel(Labelled(), SDES["vp"]), draw(1, 4, 3), torch.tensor([0, 3, 3, 1])
    bound = model.condition(y=y).condition(strength=2.0)
    torch.testing.assert_close(bound.noise(x, 0.5), x * 1.5 + 2.0 * model.net.shift[y])
    assert model.bound == {}
    assert bound.net is model.net
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(bound.take(rows).noise(x[rows], 0.5), bound.noise(x, 0.5)[rows])
    mask = torch.tensor([True, False, False, True])
    torch.testing.assert_close(bound.take(mask).noise(x[mask], 0.5), bound.noise(x, 0.5)[mask])


def test_a_condition_of_another_size_is_refused_by_name():
    model = sdekit.ScoreModel(Labelled(), SDES["vp"]).condition(y=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"condition y\.shape=\(2,\); a leading size of 4"):
        sdekit.log_likelihood(model, draw(1, 4, 3))
    with pytest.raises(ValueError, match=r"condition y\.shape"):
        sdekit.sample(model, (4, 3), steps=4)


def test_conditions_follow_their_samples_through_a_solve():
    model = sdekit.ScoreModel(Labelled(), SDES["vp"], sdekit.data())
    y, x = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4]), draw(1, 10, 3)
    together = sdekit.log_likelihood(model.condition(y=y), x).log_prob
    for i in (0, 4, 9):
        alone = sdekit.log_likelihood(model.condition(y=y[i : i + 1]), x[i : i + 1]).log_prob
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-10, atol=1e-10)


WRONG = {
    "fewer columns": (lambda x, label: x[:, :2], r"shape \(4, 2\) for an input of shape \(4, 3\)"),
    "one row": (lambda x, label: x[:1], r"shape \(1, 3\)"),
    "a tuple": (lambda x, label: (x, x), "returned a tuple"),
    "integers": (lambda x, label: x.long(), "int64"),
    "complex": (lambda x, label: torch.complex(x, x), "complex128"),
}


@pytest.mark.parametrize(("function", "message"), WRONG.values(), ids=WRONG.keys())
def test_an_output_that_cannot_be_used_is_refused(function, message):
    model = sdekit.ScoreModel(Function(function), SDES["vp"])
    with pytest.raises(sdekit.NetworkError, match=message):
        model.score(draw(1, 4, 3), 0.5)


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        sdekit.ScoreModel(lambda x, t: x, SDES["vp"])
    with pytest.raises(TypeError, match="sde"):
        sdekit.ScoreModel(nn.Identity(), "vp")
    with pytest.raises(TypeError, match="parameterization"):
        sdekit.ScoreModel(nn.Identity(), SDES["vp"], sdekit.noise)
    model = gaussian().score_model(SDES["vp"])
    with pytest.raises(ValueError, match=r"t\.shape=\(3,\)"):
        model.score(draw(1, 4, 3), times(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="event axis"):
        model.score(draw(1, 4), 0.1)
    with pytest.raises(TypeError, match="int64"):
        model.score(torch.zeros(4, 3, dtype=torch.int64), 0.1)


LABELS = {
    "time": sdekit.noise(sdekit.TimeLabel(999.0)),
    "steps": sdekit.noise(sdekit.table_label(1000)),
    "sigma": sdekit.score(sdekit.SigmaLabel()),
    "log sigma": sdekit.v(sdekit.LogSigmaLabel(0.5)),
    "edm": sdekit.edm(0.25),
}


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
@pytest.mark.parametrize("kind", [*PARAMETERIZATIONS.values(), *LABELS.values()])
def test_one_file_is_the_whole_model(sde, kind, tmp_path):
    path = tmp_path / "model.safetensors"
    model = sdekit.ScoreModel(perceptron(3, 1), sde, kind, data_std=0.37)
    model.save(path)
    loaded = sdekit.ScoreModel.load(path, perceptron(3, 2))
    assert loaded.sde == sde
    assert loaded.parameterization == kind
    assert loaded.data_std == 0.37
    x, t = draw(1, 6, 3), spread_times(sde, 9)[:6]
    assert torch.equal(loaded.score(x, t), model.score(x, t))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_custom_label_is_refused_on_saving_before_anything_is_written(tmp_path):
    model = sdekit.ScoreModel(perceptron(3, 1), SDES["vp"], sdekit.noise(label=lambda sde, t: 999 * t))
    with pytest.raises(ValueError, match=r"TimeLabel.*state_dict") as caught:
        model.save(tmp_path / "model.safetensors")
    assert "not one of sdekit's own values" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    sdekit.ScoreModel(perceptron(3, 1), SDES["vp"]).save(path)
    old, write = path.read_bytes(), Path.write_bytes

    def half(self, data):
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match=r"No space left on device: .*model\.safetensors"):
            sdekit.ScoreModel(perceptron(3, 2), SDES["vp"]).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    sdekit.ScoreModel(perceptron(3, 1), SDES["vp"]).save(path)
    with pytest.raises(ValueError, match="do not fit the network"):
        sdekit.ScoreModel.load(path, perceptron(4, 1))
    with pytest.raises(FileNotFoundError):
        sdekit.ScoreModel.load(tmp_path / "none.safetensors", perceptron(3, 1))
    (tmp_path / "text.safetensors").write_text("no tensors here, but long enough to be read as a header")
    with pytest.raises(ValueError, match="not a safetensors file"):
        sdekit.ScoreModel.load(tmp_path / "text.safetensors", perceptron(3, 1))
    save_file({"a": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"format None"):
        sdekit.ScoreModel.load(tmp_path / "other.safetensors", perceptron(3, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: None, "no metadata 'model'"),
        (lambda model: "{not JSON", "Expecting property name"),
        (lambda model: "null", "'null', and no JSON object"),
        (lambda model: model.replace('"sde"', '"other"'), "its sde is None; SDE is needed"),
        (lambda model: model.replace('"beta_min"', '"gamma"'), r"VPSDE has \['gamma'\], which this version"),
        (lambda model: model.replace('"VPSDE"', '"NewSDE"'), "class 'NewSDE' is unknown"),
        (lambda model: model.replace('"VPSDE"', "[3]"), r"class \[3\] is unknown"),
        (lambda model: model.replace("0.1", '"a"'), "VPSDE cannot be made of"),
        (lambda model: model.replace("0.37", "null"), "its data_std is None"),
        (lambda model: model.replace("0.37", "-1"), "data_std=-1"),
        (lambda model: model.replace('{"class": "TimeLabel", "scale": 1.0, "shift": 0.0}', "3"), "label=3"),
    ],
)
def test_a_damaged_or_newer_file_is_named_with_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    sdekit.ScoreModel(perceptron(3, 1), SDES["vp"], data_std=0.37).save(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    metadata["model"], old = change(metadata["model"]), metadata["model"]
    assert metadata["model"] != old
    kept = {name: text for name, text in metadata.items() if text is not None}
    save_file(load_file(path), path, kept)
    with pytest.raises(ValueError, match=rf"model\.safetensors' is damaged, or of another version.*{message}"):
        sdekit.ScoreModel.load(path, perceptron(3, 1))

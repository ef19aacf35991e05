"""The commands: the library's numbers, resumption, and one-line errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import sdekit
from sdekit.cli import main
from sdekit.commands import evaluation as _evaluation
from sdekit.commands import recipes as _recipes
from sdekit.model.nets import MLP

MODULE = """
import torch
import sdekit

TARGET = sdekit.targets.GaussianMixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[0.6, 0.0], [-0.6, 0.2]]), torch.tensor([0.3, 0.4])
)

def load():
    return TARGET.score_model(sdekit.VPSDE())

class Stopping(torch.nn.Module):
    # Ctrl-C at the fortieth call.
    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x, t):
        self.calls += 1
        if self.calls == 40:
            raise KeyboardInterrupt
        return self.net(x, t)

def stopping():
    model = load()
    return sdekit.ScoreModel(Stopping(model.net), model.sde, model.parameterization)

class Shifted(torch.nn.Module):
    def forward(self, x, t, shift):
        return shift - 0.5 * x

def conditioned():
    shift = torch.arange(10.0, dtype=torch.float64)[:, None] / 10
    return sdekit.ScoreModel(Shifted(), sdekit.VPSDE(), sdekit.data()).condition(shift=shift)

def number():
    return 3

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with a module of a user's and ten samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sdekit_cli_toy.py").write_text(MODULE)
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.save(tmp_path / "x.npy", x.numpy())
    return tmp_path


def run(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [*arguments, "--quiet"])
    assert result.exit_code == status, result.output
    return result


def likelihood(*arguments: str, status: int = 0) -> Result:
    return run("likelihood", "x.npy", "--model", "sdekit_cli_toy:load", "--device", "cpu", *arguments, status=status)


def arrays(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> list[int]:
    """Presses Ctrl-C instead of evaluating the batch after that many; returns the list that counts calls."""
    calls: list[int] = []
    evaluate = sdekit.log_likelihood

    def stopping(model, x, **options):
        calls.append(len(x))
        if len(calls) > batches:
            raise KeyboardInterrupt
        return evaluate(model, x, **options)

    monkeypatch.setattr(_evaluation, "log_likelihood", stopping)
    return calls


def test_likelihood_writes_the_library_s_numbers(place):
    likelihood("--tolerance", "1e-3", "--out", "out.npz")
    namespace: dict[str, object] = {}
    exec(MODULE, namespace)
    x = torch.from_numpy(np.load("x.npy"))
    want = sdekit.log_likelihood(namespace["load"](), x, tolerance=1e-3)  # type: ignore[operator]
    got = arrays("out.npz")
    np.testing.assert_array_equal(got["log_prob"], want.log_prob.numpy())
    np.testing.assert_array_equal(got["evaluations"], want.stats.evaluations.numpy())
    assert json.loads(str(got["summary"]))["arrived"] == 10
    assert sorted(path.name for path in place.glob("out*")) == ["out.npz"]


def test_a_runtime_changes_cost_only(place):
    for how in ("eager", "compile"):
        likelihood("--runtime", how, "--out", f"{how}.npz")
    np.testing.assert_allclose(arrays("compile.npz")["log_prob"], arrays("eager.npz")["log_prob"], rtol=0, atol=1e-9)


def test_an_interrupted_evaluation_goes_on_to_the_same_bits(place, monkeypatch):
    options = ("--divergence", "hutchinson", "--batch-size", "4")
    likelihood(*options, "--out", "whole.npz")
    with monkeypatch.context() as patch:
        calls = interrupt_after(patch, 1)
        stopped = likelihood(*options, "--out", "parts.npz", status=130)
        assert "4 of 10" in stopped.output
        assert calls == [4, 4]
    assert not Path("parts.npz").exists()
    with monkeypatch.context() as patch:
        calls = interrupt_after(patch, 9)
        likelihood(*options, "--out", "parts.npz")
        assert calls == [4, 2]
    whole, parts = arrays("whole.npz"), arrays("parts.npz")
    assert whole.keys() == parts.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name])


@pytest.mark.parametrize(
    "command",
    [
        ["likelihood", "x.npy", "--out", "out.npz", "--tolerance", "1e-6"],
        ["sample", "--out", "out.npz", "--shape", "2", "--steps", "60"],
    ],
)
def test_ctrl_c_within_a_solve_ends_the_command(place, command):
    # The library returns what there is, which a command must not take for a result.
    result = run(*command, "--model", "sdekit_cli_toy:stopping", "--device", "cpu", status=130)
    assert "interrupted" in result.output
    assert not Path("out.npz").exists()


@pytest.mark.parametrize("change", ["option", "data", "seed"])
def test_what_another_run_left_is_not_mixed_in(place, monkeypatch, change):
    options = ["--divergence", "hutchinson", "--batch-size", "4", "--out", "out.npz"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        likelihood(*options, status=130)
    if change == "data":
        x = np.load("x.npy")
        x[9, 1] += 1e-9
        np.save("x.npy", x)
    other = {"option": ["--tolerance", "1e-3"], "data": [], "seed": ["--seed", "1"]}[change]
    refused = likelihood(*options, *other, status=1)
    assert "other data, another model or other options" in refused.output
    assert len(refused.output.strip().splitlines()) == 1


def test_numbers_do_not_depend_on_the_batch_size(place):
    for size in ("3", "10"):
        likelihood("--divergence", "hutchinson", "--batch-size", size, "--out", f"{size}.safetensors")
    few, all_at_once = load_file("3.safetensors"), load_file("10.safetensors")
    for name in ("log_prob", "std_error"):
        np.testing.assert_allclose(few[name], all_at_once[name], rtol=0, atol=1e-10)


def test_samples_that_fail_are_left_out_and_reported(place):
    x = np.load("x.npy")
    x[3, 0] = np.nan
    np.save("x.npy", x)
    result = likelihood("--out", "out.npz", status=1)
    assert "9 of 10 arrived" in result.output
    assert "1 of 10 samples did not arrive" in result.output
    log_prob = arrays("out.npz")["log_prob"]
    assert np.isnan(log_prob).nonzero()[0].tolist() == [3]


def test_bits_per_dim_follow_from_the_levels(place):
    np.save("k.npy", np.random.default_rng(0).integers(0, 8, (20, 2)))
    result = run("likelihood", "k.npy", "--model", "sdekit_cli_toy:load", "--levels", "8", "--out", "out.npz")
    mean = float(arrays("out.npz")["log_prob"].mean())
    want = -mean / (2 * np.log(2)) - np.log2(2 / 8)
    assert f"bits/dim   {want:.4f}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.npy", "--model", "sdekit_cli_toy:load"], "there is no file 'absent.npy'"),
        (["x.txt", "--model", "sdekit_cli_toy:load"], "'.txt'"),
        (["k.npy", "--model", "sdekit_cli_toy:load"], "--levels"),
        (["k.npy", "--model", "sdekit_cli_toy:load", "--levels", "3"], "integers 0..2 are needed"),
        (["wide.npy", "--model", "sdekit_cli_toy:load", "--levels", "3"], "every value of the array is an integer"),
        (["two.npz", "--model", "sdekit_cli_toy:load"], "['a', 'b']"),
        (["two.npz", "--model", "sdekit_cli_toy:load", "--key", "c"], "['a', 'b']"),
        (["text.npy", "--model", "sdekit_cli_toy:load"], "real numbers"),
        (["empty.npy", "--model", "sdekit_cli_toy:load"], "no samples"),
        (["x.npy", "--model", "sdekit_cli_toy"], "module:function"),
        (["x.npy", "--model", "sdekit_cli_toy:absent"], "AttributeError"),
        (["x.npy", "--model", "sdekit_cli_toy:number"], "an sdekit.ScoreModel is needed"),
        (["x.npy", "--model", "sdekit_cli_toy:broken"], "no weights here"),
        (["x.npy", "--model", "absent.safetensors"], "there is no file"),
        (["x.npy", "--model", "other.safetensors"], "does not say what network"),
        (["x.npy", "--model", "sdekit_cli_toy:load", "--tolerance", "-1"], "tolerance"),
        (["x.npy", "--model", "sdekit_cli_toy:load", "--probes", "2"], "--divergence hutchinson"),
        (["x.npy", "--model", "sdekit_cli_toy:load", "--out", "out.npy"], ".npz"),
        (["x.npy", "--model", "sdekit_cli_toy:load", "--out", "two.npz"], "--overwrite"),
        (["x.npy", "--model", "sdekit_cli_toy:load", "--device", "nowhere"], "nowhere"),
        (["wide.npy", "--model", "sdekit_cli_toy:load"], "shape"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(place, arguments, message):
    np.save("k.npy", np.arange(6).reshape(3, 2))
    np.savez("two.npz", a=np.ones(2), b=np.ones(2))
    np.save("text.npy", np.array(["a", "b"]))
    np.save("empty.npy", np.empty((0, 2)))
    np.save("wide.npy", np.ones((3, 5)))
    save_file({"w": np.ones(1)}, "other.safetensors")
    result = run("likelihood", *arguments, status=1)
    assert message in result.output
    assert result.output.startswith("Error: ")
    assert "Traceback" not in result.output


def test_the_traceback_is_to_be_had(place):
    result = CliRunner().invoke(main, ["--traceback", "likelihood", "absent.npy", "--model", "digits"])
    assert isinstance(result.exception, FileNotFoundError)


def test_samples_do_not_depend_on_the_batch_size(place):
    for size in ("3", "8"):
        run(
            *("sample", "--model", "sdekit_cli_toy:load", "--shape", "2", "--count", "8", "--steps", "8"),
            *("--seed", "5", "--batch-size", size, "--out", f"{size}.npy", "--picture", f"{size}.png"),
        )
        assert Path(f"{size}.png").read_bytes().startswith(b"\x89PNG")
    np.testing.assert_allclose(np.load("3.npy"), np.load("8.npy"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("extra", [["--solver", "heun"], ["--solver", "dpm++"], ["--eta", "1", "--steps", "12"]])
def test_solvers_are_chosen_by_name(place, extra):
    run("sample", "--model", "sdekit_cli_toy:load", "--shape", "2", "--count", "4", "--out", "s.npz", *extra)
    assert np.isfinite(arrays("s.npz")["x"]).all()


def test_the_shape_of_a_sample_has_to_be_known(place):
    result = run("sample", "--model", "sdekit_cli_toy:load", "--out", "s.npy", status=1)
    assert "--shape" in result.output
    assert run("sample", "--model", "digits", "--shape", "3,x", "--out", "s.npy", status=2).exit_code == 2


def train(out: str, *extra: str, status: int = 0) -> Result:
    return run(
        *("train", "x.npy", "--out", out, "--steps", "12", "--width", "8", "--depth", "1", "--batch-size", "4"),
        *("--device", "cpu", *extra),
        status=status,
    )


def test_a_trained_model_is_found_by_its_file(place):
    train("model.safetensors")
    run("likelihood", "x.npy", "--model", "model.safetensors", "--out", "out.npz", "--tolerance", "0.1")
    run("sample", "--model", "model.safetensors", "--count", "3", "--steps", "6", "--out", "s.npy")
    assert np.load("s.npy").shape == (3, 2)
    assert sorted(path.name for path in place.glob("model*")) == ["model.safetensors"]


def stop_training(monkeypatch, out: str, *extra: str, number: int = signal.SIGINT) -> None:
    """Trains, with that signal in the fifth step."""
    batches = _recipes._batches

    def stopping(x, levels, size):
        inner, drawn = batches(x, levels, size), []

        def draw(generator):
            drawn.append(0)
            if len(drawn) == 5:
                signal.raise_signal(number)
            return inner(generator)

        return draw

    with monkeypatch.context() as patch:
        patch.setattr(_recipes, "_batches", stopping)
        assert "stopped after 5 of 12" in train(out, *extra, status=130).output
    assert not Path(out).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_goes_on_to_the_same_bits(place, monkeypatch, number):
    before = signal.getsignal(signal.SIGTERM)
    train("whole.safetensors")
    stop_training(monkeypatch, "parts.safetensors", number=number)
    assert signal.getsignal(signal.SIGTERM) is before
    train("parts.safetensors")
    whole, parts = load_file("whole.safetensors"), load_file("parts.safetensors")
    assert whole.keys() == parts.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name])


@pytest.mark.parametrize(
    ("extra", "fact"),
    [
        (["--batch-size", "3"], "batch_size is 4 there and 3 here"),
        (["--dropout", "0.9"], "dropout is 0.0 there and 0.9 here"),
        (["--learning-rate", "0.1"], "learning_rate is 0.001 there and 0.1 here"),
        (["--steps", "13"], "steps is 12 there and 13 here"),
        (["--seed", "1"], "seed is 0 there and 1 here"),
        (["--net", "unet"], "kind is mlp there and unet here"),
        (["--low", "-2"], "levels is Levels(count=4, low=-1.0"),
    ],
)
def test_a_training_does_not_go_on_as_another(place, monkeypatch, extra, fact):
    np.save("x.npy", np.random.default_rng(0).integers(0, 4, (6, 1, 4, 4)))
    stop_training(monkeypatch, "m.safetensors", "--levels", "4")
    shown = train("m.safetensors", "--levels", "4", *extra, status=1).output
    assert "'m.checkpoint.safetensors' is of another run" in shown
    assert fact in shown
    train("m.safetensors", "--levels", "4")


@pytest.mark.parametrize("change", [lambda x: -x, lambda x: x[::-1], lambda x: 2 * x, lambda x: x.astype(np.float32)])
def test_a_training_does_not_go_on_with_other_data(place, monkeypatch, change):
    stop_training(monkeypatch, "m.safetensors")
    np.save("x.npy", change(np.load("x.npy")))
    assert "data is float64 (10, 2)" in train("m.safetensors", status=1).output


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("null", "the list 'event' is needed, not null"),
        ("{", "Expecting property name"),
        ('{"kind": "mlp"}', "the list 'event' is needed"),
        ('{"kind": "mlp", "event": [2]}', "missing 4 required"),
        ({"kind": "transformer"}, "kind='transformer'; one of mlp, unet, digits is needed"),
        ({"kind": ["mlp"]}, "kind=['mlp']; one of"),
        ({"event": ["2"]}, "a size of event='2'"),
        ({"width": 0}, "width=0; at least 1"),
        ({"dropout": None}, "dropout=None; a number"),
        ({"dropout": 2.0}, "dropout"),
        ({"heads": 4}, "unexpected keyword argument 'heads'"),
    ],
)
def test_a_file_of_an_unknown_network_is_refused_in_one_line(place, architecture, message):
    net = MLP((2,), 8, 1)
    sdekit.ScoreModel(net, sdekit.VPSDE()).save("m.safetensors")
    known = {"kind": "mlp", "event": [2], "width": 8, "depth": 1, "dropout": 0.0, "period": 4.0}
    text = architecture if isinstance(architecture, str) else json.dumps({**known, **architecture})
    with safe_open("m.safetensors", framework="np") as file:
        metadata = {**file.metadata(), "architecture": text}
    save_file(load_file("m.safetensors"), "m.safetensors", metadata)
    shown = run("sample", "--model", "m.safetensors", "--out", "s.npy", status=1).output
    assert shown.startswith("Error: 'm.safetensors' does not say what network it is for")
    assert message in shown
    assert shown.count("\n") == 1


def test_images_train_a_unet(place):
    np.save("x.npy", np.random.default_rng(0).integers(0, 4, (6, 1, 4, 4)))
    train("model.safetensors", "--net", "unet", "--levels", "4")
    run("sample", "--model", "model.safetensors", "--count", "2", "--steps", "4", "--out", "s.npy")
    assert np.load("s.npy").shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("array", "extra", "message"),
    [
        (np.arange(6).reshape(3, 2), [], "finite floating numbers"),
        (np.full((3, 2), np.nan), [], "finite floating numbers"),
        (np.ones((3, 2)), [], "nothing to learn"),
        (np.ones((1, 2)), [], "at least two samples"),
        (np.eye(3), ["--net", "unet"], "images (C, H, W)"),
        (np.eye(3), ["--steps", "4", "--learning-rate", "-1"], "learning_rate"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(place, array, extra, message):
    np.save("x.npy", array)
    assert message in train("model.safetensors", *extra, status=1).output


def test_a_changed_model_changes_the_fingerprint(place):
    x, options = torch.zeros(2, 2), _evaluation.Options()

    class Net(torch.nn.Linear):
        gain = 1.0

        def forward(self, x, label):
            return self.gain * super().forward(x)

    net = Net(2, 2)
    model = sdekit.ScoreModel(net, sdekit.VPSDE())
    before = _evaluation.fingerprint(model, x, options)
    assert _evaluation.fingerprint(sdekit.ScoreModel(net, sdekit.VPSDE()), x, options) == before
    assert _evaluation.fingerprint(sdekit.ScoreModel(net, sdekit.VESDE()), x, options) != before
    assert _evaluation.fingerprint(sdekit.ScoreModel(net, sdekit.VPSDE(), sdekit.score()), x, options) != before
    net.gain = 2.0  # no weight: what the network does tells
    assert _evaluation.fingerprint(model, x, options) != before
    net.gain = 1.0
    assert _evaluation.fingerprint(model, x, options) == before
    with torch.no_grad():
        net.bias += 1e-6
    assert _evaluation.fingerprint(model, x, options) != before


def test_conditions_follow_their_samples(place):
    asked = ("--model", "sdekit_cli_toy:conditioned", "--shape", "2", "--count", "10", "--steps", "6")
    run("sample", *asked, "--out", "all.npy")
    run("sample", *asked, "--out", "parts.npy", "--batch-size", "3")
    assert np.array_equal(np.load("all.npy"), np.load("parts.npy"))


@pytest.mark.parametrize("count", [5, 30])
def test_conditions_of_other_samples_are_refused(place, count):
    np.save("more.npy", np.random.default_rng(0).normal(size=(count, 2)))
    model = ("--model", "sdekit_cli_toy:conditioned")
    shown = run("likelihood", "more.npy", *model, status=1).output
    assert f"a leading size of {count} is needed" in shown
    shown = run("sample", *model, "--shape", "2", "--count", str(count), "--out", "x2.npy", status=1).output
    assert f"a leading size of {count} is needed" in shown


def test_a_picture_that_cannot_be_written_is_refused_first(place):
    asked = ("--model", "sdekit_cli_toy:load", "--shape", "2", "--count", "4", "--out", "x2.npy")
    assert "ends in '.txt'" in run("sample", *asked, "--picture", "p.txt", status=1).output
    assert not Path("x2.npy").exists()


def test_the_package_can_be_run():
    done = subprocess.run([sys.executable, "-m", "sdekit", "--help"], capture_output=True, text=True, check=True)
    assert "likelihood" in done.stdout


def test_likelihood_on_a_grid_is_the_library_s(place):
    likelihood("--nodes", "12", "--out", "out.npz")
    model, x = sdekit.targets.GaussianMixture, torch.from_numpy(np.load("x.npy"))
    target = model(torch.tensor([0.5, 0.5]), torch.tensor([[0.6, 0.0], [-0.6, 0.2]]), torch.tensor([0.3, 0.4]))
    wanted = sdekit.log_likelihood(target.score_model(sdekit.VPSDE()), x, nodes=12)
    np.testing.assert_allclose(arrays("out.npz")["log_prob"], wanted.log_prob.numpy(), rtol=0, atol=1e-10)
    assert (arrays("out.npz")["evaluations"] == wanted.stats.evaluations.numpy()).all()

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
from sdekit.commands import drawing as _drawing
from sdekit.commands import evaluation as _evaluation
from sdekit.commands import kept as _kept
from sdekit.commands import recipes as _recipes
from sdekit.model.nets import MLP

MODULE = """
import os
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

def guided():
    scale = float(os.environ["TOY_SCALE"])
    other = sdekit.targets.Gaussian(torch.zeros(2), torch.eye(2)).score_model(sdekit.VPSDE())
    return sdekit.guided(load(), other, lambda level: torch.full_like(level, scale))

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
        (np.arange(6).reshape(3, 2), [], "for integers --levels"),
        (np.full((3, 2), np.nan), [], "numbers that are not finite"),
        (np.ones((3, 2)), [], "nothing to learn"),
        (np.ones((1, 2)), [], "at least two samples"),
        (np.eye(3), ["--net", "unet"], "images (C, H, W)"),
        (np.eye(3), ["--steps", "4", "--learning-rate", "-1"], "learning_rate"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(place, array, extra, message):
    np.save("x.npy", array)
    assert message in train("model.safetensors", *extra, status=1).output


def test_a_changed_model_changes_the_fingerprint():
    x, options = torch.zeros(2, 2), _evaluation.Options()

    class Net(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.gain, self.bounds = 1.0, (0.0, 1.0)
            self.register_buffer("table", torch.zeros(3), persistent=False)

    net = Net()
    model = sdekit.ScoreModel(net, sdekit.VPSDE())
    before = _kept.fingerprint(model, options, x)
    assert _kept.fingerprint(sdekit.ScoreModel(net, sdekit.VPSDE()), options, x) == before
    assert _kept.fingerprint(sdekit.ScoreModel(net, sdekit.VESDE()), options, x) != before
    assert _kept.fingerprint(sdekit.ScoreModel(net, sdekit.VPSDE(), sdekit.score()), options, x) != before
    for name, other in (("gain", 2.0), ("bounds", (0.0, 2.0)), ("table", torch.ones(3))):  # no weights
        old = getattr(net, name)
        setattr(net, name, other)
        assert _kept.fingerprint(model, options, x) != before
        setattr(net, name, old)
        assert _kept.fingerprint(model.eval(), options, x) == before
    with torch.no_grad():
        net.bias += 1e-6
    assert _kept.fingerprint(model, options, x) != before


class TestAnswers:
    def answers(self, scale):
        """Of a guided model whose scale no attribute tells: a function."""
        one, two = (
            sdekit.targets.Gaussian(torch.full((2,), mean), torch.eye(2)).score_model(sdekit.VPSDE())
            for mean in (1.0, -1.0)
        )
        x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return _kept.ask(sdekit.guided(one, two, scale), x, torch.arange(5))

    def test_tell_a_guidance_scale(self):
        mine = self.answers(lambda level: torch.full_like(level, 2.0))
        assert mine.values.shape == (16, 3, 2)
        assert mine.same(self.answers(2.0).values)
        assert not mine.same(self.answers(2.002).values)

    def test_tell_a_guidance_interval_between_the_ends(self):
        two, three = (sdekit.GuidanceInterval(scale, low=0.5, high=2.5, width=0.1) for scale in (2.0, 3.0))
        assert not self.answers(lambda level: two(level)).same(self.answers(lambda level: three(level)).values)

    def test_are_the_same_up_to_rounding(self):
        mine = self.answers(2.0)
        assert mine.same(mine.values * (1 + 1e-6))
        assert mine.same(torch.full_like(mine.values, torch.nan)) is False
        unknown = _kept.Answers(torch.full((2, 1, 3), torch.nan), 1e-4)
        assert unknown.same(unknown.values)


def test_a_scale_that_changed_is_refused_though_nothing_else_tells(place, monkeypatch):
    options = ["--batch-size", "4", "--out", "out.npz", "--model", "sdekit_cli_toy:guided"]
    monkeypatch.setenv("TOY_SCALE", "2.0")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        run("likelihood", "x.npy", *options, status=130)
    monkeypatch.setenv("TOY_SCALE", "2.002")
    assert "another model" in run("likelihood", "x.npy", *options, status=1).output
    monkeypatch.setenv("TOY_SCALE", "2.0")
    run("likelihood", "x.npy", *options)


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


def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every write takes a second and nothing else any time, so that later ones are put off."""
    now = [0.0]
    write = _kept.write_arrays

    def timed(*arguments):
        write(*arguments)
        now[0] += 1.0

    monkeypatch.setattr(_kept, "write_arrays", timed)
    monkeypatch.setattr(_kept.time, "monotonic", lambda: now[0])


def test_batches_whose_write_was_put_off_are_kept_on_ctrl_c(place, monkeypatch):
    slow_clock(monkeypatch)
    written = []
    monkeypatch.setattr(_kept.Kept, "write", lambda self, write=_kept.Kept.write: (written.append(0), write(self)))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        shown = likelihood("--batch-size", "2", "--out", "out.npz", status=130).output
    assert "interrupted after 8 of 10 samples; 8 are kept" in shown
    assert load_file("out.npz.partial.safetensors")["log_prob"].shape == (8,)
    assert len(written) == 2  # after the first batch, and at the end


def test_only_what_was_written_is_said_to_be_kept(place, monkeypatch):
    def full(*arguments):
        raise OSError("disk full")

    interrupt_after(monkeypatch, 1)
    slow_clock(monkeypatch)
    monkeypatch.setattr(_kept, "write_arrays", full)
    monkeypatch.setattr(_kept.Kept, "add", lambda self, part: self.parts.append(part))
    shown = likelihood("--batch-size", "4", "--out", "out.npz", status=130).output
    assert "interrupted after 4 of 10 samples; nothing was kept, the rest could not be written: disk full" in shown


def test_a_run_leaves_alone_what_another_keeps_in_the_same_place(place, monkeypatch):
    start = _kept.Kept.__init__

    def late(self, path, mark, answers):
        start(self, path, mark, answers)
        monkeypatch.setattr(_kept.Kept, "__init__", start)
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1)
            likelihood("--batch-size", "4", "--seed", "1", "--out", "out.npz", status=130)

    monkeypatch.setattr(_kept.Kept, "__init__", late)
    assert "another run writes to" in likelihood("--batch-size", "4", "--out", "out.npz", status=1).output
    likelihood("--batch-size", "4", "--seed", "1", "--out", "out.npz")


def test_a_result_that_appeared_meanwhile_is_not_replaced(place, monkeypatch):
    evaluate = sdekit.log_likelihood

    def meanwhile(model, x, **options):
        Path("out.npz").write_bytes(b"another's")
        return evaluate(model, x, **options)

    monkeypatch.setattr(_evaluation, "log_likelihood", meanwhile)
    shown = likelihood("--out", "out.npz", status=1).output
    assert "is kept in 'out.npz.partial.safetensors'" in shown
    assert Path("out.npz").read_bytes() == b"another's"
    assert load_file("out.npz.partial.safetensors")["log_prob"].shape == (10,)


DRAW = ("sample", "--model", "sdekit_cli_toy:load", "--shape", "2", "--steps", "6", "--batch-size", "4")


@pytest.mark.parametrize("eta", ["0", "1"])
def test_interrupted_sampling_goes_on_to_the_same_bits(place, monkeypatch, eta):
    asked, draws, calls = (*DRAW, "--count", "10", "--eta", eta), sdekit.sample, []
    run(*asked, "--out", "whole.npy")

    def stopping(*arguments, **options):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draws(*arguments, **options)

    monkeypatch.setattr(_drawing, "sample", stopping)
    assert "interrupted after 8 of 10 samples; 8 are kept" in run(*asked, "--out", "parts.npy", status=130).output
    assert "other options" in run(*asked, "--seed", "3", "--out", "parts.npy", status=1).output
    run(*asked, "--out", "parts.npy")
    assert len(calls) == 4  # the last batch only
    np.testing.assert_array_equal(np.load("parts.npy"), np.load("whole.npy"))
    assert sorted(path.name for path in place.glob("parts*")) == ["parts.npy"]


@pytest.mark.parametrize("model", ["load", "conditioned"])
def test_shards_of_samples_are_the_whole(place, model):
    asked = (*DRAW, "--model", f"sdekit_cli_toy:{model}")
    run(*asked, "--count", "10", "--out", "whole.npy")
    run(*asked, "--count", "4", "--first", "0", "--out", "a.npy")
    run(*asked, "--count", "6", "--first", "4", "--out", "b.npy")
    np.testing.assert_array_equal(np.concatenate([np.load("a.npy"), np.load("b.npy")]), np.load("whole.npy"))


def test_conditions_have_to_reach_the_last_sample(place):
    asked = (*DRAW, "--model", "sdekit_cli_toy:conditioned", "--count", "6", "--first", "5", "--out", "a.npy")
    assert "at least 11 is needed" in run(*asked, status=1).output


@pytest.mark.parametrize("model", ["load", "conditioned"])
def test_shards_of_an_array_are_the_whole(place, model):
    np.save("k.npy", np.random.default_rng(0).integers(0, 8, (10, 2)))
    asked = ("likelihood", "k.npy", "--levels", "8", "--model", f"sdekit_cli_toy:{model}", "--batch-size", "4")
    asked = (*asked, "--divergence", "hutchinson", "--tolerance", "0.1")
    run(*asked, "--out", "whole.npz")
    run(*asked, "--count", "4", "--out", "a.npz")
    run(*asked, "--first", "4", "--out", "b.npz")
    whole, a, b = (arrays(f"{name}.npz") for name in ("whole", "a", "b"))
    for name in _evaluation.Scores._fields:
        np.testing.assert_array_equal(np.concatenate([a[name], b[name]]), whole[name])


@pytest.mark.parametrize("asked", [("--first", "10"), ("--first", "7", "--count", "4")])
def test_rows_that_are_not_there_are_refused(place, asked):
    assert "the array has the rows 0 to 9 only" in likelihood(*asked, status=1).output


@pytest.mark.parametrize("command", [("likelihood", "absent.npy"), ("sample", "--shape", "2"), ("train", "absent.npy")])
def test_a_place_that_cannot_be_written_is_found_first(place, command):
    model = () if command[0] == "train" else ("--model", "sdekit_cli_toy:broken")
    Path("file").write_text("")
    shown = run(*command, *model, "--out", "file/out.safetensors", status=1).output
    assert "'file' is not a directory that can be written to" in shown


def test_a_picture_is_not_replaced_unasked(place):
    Path("p.png").write_bytes(b"mine")
    assert "'p.png' exists" in run(*DRAW, "--out", "x2.npy", "--picture", "p.png", status=1).output
    assert Path("p.png").read_bytes() == b"mine"
    run(*DRAW, "--out", "x2.npy", "--picture", "p.png", "--overwrite")
    assert Path("p.png").read_bytes() != b"mine"


def test_what_the_recipe_of_digits_sets_is_not_to_be_given(place):
    shown = run("train", "digits", "--out", "d.safetensors", "--width", "9", "--net", "mlp", status=1).output
    assert "--net, --width: the recipe of `sdekit train digits` sets it" in shown


def test_where_none_arrived_no_means_are_shown(place):
    np.save("x.npy", np.full((3, 2), np.nan))
    shown = likelihood(status=1).output
    assert "none of 3 arrived" in shown
    assert "nan" not in shown


def test_an_error_of_many_lines_is_shown_in_one(place, monkeypatch):
    def failing(*arguments, **options):
        raise RuntimeError("no such kernel\nregistered at a.cpp\nregistered at b.cpp")

    monkeypatch.setattr(_evaluation, "log_likelihood", failing)
    assert likelihood(status=1).output == "Error: no such kernel\n"

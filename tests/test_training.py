"""The training loop: exact resumption, and what it leaves alone."""

from __future__ import annotations

import errno
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sdekit import _checkpoint
from sdekit import loss as losses
from sdekit.errors import SdekitError, SdekitWarning
from sdekit.model.nets import MLP
from sdekit.model.score_model import ScoreModel
from sdekit.sde.vp import VPSDE
from sdekit.training import Batch, Recipe, train


def fresh(seed: int = 0, dropout: float = 0.3) -> ScoreModel:
    """A small network with dropout and a parameter that never has a gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = MLP((2,), 16, 2, residual=True, dropout=dropout)
        net.unused = nn.Parameter(torch.ones(3))
    return ScoreModel(net, VPSDE())


def draw(generator: torch.Generator) -> Batch:
    return Batch(1.0 + 0.2 * torch.randn(32, 2, generator=generator), {})


def stopping_at(step: int):
    """Batches during whose draw number `step` the user presses Ctrl-C."""
    drawn = 0

    def batches(generator):
        nonlocal drawn
        drawn += 1
        if drawn == step:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(generator)

    return batches


def weights(model: ScoreModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.net.state_dict().items()}


def same(first: ScoreModel, second: ScoreModel) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


RECIPE = Recipe(20, warmup=3, learning_rate=1e-2, seed=5)


@pytest.mark.parametrize("stop", [1, 10, 19])
def test_a_run_stopped_by_ctrl_c_and_resumed_is_bit_identical_to_one_never_stopped(tmp_path, stop):
    whole = train(fresh(), draw, RECIPE, progress=False)
    file = tmp_path / "run.safetensors"
    part = train(fresh(), stopping_at(stop), RECIPE, checkpoint=file, progress=False)
    assert part.step == stop
    rest = train(
        fresh(seed=99), draw, RECIPE, checkpoint=file, progress=False
    )  # other initial weights: all overwritten
    assert rest.step == whole.step == 20
    assert same(rest.last, whole.last)
    assert same(rest.model, whole.model)


def test_a_finished_run_is_not_trained_further(tmp_path):
    file = tmp_path / "run.safetensors"
    done = train(fresh(), draw, RECIPE, checkpoint=file, progress=False)
    again = train(fresh(seed=3), draw, RECIPE, checkpoint=file, progress=False)
    assert again.losses.numel() == 0
    assert same(done.model, again.model)


def test_a_periodic_checkpoint_is_the_state_of_its_step(tmp_path):
    file, copies = tmp_path / "run.safetensors", []

    def watching(generator):
        copies.append(file.read_bytes() if file.exists() else b"")
        return draw(generator)

    whole = train(fresh(), watching, RECIPE, checkpoint=file, every=8, progress=False)
    file.write_bytes(copies[-1])  # as left by step 16, had the machine failed later
    again = train(fresh(), draw, RECIPE, checkpoint=file, progress=False)
    assert same(again.model, whole.model)


def test_the_callers_random_state_and_the_networks_mode_are_left_as_they_were():
    model = fresh().eval()
    before = torch.get_rng_state()
    handler = signal.getsignal(signal.SIGINT)
    trained = train(model, draw, RECIPE, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert signal.getsignal(signal.SIGINT) is handler
    assert not model.net.training
    assert not trained.model.net.training


def test_the_result_depends_on_the_seed_and_not_on_the_global_generator():
    first = train(fresh(), draw, RECIPE, progress=False)
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        second = train(fresh(), draw, RECIPE, progress=False)
    other = train(fresh(), draw, Recipe(20, warmup=3, learning_rate=1e-2, seed=6), progress=False)
    assert same(first.last, second.last)
    assert not same(first.last, other.last)


def test_the_average_follows_its_recursion():
    recipe = Recipe(4, warmup=1, learning_rate=1e-2, ema=0.6)
    expected, trail = None, []

    def watching(generator):
        trail.append(model.net.leave.weight.detach().clone())
        return draw(generator)

    model = fresh(dropout=0.0)
    trained = train(model, watching, recipe, progress=False)
    trail.append(model.net.leave.weight.detach().clone())
    expected = trail[0]
    for step, weight in enumerate(trail[1:]):
        decay = min(0.6, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(trained.model.net.leave.weight.detach(), expected)


def test_the_learning_rate_rises_over_the_warmup_and_falls_to_zero():
    recipe = Recipe(100, learning_rate=2.0, warmup=10)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == pytest.approx(2.0 * 0.91)
    assert rates[100] == 0.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_a_linear_network_reaches_the_exact_denoiser_of_a_gaussian():
    # At one noise level the exact noise prediction of N(0, v I) is sigma/(alpha^2 v + sigma^2) x.
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.zeros(()))

        def forward(self, x, label):
            return self.factor * x

    sde = VPSDE(t_min=0.3, t_max=0.3 + 1e-9)
    alpha, sigma = float(sde.alpha(0.3)), float(sde.sigma(0.3))

    def gaussian(generator):
        return Batch(2.0 * torch.randn(512, 2, generator=generator), {})

    recipe = Recipe(400, learning_rate=2e-2, warmup=1, ema=0.9, times=losses.UniformTime())
    trained = train(ScoreModel(Scale(), sde), gaussian, recipe, progress=False)
    # The standard error of the least-squares factor over the last steps is about 3e-3; five of them.
    assert float(trained.model.net.factor.detach()) == pytest.approx(sigma / (4 * alpha**2 + sigma**2), abs=1.5e-2)


def test_a_checkpoint_of_another_recipe_or_network_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    train(fresh(), stopping_at(2), RECIPE, checkpoint=file, progress=False)
    with pytest.raises(ValueError, match="steps is 20 there and 30 here"):
        train(fresh(), draw, Recipe(30, warmup=3, learning_rate=1e-2, seed=5), checkpoint=file, progress=False)
    with pytest.raises(ValueError, match="is of another run"):
        train(ScoreModel(MLP((2,), 8, 2), VPSDE()), draw, RECIPE, checkpoint=file, progress=False)
    file.write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a safetensors file"):
        train(fresh(), draw, RECIPE, checkpoint=file, progress=False)


def test_a_checkpoint_of_other_facts_is_refused_and_of_the_same_is_not(tmp_path):
    file, facts = tmp_path / "run.safetensors", {"data": "float32 (40, 2) 51ab", "batch_size": 32}
    train(fresh(), stopping_at(2), RECIPE, checkpoint=file, facts=facts, progress=False)
    for other, message in (
        ({**facts, "batch_size": 64}, "batch_size is 32 there and 64 here"),
        ({"data": facts["data"]}, "batch_size is 32 there and unknown here"),
        ({**facts, "levels": 17}, "levels is unknown there and 17 here"),
    ):
        with pytest.raises(ValueError, match=rf"run\.safetensors.*{message}\. Remove the file"):
            train(fresh(), draw, RECIPE, checkpoint=file, facts=other, progress=False)
    assert train(fresh(), draw, RECIPE, checkpoint=file, facts=facts, progress=False).step == 20


def test_facts_that_would_tell_nothing_are_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    with pytest.raises(TypeError, match=r"facts\['data'\] is a Tensor; a text or a number"):
        train(fresh(), draw, RECIPE, checkpoint=file, facts={"data": torch.ones(3)}, progress=False)
    with pytest.raises(ValueError, match=r"facts\['seed'\].*name it otherwise"):
        train(fresh(), draw, RECIPE, checkpoint=file, facts={"seed": 3}, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"facts": None}, "damaged"),
        ({"facts": "[3]"}, "damaged"),
        ({"step": "many"}, "damaged"),
        ({"format": "other"}, "format 'other'"),
        ({}, "does not fit the network: 'average/"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, change, message):
    file = tmp_path / "run.safetensors"
    train(fresh(), stopping_at(2), RECIPE, checkpoint=file, progress=False)
    with safe_open(str(file), framework="pt") as opened:
        metadata = {name: text for name, text in {**opened.metadata(), **change}.items() if text is not None}
    weights = {name: value for name, value in load_file(file).items() if name.startswith("net/")}
    save_file(weights, file, metadata)
    with pytest.raises(ValueError, match=rf"run\.safetensors' .*{message}"):
        train(fresh(), draw, RECIPE, checkpoint=file, progress=False)


def test_a_checkpoint_of_another_kind_of_device_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    train(fresh(), stopping_at(2), RECIPE, checkpoint=file, progress=False)
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata()
    metadata["facts"] = metadata["facts"].replace('"cpu"', '"cuda"')
    save_file(load_file(file), file, metadata)
    with pytest.raises(ValueError, match="device is cuda there and cpu here"):
        train(fresh(), draw, RECIPE, checkpoint=file, progress=False)


def failing(monkeypatch, fails):
    """Makes the writes of those numbers, from 1, run out of space half way; returns the list that counts writes."""
    written, write = [], Path.write_bytes

    def write_bytes(self, data):
        written.append(self)
        if len(written) in fails:
            write(self, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    return written


def test_a_checkpoint_that_cannot_be_written_costs_no_step_and_is_tried_again(tmp_path, monkeypatch):
    whole, file = train(fresh(), draw, RECIPE, progress=False), tmp_path / "run.safetensors"
    written = failing(monkeypatch, {1, 2})
    with pytest.warns(SdekitWarning, match=r"after step 5: .*No space left on device: .*run\.safetensors") as caught:
        trained = train(fresh(), draw, RECIPE, checkpoint=file, every=5, progress=False)
    assert len(caught) == 1
    assert len(written) == 5  # after 5, 10, 15 and 20 steps, and at the return
    assert same(trained.model, whole.model)
    assert list(tmp_path.iterdir()) == [file]
    assert same(train(fresh(), draw, RECIPE, checkpoint=file, progress=False).model, whole.model)


@pytest.mark.parametrize("stop", [3, 100])
def test_the_last_checkpoint_has_to_be_written(tmp_path, monkeypatch, stop):
    failing(monkeypatch, {1})
    with pytest.raises(OSError, match=r"No space left on device: .*run\.safetensors"):
        train(fresh(), stopping_at(stop), RECIPE, checkpoint=tmp_path / "run.safetensors", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_due_by_time_too_and_change_no_number(tmp_path, monkeypatch):
    whole = train(fresh(), draw, RECIPE, progress=False)
    monkeypatch.setattr(_checkpoint, "_SECONDS", 0.0)
    monkeypatch.setattr(_checkpoint, "_SHARE", float("inf"))
    written = failing(monkeypatch, set())
    trained = train(fresh(), draw, RECIPE, checkpoint=tmp_path / "run.safetensors", progress=False)
    assert len(written) == 21
    assert same(trained.model, whole.model)
    assert torch.equal(trained.losses, whole.losses)


def test_two_trainings_with_one_checkpoint_end_as_if_alone(tmp_path):
    file, inner = tmp_path / "run.safetensors", []

    def nesting(generator):
        if not inner:
            inner.append(train(fresh(), draw, RECIPE, checkpoint=file, every=1, progress=False))
        return draw(generator)

    outer = train(fresh(), nesting, RECIPE, checkpoint=file, every=1, progress=False)
    assert same(outer.last, inner[0].last)
    assert list(tmp_path.iterdir()) == [file]


def test_a_loss_that_is_not_finite_is_an_error():
    def broken(generator):
        return Batch(torch.full((4, 2), float("nan")), {})

    with pytest.raises(SdekitError, match="loss is nan"):
        train(fresh(), broken, RECIPE, progress=False)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 5, "ema": 1.0}, {"steps": 5, "learning_rate": -1.0}])
def test_an_impossible_recipe_is_refused(bad):
    with pytest.raises(ValueError, match="needed"):
        Recipe(**bad)

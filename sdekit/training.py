"""A short training loop: Adam, an exponential moving average of the weights, and exact resumption.

One step draws a batch, takes `denoising_loss(...).mean()`, clips the gradient's norm, steps Adam with

    rate(i) = learning_rate * min(1, (i + 1)/warmup) * (1 - i/steps),

and moves the average e <- e + (1 - d)(w - e) with d = min(ema, (i + 1)/(i + 10)), so that it forgets the start.

A checkpoint is one safetensors file: weights, average, Adam's moments, the step, and both sources of randomness (the
generator of batches, times and noise, and the stream that dropout draws from). Stopping after any step and resuming
gives the numbers of a run that was never stopped, to the bit. Ctrl-C finishes the step, writes the checkpoint and
returns what there is; a second one stops at once. The caller's global random state is left as it was.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from ._checkpoint import Checkpoint, Fact, joined
from ._checks import require_count, require_positive, require_seed
from ._interrupt import finish_step
from .errors import SdekitError
from .loss import Times, UniformHalfLogSNR, Weight, denoising_loss, uniform
from .model.score_model import ScoreModel

_LOOK = 100  # steps between looks at the loss: each look waits for the device


class Batch(NamedTuple):
    """What is trained on in one step.

    Attributes:
        x0: Data, (B, *event).
        condition: Keyword arguments for the network, tensors of leading size B.
    """

    x0: Tensor
    condition: dict[str, Tensor]


Batches: TypeAlias = Callable[[torch.Generator], Batch]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Steps in all; the learning rate falls linearly to zero over them.
        learning_rate: Adam's, at its highest.
        warmup: Steps over which the learning rate rises.
        betas: Adam's.
        ema: Decay of the average of the weights, in [0, 1).
        clip: Largest norm of the gradient.
        weight: Of the noise levels; see `sdekit.loss`.
        times: Distribution of the noise levels.
        seed: Of batches, times, noise and dropout.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.999)
    ema: float = 0.999
    clip: float = 1.0
    weight: Weight = uniform
    times: Times = field(default_factory=UniformHalfLogSNR)
    seed: int = 0

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        require_count("warmup", self.warmup)
        require_positive("learning_rate", self.learning_rate)
        require_positive("clip", self.clip)
        require_seed(self.seed)
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema={self.ema!r}; 0 <= ema < 1 is needed.")

    def rate(self, step: int) -> float:
        """The learning rate of step number `step`, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (1.0 - step / self.steps)

    def decay(self, step: int) -> float:
        """The decay of the average at step number `step`."""
        return min(self.ema, (step + 1) / (step + 10))


class Trained(NamedTuple):
    """The result of training.

    Attributes:
        model: The averaged weights, in evaluation mode: what to use.
        last: The weights of the last step; the same object that was passed in.
        step: Steps done; less than `Recipe.steps` if stopped.
        losses: (n,) float64, the mean loss of every 100 steps of this call (fewer before a checkpoint and at the end).
    """

    model: ScoreModel
    last: ScoreModel
    step: int
    losses: Tensor


def train(
    model: ScoreModel,
    batches: Batches,
    recipe: Recipe,
    *,
    checkpoint: str | Path | None = None,
    every: int = 1000,
    facts: Mapping[str, Fact] | None = None,
    progress: bool = True,
) -> Trained:
    """The trained model: weights of `model` updated in place, and a copy with their moving average.

    Args:
        model: What is trained, on the device where it is to be trained.
        batches: Draws a `Batch` from the generator it is given, and from nothing else: a resumed run repeats it.
        recipe: Steps, rates, weights, seed.
        checkpoint: A safetensors file. Resumed from if it exists; written every `every` steps, once a minute, and at
            the return.
        every: Steps between checkpoints.
        facts: What else the result depends on, texts or numbers by name: the batch size, a digest of the data.
            They are kept in the checkpoint, and a run of other facts does not resume from it.
        progress: Show a progress bar.

    Raises:
        ValueError: The checkpoint is of another recipe, network or other facts.
        TypeError: A fact is neither a text nor a number.
        OSError: The last checkpoint cannot be written; one before it that cannot is warned of and tried again.
        SdekitError: The loss is not finite.
    """
    require_count("every", every)
    run, kept = _Run(model, recipe), None
    if checkpoint is not None:
        kept = Checkpoint(Path(checkpoint), every, joined(run.facts(), facts or {}))
    device, mode = run.generator.device, model.net.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), finish_step() as stopped:
        run.seed_dropout()
        if kept is not None and kept.path.exists():
            run.resume(kept)
        done = run.step
        losses, recent = [], torch.zeros((), dtype=torch.float64, device=device)
        with tqdm(total=recipe.steps, initial=run.step, disable=not progress, desc="train", unit="step") as bar:
            while run.step < recipe.steps and not stopped():
                recent += run.advance(batches)
                bar.update()
                saves, listed = kept is not None and kept.due(run.step), kept is not None and run.step % every == 0
                if listed or run.step % _LOOK == 0 or run.step == recipe.steps:
                    losses.append(run.mean_loss(recent, run.step - done))
                    recent, done = torch.zeros_like(recent), run.step
                    bar.set_postfix(loss=f"{losses[-1]:.4g}")
                elif saves:
                    run.mean_loss(recent, run.step - done)  # nothing unseen is saved
                if kept is not None and saves:
                    kept.try_to_write(run.tensors(), run.step)
        if run.step > done:
            losses.append(run.mean_loss(recent, run.step - done))
        if kept is not None:
            kept.write(run.tensors(), run.step)
    model.net.train(mode)
    return Trained(run.averaged(), model, run.step, torch.tensor(losses, dtype=torch.float64))


class _Run:
    """Everything that changes while training, and its file."""

    def __init__(self, model: ScoreModel, recipe: Recipe) -> None:
        self.model, self.recipe, self.step = model, recipe, 0
        self.named = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("the network has no parameters that require a gradient: there is nothing to train.")
        self.average = {name: p.detach().clone() for name, p in self.named.items()}
        device = next(iter(self.named.values())).device
        self.adam = torch.optim.Adam(list(self.named.values()), lr=recipe.learning_rate, betas=recipe.betas, fused=True)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)

    def seed_dropout(self, state: Tensor | None = None) -> None:
        """Sets the stream that dropout draws from, torch's global one: to `state`, or by the recipe's seed."""
        if state is None:
            state = torch.Generator(self.generator.device).manual_seed(self.recipe.seed + 1).get_state()
        if self.generator.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.generator.device)
        else:
            torch.set_rng_state(state)

    def _dropout(self) -> Tensor:
        device = self.generator.device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def advance(self, batches: Batches) -> Tensor:
        """The loss of one step, after which the weights and their average have moved."""
        recipe, step = self.recipe, self.step
        self.model.net.train()
        batch = batches(self.generator)
        bound = self.model.condition(**batch.condition) if batch.condition else self.model
        losses = denoising_loss(bound, batch.x0, weight=recipe.weight, times=recipe.times, generator=self.generator)
        loss = losses.mean()
        self.adam.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(list(self.named.values()), recipe.clip)
        for group in self.adam.param_groups:
            group["lr"] = recipe.rate(step)
        self.adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.named.values()), 1.0 - recipe.decay(step))
        self.step = step + 1
        return loss.detach()

    def mean_loss(self, total: Tensor, count: int) -> float:
        """The mean of `count` losses, checked to be finite."""
        mean = float(total) / count
        if not math.isfinite(mean):
            where = f"the loss is {mean} between steps {self.step - count} and {self.step}"
            raise SdekitError(f"{where}: lower `learning_rate` or `clip`, or look for non-finite data.")
        return mean

    def averaged(self) -> ScoreModel:
        """A copy of the model with the averaged weights, in evaluation mode."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, parameter in model.net.named_parameters():
                if name in self.average:
                    parameter.copy_(self.average[name])
        return model.eval()

    def facts(self) -> dict[str, str]:
        """What a checkpoint must agree with: the recipe, the kind of generator, the shapes of the parameters."""
        recipe = {name: repr(value) for name, value in vars(self.recipe).items()}
        # A function's repr has its address, which differs from process to process.
        recipe["weight"] = getattr(self.recipe.weight, "__name__", recipe["weight"])
        recipe |= {"sde": repr(self.model.sde), "parameterization": repr(self.model.parameterization)}
        recipe = {name: re.sub(r" at 0x[0-9a-f]+", "", text) for name, text in recipe.items()}
        recipe["device"] = self.generator.device.type  # another kind of device draws other numbers
        return recipe | {f"shape of {name}": str(tuple(p.shape)) for name, p in self.named.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes, by name."""
        tensors = {"random/generator": self.generator.get_state(), "random/dropout": self._dropout()}
        tensors |= {f"net/{name}": value for name, value in self.model.net.state_dict().items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for name, parameter in self.named.items():  # a parameter that never had a gradient has no moments
            tensors |= {f"adam/{key}/{name}": value for key, value in self.adam.state.get(parameter, {}).items()}
        return tensors

    def resume(self, kept: Checkpoint) -> None:
        """Continues from a checkpoint; raises ValueError unless it is one of this run."""
        tensors, step = kept.read()
        try:
            self._put(tensors, step)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{str(kept.path)!r} does not fit the network: {error}. Remove the file.") from error

    def _put(self, tensors: dict[str, Tensor], step: int) -> None:
        device = self.generator.device
        self.model.net.load_state_dict({name[4:]: tensors[name] for name in tensors if name.startswith("net/")})
        for name, parameter in self.named.items():
            self.average[name].copy_(tensors[f"average/{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam/{key}/{name}" in tensors]
            if keys:
                self.adam.state[parameter] = {key: tensors[f"adam/{key}/{name}"].to(device) for key in keys}
        self.generator.set_state(tensors["random/generator"])
        self.seed_dropout(tensors["random/dropout"])
        self.step = step

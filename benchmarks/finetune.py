"""Maximum likelihood by `log_prob`: what does a trained network gain on samples that it has not seen?

A small network is trained on the ring of 8 Gaussians by denoising, its learning rate falling to zero. Then two copies
go on from there on fresh samples:

    likelihood   Adam on -mean log_prob, exact trace, the number of nodes drawn anew at every step
    denoising    the same denoising loss for more than as much CPU time, its learning rate falling to zero again

The number of nodes is drawn because the steps would otherwise learn the grid's errors: with one grid for all, the loss
falls below the entropy of the data (see the last table). Everything is judged on held-out samples by
`log_likelihood` at a tolerance that has no part in training, and beside the true density of the data at t_min.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit
from sdekit.gradient import log_prob
from sdekit.model.nets import MLP
from sdekit.targets import GaussianMixture
from sdekit.training import Batch, Recipe, train

from .common import Goal, Report, arguments
from .problems import ring

SURE = 3.0  # standard errors by which an improvement is to be above zero
SDE = sdekit.VPSDE(t_min=1e-3)


class Plan(NamedTuple):
    """How long: denoising steps at first and again, likelihood steps, nodes (least, most), batch, held-out samples."""

    first: int
    again: int
    steps: int
    nodes: tuple[int, int]
    batch: int
    held_out: int


FULL = Plan(first=6000, again=40000, steps=100, nodes=(48, 72), batch=512, held_out=4000)
QUICK = Plan(first=300, again=300, steps=4, nodes=(24, 36), batch=64, held_out=200)


def denoise(model: sdekit.ScoreModel, target: GaussianMixture, steps: int, rate: float, seed: int) -> sdekit.ScoreModel:
    """`model` after `steps` steps of denoising on fresh samples."""

    def batches(generator: torch.Generator) -> Batch:
        return Batch(target.sample(256, generator=generator).float(), {})

    return train(copy.deepcopy(model), batches, Recipe(steps, rate, seed=seed), progress=False).model


def maximise(
    model: sdekit.ScoreModel, target: GaussianMixture, plan: Plan, rate: float, seed: int, drawn: bool = True
) -> tuple[sdekit.ScoreModel, list[float]]:
    """`model` after `plan.steps` steps of maximum likelihood on fresh samples, averaged, and the losses."""
    model = copy.deepcopy(model)
    average, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    for step in tqdm(range(plan.steps), desc="likelihood"):
        least, most = plan.nodes
        nodes = int(torch.randint(least, most, (), generator=generator)) if drawn else least
        x = target.sample(plan.batch, generator=generator).float()
        loss = -log_prob(model, x, nodes=nodes).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * (1.0 - step / plan.steps)
        adam.step()
        with torch.no_grad():
            for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(now, 1.0 - min(0.95, (step + 1) / (step + 10)))
        losses.append(float(loss.detach()))
    return average.eval(), losses


def bits(model: sdekit.ScoreModel, x: Tensor) -> tuple[Tensor, float]:
    """(B,) -log2 p / D of held-out samples, and the largest estimate of the solver's error in the same unit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sdekit.log_likelihood(model, x, tolerance=1e-3, throw=False)
    unit = x.shape[1] * math.log(2.0)
    return -found.log_prob / unit, float(found.solver_error.max()) / unit


def paired(better: Tensor, worse: Tensor) -> tuple[float, float]:
    """Mean gain and its standard error, sample by sample."""
    gain = worse - better
    return float(gain.mean()), float(gain.std() / math.sqrt(len(gain)))


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("finetune", chosen)
    plan, seed = (QUICK if chosen.quick else FULL), chosen.seed
    target = ring().target()
    torch.manual_seed(seed)  # of the initial weights
    label = sdekit.LogSigmaLabel(0.25)
    net = MLP((2,), 32, 2, period=4.0)
    untrained = sdekit.ScoreModel(net, SDE, sdekit.noise(label), data_std=target.std)
    models: dict[str, tuple[sdekit.ScoreModel, float]] = {}

    def timed(name: str, began: float, model: sdekit.ScoreModel) -> sdekit.ScoreModel:
        models[name] = (model, time.process_time() - began)
        return model

    trained = timed("trained", time.process_time(), denoise(untrained, target, plan.first, 2e-3, seed))
    began = time.process_time()
    tuned, losses = maximise(trained, target, plan, 1e-3, seed + 1)
    timed("likelihood", began, tuned)
    began = time.process_time()
    timed("denoising", began, denoise(trained, target, plan.again, 1e-3, seed + 2))
    short = plan._replace(steps=plan.steps // 3, nodes=(plan.nodes[0] // 3, 0))
    began = time.process_time()
    cheated, fooled = maximise(trained, target, short, 1e-3, seed + 1, drawn=False)
    timed(f"likelihood, always {short.nodes[0]} nodes", began, cheated)

    x = target.sample(plan.held_out, generator=torch.Generator().manual_seed(seed + 3)).float()
    truth = -target.marginal_log_prob(SDE, x, SDE.t_min) / (2 * math.log(2.0))
    found = {name: bits(model, x) for name, (model, _) in models.items()}
    table = report.table(
        "held-out bits/dim",
        ["network", "bits/dim", "above the truth", "+-", "gain", "+-", "solver error, worst", "CPU s"],
        f"{len(x)} samples; the truth is {float(truth.mean()):.4f}. Gain over the trained network, paired; standard "
        f"errors. MLP of {sum(p.numel() for p in net.parameters())} parameters, batch {plan.batch}.",
    )
    for name, (value, error) in found.items():
        gain = paired(value, found["trained"][0])
        table.rows.append([name, float(value.mean()), *paired(truth, value), *gain, error, models[name][1]])
    curve = report.table(
        "training losses, nats",
        ["steps", f"nodes {plan.nodes[0]} to {plan.nodes[1] - 1}", f"always {short.nodes[0]}"],
        f"Means over that part of the steps. The entropy of the data is {float(truth.mean()) * 2 * math.log(2):.3f} "
        "nats: a loss below it is the grid's error, not a better model.",
    )
    for part in range(3):
        rows = [loss[part * len(loss) // 3 : (part + 1) * len(loss) // 3] for loss in (losses, fooled)]
        curve.rows.append([f"{part + 1} of 3", *(sum(row) / max(1, len(row)) for row in rows)])
    over_start, over_again = (paired(found["likelihood"][0], found[name][0]) for name in ("trained", "denoising"))
    report.goals += [
        Goal("gain over the trained network, bits/dim", over_start[0], low=0.0),
        Goal("  in standard errors", over_start[0] / over_start[1], low=SURE),
        Goal("gain over more denoising, bits/dim", over_again[0], low=0.0),
        Goal("  in standard errors", over_again[0] / over_again[1], low=SURE),
        Goal("CPU time of more denoising / of likelihood", models["denoising"][1] / models["likelihood"][1], low=1.0),
    ]
    report.save()


if __name__ == "__main__":
    main()

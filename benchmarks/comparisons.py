"""Differences of log p between the shipped digits network and others: what common probes gain, and whether the error
bar of the difference is right.

    gain      standard deviation of log p_a - log p_b over draws of the probes, independent over common probes
    claimed   sqrt(mean std_error^2) of 4 probes over the true standard deviation, all images together
    coverage  how often the exact difference lies within Student's interval of 3 degrees of freedom
    paired    standard error of the mean difference over images, against two sets of images
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings

import torch
from torch import Tensor

import sdekit
from sdekit.comparison import LogRatio, log_ratio
from sdekit.zoo import digits as zoo

from .common import CACHE, Goal, Report, Table, arguments, digest
from .problems import Digits, digits

STUDENT_3 = 3.182
CONFIGURATIONS: dict[str, tuple[sdekit.Divergence, dict[str, float | int]]] = {
    "fresh, nodes=64": (sdekit.Hutchinson(1), {"nodes": 64}),
    "fresh, tolerance 1e-2": (sdekit.Hutchinson(1), {"tolerance": 1e-2}),
    "fixed, nodes=64": (sdekit.Hutchinson(1, fresh=False), {"nodes": 64}),
}


def moved(model: sdekit.ScoreModel, by: float, seed: int) -> sdekit.ScoreModel:
    """The model with every weight moved at random, by the share `by` of its tensor's standard deviation."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.net.parameters():
            if weight.numel() > 1:
                weight += by * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


def trained(steps: int, seed: int) -> sdekit.ScoreModel:
    """The recipe of the shipped weights with other seeds and fewer steps, cached."""
    path = CACHE / f"digits-{digest(steps, seed)}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        zoo.train(steps=steps, seed=seed).save(path)
    return sdekit.ScoreModel.load(path, zoo.CellNet()).eval()


def variants(chosen: argparse.Namespace, model: sdekit.ScoreModel) -> dict[str, sdekit.ScoreModel]:
    """Neighbours and strangers of the shipped network."""
    return {
        "weights moved by 1%": moved(model, 0.01, chosen.seed),
        "weights moved by 10%": moved(model, 0.1, chosen.seed),
        "trained anew, briefly": trained(100 if chosen.quick else 500, chosen.seed + 1),
    }


def likelihood(
    model: sdekit.ScoreModel, x: Tensor, seed: int, divergence: sdekit.Divergence, options: dict[str, float | int]
) -> Tensor:
    """(B,) log p with the probes of a seed."""
    found = sdekit.log_likelihood(
        model, x, divergence=divergence, seed=seed, tolerance=float(options.get("tolerance", 1e-2)),
        nodes=int(options["nodes"]) if "nodes" in options else None, throw=False,
    )  # fmt: skip
    return found.log_prob


def gains(table: Table, name: str, images: Digits, other: sdekit.ScoreModel, count: int) -> dict[str, float]:
    """One row a configuration: what common probes gain; returns the gains."""
    size, found = images.x.shape[0], {}
    x = images.x[torch.arange(size).repeat_interleave(count)]
    for title, (divergence, options) in CONFIGURATIONS.items():
        a = likelihood(images.model, x, 0, divergence, options)
        b, apart = (likelihood(other, x, seed, divergence, options) for seed in (0, 1))
        common, independent = (float((a - value).reshape(size, count).var(1).mean().sqrt()) for value in (b, apart))
        found[title] = independent / common
        table.rows.append([name, title, float((a - b).mean()), independent, common, found[title]])
    return found


def calibrated(images: Digits, other: sdekit.ScoreModel, count: int) -> tuple[float, float, float]:
    """Claimed over true standard deviation, coverage, and how many times too large the sum of both errors is."""
    size = images.x.shape[0]
    rows = torch.arange(size).repeat_interleave(count)
    exact = log_ratio(images.model, other, images.x, nodes=64)
    out = log_ratio(images.model, other, images.x[rows], nodes=64, divergence=sdekit.Hutchinson(4))
    off = out.value - exact.value[rows]
    true = float(off.square().mean().sqrt())
    covered = float((off.abs() <= STUDENT_3 * out.std_error).double().mean())
    both = float((out.a.std_error + out.b.std_error).square().mean().sqrt())
    return float(out.std_error.square().mean().sqrt()) / true, covered, both / true


def paired(out: LogRatio) -> tuple[float, float, float]:
    """Mean difference, its standard error, and that of two sets of images of the same size."""
    mean = out.mean()
    apart = math.sqrt(float(out.a.log_prob.var() + out.b.log_prob.var()) / mean.samples)
    return mean.value, mean.std_error, apart


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("comparisons", chosen)
    size, count, many = (3, 8, 12) if chosen.quick else (5, 24, 48)
    images, wide = (digits(n, chosen.seed, torch.float32) for n in (size, many))
    first = report.table(
        "what common probes gain",
        ["other network", "one probe", "mean difference", "std, independent", "std, common", "gain"],
        f"{size} images, {count} draws each; standard deviations over draws, nats.",
    )
    second = report.table(
        "the error bar of 4 fresh probes, nodes=64",
        ["other network", "claimed / true", "coverage of 95%", "se_a + se_b, times too large"],
    )
    third = report.table(
        f"mean difference over {many} images, 2 fresh probes, nodes=64",
        ["other network", "mean", "standard error, paired", "standard error, unpaired"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sdekit.SdekitWarning)
        for name, other in variants(chosen, images.model).items():
            gain = gains(first, name, images, other, count)
            claimed, coverage, both = calibrated(images, other, count)
            second.rows.append([name, claimed, coverage, both])
            mean = paired(log_ratio(wide.model, other, wide.x, nodes=64, divergence=sdekit.Hutchinson(2)))
            third.rows.append([name, *mean])
            near = 10.0 if name.endswith("by 1%") else 3.0 if name.endswith("by 10%") else 1.0
            report.goals += [
                *[Goal(f"gain, {name}, {title}", value, low=near) for title, value in gain.items()],
                Goal(f"claimed / true, {name}", claimed, 0.8, 1.25),
                Goal(f"coverage of 95%, {name}", coverage, 0.9, 0.99),
                Goal(f"paired / unpaired standard error, {name}", mean[1] / mean[2], high=0.5),
            ]
            report.save(final=False)
    report.save()


if __name__ == "__main__":
    main()

"""Hutchinson's probes on the digits network: their noise, and whether `std_error` tells it.

Every draw is an image with its own `indices`, so that thousands of independent draws are one batch.

    fresh or fixed   standard deviation of log p over the draws of one image, one probe, at equal calls
    coverage         how often log p +- 1.96 std_error covers the exact trace's value
    claimed          sqrt(mean std_error^2) over the true standard deviation, image by image
    bias             z of the mean difference from the exact trace's value
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit

from .common import Goal, Report, arguments, quantile
from .problems import Digits, digits

FALSE_ALARM = 1e-3  # of the test for bias, two-sided: |z| < 3.29
Z_BOUND = 3.29
_ROWS = 500  # draws solved together


class Draws(NamedTuple):
    """(images, draws) log p and standard errors; mean network evaluations."""

    log_prob: Tensor
    std_error: Tensor
    evaluations: float


def draw(images: Digits, count: int, divergence: sdekit.Divergence, title: str, **options: float | int) -> Draws:
    """`count` independent draws of the probes for each image."""
    size = images.x.shape[0]
    rows = torch.arange(size).repeat_interleave(count)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in tqdm(range(0, size * count, _ROWS), desc=title):
        chosen = torch.arange(start, min(start + _ROWS, size * count))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = sdekit.log_likelihood(
                images.model, images.x[rows[chosen]], divergence=divergence, indices=chosen, throw=False, **options
            )
        parts.append((found.log_prob, found.std_error, found.stats.evaluations.double()))
    log_prob, std_error, evaluations = (torch.cat(column) for column in zip(*parts, strict=True))
    return Draws(log_prob.reshape(size, count), std_error.reshape(size, count), float(evaluations.mean()))


def exact_values(seed: int, count: int) -> tuple[Tensor, float]:
    """(images,) log p with the exact trace in float64 at 1e-4, and the largest estimate of its error."""
    images = digits(count, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sdekit.log_likelihood(images.model, images.x, divergence=sdekit.Exact(), tolerance=1e-4, throw=False)
    return found.log_prob, quantile(found.solver_error, 1.0)


def calibrated(draws: Draws, exact: Tensor) -> dict[str, float]:
    """Coverage, claimed over true (mean and median over images), bias and its z."""
    off = draws.log_prob - exact[:, None]
    count = off.shape[1]
    true = draws.log_prob.std(1)
    claimed = draws.std_error.square().mean(1).sqrt() / true
    z = float(off.mean() / (true.square().mean() / (off.shape[0] * count)).sqrt())
    return {
        "std": float(true.mean()),
        "coverage": float((off.abs() <= 1.96 * draws.std_error).double().mean()),
        "claimed": float(claimed.mean()),
        "claimed median": quantile(claimed, 0.5),
        "bias": float(off.mean()),
        "z": z,
    }


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("probes", chosen)
    count, repeats, nodes = (4, 25, 64) if chosen.quick else (20, 100, 80)
    images = digits(count, chosen.seed, torch.float32)
    exact, own = exact_values(chosen.seed, count)
    fresh, fixed = sdekit.Hutchinson(probes=1), sdekit.Hutchinson(probes=1, fresh=False)
    runs = {
        f"fresh, nodes={nodes}": draw(images, repeats, fresh, "fresh, equal calls", nodes=nodes),
        f"fixed, nodes={nodes}": draw(images, repeats, fixed, "fixed, equal calls", nodes=nodes),
        "fresh, tolerance 1e-2": draw(images, repeats, fresh, "fresh", tolerance=1e-2),
        "fixed, tolerance 1e-2": draw(images, repeats, fixed, "fixed", tolerance=1e-2),
        "fresh, tolerance 1e-3": draw(images, repeats, fresh, "fresh, tight", tolerance=1e-3),
    }
    columns = [
        "probe",
        "draws",
        "evaluations",
        "true std",
        "coverage of 95%",
        "claimed / true",
        "its median",
        "bias",
        "z",
    ]
    note = (
        f"{count} images, {repeats} draws each, float32. Exact trace at 1e-4 in float64: error at most {own:.1e} nats."
    )
    table = report.table("one probe on the digits network", columns, note)
    facts = {name: calibrated(draws, exact) for name, draws in runs.items()}
    for name, draws in runs.items():
        values = facts[name]
        shown = [values[key] for key in ("std", "coverage", "claimed", "claimed median", "bias", "z")]
        table.rows.append([name, draws.log_prob.numel(), draws.evaluations, *shown])
    equal = facts[f"fresh, nodes={nodes}"]["std"] / facts[f"fixed, nodes={nodes}"]["std"]
    default = facts["fresh, tolerance 1e-2"]
    report.goals += [
        Goal("std of one fresh probe / of one fixed probe, equal calls", equal, high=0.3),
        Goal("coverage of the 95% interval, default tolerance", default["coverage"], 0.93, 0.99),
        Goal("claimed / true standard deviation, default tolerance", default["claimed"], 1 / 1.3, 1.3),
        Goal(f"|z| of the bias at 1e-2 (false alarm {FALSE_ALARM:g})", abs(default["z"]), high=Z_BOUND),
        Goal(
            f"|z| of the bias at 1e-3 (false alarm {FALSE_ALARM:g})",
            abs(facts["fresh, tolerance 1e-3"]["z"]),
            high=Z_BOUND,
        ),
    ]
    assert math.isfinite(equal)
    report.save()


if __name__ == "__main__":
    main()

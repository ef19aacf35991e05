"""Time of a likelihood against the batch and against the dimensions, with the exponents between.

    batch         1 to 65,536 samples in 64 dimensions, MLP 64-128x3-64
    dimensions    2 to 12,288 with 16 samples, MLP D-256x3-D

A fixed grid of 32 nodes, one fixed probe, float32; beside it as many bare forward passes, each with a vjp.
The exponent over an interval is d log time / d log size by least squares; the bend is where time has become twice that
of the smallest size. On CUDA where there is one, else CPU seconds of one thread, up to what the time allows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import sdekit
from sdekit.model.nets import MLP

from .common import RESULTS, Goal, Report, arguments
from .overhead import bare
from .peers import fixed_probe
from .timing import best_device, clock, device_name, least, timed

matplotlib.use("Agg")

NODES = 32
PROBE = sdekit.Hutchinson(probes=1, fresh=False)
ALLOWED = 120.0  # seconds for a curve


class Curve(NamedTuple):
    """Sizes, and seconds of a solve and of the bare network at each."""

    name: str
    sizes: list[int]
    solve: list[float]
    network: list[float]


def measured(dim: int, batch: int, width: int, repeats: int) -> tuple[float, float]:
    """Seconds of a solve, and of the network alone."""
    device = best_device()
    torch.manual_seed(0)
    net = MLP((dim,), width, 3, period=4.0)
    model = sdekit.ScoreModel(net, sdekit.VPSDE(), sdekit.noise(sdekit.LogSigmaLabel(0.25)), data_std=1.0)
    model = model.to(device).eval()
    x = torch.randn(batch, dim, generator=torch.Generator().manual_seed(1)).to(device)
    probe = fixed_probe(x)

    def solve() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sdekit.log_likelihood(model, x, divergence=PROBE, nodes=NODES, throw=False)

    measure: Callable[[Callable[[], object]], float] = lambda call: (  # noqa: E731
        least(call, repeats, device) if repeats > 1 else timed(call, device)
    )
    return measure(solve), measure(lambda: bare(model, x, probe, NODES))


def curve(name: str, sizes: list[int], at: Callable[[int], tuple[int, int, int]]) -> Curve:
    """The curve over as many of the sizes as the time allows; `at` gives dimensions, batch and width of a size."""
    found = Curve(name, [], [], [])
    device, began, repeats = best_device(), clock(best_device()), 5
    for size in tqdm(sizes, desc=name):
        if found.sizes:
            grown = max(1.0, size / found.sizes[-1]) * (found.solve[-1] + found.network[-1])
            left = ALLOWED - (clock(device) - began)
            repeats = 5 if 6 * grown < 0.2 * left else 1
            if grown > left:
                break
        solve, network = measured(*at(size), repeats)
        found.sizes.append(size)
        found.solve.append(solve)
        found.network.append(network)
    return found


def slope(sizes: list[int], seconds: list[float]) -> float:
    """The exponent, by least squares in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def bend(sizes: list[int], seconds: list[float]) -> float:
    """Where time has become twice that of the smallest size, by interpolation in logarithms; NaN if it does not."""
    logs, goal = np.log(np.asarray(seconds) / seconds[0]), math.log(2.0)
    for k in range(1, len(sizes)):
        if logs[k] >= goal > logs[k - 1]:
            share = (goal - logs[k - 1]) / (logs[k] - logs[k - 1])
            return float(sizes[k - 1] * (sizes[k] / sizes[k - 1]) ** share)
    return math.nan


def told(report: Report, found: Curve, what: str) -> None:
    """Tables and goals of a curve."""
    table = report.table(
        f"{found.name}: seconds of {NODES} evaluations, {device_name(best_device())}",
        [what, "solve", "network", "ratio", "exponent to the next"],
    )
    for k, size in enumerate(found.sizes):
        here = slope(found.sizes[k : k + 2], found.solve[k : k + 2]) if k + 1 < len(found.sizes) else math.nan
        table.rows.append([size, found.solve[k], found.network[k], found.solve[k] / found.network[k], here])
    ends = {"low": slice(0, 4), "high": slice(-4, None)}
    fits = report.table(f"{found.name}: exponents", ["sizes", "solve", "network"])
    for part in ends.values():
        sizes = found.sizes[part]
        fits.rows.append(
            [f"{sizes[0]} to {sizes[-1]}", slope(sizes, found.solve[part]), slope(sizes, found.network[part])]
        )
    fits.rows.append(["twice the first at", bend(found.sizes, found.solve), bend(found.sizes, found.network)])
    top = slope(found.sizes[-4:], found.solve[-4:])
    report.goals.append(
        Goal(f"{found.name}: exponent of the last four sizes (network's own {fits.rows[1][2]:.2f})", top, high=1.1)
    )
    report.goals.append(
        Goal(f"{found.name}: solve / network at the largest", found.solve[-1] / found.network[-1], high=1.25)
    )


def picture(curves: list[Curve], path: object) -> None:
    """Time against size, solve and network."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.4), squeeze=False)
    for axis, found in zip(axes.flat, curves, strict=True):
        axis.loglog(found.sizes, found.solve, "C3o-", label="log_likelihood")
        axis.loglog(found.sizes, found.network, "k--", label="forward + vjp alone")
        guide = [found.solve[-1] * size / found.sizes[-1] for size in found.sizes]
        axis.loglog(found.sizes, guide, color="0.7", lw=0.8, label="proportional")
        axis.set_ylim(0.5 * min(found.network), 2 * max(found.solve))
        axis.set(title=found.name, xlabel=found.name, ylabel=f"seconds, {NODES} evaluations")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("scaling", chosen)
    step = 4 if chosen.quick else 2
    top, wide = (2**10, 3072) if chosen.quick else (2**16, 12_288)
    batches = [size for size in (step**k for k in range(17)) if size <= top]
    dims = sorted({*(size for size in (2 * 4**k for k in range(7)) if size <= wide), wide})
    curves = [
        curve("batch", batches, lambda size: (64, size, 128)),
        curve("dimensions", dims, lambda size: (size, 16, 256)),
    ]
    for found in curves:
        told(report, found, found.name)
    folder = RESULTS / "quick" if chosen.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    picture(curves, folder / "scaling.png")
    report.save()


if __name__ == "__main__":
    main()

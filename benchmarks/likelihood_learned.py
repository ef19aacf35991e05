"""Likelihoods of learned networks, beside other packages: error against a reference, and what an accuracy costs.

Two 2-D networks trained here (noise prediction; EDM preconditioning, under VP and in EDM's own time) with the exact
trace, and the digits network with one fixed probe that all methods share, so that all integrate the same equation.
Everything is float64 on the same weights and samples. First every method at stated tolerances; then every method at the
loosest of its quarter-decade tolerances that puts 95% of the samples within 1e-2, and within 1e-3, of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit

from .common import Goal, Report, Table, arguments, quantile, share_within
from .peers import PEERS, Run, fixed_probe, sdekit_default
from .problems import digits, learned, ring
from .reference import reference

Method = Callable[[sdekit.ScoreModel, Tensor, Tensor | None, float], Run]

METHODS: dict[str, Method] = {"sdekit": sdekit_default, **PEERS}
STATED = {
    "sdekit": (1e-1, 1e-2, 1e-3),
    "torchdiffeq dopri5": (1e-3, 1e-4, 1e-5, 1e-6),
    "scipy RK45": (1e-3, 1e-4, 1e-5, 1e-6),
    "torchode tsit5": (1e-3, 1e-4, 1e-5, 1e-6),
}
LOOSEST = {"sdekit": 1.0}  # where the sweep begins, log10 of the tolerance; -1 for the others
TIGHTEST = -9.0
WANTED = (1e-2, 1e-3)
SHARE = 0.95


class Equation(NamedTuple):
    """A network, its samples, its probe (None: exact trace) and the reference's log p and own error."""

    name: str
    model: sdekit.ScoreModel
    x: Tensor
    probe: Tensor | None
    truth: Tensor
    own: float


def equations(seed: int, quick: bool) -> list[Equation]:
    """The equations to solve, with their references."""
    x = ring().target().sample(32 if quick else 128, generator=torch.Generator().manual_seed(100 + seed))
    models = {
        "noise net, VP": learned("noise", seed, quick),
        "EDM net, VP": learned("edm", seed, quick),
        "EDM net, Karras": learned("edm", seed, quick, sdekit.KarrasSDE()),
    }
    made = []
    for name, model in models.items():
        known = reference(model, x)
        made.append(Equation(name, model, x, None, known.log_prob, float(known.error.max())))
    images = digits(8 if quick else 64, seed)
    probe = fixed_probe(images.x)
    known = reference(images.model, images.x, probe)
    own = float(known.error.max())
    return [*made, Equation("digits, one fixed probe", images.model, images.x, probe, known.log_prob, own)]


def at_stated(table: Table, equation: Equation, bar: tqdm) -> None:
    """Every method at its stated tolerances."""
    for method, tolerances in STATED.items():
        for tolerance in tolerances:
            run = METHODS[method](equation.model, equation.x, equation.probe, tolerance)
            error = (run.log_prob - equation.truth).abs()
            table.rows.append(
                [
                    *(equation.name, method, tolerance, float(error.mean()), quantile(error, 0.95)),
                    *(quantile(error, 1.0), run.evaluations, run.calls, run.seconds),
                ]
            )
            bar.update()


class Found(NamedTuple):
    """The loosest setting that is accurate enough."""

    tolerance: float
    run: Run
    error: Tensor


def sweep(method: str, equation: Equation, bar: tqdm) -> dict[float, Found]:
    """From loose to tight in quarter decades, until every accuracy wanted is had."""
    found: dict[float, Found] = {}
    power = LOOSEST.get(method, -1.0)
    while len(found) < len(WANTED) and power >= TIGHTEST:
        tolerance = 10.0**power
        run = METHODS[method](equation.model, equation.x, equation.probe, tolerance)
        error = (run.log_prob - equation.truth).abs()
        for wanted in WANTED:
            if wanted not in found and share_within(error, wanted) >= SHARE:
                found[wanted] = Found(tolerance, run, error)
        power -= 0.25
        bar.update()
    return found


def tuned(report: Report, table: Table, equation: Equation, bar: tqdm) -> None:
    """Every method tuned to each accuracy, and sdekit's share of torchdiffeq's evaluations."""
    every = {method: sweep(method, equation, bar) for method in METHODS}
    for wanted in WANTED:
        theirs = every["torchdiffeq dopri5"].get(wanted)
        for method, founds in every.items():
            best = founds.get(wanted)
            if best is None:
                table.rows.append([equation.name, wanted, method, *["not reached"] * 6])
                continue
            ratio = best.run.evaluations / theirs.run.evaluations if theirs is not None else math.nan
            table.rows.append(
                [
                    *(equation.name, wanted, method, best.tolerance, best.run.evaluations, best.run.calls),
                    *(best.run.seconds, ratio, quantile(best.error, 1.0)),
                ]
            )
            if method == "sdekit":
                name = f"{equation.name}: evaluations for 95% within {wanted:g}, of torchdiffeq's"
                report.goals.append(Goal(name, ratio, high=0.5))


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("likelihood_learned", chosen)
    costs = (
        "Evaluations are the mean over samples (for torchdiffeq and scipy the calls); calls those of the whole batch."
    )
    stated = report.table(
        "at stated tolerances",
        ["network", "method", "tolerance", "mean error", "95%", "worst", "evaluations", "calls", "CPU s"],
        f"{costs} score_sde's own code runs the network twice for each of scipy's evaluations.",
    )
    best = report.table(
        "the loosest tolerance that puts 95% of the samples within ...",
        [
            "network",
            "within",
            "method",
            "tolerance",
            "evaluations",
            "calls",
            "CPU s",
            "of torchdiffeq's",
            "worst error",
        ],
        "Quarter-decade steps, sdekit from 10 nats down, the others from 0.1.",
    )
    every = equations(chosen.seed, chosen.quick)
    own = report.table("the references' own error, nats", ["network", "samples", "at most"])
    own.rows += [[e.name, e.x.shape[0], e.own] for e in every]
    with tqdm(desc="solves", unit="") as bar:
        for equation in every:
            at_stated(stated, equation, bar)
            tuned(report, best, equation, bar)
    report.save()


if __name__ == "__main__":
    main()

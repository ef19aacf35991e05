"""Likelihoods of a U-Net on colour patches (D = 768), one fixed probe for all methods, beside other packages.

All methods integrate the same equation: the same weights in float64, the same held-out patches, the same probe a patch
(`Hutchinson(fresh=False)`). sdekit is asked for its tolerance in nats and not tuned. The others know nothing of nats:
each runs a ladder of tolerances, and what it takes to put 95% of the samples within some error is read off its ladder,
log-linear between two rungs. Two errors are asked of it: sdekit's tolerance, and the error sdekit had at that tolerance
("as close"). Beside the packages, sdekit's own Tsit5 under the same control in nats.

Then the same on mixtures with exact scores and traces, where diffrax takes part (in jax.numpy).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit

from . import peers_jax
from .common import Goal, Report, Table, arguments, cached, digest, quantile, share_within
from .patches import bits_per_dimension, held_out, trained
from .peers import Run, fixed_probe, torchdiffeq_dopri5, torchode_tsit5
from .problems import exact_problem, random_mixture, ring
from .reference import reference

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
SHARE = 0.95
OWN = ["equation", "samples", "mean log p", "bits per dimension", "reference's own error"]
STATED = ["equation", "solver", "tolerance", "within", "worst / tol", "95% / tol", "median estimate / error"]
STATED += ["covered", "loose", "evaluations", "calls", "CPU s"]
LADDER = ["equation", "method", "rtol = atol", "median error", "95%", "worst", "evaluations", "calls", "CPU s"]
CLOSE = ["equation", "tolerance", "sdekit's 95% error", "sdekit's evaluations", "method", "95% within the tolerance"]
CLOSE += ["as close as sdekit", "sdekit of the former", "sdekit of the latter"]
_TIGHT = 1e-9  # of the references on patches
_PART = 8  # patches a reference solves together

Peer = Callable[[Tensor, float], Run]


class Ours(NamedTuple):
    """sdekit's run: what other methods report, its estimate (B,), and how many are marked loose."""

    run: Run
    estimate: Tensor
    loose: int


class Equation(NamedTuple):
    """What is solved: samples, divergence, the reference's log p and own error, the rivals and their ladders."""

    name: str
    model: sdekit.ScoreModel
    x: Tensor
    divergence: sdekit.Divergence
    truth: Tensor
    own: float
    peers: dict[str, Peer]
    ladder: Sequence[float]
    rival_from: float  # the tightest tolerance at which Tsit5 under the same control runs too: it is dear
    tolerances: tuple[float, ...] = TOLERANCES


def decades(first: float, last: float, a_decade: int) -> list[float]:
    """Tolerances 10^first, ... down to 10^last, so many a decade."""
    count = round((first - last) * a_decade)
    return [10.0 ** (first - step / a_decade) for step in range(count + 1)]


def patches(quick: bool, seed: int) -> Equation:
    """The U-Net on held-out patches under VP, with one fixed probe."""
    model, x = trained(quick), held_out(2 if quick else 8, seed)
    probe = fixed_probe(x)
    known = [
        reference(model, *part, tight=1e-6 if quick else _TIGHT)
        for part in zip(x.split(_PART), probe.split(_PART), strict=True)
    ]
    truth, own = torch.cat([k.log_prob for k in known]), torch.cat([k.error for k in known])
    rivals: dict[str, Peer] = {
        "torchdiffeq dopri5": lambda rows, tol: torchdiffeq_dopri5(model, rows, probe[: len(rows)], tol),
    }
    fixed = sdekit.Hutchinson(probes=1, fresh=False)
    ladder = decades(-3, -4 if quick else -5, 1)
    return Equation("U-Net, VP", model, x, fixed, truth, float(own.max()), rivals, ladder, 1.0, TOLERANCES[:3])


def mixtures(quick: bool, seed: int) -> list[Equation]:
    """The ring and two 16-D mixtures under VP, with exact scores and traces; truth from a reference solution."""
    generator = torch.Generator().manual_seed(400 + seed)
    laws = {"ring": ring(), "16-D mixture": random_mixture(16, "full", generator)}
    made = []
    for name, law in laws.items():
        problem = exact_problem(name, law, sdekit.VPSDE(), 16 if quick else 256, 1, 900 + seed)
        x, model = problem.x[~problem.near], problem.model
        known = reference(model, x)
        rivals: dict[str, Peer] = {
            "torchdiffeq dopri5": lambda rows, tol, m=model: torchdiffeq_dopri5(m, rows, None, tol),
            "torchode tsit5": lambda rows, tol, m=model: torchode_tsit5(m, rows, None, tol),
        }
        if peers_jax.available:
            rivals["diffrax tsit5"] = lambda rows, tol, m=law: peers_jax.diffrax_tsit5(m, sdekit.VPSDE(), rows, tol)
        ladder = decades(-3, -5, 1) if quick else decades(-2, -7, 2)
        own = float(known.error.max())
        made.append(Equation(name, model, x, sdekit.Exact(), known.log_prob, own, rivals, ladder, 0.0))
    return made


def solve(equation: Equation, tolerance: float, solver: sdekit.Solver | None) -> Ours:
    """sdekit's default, or another solver under the same control."""
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sdekit.log_likelihood(
            *(equation.model, equation.x),
            divergence=equation.divergence,
            solver=solver,
            controller=sdekit.Nats(tolerance),
            throw=False,
        )
    mean, seconds = float(found.stats.evaluations.double().mean()), time.process_time() - began
    loose = int((found.status == sdekit.Status.LOOSE).sum())
    return Ours(Run(found.log_prob, found.stats.calls, mean, seconds), found.solver_error, loose)


def climb(equation: Equation, name: str, bar: tqdm) -> list[Run]:
    """A peer's runs down its ladder; cached, since no solver of sdekit has a part in them."""
    x = equation.x
    runs = []
    for tolerance in equation.ladder:
        weights = digest(equation.truth, *equation.model.state_dict().values())
        key = f"peer-{digest(name, x, weights, tolerance)}"

        def make() -> dict[str, Tensor]:
            run = equation.peers[name](x, tolerance)
            facts = torch.tensor([float(run.calls), run.evaluations, run.seconds], dtype=torch.float64)
            return {"log_prob": run.log_prob, "facts": facts}

        found = cached(key, make)
        calls, evaluations, seconds = found["facts"].tolist()
        runs.append(Run(found["log_prob"], int(calls), evaluations, seconds))
        bar.update()
    return runs


def needed(runs: list[Run], truth: Tensor, wanted: float) -> float:
    """Evaluations that put 95% within `wanted`, log-linear between the ladder's rungs; NaN where none is as close."""
    points = [(run.evaluations, quantile((run.log_prob - truth).abs(), SHARE)) for run in runs]
    for number, (cost, error) in enumerate(points):
        if error > wanted:
            continue
        if number == 0:
            return cost
        before, above = points[number - 1]
        share = math.log(above / wanted) / math.log(above / error) if math.isfinite(above) else 1.0
        return before * (cost / before) ** share
    return math.nan


class Tables(NamedTuple):
    """The tables that every equation adds to."""

    own: Table
    stated: Table
    ladder: Table
    close: Table


def run(report: Report, tables: Tables, equation: Equation, bar: tqdm) -> None:
    """Everything about one equation."""
    truth, count = equation.truth, len(equation.x)
    bits = float(bits_per_dimension(truth).mean()) if equation.x.dim() == 4 else math.nan
    tables.own.rows.append([equation.name, count, float(truth.mean()), bits, equation.own])
    ladders = {}
    for name in equation.peers:
        ladders[name] = climb(equation, name, bar)
        for tolerance, there in zip(equation.ladder, ladders[name], strict=True):
            error = (there.log_prob - truth).abs()
            tables.ladder.rows.append([equation.name, name, tolerance, quantile(error, 0.5), quantile(error, SHARE)])
            tables.ladder.rows[-1] += [quantile(error, 1.0), there.evaluations, there.calls, there.seconds]
    inside, total = 0.0, 0
    for tolerance in equation.tolerances:
        ours = {"Adams": solve(equation, tolerance, None)}
        if tolerance >= equation.rival_from:
            ours["Tsit5"] = solve(equation, tolerance, sdekit.Tsit5())
        for name, mine in ours.items():
            error = (mine.run.log_prob - truth).abs()
            row = [equation.name, name, tolerance, share_within(error, tolerance), quantile(error, 1.0) / tolerance]
            row += [quantile(error, SHARE) / tolerance, quantile(mine.estimate, 0.5) / quantile(error, 0.5)]
            row += [share_within(error, mine.estimate), mine.loose, mine.run.evaluations, mine.run.calls]
            tables.stated.rows.append([*row, mine.run.seconds])
        bar.update()
        error = (ours["Adams"].run.log_prob - truth).abs()
        inside, total = inside + share_within(error, tolerance) * count, total + count
        compare(report, tables.close, equation, tolerance, ours, ladders)
        report.save(final=False)
    report.goals.append(Goal(f"{equation.name}: share within tolerance, all of them", inside / total, low=0.99))


def compare(
    report: Report,
    table: Table,
    equation: Equation,
    tolerance: float,
    ours: dict[str, Ours],
    ladders: dict[str, list[Run]],
) -> None:
    """What the others need to be as close, at one tolerance."""
    mine = ours["Adams"].run
    close = quantile((mine.log_prob - equation.truth).abs(), SHARE)
    as_close: dict[str, float] = {}
    for name, runs in ladders.items():
        within = needed(runs, equation.truth, tolerance)
        as_close[name] = needed(runs, equation.truth, close)
        table.rows.append([equation.name, tolerance, close, mine.evaluations, name, within, as_close[name]])
        table.rows[-1] += [mine.evaluations / within, mine.evaluations / as_close[name]]
    if "Tsit5" in ours:
        rival = ours["Tsit5"].run.evaluations
        table.rows.append([equation.name, tolerance, close, mine.evaluations, "sdekit Tsit5, same control", rival])
        table.rows[-1] += [math.nan, mine.evaluations / rival, math.nan]
    best_of(report, equation, tolerance, mine.evaluations, as_close)


def best_of(report: Report, equation: Equation, tolerance: float, mine: float, as_close: dict[str, float]) -> None:
    """The goal: at most half of the evaluations of the best peer that is as close."""
    best = min((cost for cost in as_close.values() if not math.isnan(cost)), default=math.nan)
    if not math.isnan(best):
        title = f"{equation.name}, {tolerance:g}: evaluations, of the best peer's that is as close"
        report.goals.append(Goal(title, mine / best, high=0.5))


def main() -> None:
    """Runs the benchmark."""
    chosen = arguments(__doc__)
    report = Report("likelihood_images", chosen)
    tables = Tables(
        report.table(
            "the equations",
            OWN,
            f"References by DOP853 at {_TIGHT:g} on patches (1e-11 on mixtures); their own error is the difference to "
            "a solve 100 times looser, the largest of all samples, nats. Bits per dimension: one probe a patch.",
        ),
        report.table("sdekit at stated tolerances", STATED),
        report.table("the other packages' ladders", LADDER),
        report.table(
            "what the others need",
            CLOSE,
            "Evaluations a sample, interpolated on the ladders. diffrax "
            + ("is compiled before it is timed." if peers_jax.available else "is not installed."),
        ),
    )
    with tqdm(unit="solve") as bar:
        for equation in [patches(chosen.quick, chosen.seed), *mixtures(chosen.quick, chosen.seed)]:
            run(report, tables, equation, bar)
    report.save()


if __name__ == "__main__":
    main()

"""Likelihoods of images, and what accuracy costs beside other packages: a U-Net's patches, digits, exact mixtures.

    patches     64 held-out colour patches (D = 768) by the U-Net of patches.py, one fixed probe a patch
    digits      all 360 held-out digits (D = 64) by the shipped network, one fixed probe a digit
    mixtures    a ring and a 16-D mixture, exact scores and traces

All methods integrate the same equation: the same weights in float64, the same samples, the same probe. sdekit is asked
for its tolerance in nats and not tuned. The others know nothing of nats: each runs a ladder of tolerances, and what it
takes to put 95% of the samples within some error is read off its ladder, log-linear between two rungs. Two errors are
asked of it: sdekit's tolerance, and the error that 95% of sdekit's samples had at that tolerance ("as close"). Where
the others run on the first samples only, sdekit's error and cost in that table are of the same samples. Beside the
packages, on mixtures, sdekit's own Tsit5 under the same control in nats.
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
from .common import Goal, Report, Table, arguments, cached, digest, needed, quantile, share_within
from .patches import bits_per_dimension, held_out, trained
from .peers import Run, fixed_probe, torchdiffeq_dopri5, torchode_tsit5
from .problems import digits, exact_problem, random_mixture, ring
from .reference import reference

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
SHARE = 0.95
OWN = ["equation", "samples", "mean log p", "bits per dimension", "reference's own error"]
STATED = ["equation", "solver", "tolerance", "within", "worst / tol", "95% / tol", "median estimate / error"]
STATED += ["covered", "loose", "worst estimate / tol", "evaluations", "lock step", "CPU s"]
LADDER = ["equation", "method", "n", "rtol = atol", "median error", "95%", "worst", "evaluations", "lock step", "CPU s"]
CLOSE = ["equation", "n", "tolerance", "sdekit's 95% error", "sdekit's evaluations", "method"]
CLOSE += ["95% within the tolerance", "as close as sdekit", "sdekit of the former", "sdekit of the latter"]
_TIGHT = 1e-9  # of the references on patches
_PARTS = {"patches": 8, "digits": 120}  # samples a reference solves together

Peer = Callable[[Tensor, float], Run]


class Ours(NamedTuple):
    """sdekit's run: what other methods report, its estimates and evaluations (B,), and how many are marked loose."""

    run: Run
    estimate: Tensor
    evaluations: Tensor
    loose: int


class Equation(NamedTuple):
    """What is solved: samples, divergence, the reference's log p and own error, the rivals and their ladders.

    Attributes:
        shared: The rivals run on the first so many samples.
        rival_from: The tightest tolerance at which Tsit5 under the same control runs too: it is dear.
    """

    name: str
    model: sdekit.ScoreModel
    x: Tensor
    divergence: sdekit.Divergence
    truth: Tensor
    own: float
    peers: dict[str, Peer]
    ladder: Sequence[float]
    shared: int
    rival_from: float = math.inf


def decades(first: float, last: float, a_decade: int) -> list[float]:
    """Tolerances 10^first, ... down to 10^last, so many a decade."""
    count = round((first - last) * a_decade)
    return [10.0 ** (first - step / a_decade) for step in range(count + 1)]


def probed(
    name: str, model: sdekit.ScoreModel, x: Tensor, tight: float, part: int, shared: int, ladder: Sequence[float]
) -> Equation:
    """An equation of one fixed probe a sample, with its references, `part` samples solved together."""
    probe = fixed_probe(x)
    parts = tqdm(list(zip(x.split(part), probe.split(part), strict=True)), desc=f"references: {name}")
    known = [reference(model, *rows, tight=tight, checked=number == 0) for number, rows in enumerate(parts)]
    truth, own = torch.cat([k.log_prob for k in known]), known[0].error
    rivals: dict[str, Peer] = {
        "torchdiffeq dopri5": lambda rows, tol: torchdiffeq_dopri5(model, rows, probe[: len(rows)], tol),
        "torchode tsit5": lambda rows, tol: torchode_tsit5(model, rows, probe[: len(rows)], tol),
    }
    if peers_jax.available:
        rivals["diffrax tsit5"] = lambda rows, tol: peers_jax.diffrax_of_network(model, rows, probe[: len(rows)], tol)
    fixed = sdekit.Hutchinson(probes=1, fresh=False)
    return Equation(name, model, x, fixed, truth, float(own.max()), rivals, ladder, shared)


def patches(quick: bool, seed: int, count: int) -> Equation:
    """The U-Net on held-out patches under VP."""
    x, ladder = held_out(2 if quick else count, seed), decades(-3, -4 if quick else -9, 1)
    return probed("U-Net, VP", trained(quick), x, 1e-6 if quick else _TIGHT, _PARTS["patches"], 8, ladder)


def numbers(quick: bool, seed: int) -> Equation:
    """The shipped network on the held-out digits."""
    images, ladder = digits(6 if quick else 360, seed), decades(-2, -4 if quick else -8, 1)
    return probed("digits, VP", images.model, images.x, 1e-7 if quick else 1e-11, _PARTS["digits"], 64, ladder)


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
        ladder = decades(-3, -5, 1) if quick else decades(-1, -9, 2)
        own = float(known.error.max())
        made.append(Equation(name, model, x, sdekit.Exact(), known.log_prob, own, rivals, ladder, len(x), 0.0))
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
    seconds, cost = time.process_time() - began, found.stats.evaluations.double()
    loose = int((found.status == sdekit.Status.LOOSE).sum())
    return Ours(Run(found.log_prob, found.stats.calls, float(cost.mean()), seconds), found.solver_error, cost, loose)


def climb(equation: Equation, name: str, bar: tqdm) -> list[Run]:
    """A peer's runs down its ladder; cached, since no solver of sdekit has a part in them."""
    x, truth, runs = equation.x[: equation.shared], equation.truth[: equation.shared], []
    for tolerance in equation.ladder:
        weights = digest(truth, *equation.model.state_dict().values())
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


def costs(runs: list[Run], truth: Tensor) -> list[tuple[float, float]]:
    """Evaluations, and the error that 95% of the samples have, of each rung."""
    return [(run.evaluations, quantile((run.log_prob - truth).abs(), SHARE)) for run in runs]


class Tables(NamedTuple):
    """The tables that every equation adds to."""

    own: Table
    stated: Table
    ladder: Table
    close: Table


def run(report: Report, tables: Tables, equation: Equation, bar: tqdm) -> None:
    """Everything about one equation."""
    every: dict[float, dict[str, Ours]] = {}
    truth, count = equation.truth, len(equation.x)
    bits = float(bits_per_dimension(truth).mean()) if equation.x[0].numel() == 768 else math.nan
    tables.own.rows.append([equation.name, count, float(truth.mean()), bits, equation.own])
    for tolerance in TOLERANCES:
        ours = {"Adams": solve(equation, tolerance, None)}
        if tolerance >= equation.rival_from:
            ours["Tsit5"] = solve(equation, tolerance, sdekit.Tsit5())
        for name, mine in ours.items():
            tables.stated.rows.append([equation.name, name, tolerance, *stated(mine, truth, tolerance)])
        bar.update()
        every[tolerance] = ours
        error = ours["Adams"].run.log_prob - truth
        report.goals.append(Goal(f"{equation.name}: share within {tolerance:g}", share_within(error, tolerance), 0.99))
        report.save(final=False)
    ladders = {}
    for name in equation.peers:
        ladders[name] = climb(equation, name, bar)
        for tolerance, there in zip(equation.ladder, ladders[name], strict=True):
            error = (there.log_prob - truth[: equation.shared]).abs()
            row = [equation.name, name, len(error), tolerance, quantile(error, 0.5), quantile(error, SHARE)]
            tables.ladder.rows.append([*row, quantile(error, 1.0), there.evaluations, there.calls, there.seconds])
        report.save(final=False)
    for tolerance, ours in every.items():
        compare(report, tables.close, equation, tolerance, ours, ladders)
    report.save(final=False)


def stated(mine: Ours, truth: Tensor, tolerance: float) -> list[float | int]:
    """The rest of a row about sdekit's own run."""
    error = (mine.run.log_prob - truth).abs()
    row: list[float | int] = [share_within(error, tolerance), quantile(error, 1.0) / tolerance]
    row += [quantile(error, SHARE) / tolerance, quantile(mine.estimate, 0.5) / quantile(error, 0.5)]
    row += [share_within(error, mine.estimate), mine.loose, quantile(mine.estimate, 1.0) / tolerance]
    return [*row, mine.run.evaluations, mine.run.calls, mine.run.seconds]


def compare(
    report: Report,
    table: Table,
    equation: Equation,
    tolerance: float,
    ours: dict[str, Ours],
    ladders: dict[str, list[Run]],
) -> None:
    """What the others need to be as close, at one tolerance."""
    truth, mine = equation.truth[: equation.shared], ours["Adams"]
    close = quantile((mine.run.log_prob[: equation.shared] - truth).abs(), SHARE)
    cost = float(mine.evaluations[: equation.shared].mean())
    start: list[str | float | int] = [equation.name, len(truth), tolerance, close, cost]
    within, as_close = (
        {name: needed(costs(runs, truth), e) for name, runs in ladders.items()} for e in (tolerance, close)
    )
    for name in ladders:
        row = [*start, name, within[name], as_close[name]]
        table.rows.append([*row, cost / within[name], cost / as_close[name]])
    if "Tsit5" in ours:
        rival = ours["Tsit5"].run.evaluations
        table.rows.append([*start, "sdekit Tsit5, same control", rival, math.nan, cost / rival, math.nan])
    for reading, found in (("within it", within), ("as close", as_close)):
        best = min((value for value in found.values() if not math.isnan(value)), default=math.nan)
        title = f"{equation.name}, {tolerance:g}: evaluations, of the best peer's with 95% {reading}"
        if math.isnan(best):
            title, best = (
                f"{title} (none is; the most that any took)",
                max(r.evaluations for rs in ladders.values() for r in rs),
            )
        report.goals.append(Goal(title, cost / best, high=0.5))


def main() -> None:
    """Runs the benchmark."""
    chosen = arguments(
        __doc__, lambda parser: parser.add_argument("--patches", type=int, default=64, help="how many, of the U-Net")
    )
    report = Report("likelihood_images", chosen)
    tables = Tables(
        report.table(
            "the equations",
            OWN,
            f"References by DOP853 at {_TIGHT:g} on patches (1e-11 elsewhere); their own error is the difference to "
            "a solve 100 times looser, nats, the largest of the samples (of networks, of the first few). Bits per "
            "dimension: one probe a patch.",
        ),
        report.table("sdekit at stated tolerances", STATED),
        report.table("the other packages' ladders", LADDER),
        report.table(
            "what the others need",
            CLOSE,
            "Evaluations a sample, interpolated on the ladders. diffrax "
            + (
                "is compiled before it is timed; of networks it calls torch, a call a stage of the whole batch."
                if peers_jax.available
                else "is not installed."
            ),
        ),
    )
    with tqdm(unit="solve") as bar:
        for equation in mixtures(chosen.quick, chosen.seed):
            run(report, tables, equation, bar)
        run(report, tables, numbers(chosen.quick, chosen.seed), bar)
        run(report, tables, patches(chosen.quick, chosen.seed, chosen.patches), bar)
    report.save()


if __name__ == "__main__":
    main()

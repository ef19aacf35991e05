"""Likelihoods against exact ones: random mixtures in 2, 16 and 64 dimensions, exact scores and traces, float64.

Every problem is drawn afresh from the seed. Truth is the closed form of log p_{t_min}; the terminal law is matched to
the mixture's own mean and covariance. Data scaled by 10 do not fit VP's terminal law, so there the truth is a reference
solution of the same equation with the same law, and what the law itself costs is reported apart. Last, `extrapolate`
is held against log p_0.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit

from .common import Goal, Report, Table, arguments, quantile, share_within
from .problems import ExactProblem, exact_problems
from .reference import reference

TOLERANCES = (1e-2, 1e-3)


class Outcome(NamedTuple):
    """Errors, estimates and costs of some samples, all (n,); `law`: what the terminal law alone does to log p."""

    error: Tensor
    law: Tensor
    estimate: Tensor
    evaluations: Tensor
    near: Tensor


def solve(problem: ExactProblem, tolerance: float, truth: Tensor, end: str = "marginal") -> Outcome:
    """The outcome of sdekit's default on a problem."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sdekit.log_likelihood(
            problem.model,
            problem.x,
            divergence=sdekit.Exact(),
            tolerance=tolerance,
            end=end,
            data_moments=problem.moments,
            throw=False,
        )
    law = found.log_prior - problem.target.marginal_log_prob(problem.model.sde, found.latent, problem.model.sde.t_max)
    return Outcome(found.log_prob - truth, law, found.solver_error, found.stats.evaluations.double(), problem.near)


def pooled(parts: list[Outcome]) -> Outcome:
    """Several outcomes as one."""
    return Outcome(*(torch.cat(column) for column in zip(*parts, strict=True)))


def group_of(problem: ExactProblem) -> str:
    """The row a problem belongs to: its SDE and dimension, the ring apart."""
    sde, law = problem.name.split(" ", 1)
    return f"{sde} {'ring' if law == 'ring' else law.split(' ')[0]}"


COLUMNS = [
    "problem",
    "points",
    "tolerance",
    "n",
    "within",
    "worst / tol",
    "median / tol",
    "evaluations",
    "loose",
    "law alone, worst",
]


def add_rows(table: Table, groups: dict[tuple[str, float], list[Outcome]]) -> None:
    """Two rows a group and tolerance: samples, and points near separatrices."""
    for (name, tolerance), parts in groups.items():
        outcome = pooled(parts)
        for label, rows in (("samples", ~outcome.near), ("near separatrix", outcome.near)):
            error = outcome.error[rows].abs()
            if not error.numel():
                continue
            table.rows.append(
                [
                    *(name, label, tolerance, error.numel(), share_within(error, tolerance)),
                    *(quantile(error, 1.0) / tolerance, quantile(error, 0.5) / tolerance),
                    *(float(outcome.evaluations[rows].mean()), int((outcome.estimate[rows] > tolerance).sum())),
                    quantile(outcome.law[rows].abs(), 1.0),
                ]
            )


def add_goals(report: Report, title: str, groups: dict[tuple[str, float], list[Outcome]]) -> None:
    """Share within and worst error over everything in `groups`, at each tolerance."""
    for tolerance in TOLERANCES:
        outcome = pooled([part for (_, tol), parts in groups.items() if tol == tolerance for part in parts])
        report.goals += [
            Goal(f"{title}: share within {tolerance:g}", share_within(outcome.error, tolerance), low=0.99),
            Goal(f"{title}: worst / {tolerance:g}", quantile(outcome.error.abs(), 1.0) / tolerance, high=3.0),
        ]


def against_closed_form(report: Report, problems: list[ExactProblem], title: str) -> None:
    """log p_{t_min} by the default at both tolerances against the closed form."""
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for problem in tqdm(problems, desc=title):
        sde = problem.model.sde
        truth = problem.target.marginal_log_prob(sde, problem.x, sde.t_min)
        for tolerance in TOLERANCES:
            groups.setdefault((group_of(problem), tolerance), []).append(solve(problem, tolerance, truth))
    add_rows(report.table(title, COLUMNS), groups)
    add_goals(report, title, groups)
    report.save(final=False)


def against_reference(report: Report, problems: list[ExactProblem], title: str) -> None:
    """log p by the default against a reference solution of the same equation; what the terminal law costs apart."""
    groups: dict[tuple[str, float], list[Outcome]] = {}
    laws: list[list[str | float]] = []
    own = 0.0
    for problem in tqdm(problems, desc=title):
        sde, known = problem.model.sde, reference(problem.model, problem.x)
        truth = known.with_moments(sde, problem.moments)
        own = max(own, float(known.error.max()))
        exact = problem.target.marginal_log_prob(sde, problem.x, sde.t_min)
        for tolerance in TOLERANCES:
            groups.setdefault((group_of(problem), tolerance), []).append(solve(problem, tolerance, truth))
        matched, prior = (truth - exact).abs(), (known.log_prob - exact).abs()
        laws.append(
            [problem.name, float(matched.mean()), float(matched.max()), float(prior.mean()), float(prior.max())]
        )
    note = f"The reference's own error is {own:.1e} nats at most."
    add_rows(report.table(title, COLUMNS, note), groups)
    columns = ["problem", "matched law: mean", "max", "prior: mean", "max"]
    report.table(f"{title}: what the terminal law alone costs, nats", columns).rows += laws
    add_goals(report, title, groups)


def extrapolated(report: Report, problems: list[ExactProblem]) -> None:
    """`end="extrapolate"` at tolerance 1e-3 against log p_0."""
    table = report.table(
        'end="extrapolate", tolerance 1e-3, against log p_0',
        ["problem", "points", "n", "mean", "max", "marginal: mean"],
    )
    every: list[Tensor] = []
    for problem in tqdm(problems, desc="extrapolate"):
        truth = problem.target.log_prob(problem.x)
        outcome = solve(problem, 1e-3, truth, "extrapolate")
        sde = problem.model.sde
        bias = (problem.target.marginal_log_prob(sde, problem.x, sde.t_min) - truth).abs()
        every.append(outcome.error[~problem.near])
        for label, rows in (("samples", ~problem.near), ("near separatrix", problem.near)):
            error = outcome.error[rows].abs()
            table.rows.append(
                [problem.name, label, error.numel(), float(error.mean()), float(error.max()), float(bias[rows].mean())]
            )
    report.goals.append(
        Goal("extrapolate: mean error against log p_0, samples", float(torch.cat(every).abs().mean()), high=1e-3)
    )
    worst = max(float(row[3]) for row in table.rows if row[1] == "samples")
    report.goals.append(Goal("extrapolate: largest mean error of a problem, samples", worst, high=1e-3))


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("likelihood_exact", chosen)
    problems = exact_problems(chosen.seed, chosen.quick)
    against_closed_form(report, problems, "as drawn")
    against_closed_form(report, exact_problems(chosen.seed + 1, chosen.quick, 0.1, ("VP",)), "VP, data times 0.1")
    large = [p for p in exact_problems(chosen.seed + 2, chosen.quick, 10.0, ("VP",)) if p.name.endswith((" 0", "ring"))]
    against_reference(report, large, "VP, data times 10")
    extrapolated(report, [p for p in problems if p.name.endswith((" 0", "ring"))])
    report.save()


if __name__ == "__main__":
    main()

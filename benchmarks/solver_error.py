"""Is `solver_error` honest? Estimated against true integration errors, on exact targets and learned networks, float64.

Truth of exact targets is their own density at both ends, so that no terminal law takes part; of networks the same
equation at 1e-11 (reference.py). Exact traces first. With fresh probes the
probe's noise would hide the integration error, so their control is tested with a divergence whose *value* is the exact
trace while the steps are controlled by the control probe: path and steps do not depend on the value.
Last a ReLU network, whose divergence jumps: the cap must be reached, be said, and the estimate must still hold.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit
from sdekit.divergence import Field, FieldValue
from sdekit.targets import GaussianMixture

from .common import Goal, Report, Table, arguments, quantile, share_within
from .problems import SDES, digits, exact_problems, learned, near_separatrix, ring
from .reference import Reference, fine_reference, reference

TOLERANCES = (1e-1, 1e-2, 1e-3)


@dataclass(frozen=True)
class ExactValue(sdekit.Hutchinson):
    """Hutchinson with a control probe, the noise taken out of its value: the exact trace instead."""

    control: bool = True

    def evaluate(self, field: Field, x: Tensor, probes: Tensor | None) -> FieldValue:
        found = super().evaluate(field, x, probes)
        exact = sdekit.Exact().evaluate(field, x, None).traces
        return found._replace(traces=torch.cat((exact.expand(-1, self.probes), found.traces[:, self.probes :]), 1))


class Case(NamedTuple):
    """An equation with its truth: a reference solution, or the target itself."""

    name: str
    model: sdekit.ScoreModel
    x: Tensor
    known: Reference | None
    target: GaussianMixture | None = None

    def error(self, found: sdekit.LogLikelihood) -> Tensor:
        """(B,) the integration error: the terminal law of `found` has no part in it."""
        sde = self.model.sde
        if self.known is not None:
            return (found.log_prob - self.known.log_prob).abs()
        assert self.target is not None
        solved = found.log_det + self.target.marginal_log_prob(sde, found.latent, sde.t_max)
        return (solved - self.target.marginal_log_prob(sde, self.x, sde.t_min)).abs()

    @property
    def own(self) -> float:
        """The largest error of the truth itself."""
        return 0.0 if self.known is None else quantile(self.known.error, 1.0)


def cases(seed: int, quick: bool) -> list[Case]:
    """Exact targets (as drawn, and VP times 0.1 and 10), and learned networks with the exact trace."""
    laws = [(p, "") for p in exact_problems(seed, quick)]
    if not quick:
        laws += [(p, " x0.1") for p in exact_problems(seed + 1, True, 0.1, ("VP",))]
        laws += [(p, " x10") for p in exact_problems(seed + 2, True, 10.0, ("VP",))]
    made = [Case(p.name + label, p.model, p.x, None, p.target) for p, label in laws]
    generator = torch.Generator().manual_seed(100 + seed)
    x = ring().target().sample(32 if quick else 128, generator=generator)
    x = torch.cat((x, near_separatrix(ring(), len(x) // 4, generator)))
    models = {"noise net, VP": learned("noise", seed, quick), "EDM net, VP": learned("edm", seed, quick)}
    models["EDM net, Karras"] = learned("edm", seed, quick, sdekit.KarrasSDE())
    count = len(x) * 4 // 5
    for name, model in tqdm(models.items(), desc="references"):
        known = reference(model, x)
        for label, rows in (("", slice(count)), (", near separatrices", slice(count, None))):
            made.append(Case(name + label, model, x[rows], Reference(*(part[rows] for part in known))))
    images = digits(4 if quick else 32, seed)
    return [
        *made,
        Case("digits", images.model, images.x, reference(images.model, images.x, panels=16 if quick else 64)),
    ]


class Outcome(NamedTuple):
    """True errors, estimates (n,), mean evaluations, and how many are marked loose."""

    error: Tensor
    estimate: Tensor
    evaluations: float
    loose: int
    warned: bool


def solve(case: Case, divergence: sdekit.Divergence, tolerance: float) -> Outcome:
    """sdekit's default on a case, with the prior as terminal law, as the reference has it."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = sdekit.log_likelihood(case.model, case.x, divergence=divergence, tolerance=tolerance, throw=False)
    warned = any(issubclass(warning.category, sdekit.ToleranceWarning) for warning in heard)
    loose = int((found.status == sdekit.Status.LOOSE).sum())
    return Outcome(case.error(found), found.solver_error, float(found.stats.evaluations.double().mean()), loose, warned)


COLUMNS = ["problem", "tolerance", "n", "covered", "within tol", "median estimate / error", "95% error / estimate"]
COLUMNS += ["worst error", "loose", "evaluations"]


def row(case: Case, tolerance: float, outcome: Outcome) -> list[str | float | int]:
    """What the table says of one case."""
    error, estimate = outcome.error, outcome.estimate
    return [
        case.name,
        tolerance,
        error.numel(),
        share_within(error, estimate),
        share_within(error, tolerance),
        quantile(estimate, 0.5) / quantile(error, 0.5),
        quantile(error / estimate, 0.95),
        quantile(error, 1.0),
        outcome.loose,
        outcome.evaluations,
    ]


def calibration(report: Report, every: list[Case], divergence: sdekit.Divergence, title: str) -> None:
    """Coverage and size of the estimate over all cases."""
    table: Table = report.table(
        title, COLUMNS, "The estimate is to lie above the error; loose: estimate above tolerance."
    )
    for tolerance in TOLERANCES:
        outcomes = [solve(case, divergence, tolerance) for case in tqdm(every, desc=f"{title} {tolerance:g}")]
        table.rows += [row(case, tolerance, outcome) for case, outcome in zip(every, outcomes, strict=True)]
        error, estimate = (torch.cat([getattr(o, name) for o in outcomes]) for name in ("error", "estimate"))
        ratios = [quantile(o.estimate, 0.5) / quantile(o.error, 0.5) for o in outcomes]
        report.save(final=False)
        report.goals += [
            Goal(f"{title}, {tolerance:g}: errors below solver_error", share_within(error, estimate), low=0.99),
            Goal(
                f"{title}, {tolerance:g}: least share of a problem",
                min(share_within(o.error, o.estimate) for o in outcomes),
                low=0.99,
            ),
            Goal(
                f"{title}, {tolerance:g}: median estimate / median error",
                quantile(estimate, 0.5) / quantile(error, 0.5),
                high=30.0,
            ),
            Goal(f"{title}, {tolerance:g}: the same, largest of a problem", max(ratios), high=30.0),
        ]


def kinked(report: Report, seed: int, quick: bool) -> None:
    """The ReLU network: no method converges on it; what does sdekit say?"""
    model = learned("relu", seed, quick, SDES["VP"])
    x = ring().target().sample(16 if quick else 64, generator=torch.Generator().manual_seed(200 + seed))
    case = Case("ReLU net, VP", model, x, fine_reference(model, x, 1 << (12 if quick else 15)))
    known = case.known
    assert known is not None
    note = f"Truth by the midpoint rule; with half the steps it differs by {case.own:.1e} nats at most."
    table = report.table("a ReLU network", [*COLUMNS, "ToleranceWarning"], note)
    for tolerance in (1e-1, 1e-2, 1e-3):
        outcome = solve(case, sdekit.Exact(), tolerance)
        table.rows.append([*row(case, tolerance, outcome), str(outcome.warned)])
        sure = (outcome.error - known.error).clamp(min=0.0)
        report.goals.append(
            Goal(f"ReLU, {tolerance:g}: errors below solver_error", share_within(sure, outcome.estimate), low=0.99)
        )
    report.goals.append(
        Goal("ReLU, 0.001: loose samples, and it warns", outcome.loose * float(outcome.warned), low=1.0)
    )


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("solver_error", chosen)
    every = cases(chosen.seed, chosen.quick)
    own = report.table("the references' own error, nats", ["problem", "at most"])
    own.rows += [[case.name, case.own] for case in every if case.known is not None]
    calibration(report, every, sdekit.Exact(), "exact trace")
    # Two traces an evaluation: without the largest, and one draw of each law.
    small = [c for c in every if c.known is not None or (c.x.shape[1] <= 16 and not c.name.endswith((" 1", " 2")))]
    calibration(report, small, ExactValue(probes=1), "control probe")
    kinked(report, chosen.seed, chosen.quick)
    report.save()


if __name__ == "__main__":
    main()

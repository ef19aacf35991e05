"""The choices inside `Nats`: how fast steps may grow, how long they may be, how far coarse estimates are doubted.

Each variant solves the same samples with the exact trace in float64: learned networks (noise, EDM) and a 16-D mixture
with exact scores. What counts: no sample beyond its tolerance, 99% of true errors below `solver_error`, evaluations.
"""

from __future__ import annotations

import warnings

import torch
from tqdm import tqdm

import sdekit

from .common import Report, arguments, quantile, share_within
from .problems import SDES, learned, random_mixture, ring
from .reference import Reference, reference
from .solver_error import Case

VARIANTS: dict[str, dict[str, float]] = {
    "as decided": {},
    "growth 2": {"growth": 2.0},
    "growth 1.25": {"growth": 1.25},
    "ceiling 1/30": {"ceiling": 1.0 / 30.0},
    "doubt 0": {"doubt": 0.0},
    "doubt 40": {"doubt": 40.0},
    "growth 2, doubt 0": {"growth": 2.0, "doubt": 0.0},
}
TOLERANCES = (1e-1, 1e-2, 1e-3)
COLUMNS = ["problem", "tolerance", "variant", "evaluations", "rejected", "within", "worst / tol", "covered"]
COLUMNS += ["99% error / estimate", "median estimate / error"]


def cases(seed: int, quick: bool) -> list[Case]:
    """Two learned networks against references, and a 16-D mixture against itself."""
    generator = torch.Generator().manual_seed(300 + seed)
    count = 48 if quick else 192
    made: list[Case] = []
    for name, kind in (("noise net, VP", "noise"), ("EDM net, VP", "edm")):
        model, x = learned(kind, seed, quick), ring().target().sample(count, generator=generator)
        known: Reference = reference(model, x)
        made.append(Case(name, model, x, known))
    target = random_mixture(16, "diagonal", generator).target()
    return [
        *made,
        Case("16-D mixture", target.score_model(SDES["VP"]), target.sample(count, generator=generator), None, target),
    ]


def main() -> None:
    """Runs the benchmark."""
    chosen = arguments(__doc__)
    report = Report("control_variants", chosen)
    table = report.table("Variants of the control in nats", COLUMNS)
    problems = cases(chosen.seed, chosen.quick)
    work = [(case, tol, name) for case in problems for tol in TOLERANCES for name in VARIANTS]
    for case, tolerance, name in tqdm(work, unit="solve"):
        controller = sdekit.Nats(tolerance, **VARIANTS[name])  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sdekit.ToleranceWarning)
            found = sdekit.log_likelihood(
                *(case.model, case.x), divergence=sdekit.Exact(), controller=controller, throw=False
            )
        error, estimate = case.error(found), found.solver_error
        table.rows.append([
            *(case.name, tolerance, name),
            float(found.stats.evaluations.double().mean()),
            float(found.stats.rejected.double().mean()),
            share_within(error, tolerance),
            quantile(error, 1.0) / tolerance,
            share_within(error, estimate),
            quantile(error / estimate, 0.99),
            quantile(estimate, 0.5) / quantile(error, 0.5),
        ])  # fmt: skip
    report.save()


if __name__ == "__main__":
    main()

"""Does a corrector pay? Predictor and corrector beside the predictor alone with as many evaluations.

Exact scores of the ring and of mixtures in 16 and 64 dimensions (VP), 1,500 samples, the grid equally spaced in the
mixed variable: sliced 2-Wasserstein distance, error of the covariance and energy distance to exact draws, as in
work_precision, at 20, 50 and 100 evaluations in all.
"""

from __future__ import annotations

import torch
from tqdm import tqdm

import sdekit
from sdekit.prior import draw_prior

from .common import Report, arguments
from .work_precision import GRIDS, Law, distances, laws, solve

PREDICTORS: dict[str, tuple[sdekit.Solver, float]] = {
    "EulerMaruyama": (sdekit.EulerMaruyama(), 1.0),
    "SDEDPMSolverPP(1)": (sdekit.SDEDPMSolverPP(1), 1.0),
    "DDIM": (sdekit.DDIM(), 0.0),
    "Heun": (sdekit.Heun(), 0.0),
}
CORRECTORS: dict[str, sdekit.Corrector | None] = {
    "none": None,
    "Langevin(0.02)": sdekit.Langevin(0.02),
    "Langevin(0.1)": sdekit.Langevin(0.1),
    "Langevin(0.3)": sdekit.Langevin(0.3),
    "BatchSNRLangevin(0.16)": sdekit.BatchSNRLangevin(0.16),
    "Underdamped(0.5)": sdekit.Underdamped(0.5),
}
COUNTS = (20, 50, 100)


def ended(law: Law, predictor: sdekit.Solver, corrector: sdekit.Corrector | None, eta: float, count: int) -> object:
    """Where `count` evaluations take the prior's draws."""
    solver = predictor if corrector is None else sdekit.PredictorCorrector(predictor, corrector)
    numbers = torch.arange(len(law.truth))
    start = draw_prior(law.model, tuple(law.truth.shape), 0, numbers, torch.float64)
    term = sdekit.ReverseSDE(law.model, eta) if eta else sdekit.ProbabilityFlow(law.model)
    path = sdekit.IndependentIncrements(1, numbers)
    return solve(term, solver, GRIDS["mixed"](law.model, max(1, count // solver.evaluations)), start, path).x


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("predictor_corrector", chosen)
    found = laws(chosen.seed, chosen.quick)
    counts = COUNTS[:1] if chosen.quick else COUNTS
    bar = tqdm(total=len(found) * len(PREDICTORS) * len(CORRECTORS), unit="method")
    for law in found:
        columns = ["predictor", "corrector", *(f"{name} {n}" for name in ("W2", "cov", "energy") for n in counts)]
        table = report.table(law.name, columns, "The first row is the floor: a second set of exact draws.")
        floor = distances(law, law.again)
        table.rows.append(["exact draws", "-", *(floor[k] for k in range(3) for _ in counts)])
        for name, (predictor, eta) in PREDICTORS.items():
            for label, corrector in CORRECTORS.items():
                each = [distances(law, ended(law, predictor, corrector, eta, count)) for count in counts]
                table.rows.append([name, label, *(one[k] for k in range(3) for one in each)])
                bar.update()
        report.save(final=False)
    report.save()


if __name__ == "__main__":
    main()

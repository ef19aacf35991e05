"""Does an order that each sample chooses for itself pay: on smooth paths, near separatrices, with fresh probes?

    order 5, 6, 7      the same order for all
    adaptive           each sample has orders 3 to 7: the default, with exact traces and fixed probes
    ... to 6, to 5     a lower highest order; 5 is the default with fresh probes
    ... single steps   no running mean: the last step alone decides
    ... sooner         longer as soon as the next term is smaller by e^-0.3 (e^-1 is decided)
    ... order 4        at least

Learned networks, mixtures, points near separatrices, digits and patches, all under the same control in nats. What
counts: evaluations, and that no sample is lost (error above the tolerance, or above its estimate).

Fresh probes: every node's probe has the weight of the node in the formula. A standard deviation is worth its square
times the evaluations; the column is that product over order 5's, sample by sample, the median and the largest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit
from sdekit.solver import adams

from .common import Goal, Report, arguments, quantile
from .control_ideas import TOLERANCES, cases, facts, of_patches
from .control_ideas import solved as solved_by
from .problems import SDES, digits, near_separatrix, random_mixture
from .solver_error import Case

COLUMNS = ["problem", "tolerance", "method", "evaluations", "worst / tol", "n", "above tol", "above estimate", "loose"]
COLUMNS += ["median estimate / error"]
FRESH = ["problem", "tolerance", "method", "evaluations", "evaluations x variance, over order 5's: median", "largest"]
FRESH += ["claimed / true: median", "least"]


class Method(NamedTuple):
    """A solver, and constants of the choice that differ from what is decided."""

    solver: sdekit.Solver
    constants: dict[str, float]


_SEVEN = sdekit.Adams(7, adaptive=True)
METHODS = {
    "order 5": Method(sdekit.Adams(5), {}),
    "order 6": Method(sdekit.Adams(6), {}),
    "order 7": Method(sdekit.Adams(7), {}),
    "adaptive": Method(_SEVEN, {}),
    "adaptive to 6": Method(sdekit.Adams(6, adaptive=True), {}),
    "adaptive to 5": Method(sdekit.Adams(5, adaptive=True), {}),
    "single steps": Method(_SEVEN, {"_KEPT": 0.0, "_ANEW": 0.0}),
    "sooner": Method(_SEVEN, {"_LONGER": -0.3}),
    "order 4 at least": Method(_SEVEN, {"_LEAST": 3}),
}
PLAIN = ("order 5", "order 6", "order 7", "adaptive")
WITH_PROBES = ("order 5", "adaptive to 5", "adaptive")


@contextmanager
def constants(changed: dict[str, float]) -> Iterator[None]:
    """The choice's constants, changed for a while."""
    before = {name: getattr(adams, name) for name in changed}
    for name, value in changed.items():
        setattr(adams, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(adams, name, value)


def solved(case: Case, method: Method, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) errors, estimates and evaluations."""
    with constants(method.constants):
        return solved_by(case, (sdekit.Nats(tolerance), method.solver))


def far(seed: int, quick: bool) -> Case:
    """Points near separatrices of a mixture in 64 dimensions."""
    generator = torch.Generator().manual_seed(700 + seed)
    law = random_mixture(64, "diagonal", generator)
    x, target = near_separatrix(law, 2 if quick else 4, generator), law.target()
    return Case("VP 64-D, near separatrices", target.score_model(SDES["VP"]), x, None, target)


def with_probes(seed: int, quick: bool) -> list[Case]:
    """Digits, and a 16-D mixture's samples and points near its separatrices."""
    generator = torch.Generator().manual_seed(800 + seed)
    law, count = random_mixture(16, "diagonal", generator), 2 if quick else 12
    target = law.target()
    model, images = target.score_model(SDES["VP"]), digits(count, seed)
    rows = {"": target.sample(count, generator=generator)}
    rows[", near separatrices"] = near_separatrix(law, count, generator)
    made = [Case(f"VP 16-D{name}", model, x, None, target) for name, x in rows.items()]
    return [Case("digits", images.model, images.x, None, None), *made]


def drawn(case: Case, method: Method, tolerance: float, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) evaluations, variance over draws of one fresh probe a node, and the variance claimed."""
    x = case.x.repeat_interleave(draws, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sdekit.log_likelihood(
            *(case.model, x), divergence=sdekit.Hutchinson(), solver=method.solver, tolerance=tolerance, throw=False
        )
    parts = (found.stats.evaluations.double(), found.log_prob, found.std_error.square())
    evaluations, value, claimed = (part.reshape(-1, draws) for part in parts)
    return evaluations.mean(1), value.var(1), claimed.mean(1)


def main() -> None:
    """Runs the benchmark."""
    chosen = arguments(__doc__)
    report = Report("adaptive_order", chosen)
    table = report.table("under the same control", COLUMNS)
    fresh = report.table("one fresh probe a node", FRESH, "Norms control the steps, as by default.")
    made = (chosen.seed, chosen.quick)
    tolerances = TOLERANCES[:2] if chosen.quick else TOLERANCES
    problems = [(case, tolerances, tuple(METHODS)) for case in cases(*made)]
    problems += [(far(*made), tolerances[::2], tuple(METHODS)), (of_patches(*made), tolerances, PLAIN)]  # dear
    spent: dict[str, list[float]] = {name: [] for name in METHODS}
    within: list[Tensor] = []
    with tqdm(total=sum(len(every) * len(names) for _, every, names in problems)) as bar:
        for case, every, names in problems:
            for tolerance in every:
                for name in names:
                    found = solved(case, METHODS[name], tolerance)
                    table.rows.append([case.name, tolerance, name, *facts(tolerance, *found)])
                    spent[name].append(float(found[2].mean()))
                    if name == "adaptive":
                        within.append((found[0] <= tolerance).double())
                    bar.update()
            report.save(final=False)
    for case in with_probes(*made):
        for tolerance in TOLERANCES[:2]:
            base = torch.empty(0)
            for name in WITH_PROBES:
                evaluations, true, claimed = drawn(case, METHODS[name], tolerance, 8 if chosen.quick else 64)
                worth, honest = evaluations * true, (claimed / true).sqrt()
                base = worth if name == "order 5" else base
                row = [float(evaluations.mean()), quantile(worth / base, 0.5), quantile(worth / base, 1.0)]
                fresh.rows.append([case.name, tolerance, name, *row, quantile(honest, 0.5), quantile(honest, 0.0)])
        report.save(final=False)
    share = max(ours / five for ours, five in zip(spent["adaptive"], spent["order 5"], strict=True))
    report.goals.append(Goal("evaluations over order 5's, the worst problem and tolerance", share, high=1.05))
    report.goals.append(Goal("adaptive: share within the tolerance", float(torch.cat(within).mean()), low=0.99))
    report.save()


if __name__ == "__main__":
    main()

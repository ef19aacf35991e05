"""A sample's log p does not depend on its company: alone, among 4,095 others, shuffled, or beside a NaN.

Exact score of the ring and of a 4-D mixture, float64, exact trace and one fresh probe. `indices` go with the samples.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit

from .common import Goal, Report, arguments
from .problems import SDES, exact_problem, random_mixture, ring

TOLERANCE = 1e-3


def solve(model: sdekit.ScoreModel, x: Tensor, divergence: sdekit.Divergence, indices: Tensor) -> sdekit.LogLikelihood:
    """sdekit's default, what fails left as NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sdekit.log_likelihood(
            model, x, divergence=divergence, tolerance=TOLERANCE, indices=indices, seed=3, throw=False
        )


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite if one is NaN where the other is not."""
    return float((a - b).abs().nan_to_num(nan=float("inf")).max())


def differences(
    model: sdekit.ScoreModel, x: Tensor, divergence: sdekit.Divergence, near: Tensor
) -> list[tuple[str, str, float]]:
    """Largest change of log p, nats, by each kind of company: (what, which points, value)."""
    count = x.shape[0]
    numbers = torch.arange(count)
    whole = solve(model, x, divergence, numbers)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    shuffled = solve(model, x[order], divergence, numbers[order])
    spoilt = torch.cat((x[:240], x[-16:]))
    spoilt[7] = torch.nan
    kept = torch.cat((numbers[:240], numbers[-16:]))
    beside = solve(model, spoilt, divergence, kept)
    found: list[tuple[str, str, float]] = []
    for label, mask in (("samples", ~near), ("near separatrix", near)):
        some = mask.nonzero().squeeze(1)
        some = some[torch.linspace(0, len(some) - 1, 8).long()]
        alone = [solve(model, x[i : i + 1], divergence, numbers[i : i + 1]).log_prob for i in some.tolist()]
        others = mask[kept] & (kept != 7)
        found += [
            ("alone", label, distance(torch.cat(alone), whole.log_prob[some])),
            ("shuffled", label, distance(shuffled.log_prob[mask[order]], whole.log_prob[order][mask[order]])),
            ("beside a NaN", label, distance(beside.log_prob[others], whole.log_prob[kept][others])),
        ]
    own = beside.log_prob[7].isnan() & (beside.status[7] == sdekit.Status.NOT_FINITE)
    found += [("the NaN's own log p is NaN", "that one", float(own))]
    return found


NOTE = """Near separatrices the Jacobian changes by its own size over 1e-4 and less: rounding (batched matrix products
round otherwise than single ones) is enlarged there."""


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("invariance", chosen)
    size = 256 if chosen.quick else 4096
    columns = ["problem", "trace", "what", "points", "value"]
    table = report.table(f"largest change of log p, nats, in a batch of {size}", columns, NOTE.replace("\n", " "))
    laws = {"ring": ring(), "4-D mixture": random_mixture(4, "full", torch.Generator().manual_seed(chosen.seed))}
    traces = {"exact": sdekit.Exact(), "one fresh probe": sdekit.Hutchinson(probes=1)}
    traces["with control"] = sdekit.Hutchinson(probes=1, control=True)
    for law, mixture in laws.items():
        problem = exact_problem(law, mixture, SDES["VP"], size - 16, 16, chosen.seed)
        for trace, divergence in tqdm(traces.items(), desc=law):
            for row in differences(problem.model, problem.x, divergence, problem.near):
                table.rows.append([law, trace, *row])
    changes = [row for row in table.rows if row[3] != "that one"]

    def worst(exact: bool, points: str) -> float:
        return max(float(row[4]) for row in changes if (row[1] == "exact") == exact and row[3] == points)

    own = min(float(row[4]) for row in table.rows if row[3] == "that one")
    report.goals += [
        Goal("exact trace: largest change, samples", worst(True, "samples"), high=1e-10),
        Goal("exact trace: largest change, near separatrices", worst(True, "near separatrix"), high=1e-10),
        Goal("probes: largest change, samples", worst(False, "samples"), high=1e-10),
        Goal("probes: largest change, near separatrices", worst(False, "near separatrix"), high=1e-10),
        Goal("the NaN is reported for its own sample", own, low=1.0),
    ]
    report.save()


if __name__ == "__main__":
    main()

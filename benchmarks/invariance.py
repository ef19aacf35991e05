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


def differences(model: sdekit.ScoreModel, x: Tensor, divergence: sdekit.Divergence) -> dict[str, float]:
    """Largest change of log p, nats, by each kind of company; and how many samples a NaN took with it."""
    count = x.shape[0]
    numbers = torch.arange(count)
    whole = solve(model, x, divergence, numbers)
    some = torch.linspace(0, count - 1, 8).long()
    alone = [solve(model, x[i : i + 1], divergence, numbers[i : i + 1]).log_prob for i in some.tolist()]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    shuffled = solve(model, x[order], divergence, numbers[order])
    spoilt = x[:256].clone()
    spoilt[7] = torch.nan
    beside = solve(model, spoilt, divergence, numbers[:256])
    good = numbers[:256] != 7
    return {
        "alone": distance(torch.cat(alone), whole.log_prob[some]),
        "shuffled": distance(shuffled.log_prob, whole.log_prob[order]),
        "std_error shuffled": distance(shuffled.std_error, whole.std_error[order]),
        "beside a NaN": distance(beside.log_prob[good], whole.log_prob[:256][good]),
        "other samples a NaN spoilt": float(beside.log_prob[good].isnan().sum()),
        "the NaN's own log p is NaN": float(
            beside.log_prob[7].isnan() & (beside.status[7] == sdekit.Status.NOT_FINITE)
        ),
    }


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("invariance", chosen)
    size = 256 if chosen.quick else 4096
    table = report.table(f"largest change of log p, nats, in a batch of {size}", ["problem", "trace", "what", "value"])
    laws = {"ring": ring(), "4-D mixture": random_mixture(4, "full", torch.Generator().manual_seed(chosen.seed))}
    traces = {"exact": sdekit.Exact(), "one fresh probe": sdekit.Hutchinson(probes=1)}
    traces["with control"] = sdekit.Hutchinson(probes=1, control=True)
    worst = 0.0
    for law, mixture in laws.items():
        problem = exact_problem(law, mixture, SDES["VP"], size - 16, 16, chosen.seed)
        for trace, divergence in tqdm(traces.items(), desc=law):
            for what, value in differences(problem.model, problem.x, divergence).items():
                table.rows.append([law, trace, what, value])
                if what in ("alone", "shuffled", "std_error shuffled", "beside a NaN"):
                    worst = max(worst, value)
    report.goals.append(Goal("largest change, nats", worst, high=1e-10))
    spoilt = sum(float(row[3]) for row in table.rows if row[2] == "other samples a NaN spoilt")
    report.goals.append(Goal("samples that a NaN took with it", spoilt, high=0.0))
    own = min(float(row[3]) for row in table.rows if row[2] == "the NaN's own log p is NaN")
    report.goals.append(Goal("the NaN is reported for its own sample", own, low=1.0))
    report.save()


if __name__ == "__main__":
    main()

"""How much of what a batch pays is of use, where some samples need many times the evaluations of others.

4,096 points of a mixture in 16 dimensions, one in ten near a separatrix, adaptive steps. Paid: rows times calls of the
network, counted at the network. Needed: the evaluations of every sample, rejected steps included. `slots` samples are
solved at once, the next of the batch enters when one is finished; in lock-step all rows stay until the last is done.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sdekit

from .common import Goal, Report, arguments, quantile
from .problems import SDES, exact_problem, random_mixture
from .timing import best_device, clock, device_name

SLOTS = (64, 256, None)
USEFUL = 0.95  # wanted, of what is paid
PROBE = sdekit.Hutchinson(probes=1, fresh=False)


class Rows(nn.Module):
    """A network that counts its calls and their rows."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls, self.rows = net, 0, 0

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        self.calls += 1
        self.rows += x.shape[0]
        out: Tensor = self.net(x, label)
        return out


def main() -> None:
    chosen = arguments(__doc__)
    report, device = Report("slots", chosen), best_device()
    count = 512 if chosen.quick else 4096
    law = random_mixture(16, "full", torch.Generator().manual_seed(1_000_003 * chosen.seed + 16))
    problem = exact_problem("16-D", law, SDES["VP"], count - count // 10, count // 10, chosen.seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(chosen.seed))
    x = problem.x[order].to(device)
    table = report.table(
        f"{count} samples, {device_name(device)}",
        ["slots", "calls", "rows paid", "needed", "useful", "seconds", "us a needed evaluation"],
    )
    needed: Tensor | None = None
    for slots in tqdm(SLOTS, desc="slots"):
        net = Rows(problem.model.net)
        model = sdekit.ScoreModel(net, problem.model.sde, problem.model.parameterization, problem.model.data_std)
        began = clock(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = sdekit.log_likelihood(model, x, divergence=PROBE, throw=False, slots=slots)
        took = clock(device) - began
        if slots is None:
            needed = found.stats.evaluations
        total = int(found.stats.evaluations.sum())
        table.rows.append([str(slots or "all"), net.calls, net.rows, total, total / net.rows, took, 1e6 * took / total])
        report.goals.append(Goal(f"useful share, slots {slots or 'all'}", total / net.rows, USEFUL))
        said = found.stats.paid / net.rows
        report.goals.append(Goal(f"stats.paid / rows counted, slots {slots or 'all'}", said, 1.0, 1.0))
        report.save(final=False)
    assert needed is not None
    longest = int(needed.max())
    table.rows.append(
        [
            "lock-step",
            longest,
            longest * count,
            int(needed.sum()),
            float(needed.double().mean()) / longest,
            float("nan"),
            float("nan"),
        ]
    )
    spread = report.table("evaluations a sample needs", ["share of samples", "evaluations"])
    spread.rows += [[share, quantile(needed, share)] for share in (0.05, 0.5, 0.9, 0.95, 0.99, 1.0)]
    report.save()


if __name__ == "__main__":
    main()

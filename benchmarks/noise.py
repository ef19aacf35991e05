"""What reproducible noise costs: Euler and Maruyama's method on four sources of noise, against plain torch.randn.

An untrained float32 MLP of 64 dimensions with four hidden layers of 512, a fixed grid, CPU time of one thread, the
least of a few repeats taken in turns. The solve is the same in all of them but for the path: increments drawn by step,
one path of time that can be divided, torch.randn (which depends on who else draws, and in which batch), and torchsde's
BrownianInterval asked for the same intervals.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torchsde
from torch import Tensor
from tqdm import tqdm

import sdekit
from sdekit.brownian_motion import BrownianMotion
from sdekit.model.nets import MLP

from .common import Goal, Report, Table, arguments

DIM, FIRST, LAST = 64, 1.0, 1e-3


class Randn(sdekit.IndependentIncrements):
    """Increments from torch's own generator: what noise costs that cannot be repeated."""

    def increment(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        return (s1 - s0).sqrt()[:, None].to(like.dtype) * torch.randn_like(like)


class Interval(sdekit.IndependentIncrements):
    """Increments of torchsde's BrownianInterval, one interval for the whole batch, as it asks for."""

    def __init__(self, seed: int, indices: Tensor) -> None:
        super().__init__(seed, indices)
        size = (len(indices), DIM)
        self._interval = torchsde.BrownianInterval(-FIRST, -LAST, size, dtype=torch.float32, entropy=seed)

    def increment(self, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor, lane: int = 0) -> Tensor:
        return self._interval(float(s0[0]), float(s1[0]))


def motion(seed: int, indices: Tensor) -> BrownianMotion:
    return BrownianMotion(seed, indices, -FIRST, -LAST)


RANDN = "torch.randn"
PATHS: dict[str, Callable[[int, Tensor], sdekit.BrownianPath]] = {
    RANDN: Randn,
    "IndependentIncrements": sdekit.IndependentIncrements,
    "BrownianMotion": motion,
    "torchsde BrownianInterval": Interval,
}


def network() -> sdekit.ScoreModel:
    """An untrained noise network."""
    torch.manual_seed(0)
    net = MLP((DIM,), 512, 4, period=4.0)
    return sdekit.ScoreModel(net, sdekit.VPSDE(), sdekit.noise(sdekit.LogSigmaLabel(0.25)), data_std=1.0).eval()


def least(repeats: int, functions: dict[str, Callable[[], None]], count: int) -> dict[str, float]:
    """Least CPU microseconds of each function, of which one call is `count` pieces of work."""
    took = dict.fromkeys(functions, math.inf)
    for _ in range(repeats + 1):  # in turns, so that a busy moment of the machine does not meet one of them alone
        for name, function in functions.items():
            began = time.process_time()
            function()
            took[name] = min(took[name], 1e6 * (time.process_time() - began) / count)
    return took


def solves(table: Table, batch: int, steps: int, repeats: int) -> float:
    """Rows of one batch size; the cost of IndependentIncrements against that of torch.randn."""
    model, x = network(), torch.randn(batch, DIM, generator=torch.Generator().manual_seed(1))
    term = sdekit.ReverseSDE(model)
    grid = sdekit.FixedGrid(torch.linspace(FIRST, LAST, steps + 1, dtype=torch.float64))

    def solve(make: Callable[[int, Tensor], sdekit.BrownianPath]) -> None:
        path = make(0, torch.arange(batch))  # a fresh path for each solve: torchsde's grows with what was asked
        sdekit.integrate(term, sdekit.EulerMaruyama(), grid, x, FIRST, LAST, path)

    took = least(repeats, {name: (lambda m: lambda: solve(m))(make) for name, make in PATHS.items()}, steps)
    s = term.coordinate(grid.times)[:, None].expand(steps + 1, batch).contiguous()
    number = torch.arange(steps)[:, None].expand(steps, batch).contiguous()

    def ask(make: Callable[[int, Tensor], sdekit.BrownianPath]) -> None:
        path = make(0, torch.arange(batch))
        for i in range(steps):
            path.increment(s[i], s[i + 1], number[i], x)

    alone = least(repeats, {name: (lambda m: lambda: ask(m))(make) for name, make in PATHS.items()}, steps)
    label = torch.full((batch,), 0.5)

    def forward() -> None:
        with torch.no_grad():
            for _ in range(steps):
                model.net(x, label)

    floor = least(repeats, {"forward": forward}, steps)["forward"]
    for name in PATHS:
        table.rows.append([batch, name, floor, alone[name], took[name], took[name] / took[RANDN]])
    return took["IndependentIncrements"] / took[RANDN]


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("noise", chosen)
    table = report.table(
        "one step of Euler and Maruyama's method, microseconds",
        ["batch", "noise", "bare forward", "an increment", "a step", "step / with torch.randn"],
        "Increments alone and within a solve, each of a fresh path.",
    )
    steps, repeats = (20, 1) if chosen.quick else (100, 5)
    for batch in tqdm((1,) if chosen.quick else (1, 64), desc="batches"):
        ratio = solves(table, batch, steps, repeats)
        if batch == 1:
            report.goals.append(Goal("reproducible noise, a step at batch 1 against torch.randn", ratio, high=1.3))
    report.save()


if __name__ == "__main__":
    main()

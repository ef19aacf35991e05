"""What the solver itself costs: time of an evaluation beyond the network's own forward and backward pass.

An untrained float32 MLP of 2 and of 64 dimensions, one fixed probe, batches of 1, 64 and 1024; CPU time of one thread,
the best of a few repeats. The floor is one forward pass and one vector-Jacobian product, called bare. `--profile` lists
the Python functions and the tensor operations in which sdekit spends the rest.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import sdekit
from sdekit.model.nets import MLP

from .common import Report, Table, arguments
from .peers import PEERS, fixed_probe
from .timing import least_each

TOLERANCE = 1e-2
MODES: dict[str, sdekit.Hutchinson] = {
    "sdekit, fixed probe": sdekit.Hutchinson(probes=1, fresh=False),
    "sdekit, fresh probe (default above 128 dimensions)": sdekit.Hutchinson(probes=1),
}


def network(dim: int) -> sdekit.ScoreModel:
    """An untrained noise network: three hidden layers, 128 wide in 2 dimensions, 512 in 64."""
    torch.manual_seed(0)
    net = MLP((dim,), 128 if dim == 2 else 512, 3, period=4.0)
    return sdekit.ScoreModel(net, sdekit.VPSDE(), sdekit.noise(sdekit.LogSigmaLabel(0.25)), data_std=1.0).eval()


def bare(model: sdekit.ScoreModel, x: Tensor, probe: Tensor, calls: int) -> int:
    """`calls` forward passes with one vector-Jacobian product each, and nothing else."""
    label = torch.full((x.shape[0],), 0.5, dtype=x.dtype, device=x.device)
    for _ in range(calls):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(model.net(leaf, label), leaf, probe)
    return calls


def solve(model: sdekit.ScoreModel, x: Tensor, divergence: sdekit.Divergence) -> int:
    """One solve by sdekit's default; the number of network calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sdekit.log_likelihood(model, x, divergence=divergence, tolerance=TOLERANCE, throw=False).stats.calls


def measure(table: Table, dims: tuple[int, ...], batches: tuple[int, ...], repeats: int) -> None:
    """The cost of an evaluation of every method, in every size."""
    for dim, batch in tqdm([(dim, batch) for dim in dims for batch in batches], desc="sizes"):
        model = network(dim)
        x = torch.randn(batch, dim, generator=torch.Generator().manual_seed(1))
        probe = fixed_probe(x)
        floor = least_each(lambda: bare(model, x, probe, 20), repeats, x.device)
        methods: dict[str, Callable[[], int]] = {
            name: (lambda d: lambda: solve(model, x, d))(divergence) for name, divergence in MODES.items()
        }
        methods["torchdiffeq dopri5"] = lambda: PEERS["torchdiffeq dopri5"](model, x, probe, 1e-4).calls
        methods["torchode tsit5"] = lambda: PEERS["torchode tsit5"](model, x, probe, 1e-4).calls
        for name, method in methods.items():
            took = least_each(method, repeats, x.device)
            table.rows.append([f"{dim}-D", batch, name, 1e6 * floor, 1e6 * took, took / floor, 1e6 * (took - floor)])


def by_function(model: sdekit.ScoreModel, x: Tensor, count: int) -> list[list[str | float | int]]:
    """The functions of sdekit by their cumulative time, microseconds a network call."""
    profiler = cProfile.Profile()
    profiler.enable()
    calls = solve(model, x, MODES["sdekit, fixed probe"])
    profiler.disable()
    rows: list[list[str | float | int]] = []
    for (file, _, name), (_, times, own, total, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        place = file.replace("\\", "/")
        if "/sdekit/" in place or "run_backward" in name:
            where = place.rsplit("/sdekit/", 1)[-1] if "/sdekit/" in place else "torch"
            rows.append([f"{where}: {name}", times / calls, 1e6 * total / calls, 1e6 * own / calls])
    return sorted(rows, key=lambda row: -float(row[2]))[:count]


def by_operation(model: sdekit.ScoreModel, x: Tensor, count: int) -> list[list[str | float | int]]:
    """The tensor operations by their own time, microseconds a network call."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        calls = solve(model, x, MODES["sdekit, fixed probe"])
    events = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [[event.key, event.count / calls, event.self_cpu_time_total / calls] for event in events[:count]]


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", action="store_true", help="list where sdekit spends its time, batch 1, 2-D")


def main() -> None:
    chosen = arguments(__doc__, _more)
    report = Report("overhead", chosen)
    table = report.table(
        "one evaluation, microseconds",
        ["network", "batch", "method", "bare forward + vjp", "a call", "ratio", "beyond"],
        "Fixed probe for the other packages. Samples that finish early leave the batch of sdekit.",
    )
    measure(
        table, (2,) if chosen.quick else (2, 64), (1, 64) if chosen.quick else (1, 64, 1024), 2 if chosen.quick else 5
    )
    if chosen.profile:
        model, x = network(2), torch.randn(1, 2, generator=torch.Generator().manual_seed(1))
        solve(model, x, MODES["sdekit, fixed probe"])
        functions = report.table(
            "functions, batch 1, under the profiler", ["function", "a call", "us cumulative", "us own"]
        )
        functions.rows += by_function(model, x, 40)
        operations = report.table("tensor operations, batch 1, under the profiler", ["operation", "a call", "us own"])
        operations.rows += by_operation(model, x, 25)
    report.save()


if __name__ == "__main__":
    main()

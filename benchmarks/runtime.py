"""What the solver adds to the network's own time, at every runtime, beside torchdiffeq, torchode and jitted diffrax.

A float32 MLP (64-512x4-64), one fixed probe. Floor: one forward pass with one vector-Jacobian product, called bare (one
forward pass for `sample`); on CUDA that captured in a graph. An evaluation is one that a sample needed: a solver that
keeps stepping finished samples pays for it. On CUDA where there is one, else CPU seconds of one thread.

diffrax runs in a process of its own, by the interpreter named in $BENCH_JAX_PYTHON where jax is not installed here.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import sdekit

from .common import HERE, Goal, Report, Table, arguments
from .overhead import bare
from .peers import PEERS, fixed_probe
from .sampling_overhead import Net
from .timing import best_device, device_name, least_each, paired, runtimes, timed

TOLERANCE = 1e-4  # relative and absolute, of every Runge-Kutta method
NODES = 64
FIXED = {1: 1.15, 64: 1.08, 1024: 1.05}  # wanted, by batch, on one CPU thread
ADAPTIVE = {1: 1.4, 64: 1.2, 1024: 1.1}
IMPORT = 0.3  # seconds
PROBE = sdekit.Hutchinson(probes=1, fresh=False)


def model_on(device: torch.device) -> sdekit.ScoreModel:
    return sdekit.ScoreModel(Net(), sdekit.VPSDE(), sdekit.noise(), data_std=1.0).to(device).eval()


def points(batch: int, device: torch.device) -> Tensor:
    return torch.randn(batch, 64, generator=torch.Generator().manual_seed(1)).to(device)


def likelihood(
    model: sdekit.ScoreModel, x: Tensor, runtime: str, divergence: sdekit.Divergence = PROBE, **options: object
) -> Callable[[], float]:
    """A solve by sdekit; returns the mean evaluations a sample needed."""

    def run() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = sdekit.log_likelihood(model, x, divergence=divergence, throw=False, runtime=runtime, **options)  # type: ignore[arg-type]
        return float(found.stats.evaluations.double().mean())

    return run


def sampling(model: sdekit.ScoreModel, x: Tensor, runtime: str) -> Callable[[], float]:
    """A draw of as many samples by sdekit's default on a fixed grid."""

    def run() -> float:
        return sdekit.sample(model, tuple(x.shape), steps=50, device=x.device, runtime=runtime).stats.calls

    return run


def noisy(model: sdekit.ScoreModel, x: Tensor, runtime: str) -> Callable[[], float]:
    """As many samples of the reverse SDE by adaptive steps; returns the mean evaluations of a sample."""
    sde, term = model.sde, sdekit.ReverseSDE(model)
    solver, control = sdekit.StochasticHeun(), sdekit.PID(3e-2, 3e-2)

    def run() -> float:
        path = sdekit.BrownianMotion(0, torch.arange(len(x), device=x.device), -sde.t_max, -sde.t_min)
        found = sdekit.integrate(term, solver, control, x, sde.t_max, sde.t_min, path, runtime=runtime)  # type: ignore[arg-type]
        return float(found.stats.evaluations.double().mean())

    return run


def forwards(model: sdekit.ScoreModel, x: Tensor, calls: int) -> int:
    """`calls` forward passes and nothing else."""
    label = torch.full((x.shape[0],), 0.5, device=x.device)
    with torch.no_grad():
        for _ in range(calls):
            model.net(x, label)
    return calls


def floor_of(call: Callable[[int], int], device: torch.device) -> Callable[[int], int]:
    """So many times what `call(1)` does, and how many, with as little around it as can be: on CUDA a captured graph."""
    if device.type != "cuda":
        return call
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(aside):
        call(3)
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        call(1)

    def replay(times: int) -> int:
        for _ in range(times):
            graph.replay()
        return times

    return replay


def diffrax_each(model: sdekit.ScoreModel, x: Tensor, probe: Tensor, repeats: int) -> tuple[float, float] | None:
    """Mean evaluations and seconds of each by jitted diffrax, in its own process; None where there is none."""
    python = os.environ.get("BENCH_JAX_PYTHON", sys.executable)
    layers = {
        f"{kind}{number}": part.detach().cpu().numpy()
        for number, layer in enumerate(part for part in model.net.body if isinstance(part, torch.nn.Linear))
        for kind, part in (("w", layer.weight), ("b", layer.bias))
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(path, x=x.cpu().numpy(), probe=probe.cpu().numpy(), **layers)
        command = [python, str(HERE / "runtime_jax.py"), str(path), str(TOLERANCE), str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print("diffrax did not run:", done.stderr.strip().splitlines()[-1:], file=sys.stderr)
        return None
    found = json.loads(done.stdout)
    return found["evaluations"], found["seconds"]


def beside_others(report: Report, device: torch.device, quick: bool) -> None:
    """Part one: the likelihood of one batch, every package at its own adaptive steps."""
    table = report.table(
        f"adaptive likelihood, milliseconds an evaluation needed, {device_name(device)}",
        ["batch", "method", "evaluations", "forward + vjp", "an evaluation", "ratio"],
        f"Runge-Kutta methods at rtol = atol = {TOLERANCE:g}; sdekit's default at 1e-2 nats.",
    )
    model = model_on(device)
    for batch in tqdm((1, 64) if quick else (1, 64, 1024, 4096), desc="beside others"):
        x = points(batch, device)
        probe = fixed_probe(x)
        repeats = 2 if quick or batch > 64 else 5
        asked, calls = floor_of(lambda times: bare(model, x, probe, times), device), 20 if batch < 1024 else 3
        floor = least_each(lambda: asked(calls), repeats, device)
        tight = {"solver": sdekit.Dopri5(), "controller": sdekit.PID(TOLERANCE, TOLERANCE)}
        methods: dict[str, Callable[[], float]] = {}
        for runtime in runtimes(device):
            methods[f"sdekit default, {runtime}"] = likelihood(model, x, runtime)
            methods[f"sdekit Dopri5, {runtime}"] = likelihood(model, x, runtime, **tight)
        for name in ("torchdiffeq dopri5", "torchode tsit5"):
            methods[name] = lambda n=name: PEERS[n](model, x, probe, TOLERANCE).evaluations
        took = {}
        for name, method in methods.items():
            made = method()
            took[name] = min(timed(method, device) for _ in range(1 if batch > 1000 else repeats)) / made
            _row(table, batch, name, made, floor, took[name])
        found = diffrax_each(model, x, probe, repeats)
        if found is not None:
            took["diffrax dopri5, jitted"] = found[1]
            _row(table, batch, "diffrax dopri5, jitted", found[0], floor, found[1])
        ours = took[f"sdekit default, {runtimes(device)[-1]}"]
        best = min(value for name, value in took.items() if not name.startswith("sdekit"))
        report.goals.append(
            Goal(f"batch {batch}: an evaluation / that of the fastest other package", ours / best, high=1)
        )
        if device.type == "cuda" and batch == 64:
            slower = took["torchdiffeq dopri5"] / ours
            report.goals.append(Goal("batch 64: torchdiffeq's evaluation / ours", slower, low=10.0))
        if device.type == "cuda" and batch == 4096:
            report.goals.append(Goal("batch 4096: an evaluation / the captured network", ours / floor, high=1.25))
        report.save(final=False)


def _row(table: Table, batch: int, name: str, evaluations: float, floor: float, took: float) -> None:
    table.rows.append([batch, name, evaluations, 1e3 * floor, 1e3 * took, took / floor])


def overheads(report: Report, device: torch.device, quick: bool) -> None:
    """Part two: fixed and adaptive solves over evaluations x the bare network."""
    table = report.table(
        f"time over evaluations x the bare network, {device_name(device)}",
        ["batch", "solve", "bare, us", "an evaluation, us", "ratio"],
    )
    model = model_on(device)
    for batch in tqdm((1, 64) if quick else tuple(FIXED), desc="overhead"):
        x = points(batch, device)
        probe, repeats = fixed_probe(x), 2 if quick or batch > 64 else 12
        asked, calls = floor_of(lambda times: bare(model, x, probe, times), device), 20 if batch < 1024 else 5
        once = floor_of(lambda times: forwards(model, x, times), device)
        floors = {"vjp": lambda: asked(calls), "forward": lambda: once(50)}
        cases: list[tuple[str, str, Callable[[], float], float | None]] = []
        for runtime in runtimes(device):
            fresh = sdekit.Hutchinson(probes=1)
            cases += [
                (
                    f"nodes={NODES}, fixed probe, {runtime}",
                    "vjp",
                    likelihood(model, x, runtime, nodes=NODES),
                    FIXED[batch],
                ),
                (
                    f"nodes={NODES}, fresh probe, {runtime}",
                    "vjp",
                    likelihood(model, x, runtime, fresh, nodes=NODES),
                    FIXED[batch],
                ),
                (f"sample, 50 steps, {runtime}", "forward", sampling(model, x, runtime), FIXED[batch]),
                (f"adaptive, fixed probe, {runtime}", "vjp", likelihood(model, x, runtime), ADAPTIVE[batch]),
                (f"adaptive reverse SDE, {runtime}", "forward", noisy(model, x, runtime), None),
            ]
        for name, kind, case, wanted in cases:
            floor, took, ratio = paired(case, floors[kind], repeats, device)
            table.rows.append([batch, name, 1e6 * floor, 1e6 * took, ratio])
            if wanted and name.endswith("eager" if kind == "forward" else runtimes(device)[-1]):
                report.goals.append(Goal(f"batch {batch}: {name}", ratio, high=wanted))
        report.save(final=False)


def import_seconds(module: str, repeats: int) -> float:
    """Median wall seconds of a fresh interpreter that imports it."""
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def imports(report: Report, quick: bool) -> None:
    """Part three."""
    table = report.table("import, wall seconds of a fresh interpreter", ["module", "seconds, median of 5"])
    found = {module: import_seconds(module, 2 if quick else 5) for module in ("sys", "torch", "sdekit")}
    table.rows += [[module, took] for module, took in found.items()]
    report.goals.append(Goal("import sdekit beyond import torch, s", found["sdekit"] - found["torch"], high=IMPORT))


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("runtime", chosen)
    device = best_device()
    imports(report, chosen.quick)
    with sdekit.keep_graphs():  # the network stays as it is
        overheads(report, device, chosen.quick)
        beside_others(report, device, chosen.quick)
    report.save()


if __name__ == "__main__":
    main()

"""Gradients of log p by x and by the weights: error, network calls, CPU time and memory, beside torchdiffeq.

    sdekit               log_prob: a checkpointed discrete adjoint on a fixed grid
    sdekit, all kept     the same number with torch's own backward pass through the whole solve
    odeint_adjoint       torchdiffeq's dopri5 on (x, log det) in t, and its second ODE solve backwards
    odeint, all kept     torchdiffeq's dopri5 with torch's own backward pass through it

All see the same network call and the same trace: exact in two dimensions, one fixed probe on the digits. Errors are
against a Runge-Kutta solution of order 8 in float64, whose own error, by twice its steps, is printed. Each run is a
forked process: its memory is the peak resident size above that before the solve.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torchdiffeq
from torch import Tensor, nn
from tqdm import tqdm

import sdekit
from sdekit.gradient import log_prob
from sdekit.likelihood_flow import LikelihoodFlow
from sdekit.solver.adams import Adams

from .common import Goal, Report, arguments
from .peers import fixed_probe
from .problems import digits, learned, ring

NODES = (64, 128, 256)
TOLERANCES = (1e-4, 1e-5)
FLAT = 1.1  # peak memory at 256 nodes over that at 64


class Counted(nn.Module):
    """A network that counts its calls."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x, label)


class Problem(NamedTuple):
    """A model with counted calls, data, and the trace."""

    name: str
    model: sdekit.ScoreModel
    x: Tensor
    divergence: sdekit.Divergence

    def to(self, dtype: torch.dtype) -> Problem:
        return self._replace(model=self.model.to(dtype), x=self.x.to(dtype))


class Run(NamedTuple):
    """log p, its sum's derivatives by x and by all weights (flat), calls, CPU seconds, peak memory in MB."""

    value: Tensor
    by_x: Tensor
    by_weights: Tensor
    calls: int
    seconds: float
    memory: float


class Augmented(nn.Module):
    """(x, log det) in t, with the trace that the problem asks for, for torchdiffeq."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model, self.flow = problem.model, sdekit.ProbabilityFlow(problem.model)
        exact = isinstance(problem.divergence, sdekit.Exact)
        self.probe = None if exact else fixed_probe(problem.x).reshape(problem.x.shape)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        graph = torch.is_grad_enabled()
        leaf = state[0] if graph else state[0].detach().requires_grad_()
        with torch.enable_grad():
            rate = self.flow(t, leaf)
            if self.probe is None:
                rows = torch.eye(rate.shape[1], dtype=rate.dtype)[:, None, :].expand(-1, *rate.shape)
                made = torch.autograd.grad(rate, leaf, rows, is_grads_batched=True, create_graph=graph)[0]
                trace = torch.einsum("ibi->b", made)
            else:
                made = torch.autograd.grad(rate, leaf, self.probe, create_graph=graph)[0]
                trace = (made * self.probe).flatten(1).sum(1)
        return (rate, trace) if graph else (rate.detach(), trace)


def ours(problem: Problem, x: Tensor, nodes: int) -> Tensor:
    return log_prob(problem.model, x, nodes=nodes, divergence=problem.divergence)


def kept(problem: Problem, x: Tensor, nodes: int) -> Tensor:
    """The solve of `ours` written out, for torch to keep all of it."""
    model, solver = problem.model, Adams(4)
    keys = sdekit.Hutchinson.keys(0, torch.arange(len(x)))
    term = LikelihoodFlow(model, problem.divergence, x.shape[1:], keys)
    times = sdekit.grid.likelihood(model.sde, nodes - 1, model.data_std).flip(0)
    s = term.coordinate(times)[:, None].expand(-1, len(x))
    z, step = term.enter(x, s[0]), 0
    memory = solver.init(term, z)
    while step < nodes - 1:
        ready = solver.ready(memory)
        proposal = solver.propose(term, s[step], s[step + 1], z, memory, None)
        z, memory, step = proposal.z, proposal.memory, step + int(bool(ready.all()))
    scales = term.log_scale(times[-1:]) - term.log_scale(times[:1])
    latent = term.leave(z, s[-1])
    return model.sde.prior_log_prob(latent) + z.log_det.mean(1) + x[0].numel() * scales


def theirs(solve: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Problem, Tensor, float], Tensor]:
    def function(problem: Problem, x: Tensor, tolerance: float) -> Tensor:
        sde = problem.model.sde
        ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
        options = {"rtol": tolerance, "atol": tolerance, "method": "dopri5"}
        latent, gained = solve(Augmented(problem), (x, x.new_zeros(len(x))), ends, **options)
        return sde.prior_log_prob(latent[-1]) + gained[-1].double()

    return function


def reference(problem: Problem, nodes: int) -> Run:
    exact = problem.to(torch.float64)
    return differentiated(
        exact,
        lambda p, x, n: log_prob(p.model, x, nodes=n, solver=sdekit.Dopri8(), divergence=p.divergence),
        nodes,
    )


def _resident(name: str) -> float:
    """VmRSS or VmHWM of this process in MB; NaN where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024.0
    except OSError:
        pass
    return float("nan")


def differentiated(problem: Problem, function: Callable[..., Tensor], setting: float) -> Run:
    """One run in this process."""
    net, weights = problem.model.net, list(problem.model.parameters())
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    net.calls, began, before = 0, time.process_time(), _resident("VmRSS")
    leaf = problem.x.clone().requires_grad_()
    value = function(problem, leaf, setting)
    by_x, *by_weights = torch.autograd.grad(value.sum(), [leaf, *weights], materialize_grads=True)
    seconds, memory = time.process_time() - began, _resident("VmHWM") - before
    return Run(value.detach(), by_x, torch.cat([g.flatten() for g in by_weights]), net.calls, seconds, memory)


def apart(problem: Problem, function: Callable[..., Tensor], setting: float) -> Run:
    """One run in a process of its own, forked."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        differentiated(problem._replace(x=problem.x[:1]), ours, 2)  # what a first call alone needs is not the method's
        run = differentiated(problem, function, setting)
        send.send([part.numpy() if isinstance(part, Tensor) else part for part in run])

    child = context.Process(target=work)
    child.start()
    found = receive.recv()
    child.join()
    return Run(*(torch.from_numpy(part) if hasattr(part, "shape") else part for part in found))


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


METHODS: dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "sdekit": (ours, NODES),
    "sdekit, all kept": (kept, NODES[:1]),
    "odeint_adjoint": (theirs(torchdiffeq.odeint_adjoint), TOLERANCES),
    "odeint, all kept": (theirs(torchdiffeq.odeint), TOLERANCES),
}


def measure(report: Report, problem: Problem, nodes: int, quick: bool) -> dict[tuple[str, float], tuple[Run, float]]:
    """Every method's runs on one problem, with the relative error by the weights."""
    truth, half = reference(problem, nodes), reference(problem, nodes // 2 + 1)
    own = relative(half.by_weights, truth.by_weights)
    dtype = torch.float32 if problem.name.startswith("digits") else torch.float64
    problem = problem.to(dtype)
    table = report.table(
        problem.name,
        ["method", "nodes or tolerance", "log p, worst", "d/dx", "d/dweights", "calls", "CPU s", "memory, MB"],
        f"{len(problem.x)} samples, {str(dtype).removeprefix('torch.')}. Largest error of log p in nats; relative "
        f"errors of the gradients in the 2-norm. The reference's own, by its weights: at most {own:.1e}.",
    )
    found = {}
    settings = [(name, setting) for name, (_, every) in METHODS.items() for setting in every[: 1 if quick else None]]
    for name, setting in tqdm(settings, desc=problem.name):
        run = apart(problem, METHODS[name][0], setting)
        error = relative(run.by_weights, truth.by_weights)
        found[name, setting] = (run, error)
        off = float((run.value - truth.value).abs().max())
        by_x = relative(run.by_x, truth.by_x)
        table.rows.append([name, setting, off, by_x, error, run.calls, run.seconds, run.memory])
    return found


def goals(report: Report, name: str, found: dict[tuple[str, float], tuple[Run, float]]) -> None:
    peer, bound = found["odeint_adjoint", TOLERANCES[-1]]
    plain = found["odeint, all kept", TOLERANCES[-1]][0]
    rows = {nodes: found["sdekit", nodes] for nodes in NODES}
    as_good = [run for run, error in rows.values() if error <= bound]
    seconds = min((run.seconds for run in as_good), default=float("inf"))
    fast = min(as_good, key=lambda run: run.seconds, default=None)
    same = relative(rows[NODES[0]][0].by_weights, found["sdekit, all kept", NODES[0]][0].by_weights.double())
    report.goals += [
        Goal(f"{name}: CPU time at no more error than odeint_adjoint 1e-5, of its", seconds / peer.seconds, high=0.5),
        Goal(f"{name}: calls there, of its", fast.calls / peer.calls if fast is not None else float("inf"), high=0.5),
        Goal(f"{name}: memory at 256 nodes, of that at 64", rows[256][0].memory / rows[64][0].memory, high=FLAT),
        Goal(f"{name}: memory at 256 nodes, of odeint's with all kept", rows[256][0].memory / plain.memory, high=0.5),
        Goal(f"{name}: gradient apart from that with all kept", same, high=1e-10 if "2-D" in name else 1e-4),
    ]


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("gradients", chosen)
    flat = learned("noise", chosen.seed, chosen.quick)
    x = ring().target().sample(8 if chosen.quick else 256, generator=torch.Generator().manual_seed(chosen.seed))
    images = digits(2 if chosen.quick else 128, chosen.seed)
    fixed = sdekit.Hutchinson(fresh=False)
    problems = [
        Problem("2-D net, exact trace", flat, x, sdekit.Exact()),
        Problem("digits network, one fixed probe", images.model, images.x, fixed),
    ]
    for problem in problems:
        model = problem.model
        counted = sdekit.ScoreModel(Counted(model.net), model.sde, model.parameterization, model.data_std).eval()
        found = measure(report, problem._replace(model=counted), 17 if chosen.quick else 49, chosen.quick)
        if not chosen.quick:
            goals(report, problem.name.split(",")[0], found)
        report.save(final=False)
    report.save()


if __name__ == "__main__":
    main()

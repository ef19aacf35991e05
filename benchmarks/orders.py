"""Does every solver have the order it claims? One table of observed orders, with their standard errors.

Grids go from half_log_snr -3 to 2.5 in uneven steps (1.2 : 0.6 : 1.2 times the mean) and are doubled. Slopes are taken
over the finest three. *mixture* and *Gaussian*: the flow's end against a fine Dopri8 solve and against the exact flow.
*weak*: the law of the end given the start against the reverse SDE's own, on a Gaussian, with no Monte Carlo. *strong*:
mean distance from a fine solve on the same paths, on the mixture. To put another solver to the test, add a line to
METHODS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit
from sdekit.accuracy import (
    Order,
    Reference,
    deterministic_order,
    half_log_snr_grids,
    reference_endpoint,
    strong_order,
    weak_order,
)
from sdekit.targets import Gaussian, GaussianMixture

from .common import Cell, Goal, Report, arguments

Equation = Callable[[sdekit.ScoreModel, Tensor], sdekit.Term]


def flow(model: sdekit.ScoreModel, x: Tensor) -> sdekit.Term:
    """The probability flow in t."""
    return sdekit.ProbabilityFlow(model)


def mixed(model: sdekit.ScoreModel, x: Tensor) -> sdekit.Term:
    """The probability flow in the mixed variable."""
    keys = sdekit.Hutchinson.keys(0, torch.arange(x.shape[0]))
    return sdekit.LikelihoodFlow(model, None, x.shape[1:], keys)


def reverse(eta: float) -> Equation:
    """The reverse SDE of noise level `eta`."""
    return lambda model, x: sdekit.ReverseSDE(model, eta)


def rising(model: sdekit.ScoreModel, x: Tensor) -> sdekit.Term:
    """The reverse SDE of a noise level of time, from 0.2 to 1 as the noise falls."""
    return sdekit.ReverseSDE(model, lambda t: 0.6 + 0.4 * torch.tanh(0.7 * model.sde.half_log_snr(t)))


class Method(NamedTuple):
    """A solver, the equation it is tested on, what it claims (None: nothing, so not tested), and the grids for it.

    High orders want coarse grids: on fine ones their errors are rounding. `transition` is False for a solver that adds
    noise of its own, of which the law at the end can be tested only.
    """

    name: str
    solver: sdekit.Solver
    equation: Equation
    order: float | None = None
    weak: float | None = None
    strong: float | None = None
    counts: Sequence[int] = (24, 48, 96, 192)
    transition: bool = True


MANY = (48, 96, 192)
FINE = (192, 384, 768)
UNIPC = {1: (48, 96, 192), 2: (48, 96, 192), 3: FINE}
DEIS_COUNTS = {2: (48, 96, 192), 3: (384, 768, 1536), 4: (96, 192, 384)}
COARSE = {2: (24, 48, 96, 192), 3: (48, 96, 192, 384), 4: (48, 96, 192, 384)}
SRA = {1: sdekit.SRA1(), 2: sdekit.SRA2(), 3: sdekit.SRA3()}
METHODS = (
    Method("Euler", sdekit.Euler(), flow, 1, counts=(48, 96, 192, 384)),
    Method("Heun", sdekit.Heun(), flow, 2),
    Method("Midpoint", sdekit.Midpoint(), flow, 2),
    Method("BogackiShampine", sdekit.BogackiShampine(), flow, 3),
    Method("RK4", sdekit.RK4(), flow, 4),
    Method("Dopri5", sdekit.Dopri5(), flow, 5, counts=(36, 72, 144)),
    # In t, Tsit5's error changes sign between such grids on the Karras process, and rounding comes before the order.
    Method("Tsit5, mixed variable", sdekit.Tsit5(), mixed, 5, counts=(24, 48, 96)),
    Method("Dopri8", sdekit.Dopri8(), flow, 8, counts=(9, 18, 36)),
    Method("Heun, mixed variable", sdekit.Heun(), mixed, 2),
    *(Method(f"Adams({p}), mixed variable", sdekit.Adams(p), mixed, p) for p in (2, 3)),
    Method("Adams(4, inside), mixed variable", sdekit.Adams(4, "inside"), mixed, 4),
    Method("Adams(5, inside), mixed variable", sdekit.Adams(5, "inside"), mixed, 5, counts=(96, 192, 384)),
    Method("DDIM", sdekit.DDIM(), flow, 1, counts=(48, 96, 192, 384)),
    *(Method(f"DPMSolver({p})", sdekit.DPMSolver(p), flow, p) for p in (1, 2, 3)),
    *(Method(f"DPMSolverPP({p}), multistep", sdekit.DPMSolverPP(p), flow, p) for p in (1, 2, 3)),
    *(Method(f"DPMSolverPP({p}), single-step", sdekit.DPMSolverPP(p, multistep=False), flow, p) for p in (2, 3)),
    Method("DPMSolverPP(2), as published", sdekit.DPMSolverPP(2, compat=True), flow, 2),
    Method("DPMSolverPP(3), as published", sdekit.DPMSolverPP(3, compat=True), flow, 2),
    # In t, which on VE is half_log_snr, the third order's leading errors cancel on coarse grids of the Gaussian.
    *(Method(f"DEIS({p}) in t", sdekit.DEIS(p), flow, p, counts=DEIS_COUNTS[p]) for p in (2, 3, 4)),
    *(Method(f"DEIS({p}) in rho", sdekit.DEIS(p, "rho"), flow, p, counts=COARSE[p]) for p in (2, 3, 4)),
    *(Method(f"UniPC({p}), bh1", sdekit.UniPC(p, "bh1"), flow, p + 1, counts=UNIPC[p]) for p in (1, 2, 3)),
    *(Method(f"UniPC({p}), bh2", sdekit.UniPC(p, "bh2"), flow, p + 1, counts=UNIPC[p]) for p in (1, 2, 3)),
    *(Method(f"UniPC({p}), noise", sdekit.UniPC(p, "bh2", "noise"), flow, p + 1, counts=UNIPC[p]) for p in (1, 2, 3)),
    Method("SASolver(3, 3), eta 0", sdekit.SASolver(3, 3), flow, 4, counts=FINE),
    *(
        Method(f"EulerMaruyama, eta {eta:g}", sdekit.EulerMaruyama(), reverse(eta), None, 1, 1, MANY)
        for eta in (0.5, 1.0)
    ),
    Method("Ancestral, small", sdekit.Ancestral("small"), reverse(1.0), None, 1, 1, MANY),
    Method("Ancestral, large", sdekit.Ancestral("large"), reverse(1.0), None, 1, 1, MANY),
    *(
        Method(f"ReverseDiffusion, eta {eta:g}", sdekit.ReverseDiffusion(), reverse(eta), None, 1, 1, MANY)
        for eta in (0.5, 1.0)
    ),
    *(Method(f"DDIM({eta:g})", sdekit.DDIM(eta), reverse(eta), None, 1, 1, MANY) for eta in (0.5, 1.0)),
    *(
        Method(f"SDEDPMSolver, eta {eta:g}", sdekit.SDEDPMSolver(), reverse(eta), None, 1, 1, MANY)
        for eta in (0.5, 1.0)
    ),
    *(
        Method(f"SDEDPMSolverPP(1), eta {eta:g}", sdekit.SDEDPMSolverPP(1), reverse(eta), None, 1, 1, MANY)
        for eta in (0.5, 1.0)
    ),
    *(
        Method(f"SDEDPMSolverPP(2), eta {eta:g}", sdekit.SDEDPMSolverPP(2), reverse(eta), None, 2, 1)
        for eta in (0.5, 1.0)
    ),
    Method("SDEDPMSolverPP(2), as published", sdekit.SDEDPMSolverPP(2, compat=True), reverse(1.0), None, 2, 1),
    Method("SEEDS(1)", sdekit.SEEDS(1), reverse(1.0), None, 1, 1, MANY),
    Method("SEEDS(2)", sdekit.SEEDS(2), reverse(1.0), None, 2, 1),
    *(Method(f"SASolver(2, 2), eta {eta:g}", sdekit.SASolver(2, 2), reverse(eta), None, 2, 1) for eta in (0.5, 1.0)),
    Method("SASolver(3, 3), eta 1", sdekit.SASolver(3, 3), reverse(1.0), None, 2, 1),
    *(Method(f"StochasticHeun, eta {eta:g}", sdekit.StochasticHeun(), reverse(eta), None, 2, 1) for eta in (0.5, 1.0)),
    *(
        Method(f"SRA{n}, eta {eta:g}", solver, reverse(eta), None, 2, 1.5)
        for n, solver in SRA.items()
        for eta in (0.5, 1.0)
    ),
    Method("EulerMaruyama, eta(t)", sdekit.EulerMaruyama(), rising, None, 1, 1, MANY),
    Method("ReverseDiffusion, eta(t)", sdekit.ReverseDiffusion(), rising, None, 1, 1, MANY),
    Method("SDEDPMSolver, eta(t)", sdekit.SDEDPMSolver(), rising, None, 1, 1, MANY),
    Method("SDEDPMSolverPP(2), eta(t)", sdekit.SDEDPMSolverPP(2), rising, None, 2, 1),
    Method("SASolver(2, 2), eta(t)", sdekit.SASolver(2, 2), rising, None, 2, 1),
    Method("SASolver(3, 3), eta(t)", sdekit.SASolver(3, 3), rising, None, 2, 1),
    Method("StochasticHeun, eta(t)", sdekit.StochasticHeun(), rising, None, 2, 1),
    *(Method(f"SRA{n}, eta(t)", solver, rising, None, 2, 1.5) for n, solver in SRA.items()),
    Method("EDMChurn(1)", sdekit.EDMChurn(1.0), flow, None, 2, None, transition=False),
)

# Of the strong orders: a method, and how many of its steps go into the finest of STRONG_COUNTS.
STRONG_REFERENCE, STRONG_FINER = sdekit.SRA3(), 8
STRONG_COUNTS = (18, 36, 72)
FLOW_REFERENCE, FLOW_STEPS = sdekit.Dopri8(), 256

SDES: dict[str, sdekit.SDE] = {
    "VP": sdekit.VPSDE(),
    "sub-VP": sdekit.SubVPSDE(),
    "VE": sdekit.VESDE(),
    "Karras": sdekit.KarrasSDE(),
}
MEASURES = ("mixture", "Gaussian", "weak", "strong")


class Problem(NamedTuple):
    """One SDE's problems: a Gaussian and a mixture, their exact models, where samples start, and the flow's ends."""

    sde: sdekit.SDE
    gaussian: Gaussian
    mixture: GaussianMixture
    gaussian_start: Tensor
    mixture_start: Tensor
    gaussian_end: Tensor
    mixture_end: Reference


def targets_of(seed: int) -> tuple[Gaussian, GaussianMixture]:
    """A Gaussian of 16 independent axes, and a mixture in 2 dimensions that is smooth enough for an order to show."""
    source = torch.Generator().manual_seed(seed)
    mean = torch.randn(16, generator=source, dtype=torch.float64)
    variance = torch.exp(2.0 * torch.rand(16, generator=source, dtype=torch.float64) - 2.0)
    centers = 0.8 * torch.randn(3, 2, generator=source, dtype=torch.float64)
    stds = 0.4 + 0.3 * torch.rand(3, generator=source, dtype=torch.float64)
    weights = 0.3 + torch.rand(3, generator=source, dtype=torch.float64)
    return Gaussian(mean, variance), GaussianMixture(weights, centers, stds)


def grids_of(sde: sdekit.SDE, counts: Sequence[int]) -> list[Tensor]:
    return half_log_snr_grids(sde, counts)


def problem(sde: sdekit.SDE, seed: int, samples: int) -> Problem:
    """The problems of one SDE, solved as exactly as need be."""
    gaussian, mixture = targets_of(seed)
    source = torch.Generator().manual_seed(1000 + seed)
    (grid,) = grids_of(sde, (FLOW_STEPS,))
    first, last = float(grid[0]), float(grid[-1])
    starts = []
    for target in (gaussian, mixture):
        x0 = target.sample(samples, generator=source)
        starts.append(sde.perturb(x0, first, torch.randn(x0.shape, generator=source, dtype=torch.float64)))
    end = reference_endpoint(FLOW_REFERENCE, flow(mixture.score_model(sde), starts[1]), starts[1], grid)
    return Problem(sde, gaussian, mixture, *starts, gaussian.flow_map(sde, starts[0], first, last), end)


def observed(method: Method, measure: str, on: Problem, seed: int, quick: bool) -> Order | None:
    """The order of a method by one measure; None where it claims none."""
    grids = grids_of(on.sde, method.counts[-3:] if not quick else method.counts[:3])
    gaussian, mixture = (target.score_model(on.sde) for target in (on.gaussian, on.mixture))
    if measure == "mixture" and method.order is not None:
        x = on.mixture_start
        term = method.equation(mixture, x)
        return deterministic_order(method.solver, term, x, on.mixture_end, grids, claimed=method.order)
    if measure == "Gaussian" and method.order is not None:
        x = on.gaussian_start
        term = method.equation(gaussian, x)
        return deterministic_order(method.solver, term, x, on.gaussian_end, grids, claimed=method.order)
    if measure == "weak" and method.weak is not None:
        term = method.equation(gaussian, on.gaussian_start)
        return weak_order(method.solver, term, on.gaussian, grids, transition=method.transition, claimed=method.weak)
    if measure == "strong" and method.strong is not None:
        counts = STRONG_COUNTS if not quick else tuple(n // 2 for n in STRONG_COUNTS)
        *coarse, finest = grids_of(on.sde, (*counts, STRONG_FINER * counts[-1]))
        x = on.mixture_start
        return strong_order(
            *(method.solver, method.equation(mixture, x), x, coarse),
            reference=STRONG_REFERENCE,
            finest=finest,
            claimed=method.strong,
            seed=seed,
        )
    return None


def cell(found: Order) -> str:
    """An order as it stands in the table; one that is not proven is marked."""
    return f"{found.estimate:.2f} ± {found.std_error:.2f}" + ("" if found.proven else " !")


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("orders", chosen)
    names = ("VP", "Karras") if chosen.quick else tuple(SDES)
    problems = {
        name: problem(SDES[name], chosen.seed, 32 if chosen.quick else 384) for name in tqdm(names, desc="references")
    }
    table = report.table(
        "observed orders",
        ["method", "measure", "claimed", *names, "least lower bound", "proven"],
        "Estimate ± standard error over samples (weak: over the Gaussian's axes); the lower bound is of 95% "
        "confidence, the least over the SDEs. Proven: on every SDE the lower bound lies above the claim less 0.2, the "
        "slope between any two grids above it less 0.5, and the reference is good enough to say so. `!` marks what is "
        "not proven.",
    )
    missing = dict.fromkeys(MEASURES, 0)
    for method in tqdm(METHODS, desc="methods"):
        for measure in MEASURES:
            orders = [observed(method, measure, on, chosen.seed, chosen.quick) for on in problems.values()]
            found = [order for order in orders if order is not None]
            if not found:
                continue
            missing[measure] += sum(not order.proven for order in found)
            least = min(order.lower() for order in found)
            row: list[Cell] = [method.name, measure, found[0].claimed, *map(cell, found), least]
            table.rows.append([*row, "yes" if all(order.proven for order in found) else "**no**"])
        report.save(final=False)
    for measure, count in missing.items():
        report.goals.append(Goal(f"{measure}: orders claimed and not proven", count, high=0))
    report.save()


if __name__ == "__main__":
    main()

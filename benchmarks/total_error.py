"""The whole error of log p: against log p_0 itself, beside other packages; and what becomes of it without smoothness.

Exact scores, float64. A number called log p differs from log p_0 by the solver's error and by three more:

    solver   against the exact log p_{t_min}, the terminal law exact too: only the integration
    total    against the exact log p_0: besides, the SDE's prior for the law at t_max, t_min for 0, and probes

The problems are smooth: P1 a ring in 2-D, P2 a mixture in 16-D, P3 a Gaussian in 64-D with eigenvalues 1e-3 to 1. What
becomes of these numbers where data or networks are not smooth is in the second half of the report (smoothness.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit
from sdekit.targets import Gaussian, GaussianMixture

from .common import Goal, Report, arguments, quantile
from .flow_peers import OWN, own_likelihood
from .peers import PEERS, Run
from .problems import SDES, Mixture, ring
from .smoothness import EXPENSIVE, bias_orders, check_laws, kinked_network, quiet, rough_data, rough_ends, unwarned

TOLERANCE = 1e-3  # of sdekit's rows, nats
DRAWS = 10_000  # to which moments are fitted


class Problem(NamedTuple):
    """A target under an SDE, its points, and the Gaussians of the exact and of fitted moments."""

    name: str
    target: Gaussian | GaussianMixture
    model: sdekit.ScoreModel
    x: Tensor
    exact: Gaussian
    fitted: Gaussian


def targets(seed: int) -> dict[str, tuple[Gaussian | GaussianMixture, Gaussian]]:
    """The three smooth targets with the Gaussians of their moments."""
    source = torch.Generator().manual_seed(1_000_003 * seed + 11)
    means = torch.randn(5, 16, generator=source, dtype=torch.float64)
    stds = 0.05 + 0.95 * torch.rand(5, 16, generator=source, dtype=torch.float64)
    weights = 0.2 + torch.rand(5, generator=source, dtype=torch.float64)
    mixture = Mixture(weights / weights.sum(), means, torch.diag_embed(stds.square()))
    turn = torch.linalg.qr(torch.randn(64, 64, generator=source, dtype=torch.float64)).Q
    spread = turn @ torch.logspace(-3.0, 0.0, 64, dtype=torch.float64).diag() @ turn.mT
    gaussian = Gaussian(torch.zeros(64, dtype=torch.float64), 0.5 * (spread + spread.mT))
    return {
        "P1": (ring().target(), ring().moments()),
        "P2": (mixture.target(), mixture.moments()),
        "P3": (gaussian, gaussian),
    }


def problems(seed: int, quick: bool) -> list[Problem]:
    """Each target under VP and VE, the same points for both."""
    made = []
    for sde_name, sde in SDES.items():
        for name, (target, moments) in targets(seed).items():
            if quick and name == "P3":
                continue
            generator = torch.Generator().manual_seed(31 * seed + 7)
            x = target.sample(8 if quick else 64, generator=generator)
            fitted = Gaussian.fit(target.sample(DRAWS, generator=generator))
            made.append(Problem(f"{name} {sde_name}", target, target.score_model(sde), x, moments, fitted))
    return made


def run_of(found: sdekit.LogLikelihood) -> Run:
    """sdekit's result as that of a peer."""
    return Run(found.log_prob, found.stats.calls, float(found.stats.evaluations.double().mean()), 0.0, found.latent)


ONE_PROBE = "sdekit, one fresh probe"
CORRECTED = {"exact": "sdekit, corrected", "fitted": f"sdekit, corrected, moments of {DRAWS:,} draws"}


def methods() -> dict[str, Callable[[Problem], Run | None]]:
    """Every row of the table, by name."""
    exact = sdekit.Exact()

    def ours(divergence: sdekit.Divergence) -> Callable[[Problem], Run]:
        return lambda p: run_of(quiet(p.model, p.x, TOLERANCE, divergence=divergence))

    def corrected(kind: str) -> Callable[[Problem], Run]:
        return lambda p: run_of(
            quiet(p.model, p.x, TOLERANCE, divergence=exact, end="extrapolate", data_moments=getattr(p, kind))._replace(
                latent=None
            )
        )

    def peer(name: str, tolerance: float) -> Callable[[Problem], Run]:
        return lambda p: PEERS[name](p.model, p.x, None, tolerance)

    def own(name: str) -> Callable[[Problem], Run | None]:
        return lambda p: own_likelihood(name, p.model, p.x)

    rows: dict[str, Callable[[Problem], Run | None]] = {"sdekit": ours(exact)}
    rows |= {CORRECTED[kind]: corrected(kind) for kind in CORRECTED}
    rows[ONE_PROBE] = ours(sdekit.Hutchinson(probes=1))
    rows |= {f"torchdiffeq dopri5 {tol:.0e}": peer("torchdiffeq dopri5", tol) for tol in (1e-3, 1e-5, 1e-7)}
    rows |= {f"{name} 1e-05": peer(name, 1e-5) for name in ("scipy RK45", "torchode tsit5")}
    return rows | {name: own(name) for name in OWN}


def both_errors(problem: Problem, run: Run) -> tuple[Tensor | None, Tensor]:
    """(B,) solver error, None where it cannot be told apart, and total error, nats."""
    sde, target = problem.model.sde, problem.target
    total = (run.log_prob - target.log_prob(problem.x)).abs()
    if run.latent is None:
        return None, total
    start = target.marginal_log_prob(sde, problem.x, sde.t_min)
    end = target.marginal_log_prob(sde, run.latent, sde.t_max)
    return (run.log_prob - sde.prior_log_prob(run.latent) + end - start).abs(), total


def beside_peers(report: Report, seed: int, quick: bool) -> None:
    """Solver and total error of every method on every problem."""
    note = (
        f"Nats. sdekit's rows at tolerance {TOLERANCE:g}; corrected: end='extrapolate' and data_moments, exact or "
        "fitted. Every trace exact but where a probe is named. Evaluations: the mean over samples; for the others "
        "(torchode apart) the calls. score_sde runs its network twice for each of scipy's. The noise of a probe stands "
        "under both errors."
    )
    columns = ["problem", "method", "solver: mean", "max", "total: mean", "max", "evaluations"]
    table = report.table("total error", columns, note)
    every, rows, worst = problems(seed, quick), methods(), dict.fromkeys(CORRECTED.values(), 0.0)
    for problem in tqdm(every, desc="problems"):
        for name, method in rows.items():
            run = method(problem)
            if run is None:
                table.rows.append([problem.name, name, "not installed", *["-"] * 4])
                continue
            solver, total = both_errors(problem, run)
            told = (math.nan, math.nan) if solver is None else (float(solver.mean()), quantile(solver, 1.0))
            mean = float(total.mean())
            table.rows.append([problem.name, name, *told, mean, quantile(total, 1.0), run.evaluations])
            if name in worst:
                worst[name] = max(worst[name], mean if math.isfinite(mean) else math.inf)
        report.save(final=False)
    report.goals += [
        Goal(f"{name}: largest mean total error of a problem, nats", value, high=1e-3) for name, value in worst.items()
    ]


def end_errors(report: Report, seed: int, quick: bool) -> None:
    """What t_min for 0, and each terminal law, are off by on their own: closed forms, no solve."""
    sizes = [DRAWS, DRAWS if quick else 10 * DRAWS]
    columns = ["problem", "sigma/alpha at t_min", "t_min: mean", "max", "prior: mean", "max"]
    columns += ["moments: mean", *(f"of {count:,} draws: mean" for count in sizes)]
    note = (
        "log p_{t_min} against log p_0; then at t_max the prior, and the data's moments, exact or fitted, against p_T."
    )
    table = report.table("the two ends on their own, closed forms", columns, note)
    for problem in problems(seed, quick):
        sde, target = problem.model.sde, problem.target
        first = (target.marginal_log_prob(sde, problem.x, sde.t_min) - target.log_prob(problem.x)).abs()
        source = torch.Generator().manual_seed(seed)
        noise = torch.randn(problem.x.shape, generator=source, dtype=torch.float64)
        late = sde.perturb(problem.x, torch.full((len(noise),), sde.t_max, dtype=torch.float64), noise)
        truth = target.marginal_log_prob(sde, late, sde.t_max)
        last = (sde.prior_log_prob(late) - truth).abs()
        more = Gaussian.fit(target.sample(sizes[1], generator=source))
        laws = [problem.exact, problem.fitted, more]
        matched = [float((law.marginal_log_prob(sde, late, sde.t_max) - truth).abs().mean()) for law in laws]
        size = math.exp(-float(sde.half_log_snr(sde.t_min)))
        facts = [float(first.mean()), float(first.max()), float(last.mean()), float(last.max())]
        table.rows.append([problem.name, size, *facts, *matched])


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("total_error", chosen)
    check_laws(report)
    beside_peers(report, chosen.seed, chosen.quick)
    end_errors(report, chosen.seed, chosen.quick)
    heard = rough_data(report, chosen.seed, chosen.quick)
    rough_ends(report, chosen.seed, chosen.quick)
    bias_orders(report)
    heard += kinked_network(report, chosen.seed, chosen.quick)
    silent = [unwarned(part.found) for part in heard]
    report.goals += [
        Goal("rough data and ReLU: capped samples that are not marked", sum(part[0] for part in silent), high=0.0),
        Goal(
            "rough data and ReLU: evaluations of a sample not marked", max(part[1] for part in silent), high=EXPENSIVE
        ),
    ]
    report.save()


if __name__ == "__main__":
    main()

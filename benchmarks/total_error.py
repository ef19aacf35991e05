"""The whole error of log p: against log p_0 itself, beside other packages; and what becomes of it without smoothness.

Exact scores, float64. A number called log p differs from log p_0 by the solver's error and by three more:

    solver   against the exact log p_{t_min}, the terminal law exact too: only the integration
    total    against the exact log p_0: besides, the SDE's prior for the law at t_max, t_min for 0, and probes

First smooth problems: P1 a ring in 2-D, P2 a mixture in 16-D, P3 a Gaussian in 64-D with eigenvalues 1e-3 to 1. Then
Student-t, Laplace and uniform data (rough.py), each in 2-D under VP: what the solver does with them, and what each
`end` is off by near a kink or edge and away from one. Last a network with kinks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit
from sdekit.targets import Gaussian, GaussianMixture

from .common import Cell, Goal, Report, arguments, quantile, share_within
from .flow_peers import OWN, own_likelihood
from .peers import PEERS, Run
from .problems import SDES, Mixture, learned, ring
from .reference import fine_reference
from .rough import LAWS, Law, marginal_log_prob, mass_error, rough_model, slope_error, start_error

TOLERANCE = 1e-3  # of sdekit's rows, nats
TOLERANCES = (1e-1, 1e-2, 1e-3)
DRAWS = 10_000  # to which moments are fitted
CAP, ROUGH, EXPENSIVE = 512, 16, 2000  # evaluations, rejected steps of sdekit's cap; what may not pass unwarned
NEAR, AWAY = 3.0, 10.0  # from a corner, in units of sigma(t_min): closer than, farther than


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
    gaussian = Gaussian(torch.randn(64, generator=source, dtype=torch.float64), 0.5 * (spread + spread.mT))
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
            generator = torch.Generator().manual_seed(31 * seed + 7)
            x = target.sample(8 if quick else 64, generator=generator)
            fitted = Gaussian.fit(target.sample(DRAWS, generator=generator))
            made.append(Problem(f"{name} {sde_name}", target, target.score_model(sde), x, moments, fitted))
    return made


def quiet(model: sdekit.ScoreModel, x: Tensor, tolerance: float, **options: object) -> sdekit.LogLikelihood:
    """sdekit's log likelihood without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sdekit.log_likelihood(model, x, tolerance=tolerance, throw=False, **options)


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
        f"Nats. sdekit's rows at tolerance {TOLERANCE:g}; corrected: end='extrapolate' and data_moments, the exact ones "
        "or fitted. Every trace exact but where a probe is named. Evaluations: the mean over samples; for the others "
        "(torchode apart) the calls. score_sde runs its network twice for each of scipy's."
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
    """What the SDE's prior, and t_min for 0, are off by on their own: closed forms, no solve."""
    table = report.table(
        "the two ends on their own, closed forms",
        ["problem", "sigma/alpha at t_min", "log p_{t_min} - log p_0: mean", "max", "prior - log p_T: mean", "max"],
    )
    for problem in problems(seed, quick):
        sde, target = problem.model.sde, problem.target
        first = (target.marginal_log_prob(sde, problem.x, sde.t_min) - target.log_prob(problem.x)).abs()
        draws = torch.Generator().manual_seed(seed)
        noise = torch.randn(problem.x.shape, generator=draws, dtype=torch.float64)
        late = sde.perturb(problem.x, torch.full((len(noise),), sde.t_max, dtype=torch.float64), noise)
        last = (sde.prior_log_prob(late) - target.marginal_log_prob(sde, late, sde.t_max)).abs()
        size = math.exp(-float(sde.half_log_snr(sde.t_min)))
        facts = [float(first.mean()), float(first.max()), float(last.mean()), float(last.max())]
        table.rows.append([problem.name, size, *facts])


class Heard(NamedTuple):
    """A result, and whether a ToleranceWarning came with it."""

    found: sdekit.LogLikelihood
    warned: bool


def listen(model: sdekit.ScoreModel, x: Tensor, tolerance: float) -> Heard:
    """sdekit's log likelihood with the exact trace, and what it says of itself."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = sdekit.log_likelihood(model, x, divergence=sdekit.Exact(), tolerance=tolerance, throw=False)
    return Heard(found, any(issubclass(warning.category, sdekit.ToleranceWarning) for warning in heard))


SOLVED = ["data", "tolerance", "mean error", "max", "max / tolerance", "covered", "evaluations", "max", "loose"]
SOLVED += ["warned"]


def solved_row(name: str, tolerance: float, heard: Heard, error: Tensor) -> list[Cell]:
    """How a solve went: errors, whether its estimate covers them, cost, and what it said."""
    found, spent = heard.found, heard.found.stats.evaluations.double()
    return [
        *(name, tolerance, float(error.mean()), quantile(error, 1.0), quantile(error, 1.0) / tolerance),
        *(share_within(error, found.solver_error), float(spent.mean()), int(spent.max())),
        *(int((found.status == sdekit.Status.LOOSE).sum()), str(heard.warned)),
    ]


def unwarned(found: sdekit.LogLikelihood) -> tuple[int, int]:
    """How many samples reached the cap and are not marked, and the largest cost of one that is not marked."""
    spent, silent = found.stats.evaluations, found.status != sdekit.Status.LOOSE
    capped = (spent > CAP + 1) & (found.stats.rejected >= ROUGH)
    return int((capped & silent).sum()), int((spent * silent).max())


def rough_data(report: Report, seed: int, quick: bool) -> list[Heard]:
    """The default solver on rough data: error of log p at t_min, coverage, evaluations."""
    sde, heard = SDES["VP"], []
    note = "Against the closed form at both ends: the integration alone. covered: errors below solver_error."
    table = report.table("rough data, 2-D, VP", SOLVED, note)
    for law in tqdm(LAWS, desc="rough data"):
        x = law.draw((16 if quick else 256, 2), torch.Generator().manual_seed(seed))
        model, truth = rough_model(law, sde), marginal_log_prob(law, sde, x, sde.t_min)
        for tolerance in TOLERANCES:
            heard.append(listen(model, x, tolerance))
            found = heard[-1].found
            error = (found.log_det + marginal_log_prob(law, sde, found.latent, sde.t_max) - truth).abs()
            table.rows.append(solved_row(law.name, tolerance, heard[-1], error))
            report.goals.append(
                Goal(
                    f"{law.name}, {tolerance:g}: errors below solver_error",
                    share_within(error, found.solver_error),
                    0.95,
                )
            )
    return heard


def places(law: Law, sigma: float, count: int, seed: int) -> dict[str, Tensor]:
    """Points (count, 2) by where they lie: the first coordinate close to a corner, or none; or in the tail."""
    generator = torch.Generator().manual_seed(97 + seed)
    x = law.draw((50 * count, 2), generator)
    if not law.corners:
        tail = x[x.abs().amax(1) > 10.0]
        return {"within 10": x[x.abs().amax(1) < 10.0][:count], "beyond 10": tail[:count]}
    far = torch.stack([(x - corner).abs().amin(1) for corner in law.corners]).amin(0) > AWAY * sigma
    away = x[far]
    near = away[:count].clone()
    # Inside of the edges: outside of them log p_0 is minus infinity.
    shift = NEAR * sigma * torch.rand(near.shape[0], generator=generator, dtype=torch.float64)
    near[:, 0] = max(law.corners) - shift
    return {"near": near, "away": away[count : 2 * count]}


def rough_ends(report: Report, seed: int, quick: bool) -> None:
    """What each `end` is off by against log p_0, the terminal law exact."""
    note = (
        f"Nats, tolerance {TOLERANCE:g}, exact terminal law. near: one coordinate within {NEAR:g} sigma of a kink or "
        f"inside of an edge; away: every coordinate beyond {AWAY:g} sigma. The prior's column: against the exact p_T."
    )
    ends = ("marginal", "heat", "extrapolate")
    columns = ["data", "points", "sigma(t_min)"]
    columns += [part for end in ends for part in (f"{end}: mean", "max")] + ["prior: mean", "max"]
    table = report.table("what `end` is off by", columns, note)
    for law in tqdm(LAWS, desc="ends"):
        for t_min in (1e-5, 1e-3):
            sde = sdekit.VPSDE(t_min=t_min)
            sigma = math.exp(-float(sde.half_log_snr(t_min)))
            for place, x in places(law, sigma, 8 if quick else 64, seed).items():
                truth, cells, prior = law.log_prob(x).sum(1), [], torch.zeros(1)
                for end in ends:
                    found = quiet(rough_model(law, sde), x, TOLERANCE, divergence=sdekit.Exact(), end=end)
                    last = marginal_log_prob(law, sde, found.latent, sde.t_max)
                    off = (found.log_det + last - truth).abs()
                    cells += [float(off.mean()), quantile(off, 1.0)]
                    prior = (found.log_prior - last).abs() if end == "marginal" else prior
                table.rows.append([law.name, place, sigma, *cells, float(prior.mean()), quantile(prior, 1.0)])


def kinked_network(report: Report, seed: int, quick: bool) -> list[Heard]:
    """The ReLU network: evaluations at each tolerance, and whether it says what it could not do."""
    model, heard = learned("relu", seed, quick, SDES["VP"]), []
    x = ring().target().sample(16 if quick else 64, generator=torch.Generator().manual_seed(200 + seed))
    known = fine_reference(model, x, 1 << (12 if quick else 15))
    note = f"Truth by the midpoint rule; with half the steps it differs by {float(known.error.max()):.1e} nats at most."
    table = report.table("a ReLU network", SOLVED, note)
    for tolerance in TOLERANCES:
        heard.append(listen(model, x, tolerance))
        found = heard[-1].found
        error = (found.log_prob - known.log_prob).abs()
        table.rows.append(solved_row("ReLU network, VP", tolerance, heard[-1], error))
        sure = share_within((error - known.error).clamp(min=0.0), found.solver_error)
        report.goals.append(Goal(f"ReLU network, {tolerance:g}: errors below solver_error", sure, 0.95))
    return heard


def check_laws(report: Report) -> None:
    """Are the rough laws what they claim to be?"""
    report.goals += [
        Goal("rough laws: |integral of p_t - 1|, worst", max(mass_error(law) for law in LAWS), high=1e-9),
        Goal("rough laws: score against autograd of log p_t, worst", max(slope_error(law) for law in LAWS), high=1e-8),
        Goal("rough laws: (log p_t - log p_0) / sigma^2 away from corners", max(map(start_error, LAWS)), high=2.0),
    ]


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("total_error", chosen)
    check_laws(report)
    beside_peers(report, chosen.seed, chosen.quick)
    end_errors(report, chosen.seed, chosen.quick)
    heard = rough_data(report, chosen.seed, chosen.quick)
    rough_ends(report, chosen.seed, chosen.quick)
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

"""What fresh problems cost, all of them together, beside other packages at the tolerance that makes them as close.

Every sixteenth sample of likelihood_fresh: 60 problems in 2, 16 and 64 dimensions and four learned networks, a fifth of
the points near separatrices. torchdiffeq's dopri5, torchode's and diffrax's Tsit5 run each problem down a ladder of
rtol = atol, one tolerance for all problems, and what puts 95% of all samples within some error is read off the ladder,
log-linear between two rungs. Two errors are asked: sdekit's tolerance, and what 95% of sdekit's samples had there ("as
close"). All see the same equation, the exact trace and float64. *Lock step*: a problem's batch runs on until its last
sample is done; evaluations are each sample's own, but of torchdiffeq, which steps a batch together.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit

from . import peers_jax
from .common import Goal, Report, arguments, needed, quantile, share_within
from .likelihood_fresh import TOLERANCES, Solved, exact, networks, pooled
from .likelihood_fresh import solve as ours
from .likelihood_images import decades
from .peers import Run, torchdiffeq_dopri5, torchode_tsit5
from .reference import Reference
from .solver_error import Case

SHARE = 0.95
EVERY = 16  # samples of a problem
OWN = ["tolerance", "n", "within", "worst / tol", "95% / tol", "evaluations", "lock step"]
LADDER = ["method", "rtol = atol", "n", "median error", "95%", "worst", "evaluations", "lock step"]
CLOSE = ["tolerance", "sdekit's 95% error", "sdekit's evaluations", "method"]
CLOSE += ["95% within the tolerance", "as close as sdekit", "sdekit of the former", "sdekit of the latter"]
Peer = Callable[[sdekit.ScoreModel, Tensor, None, float], Run]


def sixteenth(case: Case) -> Case:
    """Every sixteenth sample of a problem."""
    known = case.known
    if known is not None:
        known = Reference(*(part[::EVERY] for part in known))
    return case._replace(x=case.x[::EVERY], known=known)


def theirs(case: Case, solve: Peer, tolerance: float) -> Solved:
    """A peer's run; the error is the integration's, as for sdekit."""
    run = solve(case.model, case.x, None, tolerance)
    if case.known is not None:
        error = (run.log_prob - case.known.log_prob).abs()
    else:
        assert case.target is not None
        assert run.latent is not None
        sde, law = case.model.sde, case.target
        log_det = run.log_prob - sde.prior_log_prob(run.latent)
        ends = law.marginal_log_prob(sde, run.latent, sde.t_max) - law.marginal_log_prob(sde, case.x, sde.t_min)
        error = (log_det + ends).abs()
    ones = torch.ones_like(error)
    return Solved(error.nan_to_num(nan=math.inf), math.nan * ones, run.evaluations * ones, float(run.calls) * ones)


def main() -> None:
    """Runs the benchmark."""
    chosen = arguments(__doc__)
    report = Report("likelihood_pooled", chosen)
    own = report.table("sdekit at stated tolerances", OWN)
    ladder = report.table("the other packages' ladders", LADDER)
    close = report.table("what the others need", CLOSE)
    parts = exact(chosen.seed, chosen.quick) + networks(chosen.seed, chosen.quick)
    cases = [sixteenth(part.case) for part in parts]
    mine: dict[float, Solved] = {}
    for tolerance in TOLERANCES:
        found = mine[tolerance] = pooled([ours(case, tolerance) for case in tqdm(cases, desc=f"{tolerance:g}")])
        row = [share_within(found.error, tolerance), quantile(found.error, 1.0) / tolerance]
        row += [quantile(found.error, SHARE) / tolerance, float(found.evaluations.mean()), float(found.calls.mean())]
        own.rows.append([tolerance, found.error.numel(), *row])
    peers: dict[str, Peer] = {"torchdiffeq dopri5": torchdiffeq_dopri5, "torchode tsit5": torchode_tsit5}
    if peers_jax.available:
        peers["diffrax tsit5"] = peers_jax.diffrax_of_network
    rungs: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    for name, solve in peers.items():
        for tolerance in decades(-2, -4 if chosen.quick else -8, 1):
            found = pooled([theirs(case, solve, tolerance) for case in tqdm(cases, desc=f"{name} {tolerance:g}")])
            row = [quantile(found.error, q) for q in (0.5, SHARE, 1.0)]
            row += [float(found.evaluations.mean()), float(found.calls.mean())]
            rungs[name].append((row[3], row[1]))
            ladder.rows.append([name, tolerance, found.error.numel(), *row])
            report.save(final=False)
    for tolerance, found in mine.items():
        error, cost = quantile(found.error, SHARE), float(found.evaluations.mean())
        both = {name: (needed(every, tolerance), needed(every, error)) for name, every in rungs.items()}
        for name, costs in both.items():
            close.rows.append([tolerance, error, cost, name, *costs, *(cost / other for other in costs)])
        for place, reading in enumerate(("within it", "as close")):
            best = min((costs[place] for costs in both.values() if not math.isnan(costs[place])), default=math.nan)
            title = f"{tolerance:g}: evaluations, of the best peer's with 95% {reading}"
            report.goals.append(Goal(title, cost / best, high=0.5))
    report.save()


if __name__ == "__main__":
    main()

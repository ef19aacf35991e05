"""What becomes of log p where data or network are not smooth.

Student-t, Laplace and uniform data (rough.py), each in 2-D under VP, exact scores: what the default solver does with
them, and what each `end` is off by, near a kink or edge and away from one. Then a network with kinks.
"""

from __future__ import annotations

import math
import warnings
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit

from .common import Cell, Goal, Report, quantile, share_within
from .problems import SDES, learned, ring
from .reference import fine_reference
from .rough import LAWS, Law, Uniform, marginal_log_prob, mass_error, rough_model, slope_error, start_error

TOLERANCES = (1e-1, 1e-2, 1e-3)
TOLERANCE = 1e-3  # where only an end is looked at
CAP, ROUGH, EXPENSIVE = 512, 16, 2000  # evaluations, rejected steps of sdekit's cap; what may not pass unwarned
NEAR, AWAY = 3.0, 10.0  # from a corner, in units of sigma(t_min): closer than, farther than
OUTSIDE = 0.5  # beyond an edge, at most


def quiet(model: sdekit.ScoreModel, x: Tensor, tolerance: float, **options: object) -> sdekit.LogLikelihood:
    """sdekit's log likelihood without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sdekit.log_likelihood(model, x, tolerance=tolerance, throw=False, **options)


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


SOLVED = ["data", "points", "tolerance", "mean error", "max", "max / tolerance", "covered", "evaluations", "max"]
SOLVED += ["loose", "warned"]


def solved_row(name: str, points: str, tolerance: float, heard: Heard, error: Tensor) -> list[Cell]:
    """How a solve went: errors, whether its estimate covers them, cost, and what it said."""
    found, spent = heard.found, heard.found.stats.evaluations.double()
    return [
        *(name, points, tolerance, float(error.mean()), quantile(error, 1.0), quantile(error, 1.0) / tolerance),
        *(share_within(error, found.solver_error), float(spent.mean()), int(spent.max())),
        *(int((found.status == sdekit.Status.LOOSE).sum()), str(heard.warned)),
    ]


def unwarned(found: sdekit.LogLikelihood) -> tuple[int, int]:
    """How many samples reached the cap and are not marked, and the largest cost of one that is not marked."""
    spent, silent = found.stats.evaluations, found.status != sdekit.Status.LOOSE
    capped = (spent > CAP + 1) & (found.stats.rejected >= ROUGH)
    return int((capped & silent).sum()), int((spent * silent).max())


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


def rough_data(report: Report, seed: int, quick: bool) -> list[Heard]:
    """The default solver on rough data: error of log p at t_min, coverage, evaluations."""
    sde, heard = SDES["VP"], []
    note = (
        "Against the closed form at both ends: the integration alone. covered: errors below solver_error. near: one "
        f"coordinate within {NEAR:g} sigma of a kink or inside of an edge; outside: up to {OUTSIDE:g} beyond the edge."
    )
    table = report.table("rough data, 2-D, VP", SOLVED, note)
    sigma = math.exp(-float(sde.half_log_snr(sde.t_min)))
    for law in tqdm(LAWS, desc="rough data"):
        points = {"samples": law.draw((16 if quick else 256, 2), torch.Generator().manual_seed(seed))}
        points |= {k: v for k, v in places(law, sigma, 8 if quick else 64, seed).items() if k in ("near", "beyond 10")}
        if isinstance(law, Uniform):
            points["outside"] = points["near"].clone()
            points["outside"][:, 0] = law.width + OUTSIDE * torch.linspace(0.0, 1.0, len(points["near"]))
        for (place, x), tolerance in product(points.items(), TOLERANCES):
            truth = marginal_log_prob(law, sde, x, sde.t_min)
            heard.append(listen(rough_model(law, sde), x, tolerance))
            found = heard[-1].found
            error = (found.log_det + marginal_log_prob(law, sde, found.latent, sde.t_max) - truth).abs()
            table.rows.append(solved_row(law.name, place, tolerance, heard[-1], error))
            if place == "samples":
                share = share_within(error, found.solver_error)
                report.goals.append(Goal(f"{law.name}, {tolerance:g}: errors below solver_error", share, 0.99))
    return heard


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
        for t_min in (1e-3,) if quick else (1e-5, 1e-3):
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


def bias_orders(report: Report) -> None:
    """How the mean of log p_0 - log p_{t_min} over the data, KL(p_0 | p_{t_min}), falls with sigma: closed forms."""
    columns = ["data", *(f"sigma {value:.1e}" for value, _ in _levels(Uniform())), "order", "KL / sigma, last"]
    note = "Of each coordinate; order: of the last two."
    table = report.table("mean over the data of log p_0 - log p_{t_min}, VP", columns, note)
    for law in LAWS:
        found = _levels(law)
        orders = [math.log(b / a) / math.log(t / s) for (s, a), (t, b) in pairwise(found)]
        table.rows.append([law.name, *(lost for _, lost in found), orders[-1], found[-1][1] / found[-1][0]])


def _levels(law: Law) -> list[tuple[float, float]]:
    """(sigma, KL) at three t_min, by the trapezoid rule in the distance from the corner (laws are even)."""
    corner = max(law.corners, default=0.0)
    made = []
    for t in (1e-5, 1e-4, 1e-3):
        sde = sdekit.VPSDE(t_min=t)
        alpha, sigma = sde.alpha(torch.tensor([t])), sde.sigma(torch.tensor([t]))
        u = torch.linspace(0.0, math.asinh((corner or 1e6) / float(sigma)), 20_001, dtype=torch.float64)
        x = (corner - sigma * u.sinh()).abs()
        share = 2.0 * law.log_prob(x).exp() * sigma * u.cosh()
        lost = law.log_prob(x) - law.diffused(x, alpha, sigma)[0]
        made.append((float(sigma / alpha), float(torch.trapezoid(share * lost, u))))
    return made


def kinked_network(report: Report, seed: int, quick: bool) -> list[Heard]:
    """The ReLU network: evaluations at each tolerance, and whether it says what it could not do."""
    model, heard = learned("relu", seed, quick, SDES["VP"]), []
    x = ring().target().sample(16 if quick else 64, generator=torch.Generator().manual_seed(200 + seed))
    known = fine_reference(model, x, 1 << (10 if quick else 15))
    note = f"Truth by the midpoint rule; with half the steps it differs by {float(known.error.max()):.1e} nats at most."
    table = report.table("a ReLU network", SOLVED, note)
    for tolerance in TOLERANCES:
        heard.append(listen(model, x, tolerance))
        found = heard[-1].found
        error = (found.log_prob - known.log_prob).abs()
        table.rows.append(solved_row("ReLU network", "samples", tolerance, heard[-1], error))
        sure = share_within((error - known.error).clamp(min=0.0), found.solver_error)
        report.goals.append(Goal(f"ReLU network, {tolerance:g}: errors below solver_error", sure, 0.99))
    return heard


def check_laws(report: Report) -> None:
    """Are the rough laws what they claim to be?"""
    report.goals += [
        Goal("rough laws: |integral of p_t - 1|, worst", max(mass_error(law) for law in LAWS), high=1e-9),
        Goal("rough laws: score against autograd of log p_t, worst", max(slope_error(law) for law in LAWS), high=1e-8),
        Goal("rough laws: (log p_t - log p_0) / sigma^2 away from corners", max(map(start_error, LAWS)), high=2.0),
    ]

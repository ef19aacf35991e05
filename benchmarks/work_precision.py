"""Work and precision of samplers: how far from the exact endpoint, or law, after 10, 20, 50 and 100 evaluations.

Flow samplers all start from the same draws of the prior and solve the same equation, from t_max to t_min = 1e-3 of the
VP process, on exact scores and on learned networks, in float64. The reference is Dopri8 at 1e-12; what it differs from
the same method at 1e-11 in another variable is reported. Errors are root mean squares over samples and coordinates, and
the median over samples of a sample's. Each of our solvers is shown on the best of three grids at every count, which no
user knows beforehand; the goals are on `sdekit.plan_sampling`, which measures a grid on 192 other draws once for a
model and a count (its evaluations of each of them stand with it), and on `sdekit.sample` as it is. Stochastic samplers
are compared by their laws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm

import sdekit
from sdekit.divergence import Hutchinson
from sdekit.likelihood_flow import LikelihoodFlow
from sdekit.prior import draw_prior

from .common import RESULTS, Goal, Report, Table, arguments, cached, digest
from .problems import Mixture, digits, exact_problems, learned
from .samplers import FLOW, NOISY, draw

matplotlib.use("Agg")

COUNTS = (10, 20, 50, 100)
SDE = sdekit.VPSDE(t_min=1e-3)
WANTED = {"exact": {20: 1 / 2, 50: 1 / 50}, "learned": {20: 1 / 1.5, 50: 1 / 2}}
DEFAULT, PLAN = "sdekit.sample", "sdekit.plan_sampling"
Grid = Callable[[sdekit.ScoreModel, int], Tensor]
GRIDS: dict[str, Grid] = {
    "log-SNR": lambda model, n: sdekit.grid.uniform_half_log_snr(model.sde, n),
    "karras": lambda model, n: sdekit.grid.karras(model.sde, n),
    "mixed": lambda model, n: sdekit.grid.likelihood(model.sde, n, model.data_std),
}
IN_X: list[sdekit.solver.Solver] = [
    sdekit.DDIM(),
    *(sdekit.DPMSolver(p) for p in (2, 3)),
    *(sdekit.DPMSolverPP(p) for p in (2, 3)),
    *(sdekit.DPMSolverPP(p, multistep=False) for p in (2, 3)),
    *(sdekit.DEIS(3, variable) for variable in ("t", "rho", "half_log_snr")),
    *(sdekit.DEIS(p, "half_log_snr") for p in (2, 4)),
    *(sdekit.UniPC(p, prediction=form) for p in (2, 3) for form in ("data", "noise")),
    sdekit.SASolver(2, 2),
]
IN_MIXED: list[sdekit.solver.Solver] = [
    *(sdekit.Adams(p) for p in (2, 3, 4, 5)),
    *(sdekit.Heun(), sdekit.RK4()),
]


class Problem(NamedTuple):
    """A model, its start at t_max and where that ends; `kind` is "exact" or "learned"; `own` the reference's error."""

    name: str
    kind: str
    model: sdekit.ScoreModel
    start: Tensor
    end: Tensor
    own: float


class Score(NamedTuple):
    """Root mean square error, median over samples, evaluations made, and the grid."""

    rms: float
    median: float
    evaluations: int
    grid: str


Scores = dict[str, dict[int, Score]]


def short(solver: sdekit.solver.Solver) -> str:
    """A solver as the tables name it: without what is the default anyway."""
    if isinstance(solver, sdekit.RungeKutta):
        return solver.tableau.name
    text = repr(solver)
    for default in (", multistep=True, compat=False", ", compat=False", ", variant='bh2'", "(eta=0.0)"):
        text = text.replace(default, "")
    for name in ("order=", "predictor=", "corrector=", "prediction=", "variable="):
        text = text.replace(name, "")
    return text.replace("'", "").replace("multistep=False", "single")


def mixed(model: sdekit.ScoreModel, x: Tensor) -> LikelihoodFlow:
    """The flow of `x` in the mixed variable, without its log determinant."""
    return LikelihoodFlow(model, None, x.shape[1:], Hutchinson.keys(0, torch.arange(x.shape[0])))


def solve(term: sdekit.Term, solver: sdekit.solver.Solver, times: Tensor, x: Tensor, path: object = None) -> object:
    """`x` along `times`."""
    return sdekit.integrate(
        *(term, solver, sdekit.FixedGrid(times), x, times[0], times[-1], path), max_evaluations=10**6, throw=False
    )


def reference(model: sdekit.ScoreModel, start: Tensor, key: str) -> tuple[Tensor, float]:
    """Where the flow takes `start`, and by how much two references differ (root mean square)."""

    def make() -> dict[str, Tensor]:
        ends = [
            sdekit.integrate(
                *(term, sdekit.Dopri8(), sdekit.PID(rtol, rtol), start, SDE.t_max, SDE.t_min), max_evaluations=200_000
            ).x
            for term, rtol in ((sdekit.ProbabilityFlow(model), 1e-12), (mixed(model, start), 1e-11))
        ]
        return {"end": ends[0], "other": ends[1]}

    found = cached(f"endpoint-{key}-{digest(start, repr(model.sde), *model.state_dict().values())}", make)
    return found["end"], float((found["end"] - found["other"]).square().mean().sqrt())


def problem(name: str, kind: str, model: sdekit.ScoreModel, event: tuple[int, ...], count: int, key: str) -> Problem:
    """The problem of `count` draws of the prior."""
    model = sdekit.ScoreModel(model.net, SDE, model.parameterization, model.data_std)
    start = draw_prior(model, (count, *event), 0, torch.arange(count), torch.float64)
    end, own = reference(model, start, key)
    return Problem(name, kind, model, start, end, own)


def mixtures(seed: int, quick: bool) -> list[tuple[str, Mixture]]:
    """The ring and one mixture with random axes in each dimension."""
    wanted = ("ring", "16-D full 0") if quick else ("ring", "2-D full 0", "16-D full 0", "64-D full 0")
    found = {p.name.removeprefix("VP "): p.mixture for p in exact_problems(seed, False, names=("VP",))}
    return [(name.removesuffix(" full 0"), found[name]) for name in wanted]


def problems(seed: int, quick: bool) -> list[Problem]:
    """Exact scores first, then learned networks."""
    made = []
    for name, law in mixtures(seed, quick):
        target, dim = law.target(), law.means.shape[1]
        count = 64 if quick else {2: 192, 16: 96, 64: 48}[dim]
        key = digest(*law)
        made.append(problem(name, "exact", target.score_model(SDE), (dim,), count, key))
    for kind in ("noise",) if quick else ("noise", "edm"):
        made.append(problem(f"{kind} net", "learned", learned(kind, seed, quick), (2,), 64 if quick else 192, kind))
    if not quick:
        made.append(problem("digits", "learned", digits(1, seed).model, (1, 8, 8), 32, "digits"))
    return made


@cache
def extra(solver: sdekit.solver.Solver) -> int:
    """How many evaluations `solver` makes beyond those of its steps, to start."""
    model = sdekit.targets.Gaussian(torch.zeros(2).double(), torch.ones(2).double()).score_model(SDE)
    x = torch.ones(1, 2, dtype=torch.float64)
    term = mixed(model, x) if solver in IN_MIXED else sdekit.ProbabilityFlow(model)
    found = solve(term, solver, GRIDS["log-SNR"](model, 8), x)
    return int(found.stats.evaluations[0]) - 8 * solver.evaluations


def scored(case: Problem, x: Tensor, evaluations: int, grid: str) -> Score:
    """The score of an endpoint; one that is not finite counts as infinitely far."""
    errors = (x.double() - case.end).flatten(1).square().mean(1).nan_to_num(nan=math.inf)
    return Score(float(errors.mean().sqrt()), float(errors.median().sqrt()), evaluations, grid)


def ours(case: Problem, counts: tuple[int, ...], bar: tqdm) -> dict[str, Scores]:
    """By grid, by solver, by count; and `sdekit.sample` as it is under the grid "default"."""
    found: dict[str, Scores] = {name: {} for name in GRIDS}
    for solver in (*IN_X, *IN_MIXED):
        term = mixed(case.model, case.start) if solver in IN_MIXED else sdekit.ProbabilityFlow(case.model)
        more = extra(solver)
        for name, grid in GRIDS.items():
            rows = found[name].setdefault(short(solver), {})
            for count in counts:
                steps = max(1, (count - more) // solver.evaluations)
                end = solve(term, solver, grid(case.model, steps), case.start)
                rows[count] = scored(case, end.x, int(end.stats.evaluations[0]), name)
            bar.update()
    found["default"] = {DEFAULT: {}}
    for count in counts:
        end = sdekit.sample(case.model, case.start.shape, steps=count - 1, denoise=False, dtype=torch.float64)
        found["default"][DEFAULT][count] = scored(case, end.x, int(end.stats.evaluations[0]), "default")
    found["plan"] = {PLAN: {}}
    for count in counts:
        plan = sdekit.plan_sampling(case.model, case.start.shape[1:], count - 1, dtype=torch.float64)
        end = sdekit.sample(
            *(case.model, case.start.shape),
            solver=plan.solver,
            controller=plan.controller,
            denoise=False,
            dtype=torch.float64,
        )
        name = f"planned by {plan.evaluations}, {short(plan.solver)}"
        found["plan"][PLAN][count] = scored(case, end.x, int(end.stats.evaluations[0]), name)
        bar.update()
    return found


def theirs(case: Problem, counts: tuple[int, ...], bar: tqdm) -> Scores:
    """By sampler, by count; a package that is not installed has no row."""
    found: Scores = {}
    for name, sampler in FLOW.items():
        try:
            ends = {count: draw(sampler, case.model, case.start, count) for count in counts}
        except ModuleNotFoundError:
            continue
        found[name] = {count: scored(case, end.x, end.evaluations, "own") for count, end in ends.items()}
        bar.update()
    return found


def best_grids(found: dict[str, Scores], counts: tuple[int, ...]) -> Scores:
    """Each solver on the best of its grids at each count."""
    rows: Scores = {}
    for by_solver in found.values():
        for name, row in by_solver.items():
            for count in counts:
                kept = rows.setdefault(name, {})
                if count not in kept or row[count].rms < kept[count].rms:
                    kept[count] = row[count]
    return rows


def tabulate(report: Report, case: Problem, mine: Scores, peers: Scores, counts: tuple[int, ...]) -> None:
    """All methods of a problem, ours first, each half ordered by its error at the third count."""
    columns = ["method", *(f"rms {n}" for n in counts), *(f"median {n}" for n in counts), "grids", "evaluations"]
    note = f"{case.start.shape[0]} samples; the reference's own error is {case.own:.1e}."
    table = report.table(f"{case.name}: endpoint errors", columns, note)
    for rows in (mine, peers):
        for name in sorted(rows, key=lambda name: rows[name][counts[min(2, len(counts) - 1)]].rms):
            row = [rows[name][n] for n in counts]
            grids = "default" if name == DEFAULT else "own" if rows is peers else ", ".join(s.grid for s in row)
            made = ", ".join(str(s.evaluations) for s in row)
            table.rows.append([name, *(s.rms for s in row), *(s.median for s in row), grids, made])


def judge(report: Report, table: Table, case: Problem, mine: Scores, peers: Scores, counts: tuple[int, ...]) -> None:
    """The default and our best solver beside the best peer, by count."""
    for count in counts:
        rival = min(peers, key=lambda name: peers[name][count].rms)
        best = min((name for name in mine if name not in (DEFAULT, PLAN)), key=lambda name: mine[name][count].rms)
        low, default, winner = peers[rival][count].rms, mine[DEFAULT][count].rms, mine[best][count]
        planned = mine[PLAN][count].rms
        table.rows.append(
            [
                *(case.name, count, default, planned, f"{best}, {winner.grid}", winner.rms, rival, low),
                *(default / low, planned / low, winner.rms / low),
                *(mine[DEFAULT][count].median / min(row[count].median for row in peers.values()),),
            ]
        )
        if count in WANTED[case.kind]:
            report.goals += [
                Goal(f"{case.name}, {count}: {name} / best peer", value / low, high=WANTED[case.kind][count])
                for name, value in (("plan", planned), ("default", default))
            ]


def candidates(report: Report, cases: list[Problem], every: list[dict[str, Scores]], counts: tuple[int, ...]) -> None:
    """What the default could be: each solver and grid, its error as a share of the default's, by geometric means."""
    for count in counts:
        rows = []
        for grid in GRIDS:
            for name in every[0][grid]:
                logs: dict[str, list[float]] = {"exact": [], "learned": []}
                for case, found in zip(cases, every, strict=True):
                    base = found["default"][DEFAULT][count].rms
                    logs[case.kind].append(math.log(min(1e6, found[grid][name][count].rms / base)))
                means = [sum(logs[kind]) / len(logs[kind]) for kind in logs]
                worst = math.exp(max(logs["exact"] + logs["learned"]))
                rows.append([name, grid, *(math.exp(m) for m in means), math.exp(sum(means) / 2), worst])
        columns = ["method", "grid", "exact", "learned", "both", "worst problem"]
        note = "Root mean square error over that of sdekit.sample as it is; below 1 is better. The best 10."
        table = report.table(f"candidates for the default at {count} evaluations", columns, note)
        table.rows += sorted(rows, key=lambda row: row[4])[:10]


def picture(cases: list[Problem], every: list[Scores], peers: list[Scores], path: object) -> None:
    """Error against evaluations, a panel a problem: the default, our best, and the peers."""
    from matplotlib import pyplot

    columns = min(4, len(cases))
    figure, axes = pyplot.subplots(
        -(-len(cases) // columns), columns, figsize=(3.6 * columns, 3.2 * -(-len(cases) // columns)), squeeze=False
    )
    for axis, case, mine, foreign in zip(axes.flat, cases, every, peers, strict=False):
        for rows, color, label in ((foreign, "0.6", "other packages"), (mine, "C0", "sdekit, every solver")):
            for number, (name, row) in enumerate(rows.items()):
                if name in (DEFAULT, PLAN):
                    continue
                axis.loglog(list(row), [s.rms for s in row.values()], color=color, lw=0.7, alpha=0.6,
                            label=label if number == 0 else None)  # fmt: skip
        counts = list(mine[DEFAULT])
        axis.loglog(counts, [min(r[n].rms for r in foreign.values()) for n in counts], "k--", lw=1.5, label="best peer")
        axis.loglog(counts, [mine[DEFAULT][n].rms for n in counts], "C3o-", lw=2, label=DEFAULT)
        axis.loglog(counts, [mine[PLAN][n].rms for n in counts], "C2s-", lw=2, label=PLAN)
        axis.set(title=case.name, xlabel="evaluations", ylabel="endpoint error (rms)")
        axis.set_xticks(counts, [str(n) for n in counts], minor=False)
        axis.set_xticks([], minor=True)
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# Stochastic samplers, by their laws

NOISES: list[tuple[sdekit.solver.Solver, float]] = [
    (sdekit.EulerMaruyama(), 1.0),
    (sdekit.SDEDPMSolver(), 1.0),
    (sdekit.SDEDPMSolverPP(1), 1.0),
    (sdekit.SDEDPMSolverPP(2), 1.0),
    (sdekit.SEEDS(2), 1.0),
    (sdekit.SASolver(), 1.0),
    (sdekit.DDIM(1.0), 1.0),
]


class Law(NamedTuple):
    """An exact law at t_min: draws, another set of draws, and its covariance."""

    name: str
    model: sdekit.ScoreModel
    truth: Tensor
    again: Tensor
    covariance: Tensor


def laws(seed: int, quick: bool) -> list[Law]:
    """The ring, and mixtures in 16 and 64 dimensions."""
    made, count = [], 500 if quick else 1500
    for name, law in mixtures(seed, quick):
        if name == "2-D":
            continue
        target, generator = law.target(), torch.Generator().manual_seed(seed)
        pair = [
            SDE.perturb(
                target.sample(count, generator=generator),
                SDE.t_min,
                torch.randn(count, target.dim, generator=generator, dtype=torch.float64),
            )
            for _ in range(2)
        ]
        parts = law.moments()._components
        covariance = (parts.basis[0] * parts.values[0]) @ parts.basis[0].mT
        at_end = SDE.alpha(SDE.t_min) ** 2 * covariance + SDE.sigma(SDE.t_min) ** 2 * torch.eye(target.dim).double()
        made.append(Law(name, target.score_model(SDE), *pair, at_end))
    return made


def distances(law: Law, x: Tensor) -> tuple[float, float, float]:
    """Sliced 2-Wasserstein distance, relative error of the covariance, energy distance: of `x` to the law's draws."""
    if not bool(x.isfinite().all()):
        return math.inf, math.inf, math.inf
    generator = torch.Generator().manual_seed(1)
    axes = torch.randn(x.shape[1], 128, generator=generator, dtype=torch.float64)
    axes = axes / axes.norm(dim=0)
    sliced = ((x @ axes).sort(0).values - (law.truth @ axes).sort(0).values).square().mean().sqrt()
    spread = (torch.cov(x.T) - law.covariance).norm() / law.covariance.norm()

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist").sum() / (len(a) * (len(b) - (a is b)))

    energy = 2.0 * apart(x, law.truth) - apart(x, x) - apart(law.truth, law.truth)
    return float(sliced), float(spread), float(energy)


def stochastic(report: Report, law: Law, counts: tuple[int, ...], bar: tqdm) -> None:
    """All stochastic samplers on one law."""
    columns = ["method", "grid", *(f"{name} {n}" for name in ("W2", "cov", "energy") for n in counts)]
    note = (
        f"{len(law.truth)} samples: sliced 2-Wasserstein distance, relative error of the covariance, unbiased energy "
        "distance (it may be negative); the first row is the floor, a second set of exact draws."
    )
    table = report.table(f"{law.name}: stochastic samplers", columns, note)
    numbers = torch.arange(len(law.truth))
    start = draw_prior(law.model, tuple(law.truth.shape), 0, numbers, torch.float64)

    def row(name: str, grid: str, ends: list[Tensor]) -> None:
        each = [distances(law, end) for end in ends]
        table.rows.append([name, grid, *(found[k] for k in range(3) for found in each)])
        bar.update()

    row("exact draws", "-", [law.again] * len(counts))
    for solver, eta in NOISES:
        for grid in ("karras", "mixed"):
            ends = []
            for count in counts:
                starts = 1 if isinstance(solver, sdekit.SASolver) else 0
                steps = max(1, (count - 3 * starts) // solver.evaluations)
                path = sdekit.IndependentIncrements(1, numbers)
                term = sdekit.ReverseSDE(law.model, eta)
                ends.append(solve(term, solver, GRIDS[grid](law.model, steps), start, path).x)
            row(short(solver), grid, ends)
    for name, sampler in NOISY.items():
        try:
            row(name, "own", [draw(sampler, law.model, start, count).x for count in counts])
        except ModuleNotFoundError:
            continue


def main() -> None:
    chosen = arguments(__doc__)
    counts = (10, 20) if chosen.quick else COUNTS
    report = Report("work_precision", chosen)
    columns = ["problem", "evaluations", "default", "plan", "our best", "its error", "best peer", "its error"]
    note = "Root mean square errors; the last column compares medians over samples, to the best peer's in that."
    summary = report.table(
        "beside the best of the others", [*columns, "default / peer", "plan / peer", "best / peer", "medians"], note
    )
    cases, every, mine, peers = problems(chosen.seed, chosen.quick), [], [], []
    with tqdm(desc="methods", unit="") as bar:
        for case in cases:
            every.append(ours(case, counts, bar))
            mine.append(best_grids(every[-1], counts))
            peers.append(theirs(case, counts, bar))
            judge(report, summary, case, mine[-1], peers[-1], counts)
            tabulate(report, case, mine[-1], peers[-1], counts)
            report.save(final=False)
        candidates(report, cases, every, counts)
        for law in laws(chosen.seed, chosen.quick):
            stochastic(report, law, counts, bar)
            report.save(final=False)
    folder = RESULTS / "quick" if chosen.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    picture(cases, mine, peers, folder / "work_precision.png")
    report.save()


if __name__ == "__main__":
    main()

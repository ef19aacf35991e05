"""log p without a solve, beside the probability flow: bias, error bar and noise at equal network evaluations.

On targets with exact scores the truth is a closed form, the terminal law that of the data's own moments:

    rms       root mean square error over samples and seeds, nats a sample
    claimed   root mean square of std_error over that: 1 where the error bar tells
    bias, z   mean error, and over its standard error

On the digits network there is no truth: what is shown is the distance to the flow's value (exact trace, tolerance
1e-3), which is no bias: that density is another model's. Two functions with one mean are compared with one another.
The density along the reverse SDE is compared at the samples it draws itself, so in a table of its own.

The last table has networks that are wrong at high noise, which are what an error bar of drawn levels may not see: there
the integrand is largest where the default's levels are rarest. How often does value +- 1.96 std_error hold the mean of
all estimates, and how much noise do levels that are safer add where the network is right?
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sdekit
from sdekit.bounds import sde_bound, variational_bound
from sdekit.ito import ito_log_density
from sdekit.loss import CauchyLogSigma, Draw, Times, UniformHalfLogSNR
from sdekit.pointwise import i_mmse, path_integral
from sdekit.targets import Gaussian, GaussianMixture
from sdekit.zoo import digits as zoo

from .common import Goal, Report, arguments
from .problems import Mixture, digits, random_mixture, ring

FALSE_ALARM, Z_BOUND = 1e-3, 3.29
WIDTH = 1.5  # of the default's Cauchy law
COLUMNS = ["problem", "method", "evaluations", "rms", "claimed / rms", "bias", "z", "ms of CPU"]


class Run(NamedTuple):
    """(seeds, B) values and standard errors, mean evaluations, CPU seconds of one seed and sample."""

    value: Tensor
    std_error: Tensor
    evaluations: float
    seconds: float


Method = Callable[..., tuple[Tensor, Tensor, Tensor]]


def _flow(divergence: sdekit.Divergence) -> Method:
    """The flow's value on a fixed grid of `draws` nodes."""

    def run(
        model: sdekit.ScoreModel, x: Tensor, draws: int, data_moments: Gaussian | None, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = sdekit.log_likelihood(
            model, x, nodes=draws, data_moments=data_moments, seed=seed, divergence=divergence
        )
        return found.log_prob, found.std_error, found.stats.evaluations

    return run


def _plain(estimate: Callable[..., tuple[Tensor, ...]], **fixed: object) -> Method:
    def run(*parts: object, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        value, error, evaluations = estimate(*parts, **options, **fixed)[:3]
        return value, error, evaluations

    return run


METHODS: dict[str, Method] = {
    "flow, exact trace": _flow(sdekit.Exact()),
    "flow, one probe": _flow(sdekit.Hutchinson()),
    "path integral": _plain(path_integral),
    "SDE's bound, exact trace": _plain(sde_bound, divergence=sdekit.Exact()),
    "SDE's bound, one probe": _plain(sde_bound, divergence=sdekit.Hutchinson()),
    "I-MMSE": _plain(i_mmse),
    "variational bound": _plain(variational_bound),
}
OF_DATA = ("I-MMSE", "variational bound")  # these ask for log p_0
TRACED = ("flow, exact trace", "SDE's bound, exact trace")  # dear in many dimensions
ESTIMATES = tuple(METHODS)[2:]


def run(method: Method, model: sdekit.ScoreModel, x: Tensor, budget: int, moments: Gaussian | None, seeds: int) -> Run:
    """`method` with `budget` evaluations a sample, for so many seeds."""
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [method(model, x, draws=budget, data_moments=moments, seed=seed) for seed in range(seeds)]
    seconds = (time.process_time() - began) / (seeds * x.shape[0])
    value, error = (torch.stack([part[k] for part in found]) for k in (0, 1))
    return Run(value, error, float(found[0][2].double().mean()), seconds)


def row(problem: str, name: str, found: Run, truth: Tensor) -> dict[str, float | str]:
    """One line of a table, and its facts by name."""
    off = found.value - truth
    rms, claimed = float(off.square().mean().sqrt()), float(found.std_error.square().mean().sqrt())
    spread = found.std_error.square().sum().sqrt() / off.numel()
    z = float(off.mean() / spread) if claimed else math.nan
    cells = (problem, name, found.evaluations, rms, claimed / rms if claimed else math.nan, float(off.mean()), z)
    return dict(zip(COLUMNS, (*cells, 1e3 * found.seconds), strict=True))


def exact_targets(report: Report, quick: bool, seed: int) -> None:
    """Errors against the closed form, and the goals on them."""
    budgets = (64, 256) if quick else (64, 256, 1024)
    size, seeds = (32, 2) if quick else (128, 4)
    sources = torch.Generator().manual_seed(1_000_003 * seed + 5)
    laws: dict[str, Mixture] = {"ring, 2-D": ring(), "mixture, 16-D": random_mixture(16, "full", sources)}
    table = report.table("exact scores", COLUMNS, "ms of CPU: per sample, one thread.")
    facts: list[dict[str, float | str]] = []
    for problem, law in laws.items():
        target: GaussianMixture = law.target()
        model, moments = target.score_model(sdekit.VPSDE()), law.moments()
        x = target.sample(size, generator=torch.Generator().manual_seed(seed))
        inside, data = target.marginal_log_prob(model.sde, x, model.sde.t_min), target.log_prob(x)
        for name, method in tqdm(METHODS.items(), desc=problem):
            for budget in budgets:
                if budget > 256 and (name.startswith("flow") or (name in TRACED and x.shape[1] > 2)):
                    continue
                found = run(method, model, x, budget, moments, 1 if name == "flow, exact trace" else seeds)
                facts.append(row(problem, name, found, data if name in OF_DATA else inside))
                table.rows.append([facts[-1][column] for column in COLUMNS])
    estimates = [fact for fact in facts if fact["method"] in ESTIMATES]
    ratios = [float(fact["claimed / rms"]) for fact in estimates if float(fact["evaluations"]) >= 256]
    worst = max((abs(float(fact["z"])) for fact in estimates), default=math.nan)
    alarm = FALSE_ALARM * len(estimates)
    report.goals += [
        Goal(f"exact scores: largest |z| of a bias (false alarm {alarm:.2g})", worst, high=Z_BOUND),
        Goal("exact scores, from 256 draws: smallest claimed / rms", min(ratios), low=0.85),
        Goal("exact scores, from 256 draws: largest claimed / rms", max(ratios), high=1.15),
    ]
    for problem in laws:
        least, most = (
            {str(f["method"]): float(f["rms"]) for f in facts if f["problem"] == problem and f["evaluations"] in ends}
            for ends in ((budgets[0], budgets[0] + 1), (budgets[-1], budgets[-1] + 1))
        )
        halved = [least[name] / most[name] for name in ESTIMATES if name in most]
        wanted = (budgets[-1] / budgets[0]) ** 0.5
        report.goals += [
            Goal(f"{problem}: noise falls as the root of the evaluations, least", min(halved) / wanted, low=0.8),
            Goal(
                f"{problem}: rms of the flow at {budgets[0]} / of the best estimate at {budgets[-1]}",
                least["flow, exact trace"] / min(most[name] for name in ESTIMATES if name in most),
                high=1.0,
            ),
        ]


def on_digits(report: Report, quick: bool, seed: int) -> None:
    """Distances to the flow's value on held-out images."""
    count, seeds = (4, 2) if quick else (24, 4)
    images = digits(count, seed, torch.float32)
    data = zoo.dequantise(zoo.load_split().train, torch.Generator().manual_seed(seed)).double()
    moments = Gaussian.fit(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flow = sdekit.log_likelihood(
            images.model.double(), images.x.double(), data_moments=moments, tolerance=1e-3, throw=False
        ).log_prob
    images = digits(count, seed, torch.float32)
    note = (
        f"{count} images in 64 dimensions, {seeds} seeds, data_moments of the training images. rms, bias and z: against"
        " the flow's value, which is another model's: errors for the flow's own rows only. noise: standard deviation"
        " over the seeds."
    )
    columns = [*COLUMNS[1:4], "noise", "claimed / noise", *COLUMNS[5:]]
    table = report.table("digits network", columns, note)
    means: dict[str, tuple[float, float]] = {}
    for name, method in tqdm(METHODS.items(), desc="digits"):
        for budget in (64,) if quick else (64, 256, 1024):
            if budget > (64 if name in TRACED else 256 if name.startswith("flow") else 1024):
                continue
            found = run(method, images.model, images.x, budget, moments, 1 if name == "flow, exact trace" else seeds)
            fact = row("digits", name, found, flow)
            noise = float(found.value.var(0).mean().sqrt()) if found.value.shape[0] > 1 else math.nan
            claimed = float(found.std_error.square().mean().sqrt()) / noise
            cells = [fact["method"], fact["evaluations"], fact["rms"], noise, claimed]
            table.rows.append([*cells, *[fact[column] for column in COLUMNS[5:]]])
            spread = float(found.std_error.square().sum().sqrt()) / found.value.numel()
            means[name] = (float(found.value.mean()), spread)
    (one, first), (other, second) = means["path integral"], means["SDE's bound, one probe"]
    z = abs(one - other) / math.hypot(first, second)
    report.goals.append(
        Goal(f"digits: |z| of path integral - SDE's bound (false alarm {FALSE_ALARM:g})", z, high=Z_BOUND)
    )
    _variance(report, images.model, images.x, moments, 128 if quick else 512)


def _variance(report: Report, model: sdekit.ScoreModel, x: Tensor, moments: Gaussian, draws: int) -> None:
    """What the default levels and the data's moments take away."""
    table = report.table("variance on digits", ["levels", "compared with", "std_error"], "variational bound, rms")
    errors = []
    for levels, times in (("uniform in half_log_snr", UniformHalfLogSNR()), ("default", None)):
        for reference, law in (("N(0, data_std^2 I)", None), ("data's moments", moments)):
            found = variational_bound(model, x, draws=draws, times=times, data_moments=law)
            errors.append(float(found.std_error.square().mean().sqrt()))
            table.rows.append([levels, reference, errors[-1]])
    report.goals += [
        Goal("digits: std_error of default / of uniform levels", errors[2] / errors[0], high=0.95),
        Goal("digits: std_error with the data's moments / without", errors[3] / errors[2], high=0.9),
    ]


def along_paths(report: Report, quick: bool, seed: int) -> None:
    """The density gathered along the reverse SDE, at the samples it draws."""
    columns = ["problem", "steps", "rms", "std", "claimed / std", "bias", "half of std^2", "ms of CPU"]
    table = report.table("density along the reverse SDE", columns, "exact scores; truth: log p at t_min.")
    sources = torch.Generator().manual_seed(1_000_003 * seed + 5)
    count = 128 if quick else 1024
    for problem, law in (("ring, 2-D", ring()), ("mixture, 16-D", random_mixture(16, "full", sources))):
        target = law.target()
        model = target.score_model(sdekit.VPSDE())
        errors = []
        for steps in (64, 256) if quick else (64, 256, 1024):
            began = time.process_time()
            found = ito_log_density(
                model, (count, target.dim), steps=steps, seed=seed, dtype=torch.float64, batch=count
            )
            seconds = (time.process_time() - began) / count
            off = found.value - target.marginal_log_prob(model.sde, found.x, model.sde.t_min)
            std, claimed = float(off.std()), float(found.std_error.square().mean().sqrt())
            errors.append(std)
            rms, bias = float(off.square().mean().sqrt()), float(off.mean())
            table.rows.append([problem, steps, rms, std, claimed / std, bias, 0.5 * std**2, 1e3 * seconds])
        report.goals += [
            Goal(f"{problem}, along the SDE: order in the steps", math.log(errors[-2] / errors[-1], 4), 0.4, 0.75),
            Goal(f"{problem}, along the SDE: claimed / std", claimed / std, 0.8, 1.25),
        ]


class WrongAtHighNoise(nn.Module):
    """The exact noise below log(sigma/alpha) = 1, and a multiple of it above."""

    def __init__(self, exact: sdekit.ScoreModel, factor: float) -> None:
        super().__init__()
        self.exact, self.factor = exact, factor

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        high = torch.sigmoid(3.0 * (-self.exact.sde.half_log_snr(t) - 1.0))
        return (1.0 + (self.factor - 1.0) * high)[:, None] * self.exact.noise(x, t)


@dataclass(frozen=True)
class Blend(Times):
    """A share of uniform levels, the rest the default's: no level has more than 1/share times a uniform one's weight.

    Attributes:
        center: Of the Cauchy law.
        share: Of uniform levels.
    """

    center: float
    share: float

    def at(self, sde: sdekit.SDE, u: Tensor) -> Draw:
        laws = UniformHalfLogSNR(), CauchyLogSigma(self.center, WIDTH)
        low, high = (u / self.share).clamp(max=1.0), ((u - self.share) / (1.0 - self.share)).clamp(min=0.0)
        t = sde.clamp(torch.where(u < self.share, laws[0].at(sde, low).t, laws[1].at(sde, high).t))
        ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
        first, last = torch.atan((-sde.half_log_snr(ends) - self.center) / WIDTH).unbind()
        z = (-sde.half_log_snr(t) - self.center) / WIDTH
        cauchy = 1.0 / (WIDTH * (last - first) * (1.0 + z.square()))
        uniform = 1.0 / (sde.half_log_snr(ends[0]) - sde.half_log_snr(ends[1]))
        return Draw(t, -sde.dhalf_log_snr(t) * (self.share * uniform + (1.0 - self.share) * cauchy))


def coverage(report: Report, quick: bool, seed: int) -> None:
    """How often error bars cover, and the noise, for networks that are right and wrong at high noise."""
    laws = ("default", "25% uniform", "50% uniform", "uniform")
    cells = [f"{law}, {what}" for law in laws for what in ("std", "%")]
    note = "variational bound; std: over seeds; %: how often the row's mean, weighed by variances, is covered."
    columns = ["problem", "SDE", "noise above log(sigma/alpha) = 1", "draws", *cells]
    table = report.table("coverage of networks that are wrong at high noise", columns, note)
    sources = torch.Generator().manual_seed(1_000_003 * seed + 5)
    count, seeds = (16, 8) if quick else (64, 32)
    shares: dict[int, list[float]] = {64: [], 256: []}
    for problem, law in (("ring, 2-D", ring()), ("mixture, 16-D", random_mixture(16, "full", sources))):
        target = law.target()
        x = target.sample(count, generator=torch.Generator().manual_seed(seed)).repeat(seeds, 1)
        for sde, factor in itertools.product((sdekit.VPSDE(), sdekit.VESDE()), (1.0, 0.7, 0.0)):
            exact = target.score_model(sde)
            center = math.log(exact.data_std) - 1.5
            levels = None, Blend(center, 0.25), Blend(center, 0.5), UniformHalfLogSNR()
            model = sdekit.ScoreModel(WrongAtHighNoise(exact, factor), sde, data_std=exact.data_std)
            for draws, covered in shares.items():
                found = [
                    variational_bound(model, x, draws=draws, times=law, seed=seed, batch=1 << 14) for law in levels
                ]
                value, error = (
                    torch.stack([part.reshape(seeds, count) for part in parts])
                    for parts in ([bound.value for bound in found], [bound.std_error for bound in found])
                )
                weight = 1.0 / value.var(1)
                truth = (weight * value.mean(1)).sum(0) / weight.sum(0)
                share = 100.0 * ((value - truth).abs() <= 1.96 * error).double().mean((1, 2))
                pairs = zip(value.var(1).mean(1).sqrt().tolist(), share.tolist(), strict=True)
                table.rows.append([problem, type(sde).__name__, f"x {factor}", draws, *itertools.chain(*pairs)])
                covered += [float(share[0])] if factor else []
    for draws, covered in shares.items():
        name = f"right, or wrong by 30%: least share covered at {draws} draws, %"
        report.goals.append(Goal(name, min(covered), low=90.0))


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("estimators", chosen)
    exact_targets(report, chosen.quick, chosen.seed)
    along_paths(report, chosen.quick, chosen.seed)
    on_digits(report, chosen.quick, chosen.seed)
    coverage(report, chosen.quick, chosen.seed)
    report.save()


if __name__ == "__main__":
    main()

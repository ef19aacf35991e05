"""Every line of the error budget against what it claims to be, on random problems whose truth is known.

Mixtures of four Gaussians in 2, 3, 4 and 8 dimensions (means of deviation 1, deviations from .05 to .65), under four
SDEs in turn; 8 samples each. Claimed against true, pooled over problems and samples:

    trace        log p by one fresh probe less that by the exact trace, on a grid of 48 nodes, against std_error
    solver       log p_t at tolerance 1e-2, with the exact terminal law, less the exact one
    truncation   log p_0 less log p_t of what the solve begins with, both exact, for end = "marginal" and "heat"
    prior        log p_T of the latent less log q, exact, for the SDE's prior and for moments of 4,000 draws
    rounding     log p by a trained network in single or half precision (states single) less that by the same weights
                 in double precision, on a grid of 32 nodes

A bound or an estimate that is to cover is held to 99%; an estimate of a size to a median of claimed over true within
1/1.3 and 1.3; a standard error to the coverage of its 95% interval, whose tests state their false alarm.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit
from sdekit.ends import enter_data
from sdekit.likelihood_flow import LikelihoodFlow

from .common import Goal, Report, arguments, quantile
from .problems import digits, learned, ring

SDES: dict[str, sdekit.SDE] = {
    "VP": sdekit.VPSDE(),
    "VE": sdekit.VESDE(),
    "sub-VP": sdekit.SubVPSDE(t_min=1e-2),
    "VP, t_min 1e-3": sdekit.VPSDE(t_min=1e-3),
}
SAMPLES = 8
FALSE_ALARM = 1e-3  # of the test on the trace's coverage, two-sided, were its samples independent: 3.29 deviations
_SMALL = 1e-6  # nats below which a line need not be right
_PRECISIONS = {"single": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NODES = 48
Pairs = dict[str, list[tuple[Tensor, Tensor]]]


def mixture(number: int, generator: torch.Generator) -> sdekit.targets.GaussianMixture:
    """A random mixture; its dimension follows from its number."""
    dim = (2, 3, 4, 8)[number % 4]
    weights = torch.rand(4, generator=generator).double() + 0.2
    means = torch.randn(4, dim, generator=generator).double()
    return sdekit.targets.GaussianMixture(
        weights / weights.sum(), means, (0.05 + 0.6 * torch.rand(4, dim, generator=generator)).double()
    )


def one_problem(number: int, generator: torch.Generator, pairs: Pairs) -> None:
    """Adds what a random problem's lines claim, and what is true, to `pairs`."""
    target, sde = mixture(number, generator), list(SDES.values())[(number // 4) % len(SDES)]
    model, x = target.score_model(sde), target.sample(SAMPLES, generator=generator)
    moments = sdekit.targets.Gaussian.fit(target.sample(4000, generator=generator))
    gridded = sdekit.log_likelihood(model, x, nodes=_NODES, budget=True)
    assert gridded.ends is not None
    at_start = target.marginal_log_prob(sde, x, sde.t_min)
    pairs["truncation, marginal"].append((gridded.ends.truncation, target.log_prob(x) - at_start))
    law = target.marginal_log_prob(sde, gridded.latent, sde.t_max)
    pairs["terminal law, prior"].append((gridded.ends.mismatch, law - gridded.log_prior))
    # The path does not depend on the probes: on one grid the difference is the trace's alone.
    noisy = sdekit.log_likelihood(model, x, nodes=_NODES, divergence=sdekit.Hutchinson(probes=1), seed=number)
    pairs["trace"].append((noisy.std_error, noisy.log_prob - gridded.log_prob))
    keys = sdekit.Hutchinson.keys(0, torch.arange(SAMPLES))
    entry = enter_data(LikelihoodFlow(model, sdekit.Exact(), x.shape[1:], keys), x, "heat", budget=True)
    reported = target.marginal_log_prob(sde, entry.x, sde.t_min) + entry.log_det
    pairs["truncation, heat"].append((entry.left_out, target.log_prob(x) - reported))
    out = sdekit.log_likelihood(model, x, tolerance=1e-2, data_moments=moments, budget=True)
    assert out.ends is not None
    law = target.marginal_log_prob(sde, out.latent, sde.t_max)
    pairs["terminal law, moments"].append((out.ends.mismatch, law - out.log_prior))
    pairs["solver"].append((out.solver_error, law + out.log_det - at_start))


def rounding(seed: int, count: int, pairs: Pairs) -> None:
    """Adds what networks of single and half precision do under states of single precision."""
    generator = torch.Generator().manual_seed(seed)
    images = digits(count, seed)
    cases = [(images.model, images.x)]
    cases += [
        (learned(kind, seed, False), ring().target().sample(count, generator=generator)) for kind in ("noise", "edm")
    ]
    for model, x in cases:
        for name, dtype in _PRECISIONS.items():
            low = sdekit.ScoreModel(
                copy.deepcopy(model.net).to(dtype), model.sde, model.parameterization, model.data_std
            )
            high = sdekit.ScoreModel(copy.deepcopy(low.net).double(), low.sde, low.parameterization, low.data_std)
            wide, narrow = (
                sdekit.log_likelihood(m.eval(), d, nodes=32) for m, d in ((high, x.float().double()), (low, x.float()))
            )
            assert narrow.rounding is not None
            pairs[f"rounding, {name}"].append((narrow.rounding, wide.log_prob - narrow.log_prob))


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("budget", chosen)
    problems, count = (16, 16) if chosen.quick else (200, 64)
    pairs: Pairs = defaultdict(list)
    generator = torch.Generator().manual_seed(chosen.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in tqdm(range(problems), desc="random problems"):
            one_problem(number, generator, pairs)
        rounding(chosen.seed, count, pairs)
    columns = ["line", "samples", "true, median", "true, largest", "claimed / true, median", "5%", "95%", "covered"]
    note = f"{problems} problems, {SAMPLES} samples each; ratios of those whose true value is above {_SMALL:g} nats."
    table = report.table("claimed against true", columns, note)
    for name, parts in pairs.items():
        claimed, true = (torch.cat(column) for column in zip(*parts, strict=True))
        seen = true.abs() > (_SMALL if not name.startswith("rounding") else 0.0)
        ratio = (
            (claimed / true)[seen] if name.startswith(("truncation", "terminal")) else claimed[seen] / true[seen].abs()
        )
        slack = 1.96 if name == "trace" else 1.0
        covered = float(
            (true.abs() <= slack * claimed.abs() + (0.0 if name.startswith(("trace", "rounding")) else _SMALL))
            .double()
            .mean()
        )
        median = quantile(ratio, 0.5)
        table.rows.append([name, len(true), quantile(true.abs(), 0.5), quantile(true.abs(), 1.0), median,
                           quantile(ratio, 0.05), quantile(ratio, 0.95), covered])  # fmt: skip
        if name == "trace":
            width = 3.29 * math.sqrt(0.95 * 0.05 / len(true))
            size = math.sqrt(float(claimed.square().mean() / true.square().mean()))
            report.goals += [
                Goal(f"trace: coverage of the 95% interval (false alarm {FALSE_ALARM:g})", covered, low=0.95 - width),
                Goal("trace: claimed / true root mean square", size, 1 / 1.3, 1.3),
            ]
        elif name.startswith(("solver", "rounding")):
            report.goals.append(Goal(f"{name}: covered", covered, low=0.99))
        else:
            report.goals.append(Goal(f"{name}: claimed / true, median", median, 1 / 1.3, 1.3))
    report.save()


if __name__ == "__main__":
    main()

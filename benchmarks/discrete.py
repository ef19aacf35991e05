"""Bits per dimension of held-out digits by every bound: which dequantisation pays, and what do more draws buy?

Two networks of 8x8 images with 17 grey levels. One is the shipped one, trained on uniformly dequantised images. The
other has its weights under another head, trained on for a while on the integers themselves, at the centres of their
bins: a pixel is one of 17 points, and the noise prediction is the exact posterior mean for these.

    cells     the row bounds log P of the image's cell, at the row's noise level
    decoder   it bounds the image's probability under the decoder of the variational bound

Rows at different noise levels, or with and without a decoder, bound different probabilities, each of a model of the
integers in its own right. There are two standard errors: over images (others would have another mean; common to all
rows), and over draws, which all rows of one dequantiser share. Average bounds are means of the drawn log weights,
with nothing in closed form. To add a row, add a name and a function of a `Subject` to `ROWS`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sdekit
from sdekit.bounds import Estimate, VariationalBound
from sdekit.dequantize import Dequantizer, TruncatedNormalDequantizer, UniformDequantizer, VariationalDequantizer
from sdekit.discrete import discrete_log_likelihood
from sdekit.loss import LogNormalSigma
from sdekit.plot import draw_intervals, new_figure, save
from sdekit.solution import DiscreteLogLikelihood
from sdekit.training import Batch, Recipe, train
from sdekit.units import Levels, bits_per_dim
from sdekit.zoo import digits as zoo

from .common import CACHE, HERE, Goal, Report, arguments, digest

PICTURE = HERE.parent / "docs" / "_static" / "discrete.png"
CELLS = Levels(zoo.LEVELS)
MOST = 20  # draws
AT_ONCE = 64  # rows solved together
_LEVELS = 4096  # noise levels of an estimate without a solve
PER_NAT = 1.0 / (math.prod(zoo.SHAPE) * math.log(2.0))


class Row(NamedTuple):
    """One line: bits/dim of each image (n,), their standard errors over draws and solver errors (n,), what they cost.

    Attributes:
        bits: (n,).
        draws: (n,) standard errors from the draws in bits/dim; NaN where one draw says nothing of it.
        solver: (n,) estimated errors of the integration in bits/dim.
        evaluations: (n,) network evaluations.
        of: What it is a bound of.
        t: Noise level.
    """

    bits: Tensor
    draws: Tensor
    solver: Tensor
    evaluations: Tensor
    of: str
    t: float


class Subject:
    """A network and the images to evaluate, with the draws that several rows share.

    Args:
        model: Of images in [-1, 1].
        k: (n, 1, 8, 8) levels.
        seed: Of the draws.
        most: Draws at most.
    """

    def __init__(self, model: sdekit.ScoreModel, k: Tensor, seed: int, most: int = MOST) -> None:
        self.model = model
        self.k = k
        self.seed = seed
        self.most = most
        self.evaluate = functools.cache(self._evaluate)

    def _evaluate(self, law: Dequantizer, t: float | None) -> DiscreteLogLikelihood:
        """All draws by `law`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sdekit.ToleranceWarning)
            return discrete_log_likelihood(
                *(self.model, self.k),
                levels=CELLS.count,
                dequantizer=law,
                samples=self.most,
                bound="importance",
                t=t,
                seed=self.seed,
                draws_at_once=max(1, AT_ONCE // self.k.shape[0]),
            )


def plain(subject: Subject) -> Row:
    """The density of the flow at one uniformly dequantised point each, without any of this package's bounds."""
    x = zoo.dequantise(subject.k, torch.Generator().manual_seed(subject.seed))
    out = sdekit.log_likelihood(subject.model, x)
    unknown = torch.full_like(out.log_prob, math.nan)
    bits = out.bits_per_dim(CELLS.count)
    return Row(bits, unknown, out.solver_error * PER_NAT, out.stats.evaluations, "cells", subject.model.sde.t_min)


def bound(law: Dequantizer, count: int = 1, t: float | None = None) -> Callable[[Subject], Row]:
    """The bound of `count` draws (the average bound with one), averaged over as many groups of draws as there are."""

    def row(subject: Subject) -> Row:
        out = subject.evaluate(law, t)
        groups = subject.most // count
        value = torch.logsumexp(out.draws[:, : groups * count].reshape(-1, groups, count), 2) - math.log(count)
        error = value.std(1) / math.sqrt(groups) if groups > 1 else out.std_error
        cost, of = (
            out.evaluations / subject.most * count,
            "decoder" if isinstance(law, VariationalDequantizer) else "cells",
        )
        return Row(-value.mean(1) * PER_NAT, error * PER_NAT, out.solver_error * PER_NAT, cost, of, float(out.t[0]))

    return row


def unsolved(estimate: Callable[..., Estimate | VariationalBound]) -> Callable[[Subject], Row]:
    """A bound of the reverse SDE's density at the one uniformly dequantised point each that `plain` takes."""

    def row(subject: Subject) -> Row:
        x = zoo.dequantise(subject.k, torch.Generator().manual_seed(subject.seed))
        out = estimate(subject.model, x, draws=_LEVELS, seed=subject.seed)
        bits = bits_per_dim(out.value, x[0].numel(), CELLS.count, -1.0, 1.0)
        none, t = torch.zeros_like(bits), subject.model.sde.t_min
        cost = torch.as_tensor(out.evaluations).expand(len(x))
        return Row(bits, out.std_error * PER_NAT, none, cost, "cells, reverse SDE", t)

    return row


UNIFORM, TRUNCATED, VARIATIONAL = UniformDequantizer(), TruncatedNormalDequantizer(), VariationalDequantizer()
NOISY = TRUNCATED.time(zoo.build().sde, CELLS)  # where half a cell is 3 standard deviations of the noise
ROWS: list[tuple[str, Callable[[Subject], Row]]] = [
    ("ODE, one uniform draw", plain),
    ("VLB, one uniform draw", unsolved(sdekit.variational_bound)),
    ("SDE bound's mean, one uniform draw", unsolved(sdekit.path_integral)),
    ("uniform", bound(UNIFORM)),
    ("uniform, K=5", bound(UNIFORM, 5)),
    ("uniform, K=20", bound(UNIFORM, 20)),
    ("truncated normal", bound(TRUNCATED)),
    ("truncated normal, K=5", bound(TRUNCATED, 5)),
    ("truncated normal, K=20", bound(TRUNCATED, 20)),
    ("variational", bound(VARIATIONAL)),
    ("variational, K=20", bound(VARIATIONAL, 20)),
]
ROWS_OF_INTEGERS: list[tuple[str, Callable[[Subject], Row]]] = [
    ("uniform, same noise level", bound(UNIFORM, t=NOISY)),
    ("uniform, K=5", bound(UNIFORM, 5, t=NOISY)),
    ("truncated normal", bound(TRUNCATED)),
    ("truncated normal, K=5", bound(TRUNCATED, 5)),
    ("variational", bound(VARIATIONAL)),
]


class PointNet(nn.Module):
    """The digits network of the zoo for pixels that are one of 17 points, the centres of the levels' bins."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.CellNet()

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        inner, flat, t = self.inner, x.reshape(x.shape[0], -1), t.double()
        alpha, sigma = (value[:, None] for value in (inner.sde.alpha(t), inner.sde.sigma(t)))
        coefficients = inner.coefficients(flat, inner.sde.half_log_snr(t).to(x.dtype), shift).double()
        prior = inner.log_histogram + torch.einsum("ck,bcd->bkd", inner.features, coefficients)
        centres = CELLS.place(torch.arange(CELLS.count, dtype=torch.float64))
        off = (flat.double()[:, None] - alpha[:, :, None] * centres[:, None]) / sigma[:, :, None]
        share = torch.softmax(prior - 0.5 * off.square(), 1)
        return (share * off).sum(1).to(x.dtype).reshape(x.shape)


def of_integers(quick: bool, seed: int) -> sdekit.ScoreModel:
    """The shipped weights under the head of points, trained on; cached, since no likelihood has a part in it."""
    steps, net = 30 if quick else 600, PointNet()
    path = CACHE / f"discrete-{seed}-{digest(steps, repr(net))}.safetensors"
    if not path.exists():
        split = zoo.load_split().train
        net.inner.load_state_dict(zoo.load().net.state_dict())

        def batches(generator: torch.Generator) -> Batch:
            chosen = split[torch.randint(len(split), (128,), generator=generator)]
            by = torch.randint(-1, 2, (128, 2), generator=generator)
            by = by * (torch.rand(128, 1, generator=generator) < 0.5)
            return Batch(CELLS.place(zoo.shift(chosen, by)), {"shift": by.float()})

        recipe = Recipe(steps, learning_rate=3e-4, ema=0.99, times=LogNormalSigma(-1.9, 1.7), seed=seed)
        trained = train(sdekit.ScoreModel(net, net.inner.sde, data_std=0.71), batches, recipe).model
        path.parent.mkdir(parents=True, exist_ok=True)
        trained.save(path)
    return sdekit.ScoreModel.load(path, PointNet()).eval()


def root_mean(errors: Tensor) -> float:
    """The standard error of the mean of independent values with these standard errors."""
    return float(errors.square().sum().sqrt()) / len(errors)


def picture(rows: list[tuple[str, Row]], split: int, lines: list[tuple[float, str]]) -> None:
    """One picture of all rows, those of the second network below; `lines` are bits/dim to mark."""
    figure = new_figure(8.0, 0.5 + 0.33 * len(rows))
    axes = figure.add_subplot()
    bars = [
        ("images", [float(row.bits.std()) / math.sqrt(len(row.bits)) for _, row in rows]),
        ("draws", [0.0 if math.isnan(root_mean(row.draws)) else root_mean(row.draws) for _, row in rows]),
    ]
    draw_intervals(axes, [name for name, _ in rows], [float(row.bits.mean()) for _, row in rows], bars, "bits/dim")
    axes.axhline(split - 0.5, color="#777777", linewidth=0.7)
    for place, name in lines:
        axes.axvline(place, color="#777777", linewidth=0.7, linestyle=":")
        axes.annotate(name, (place, len(rows) - 0.6), fontsize=7, rotation=90, ha="right", va="bottom")
    axes.legend(frameon=False, fontsize=8, title="95% interval over", title_fontsize=8, loc="best")
    save(figure, PICTURE)


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("discrete", chosen)
    count, most = (2, 5) if chosen.quick else (20, MOST)
    split = zoo.load_split()
    k = split.test[torch.randperm(len(split.test), generator=torch.Generator().manual_seed(chosen.seed))[:count]]
    simple = zoo.baselines(split._replace(test=k))
    subjects = [
        ("uniform points", Subject(zoo.load(), k, chosen.seed, most), ROWS),
        ("integers", Subject(of_integers(chosen.quick, chosen.seed), k, chosen.seed, 5), ROWS_OF_INTEGERS),
    ]
    columns = ["trained on", "bound", "of", "t", "bits/dim", "draws +-", "images +-", "solver <=", "evaluations"]
    table = report.table("held-out digits", columns, f"{count} images. Evaluations are those of one image's bound.")
    rows: dict[tuple[str, str], Row] = {}
    bar = tqdm([(trained, subject, *row) for trained, subject, listed in subjects for row in listed])
    for trained, subject, name, evaluate in bar:
        if chosen.quick and name.endswith("K=20"):
            continue
        row = rows[trained, name] = evaluate(subject)
        spread = float(row.bits.std()) / math.sqrt(count)
        errors = [root_mean(row.draws), spread, float(row.solver.mean())]
        cost = float(row.evaluations.double().mean())
        table.rows.append([trained, name, row.of, row.t, f"{float(row.bits.mean()):.4f}", *errors, cost])
        report.save(final=False)
    marks = [(simple.mixture, "mixture of categoricals"), (simple.histogram, "histogram")]
    for value, name in marks:
        table.rows.append(["integers", name, "itself", math.nan, f"{value:.4f}", *[math.nan] * 4])
    judge(report, rows, most)
    if not chosen.quick:
        named = [(f"{name} ({trained})", row) for (trained, name), row in rows.items()]
        picture(named, len(ROWS), marks)
    report.save()


def judge(report: Report, rows: dict[tuple[str, str], Row], most: int) -> None:
    """What theory says of these rows."""

    def bits(trained: str, name: str) -> float:
        return float(rows[trained, name].bits.mean())

    single, average = rows["uniform points", "ODE, one uniform draw"], rows["uniform points", "uniform"]
    alone = average.draws * math.sqrt(most)  # of one draw
    z = float((single.bits - average.bits).mean()) / math.hypot(root_mean(alone), root_mean(average.draws))
    gap = bits("uniform points", "truncated normal") - bits("uniform points", "uniform")
    report.goals += [
        Goal("|z| of the plain ODE value beside the uniform bound (false alarm 1e-3)", abs(z), high=3.29),
        Goal("uniform points: truncated normal minus uniform, bits/dim; 0.56 for flat cells", gap, 0.3, 0.8),
        Goal(
            "integers: uniform minus truncated normal, bits/dim; 0.86 for exact noise",
            bits("integers", "uniform, same noise level") - bits("integers", "truncated normal"),
            low=0.5,
        ),
        Goal(
            "uniform points: uniform, K=5 minus average, bits/dim",
            bits("uniform points", "uniform, K=5") - bits("uniform points", "uniform"),
            high=0.0,
        ),
    ]


if __name__ == "__main__":
    main()

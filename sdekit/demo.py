"""The demo: bits per dimension of held-out digits, with each of the errors that such a number has.

The 360 test images are dequantised and evaluated with one fresh probe. Four uncertainties of their mean are kept apart:

    images          std over images / sqrt(N): another 360 images would give another mean
    trace           sqrt(sum std_error^2)/N: other probes
    solver          mean of solver_error, an estimate mostly above the true error: a smaller tolerance
    dequantisation  other points within the grey levels. From M independent draws of them, each with probes of its own:
                    mean over images of (variance over draws - mean std_error^2), / N, square root

The exact trace, and torchdiffeq's dopri5 on the same flow with the same exact trace, are put beside it on some of the
images, with what each cost. Needs `pip install "sdekit[demo]"`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torchdiffeq
from torch import Tensor
from tqdm import tqdm

from .commands.evaluation import only_the_summary_warns
from .commands.kept import require_finished
from .divergence import Divergence, Exact, Hutchinson
from .likelihood import log_likelihood
from .model.score_model import ScoreModel
from .plot import demo_figure, save
from .sampling import sample
from .terms import ProbabilityFlow
from .zoo import digits

TOLERANCE = 1e-2  # nats per image
DRAWS = 3  # independent dequantisations
SUBSET = 32  # images for the exact trace and for torchdiffeq
PEER_TOLERANCE = 1e-5  # rtol and atol of dopri5, the setting of score_sde's likelihoods
_BATCH = 120


class Row(NamedTuple):
    """One line of the table of costs.

    Attributes:
        name: The method.
        bits: (n,) bits/dim of each image.
        evaluations: (n,) network evaluations that each image needed.
        calls: Calls of the network, on batches.
        seconds: Wall time.
    """

    name: str
    bits: Tensor
    evaluations: Tensor
    calls: int
    seconds: float


@dataclass(frozen=True)
class Errors:
    """Standard errors of the mean bits/dim of one evaluation; `solver` is an estimate."""

    images: float
    trace: float
    solver: float
    dequantisation: float


class Draw(NamedTuple):
    """One dequantisation of all images, evaluated: bits/dim, their standard and solver errors, each (N,)."""

    row: Row
    std_error: Tensor
    solver_error: Tensor


_DIMENSIONS = math.prod(digits.SHAPE)
_PER_NAT = 1.0 / (_DIMENSIONS * math.log(2.0))  # bits/dim per nat


def run(picture: Path, *, seed: int = 0, progress: bool = True) -> list[str]:
    """The demo's table, line by line; draws `picture` on the way.

    Args:
        picture: Where to draw, .png, .pdf or .svg.
        seed: Of the dequantisation, the probes and the samples.
        progress: Show a progress bar.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    began = time.perf_counter()
    split, model = digits.load_split(), digits.load()
    count = split.test.shape[0]
    bar = tqdm(total=DRAWS * count + 3 * SUBSET, disable=not progress, unit="image")
    with bar, only_the_summary_warns():
        draws = [one_probe(model, split.test, seed + number, bar) for number in range(DRAWS)]
        few = dequantised(split.test, seed)[:SUBSET]
        bar.set_description("exact trace")
        exact = with_sdekit("sdekit, exact trace", model, few, Exact(), seed)[0]
        bar.update(SUBSET)
        bar.set_description("torchdiffeq")
        peer = with_torchdiffeq(model, few)
        bar.update(SUBSET)
        bar.set_description("samples")
        drawn = sample(model, (64, *digits.SHAPE), steps=24, seed=seed, device="cpu")
        require_finished(drawn.status)
        bar.update(SUBSET)
    baselines = digits.baselines(split)
    first = draws[0]
    marks = [(float(first.row.bits.mean()), "this network"), (baselines.mixture, "mixture of categoricals")]
    title = f"{count} held-out 8x8 digits, one fresh probe, tolerance {TOLERANCE:g} nats"
    save(demo_figure(drawn.x, first.row.bits, first.std_error * _PER_NAT, marks, title), picture)
    size = sum(p.numel() for p in model.parameters())
    return [
        f"{count} held-out digits (scikit-learn, 8x8, 17 grey levels), {size} parameters, "
        f"{type(model.sde).__name__} from t_min={model.sde.t_min:g}",
        *_headline(draws, uncertainties(draws)),
        "",
        f"beside it    mixture of 10 categoricals {baselines.mixture:.3f}   histogram {baselines.histogram:.3f}   "
        f"uniform {baselines.uniform:.3f}",
        "",
        *_costs(first.row, exact, peer),
        "",
        f"picture in {str(picture)!r}; {time.perf_counter() - began:.0f} s on {torch.get_num_threads()} thread(s)",
    ]


def dequantised(levels: Tensor, seed: int) -> Tensor:
    """One dequantisation of all images; the same for a seed whatever is taken of it."""
    return digits.dequantise(levels, torch.Generator().manual_seed(seed))


def one_probe(model: ScoreModel, levels: Tensor, seed: int, bar: tqdm | None = None) -> Draw:
    """All images, dequantised by `seed`, with one fresh probe keyed by it."""
    x = dequantised(levels, seed)
    if bar is not None:
        bar.set_description("one fresh probe")
    rows, errors, solver = [], [], []
    for numbers in torch.split(torch.arange(x.shape[0]), _BATCH):
        row, error, bound = with_sdekit("", model, x[numbers], Hutchinson(probes=1), seed, numbers)
        rows.append(row)
        errors.append(error)
        solver.append(bound)
        if bar is not None:
            bar.update(numbers.shape[0])
    bits, evaluations = (torch.cat([getattr(row, name) for row in rows]) for name in ("bits", "evaluations"))
    whole = Row("sdekit, one fresh probe", bits, evaluations, sum(r.calls for r in rows), sum(r.seconds for r in rows))
    return Draw(whole, torch.cat(errors), torch.cat(solver))


def with_sdekit(
    name: str, model: ScoreModel, x: Tensor, divergence: Divergence, seed: int, indices: Tensor | None = None
) -> tuple[Row, Tensor, Tensor]:
    """Images `x` (n, 1, 8, 8) by the default solver: the row, and the standard and solver errors (n,) in nats."""
    began = time.perf_counter()
    out = log_likelihood(model, x, divergence=divergence, tolerance=TOLERANCE, seed=seed, indices=indices, throw=False)
    require_finished(out.status)
    seconds = time.perf_counter() - began
    bits = out.bits_per_dim(digits.LEVELS)
    return Row(name, bits, out.stats.evaluations, out.stats.calls, seconds), out.std_error, out.solver_error


def with_torchdiffeq(model: ScoreModel, x: Tensor) -> Row:
    """Images `x` (n, 1, 8, 8) by torchdiffeq's dopri5 in t, on the same flow with the same exact trace, in float64."""
    flow, calls = ProbabilityFlow(model), 0

    def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        value = Exact().evaluate(lambda here: flow(t, here), state[0], None)
        return value.value, value.traces[:, 0]

    began = time.perf_counter()
    sde, start = model.sde, x.double()
    times = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    state = (start, torch.zeros(x.shape[0], dtype=torch.float64))
    with torch.no_grad():
        end, log_det = torchdiffeq.odeint(
            slope, state, times, method="dopri5", rtol=PEER_TOLERANCE, atol=PEER_TOLERANCE
        )
    log_prob = sde.prior_log_prob(end[-1]) + log_det[-1]
    seconds = time.perf_counter() - began
    bits = -log_prob * _PER_NAT - math.log2(2.0 / digits.LEVELS)
    name = f"torchdiffeq dopri5 {PEER_TOLERANCE:g}, exact trace"
    return Row(name, bits, torch.full((x.shape[0],), calls), calls, seconds)


def uncertainties(draws: list[Draw]) -> Errors:
    """The standard errors of the first draw's mean, in bits/dim; see the module's text."""
    first, count = draws[0], draws[0].row.bits.shape[0]
    trace = first.std_error.square().sum().sqrt() / count * _PER_NAT
    over_draws = torch.stack([draw.row.bits for draw in draws]).var(0)
    of_trace = torch.stack([draw.std_error * _PER_NAT for draw in draws]).square().mean(0)
    return Errors(
        images=float(first.row.bits.std() / math.sqrt(count)),
        trace=float(trace),
        solver=float(first.solver_error.mean()) * _PER_NAT,
        dequantisation=math.sqrt(max(0.0, float((over_draws - of_trace).mean())) / count),
    )


def _headline(draws: list[Draw], errors: Errors) -> list[str]:
    means = [float(draw.row.bits.mean()) for draw in draws]
    return [
        "",
        f"bits/dim     {means[0]:.4f}   at tolerance {TOLERANCE:g} nats an image",
        f"             +- {errors.trace:.4f}  trace: one fresh probe an evaluation",
        f"             <= {errors.solver:.4f}  solver: its own estimate",
        f"             +- {errors.dequantisation:.4f}  dequantisation: from {len(draws)} draws, whose means are "
        + " ".join(f"{mean:.4f}" for mean in means),
        f"             +- {errors.images:.4f}  images: another {draws[0].row.bits.shape[0]} would give another mean",
    ]


def _costs(first: Row, exact: Row, peer: Row) -> list[str]:
    count = exact.bits.shape[0]
    same = Row(f"sdekit, one fresh probe (first {count})", first.bits[:count], first.evaluations[:count], 0, math.nan)
    lines = [f"{'method':<38}{'images':>7}{'bits/dim':>10}{'evaluations/image':>19}{'calls':>7}{'seconds':>9}"]
    for row in (first, same, exact, peer):
        mean, most = float(row.evaluations.double().mean()), int(row.evaluations.max())
        cost = f"{row.calls:>7}{row.seconds:>9.1f}" if row.calls else f"{'':>16}"
        spent = f"{mean:.1f} (most {most})"
        lines.append(f"{row.name:<38}{row.bits.shape[0]:>7}{float(row.bits.mean()):>10.4f}{spent:>19}{cost}")
    apart = (peer.bits - exact.bits).abs() / _PER_NAT
    noise = (same.bits - exact.bits) / _PER_NAT
    return [
        *lines,
        f"the exact traces of sdekit and torchdiffeq differ by {float(apart.mean()):.2g} nats an image "
        f"(most {float(apart.max()):.2g});",
        f"one probe differs from the exact trace by {float(noise.square().mean().sqrt()):.2f} nats rms, "
        f"{float(noise.mean()):+.2f} on average",
    ]

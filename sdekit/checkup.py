"""Whether a network was told apart rightly: how well the model predicts the noise in its own data.

A wrong label, parameterization, SDE or scale of the data raises no error. The solver then integrates another field,
exactly, and log p is wrong without a warning. But a trained network predicts the noise in x_t = alpha x + sigma eps at
least as well as the best multiple of x_t - E x_t does, whose mean square error a dimension is

    alpha^2 v / (alpha^2 v + sigma^2),    v the mean of the dimensions' variances,

and predictions of what the network was not trained for are worse than that at some noise level.

Two things more are supposed of a network and cannot be seen in a solve: that a sample's answer is its own, whatever
stands beside it in the batch, at whatever level; and that autograd's derivative of the answer is its derivative
(detached parts, straight-through estimators and gradients taken without `create_graph` have another), which is compared
with a central difference along a random direction.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _random
from ._checks import (
    require_batch,
    require_count,
    require_deterministic,
    require_indices,
    require_same_device,
    require_seed,
)
from ._products import traced, vector_jacobian
from ._random import Stream
from ._tensor import flatten, working
from .errors import NetworkError
from .model.score_model import ScoreModel
from .solution import quantile

_SURE = math.erf(4.0 / math.sqrt(2.0))  # confidence of an alarm: that of four standard errors of a normal law
_TIMES, _MORE = 1.05, 0.01  # and so many times it and more: no network is perfect where the linear one nearly is
_APART = 0.01  # of its size that an answer may change with its company: single precision and TF32 change it by less
_BENT = 0.01  # of its size that autograd's derivative may be off: kinks are, by less
_ROWS = 12  # samples looked at for both
_PRECISE = 1e-5  # relative precision that a difference of answers needs


class Checkup(NamedTuple):
    """How well a model predicts the noise in data, level by level.

    Attributes:
        t: (n,) float64 times, from t_min to t_max.
        error: (n,) float64 mean square error a dimension of the predicted noise, whose own mean square is 1.
        std_error: (n,) float64 of `error`, over the samples.
        linear: (n,) float64 the error of the best multiple of the centred state.
        samples: How many there were.
        apart: By how much of its size a sample's answer changes, where it changes most, when it is asked for alone and
            not in a batch of samples at other levels.
        bent: By how much of its size autograd's derivative differs from a difference of answers; infinite where there
            is none, NaN where the network's precision is too low to tell.
    """

    t: Tensor
    error: Tensor
    std_error: Tensor
    linear: Tensor
    samples: int
    apart: float
    bent: float

    def worse(self) -> Tensor:
        """(n,) bool, where the model is clearly worse than linear: it is not called as it was trained."""
        sure = quantile(self.samples - 1, _SURE)
        return ~(self.error - sure * self.std_error <= _TIMES * self.linear + _MORE)

    def faults(self) -> list[str]:
        """A line for each thing that is wrong; none where nothing was found."""
        found = []
        if bad := int(self.worse().sum()):
            found.append(
                f"worse than linear at {bad} of {len(self.t)} levels: not called as it was trained (label, "
                "parameterization, SDE, scale of the data), or hardly trained"
            )
        if not self.apart <= _APART:
            found.append(
                f"a sample's answer changes by {self.apart:.2g} of its size with the batch it is in: batch statistics, "
                "a label taken from the first sample, or random numbers"
            )
        if self.bent > _BENT:
            found.append(
                f"autograd's derivative is off by {self.bent:.2g} of its size: a part is detached, straight-through, "
                "or a gradient taken without create_graph; no density is to be had"
            )
        return found

    def table(self) -> str:
        """The numbers as lines of text, `worse` marked, and the faults."""
        columns = (self.t, self.error, self.std_error, self.linear, self.worse())
        lines = [
            f"{t:12.4g}  {error:9.4f}  {spread:9.4f}  {linear:9.4f}{'  worse' if worse else ''}"
            for t, error, spread, linear, worse in zip(*(column.tolist() for column in columns), strict=True)
        ]
        heading = f"{'t':>12}  {'error':>9}  {'+-':>9}  {'linear':>9}"
        return "\n".join((heading, *lines, *(f"! {fault}" for fault in self.faults())))


def check_model(
    model: ScoreModel, x: Tensor, *, levels: int = 12, seed: int = 0, indices: Tensor | None = None
) -> Checkup:
    """How well the model predicts the noise in `x`, beside a linear prediction: to be looked at before any log p.

    Costs one evaluation of every sample a level, and those of some fifty single samples.

    Args:
        model: The score model, in eval mode.
        x: (B, *event) data as the network sees them, some hundred samples, of the kind it was trained on.
        levels: How many, >= 2, equally spaced in half_log_snr from t_min to t_max.
        seed: Of the noise, 0 <= seed < 2^63.
        indices: (B,) global sample numbers that key the noise; default 0..B-1.

    Returns:
        A Checkup; `.faults()` says what is wrong, `.table()` is to print.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        NetworkError: The network cannot be used.
    """
    require_batch("x", x)
    require_same_device(model, x)
    require_deterministic(model)
    model.check_batch(x.shape[0])
    require_count("levels", levels, 2)
    require_seed(seed)
    if x.shape[0] < 2:
        raise ValueError(f"x.shape={tuple(x.shape)}; two samples are needed at least, and some hundred to tell much.")
    sde, state = model.sde, working(x)
    keys = _random.sample_keys(seed, Stream.CHECK, require_indices(indices, x.shape[0], x.device))
    first, last = (float(sde.half_log_snr(t)) for t in (sde.t_min, sde.t_max))
    times = sde.clamp(sde.time_at(torch.linspace(first, last, levels, dtype=torch.float64)))
    variance = float(state.double().var(0, correction=1).mean())
    errors, spreads = [], []
    with torch.inference_mode(False), torch.no_grad():
        for number, t in enumerate(times):
            at = torch.full((x.shape[0],), float(t), dtype=torch.float64, device=x.device)
            counter = torch.full_like(keys, number)
            noise = _random.normal(keys, counter, x.shape[1:].numel(), state.dtype).reshape(state.shape)
            missed = (model.noise(sde.perturb(state, at, noise), at) - noise).double().square().flatten(1).mean(1)
            errors.append(missed.mean())
            spreads.append(missed.std() / len(missed) ** 0.5)
    signal, sigma = sde.alpha(times).square() * variance, sde.sigma(times)
    error, spread = torch.stack(errors).cpu(), torch.stack(spreads).cpu()
    linear = signal / (signal + sigma.square())
    with torch.inference_mode(False):
        looked_at = _looked_at(model, state.clone(), keys, (first, last))
    return Checkup(times, error, spread, linear, x.shape[0], *looked_at)


def _looked_at(model: ScoreModel, x: Tensor, keys: Tensor, ends: tuple[float, float]) -> tuple[float, float]:
    """`apart` and `bent` of a Checkup, at some of the samples `x`, whose noise `keys` draw, between levels `ends`."""
    rows = torch.arange(_ROWS, device=x.device) % len(x)
    some, state, sde, size = model.take(rows), x[rows], model.sde, x[0].numel()
    keys, counter = keys[rows], torch.arange(_ROWS, device=x.device) - _ROWS  # counters that no level has

    def diffused(half_log_snr: Tensor) -> tuple[Tensor, Tensor]:
        t = sde.clamp(sde.time_at(half_log_snr)).to(x.device)
        return sde.perturb(state, t, _random.normal(keys, counter, size, x.dtype).reshape(state.shape)), t

    seen, t = diffused(torch.linspace(*ends, _ROWS, dtype=torch.float64))
    with torch.no_grad():
        together = flatten(some.output(seen, t)).double()
        each = [some.take(row).output(seen[row], t[row]) for row in torch.arange(_ROWS, device=x.device)[:, None]]
    change = (flatten(torch.cat(each)).double() - together).square().mean(1).sqrt()
    apart = float(change.max() / together.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny))
    if torch.finfo(model.precision(x)).eps > _PRECISE:
        return apart, torch.nan
    # Where data and noise are of one size, nothing is so fine that a difference could not see it.
    middle = torch.linspace(1.0, -1.0, _ROWS, dtype=torch.float64).clamp(min(ends), max(ends))
    return apart, _bent(some, *diffused(middle), _random.rademacher(keys, counter, size, x.dtype))


def _bent(model: ScoreModel, x: Tensor, t: Tensor, direction: Tensor) -> float:
    """How far autograd's derivative along `direction` (B, D) is from a central difference, in its own size."""
    step = 0.3 * torch.finfo(model.precision(x)).eps ** (1.0 / 3.0) * float(x.double().square().mean().sqrt())
    try:
        out, leaf = traced(lambda given: model.output(given, t), x)
        product = flatten(vector_jacobian(out, leaf, direction.reshape(1, *x.shape), False)[0]).double()
    except NetworkError as error:
        if error.__cause__ is not None:  # the network raised
            raise
        return torch.inf
    with torch.no_grad():
        moved = step * direction.reshape(x.shape)
        change = flatten(model.output(x + moved, t) - model.output(x - moved, t)).double() / (2.0 * step)
    by_graph, by_change = (part.mul(direction).sum(1) for part in (product, change))
    size = by_graph.abs() + by_change.abs() + product.norm(dim=1)  # the last is of the Jacobian's own size
    return float((by_graph - by_change).abs().mean() / size.mean().clamp(min=torch.finfo(torch.float32).tiny))

"""Whether a network was told apart rightly: how well the model predicts the noise in its own data.

A wrong label, parameterization, SDE or scale of the data raises no error. The solver then integrates another field,
exactly, and log p is wrong without a warning. But a trained network predicts the noise in x_t = alpha x + sigma eps at
least as well as the best multiple of x_t - E x_t does, whose mean square error a dimension is

    alpha^2 v / (alpha^2 v + sigma^2),    v the mean of the dimensions' variances,

and predictions of what the network was not trained for are worse than that at some noise level.
"""

from __future__ import annotations

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
from ._random import Stream
from ._tensor import working
from .model.score_model import ScoreModel

_SURE = 4.0  # standard errors above the linear prediction's error
_TIMES, _MORE = 1.05, 0.01  # and so many times it and more: no network is perfect where the linear one nearly is


class Checkup(NamedTuple):
    """How well a model predicts the noise in data, level by level.

    Attributes:
        t: (n,) float64 times, from t_min to t_max.
        error: (n,) float64 mean square error a dimension of the predicted noise, whose own mean square is 1.
        std_error: (n,) float64 of `error`, over the samples; NaN of one sample.
        linear: (n,) float64 the error of the best multiple of the centred state.
    """

    t: Tensor
    error: Tensor
    std_error: Tensor
    linear: Tensor

    def worse(self) -> Tensor:
        """(n,) bool, where the model is clearly worse than linear: it is not called as it was trained."""
        return ~(self.error - _SURE * self.std_error.nan_to_num(0.0) <= _TIMES * self.linear + _MORE)

    def table(self) -> str:
        """The numbers as lines of text, `worse` marked."""
        rows = zip(*(column.tolist() for column in self), self.worse().tolist(), strict=True)
        lines = [
            f"{t:12.4g}  {error:9.4f}  {spread:9.4f}  {linear:9.4f}{'  worse' if worse else ''}"
            for t, error, spread, linear, worse in rows
        ]
        return "\n".join((f"{'t':>12}  {'error':>9}  {'+-':>9}  {'linear':>9}", *lines))


def check_model(
    model: ScoreModel, x: Tensor, *, levels: int = 12, seed: int = 0, indices: Tensor | None = None
) -> Checkup:
    """How well the model predicts the noise in `x`, beside a linear prediction: to be looked at before any log p.

    Costs one evaluation of every sample a level.

    Args:
        model: The score model, in eval mode.
        x: (B, *event) data as the network sees them, some hundred samples, of the kind it was trained on.
        levels: How many, >= 2, equally spaced in half_log_snr from t_min to t_max.
        seed: Of the noise, 0 <= seed < 2^63.
        indices: (B,) global sample numbers that key the noise; default 0..B-1.

    Returns:
        A Checkup; `.worse()` where something is wrong, `.table()` to print.

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
    if not x.shape[0]:
        raise ValueError(f"x.shape={tuple(x.shape)}; at least one sample is needed.")
    sde, state = model.sde, working(x)
    keys = _random.sample_keys(seed, Stream.CHECK, require_indices(indices, x.shape[0], x.device))
    first, last = (float(sde.half_log_snr(t)) for t in (sde.t_min, sde.t_max))
    times = sde.clamp(sde.time_at(torch.linspace(first, last, levels, dtype=torch.float64)))
    variance = float(state.double().var(0, correction=0).mean())
    errors, spreads = [], []
    with torch.no_grad():
        for number, t in enumerate(times):
            at = torch.full((x.shape[0],), float(t), dtype=torch.float64, device=x.device)
            counter = torch.full_like(keys, number)
            noise = _random.normal(keys, counter, x.shape[1:].numel(), state.dtype).reshape(state.shape)
            missed = (model.noise(sde.perturb(state, at, noise), at) - noise).double().square().flatten(1).mean(1)
            errors.append(missed.mean())
            spreads.append(missed.std() / len(missed) ** 0.5 if len(missed) > 1 else missed.new_tensor(torch.nan))
    signal, sigma = sde.alpha(times).square() * variance, sde.sigma(times)
    return Checkup(times, torch.stack(errors).cpu(), torch.stack(spreads).cpu(), signal / (signal + sigma.square()))

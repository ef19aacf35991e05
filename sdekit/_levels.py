"""Integrals over half_log_snr by independent draws: any number of (sample, draw) pairs a network call.

A path starts either at the data, x_0 = x, or at the noise level t_min, x_{t_min} = x. Given x it is Gaussian,

    x_t = a x + b z,     z ~ N(0, I),     kappa = sigma/b
    from the data:  a = alpha,                   b = sigma
    from t_min:     a = alpha/alpha(t_min),      b = sigma sqrt(1 - exp(-2 delta)),    delta = lambda(t_min) - lambda(t)

and everything that solves no equation is one integral of the predicted noise eps along it, less that of a Gaussian g,
whose own integral is known in closed form (lambda = log alpha/sigma, over [lambda(t_max), lambda(t_min)]):

    denoising form    I = int E[|eps|^2 - |eps_g|^2 - 2 kappa z . (eps - eps_g)] d lambda
    divergence form   I = int E[|eps|^2 - |eps_g|^2 - 2 sigma div(eps - eps_g)]  d lambda

The two are equal for every network, by parts. g only takes variance away: its integral is put back by the caller.
From t_min the first has kappa -> infinity at delta -> 0; the network's answer at x itself, held, takes that out:
2 kappa exp(-2 delta) z . (eps - eps_g)(x, t_min) has mean 0.

The levels are stratified: each of n/2 equal parts of their law holds two independent draws, so the estimate has the
variance of a stratified one and that variance is estimated without bias: sum of (difference)^2/4 over (n/2)^2.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
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
from ._fit import check_moments
from ._random import Stream
from ._tensor import column, dot, flatten, working
from .divergence import Divergence, Hutchinson
from .errors import SdekitWarning
from .loss import Times
from .model.parameterization import Noise, conversion
from .model.score_model import ScoreModel
from .sde.base import SDE, as_time
from .targets import Gaussian

_NEAREST = 1e-8  # of delta: below, the time itself is rounded
_HEAVY = 50.0  # times the weight of uniform levels; the default's heaviest have some ten times


@dataclass(frozen=True)
class Plan:
    """How noise levels and noise are drawn, for each sample.

    The result does not depend on `batch`, nor on which samples are evaluated together.

    Attributes:
        draws: Draws a sample, even, at least 2: as many network evaluations.
        times: The law of the noise levels, divided out again: the mean stays the same, but `std_error` knows only of
            levels that came. `UniformHalfLogSNR()` gives all of them one weight.
        seed: 0 <= seed < 2^63.
        batch: Pairs of a sample and a draw in one network call, at least 1.
    """

    draws: int
    times: Times
    seed: int
    batch: int

    def __post_init__(self) -> None:
        require_count("draws", self.draws, 2)
        if self.draws % 2:
            raise ValueError(f"draws={self.draws}; an even number is needed: two draws a stratum tell its variance.")
        require_count("batch", self.batch)
        require_seed(self.seed)
        if not isinstance(self.times, Times):
            raise TypeError(f"times={self.times!r}; an sdekit.loss.Times is needed, e.g. UniformHalfLogSNR().")


class Integral(NamedTuple):
    """(B,) float64 value and variance of an estimated integral, and (B,) int64 network evaluations."""

    value: Tensor
    variance: Tensor
    evaluations: Tensor


class Pairs(NamedTuple):
    """A chunk of (sample, draw) pairs.

    Attributes:
        model: With the condition of each pair's sample.
        row: (n,) which sample.
        number: (n,) which draw of it.
        state: (n, *event) x_t.
        noise: (n, *event) z, in the dtype of the state.
        t: (n,) float64.
        kappa: (n,) float64.
        delta: (n,) float64 lambda(t_min) - lambda(t).
    """

    model: ScoreModel
    row: Tensor
    number: Tensor
    state: Tensor
    noise: Tensor
    t: Tensor
    kappa: Tensor
    delta: Tensor


class Spread(NamedTuple):
    """x_t given x at one time, for all samples: a and the variance b^2, float64 numbers."""

    scale: Tensor
    variance: Tensor


class Question:
    """Data, a model and the Gaussian laws it is compared with, checked.

    Args:
        model: The score model, in eval mode.
        x: (B, *event) floating data.
        plan: How to draw.
        data_moments: Gaussian of the data: the reference, and its p_T the terminal law. None: N(0, data_std^2 I) is
            the reference, and the SDE's prior the terminal law.
        indices: (B,) global sample numbers; default 0..B-1.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
    """

    def __init__(
        self, model: ScoreModel, x: Tensor, plan: Plan, data_moments: Gaussian | None, indices: Tensor | None
    ) -> None:
        require_batch("x", x)
        require_same_device(model, x)
        require_deterministic(model)
        model.check_batch(x.shape[0])
        check_moments(data_moments, x)
        self.model, self.sde, self.plan = model, model.sde, plan
        if (most := plan.times.heaviest(model.sde)) > _HEAVY:
            warnings.warn(
                f"times={plan.times!r} gives some levels {most:.0f} times the weight of uniform ones: they hardly ever "
                "come, so value and std_error mean little unless the network is right there. Leave times out.",
                SdekitWarning,
                stacklevel=3,
            )
        self.x = working(x)
        self.numbers = require_indices(indices, x.shape[0], x.device)
        self.terminal = data_moments
        plain = torch.ones(x.shape[1:], dtype=torch.float64)
        self.reference = Gaussian(0.0 * plain, model.data_std**2 * plain) if data_moments is None else data_moments

    def spread(self, t: float, from_data: bool) -> Spread:
        """How x_t lies around x at time `t`."""
        if from_data:
            return Spread(self.sde.alpha(t), self.sde.sigma(t).square())
        delta = self.sde.half_log_snr(self.sde.t_min) - self.sde.half_log_snr(t)
        scale = torch.exp(self.sde.log_alpha(t) - self.sde.log_alpha(self.sde.t_min))
        return Spread(scale, self.sde.sigma(t).square() * -torch.expm1(-2.0 * delta))

    def mean_log_reference(self, t: float, spread: Spread) -> Tensor:
        """(B,) E[log g_t(x_t)] given x."""
        return mean_log_gaussian(self.reference, self.sde, self.x, t, spread)

    def mean_log_terminal(self, spread: Spread) -> Tensor:
        """(B,) E[log of the terminal law at x_T] given x."""
        if self.terminal is not None:
            return mean_log_gaussian(self.terminal, self.sde, self.x, self.sde.t_max, spread)
        size, law = self.x.shape[1:].numel(), self.sde.prior_std**2
        at_mean = self.sde.prior_log_prob(spread.scale.to(self.x.device) * self.x.double())
        return at_mean - 0.5 * size * spread.variance.to(self.x.device) / law

    def terminal_gain(self, from_data: bool) -> Tensor:
        """(B,) E[log terminal law - log g_T] at x_T given x; 0 where the two are one."""
        if self.terminal is not None:
            return torch.zeros(self.x.shape[0], dtype=torch.float64, device=self.x.device)
        spread = self.spread(self.sde.t_max, from_data)
        return self.mean_log_terminal(spread) - self.mean_log_reference(self.sde.t_max, spread)

    def gap(self, model: ScoreModel, state: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """eps - eps_g and eps + eps_g at states (n, *event) and times (n,), float64."""
        mine = model.noise(state, t).double()
        theirs = self.reference.predict(self.sde, state, t)[1]
        return mine - theirs, mine + theirs

    def denoising(self, from_data: bool) -> Integral:
        """The denoising form of the integral: plain network calls."""
        with torch.inference_mode(False), torch.no_grad():
            return self._denoising(from_data)

    def _denoising(self, from_data: bool) -> Integral:
        held = None
        if not from_data and self.x.shape[0]:
            first = as_time(self.sde.t_min).to(self.x.device).expand(self.x.shape[0])
            held = torch.cat(
                [
                    self.gap(self.model.take(rows), self.x[rows], first[rows])[0]
                    for rows in torch.split(torch.arange(self.x.shape[0], device=self.x.device), self.plan.batch)
                ]
            )

        def integrand(pairs: Pairs) -> Tensor:
            difference, total = self.gap(pairs.model, pairs.state, pairs.t)
            noise = column(pairs.kappa, difference) * pairs.noise.double()
            value = dot(difference, total - 2.0 * noise)
            if held is None:
                return value
            return value + 2.0 * torch.exp(-2.0 * pairs.delta) * dot(noise, held[pairs.row])

        found = self.integrate(integrand, from_data)
        return found if held is None else found._replace(evaluations=found.evaluations + 1)

    def diverging(self, divergence: Divergence, from_data: bool) -> Integral:
        """The divergence form of the integral."""
        # Of their own: with a solve's probes the bound would lean to the side that log p leans to.
        keys = Hutchinson.keys(self.plan.seed, self.numbers, (Stream.BOUND, Stream.BOUND_CONTROL))

        def integrand(pairs: Pairs) -> Tensor:
            mine = conversion(
                self.sde.alpha(pairs.t),
                self.sde.sigma(pairs.t),
                pairs.model.parameterization.mix(self.sde, pairs.t),
                Noise().mix(self.sde, pairs.t),
            )
            probes = None
            if isinstance(divergence, Hutchinson):
                size = pairs.state[:1].numel()
                probes = divergence.draw(keys[pairs.row], pairs.number, size, pairs.state.dtype)
            out, traces, _ = divergence.evaluate(lambda x: pairs.model.output(x, pairs.t), pairs.state, probes)
            state = pairs.state.double()
            eps = column(mine.x, state) * state + column(mine.output, state) * out.double()
            trace = mine.x * pairs.state[:1].numel() + mine.output * traces.mean(1)
            theirs = self.reference.predict(self.sde, pairs.state, pairs.t)[1]
            sigma = self.sde.sigma(pairs.t)
            trace_g = -sigma * self.reference.divergence(self.sde, pairs.state, pairs.t)
            return dot(eps - theirs, eps + theirs) - 2.0 * sigma * (trace - trace_g)

        with torch.inference_mode(False), torch.no_grad():
            return self.integrate(integrand, from_data)

    def integrate(self, integrand: Callable[[Pairs], Tensor], from_data: bool) -> Integral:
        """The integral over half_log_snr of the mean of `integrand`, which takes pairs and returns (n,) float64."""
        batch, count, device = self.x.shape[0], self.plan.draws, self.x.device
        keys = _random.sample_keys(self.plan.seed, Stream.LEVEL, self.numbers)
        parts = [torch.zeros(0, dtype=torch.float64, device=device)]
        for chosen in torch.split(torch.arange(batch * count, device=device), self.plan.batch):
            if chosen.numel():
                pairs, weight = self._pairs(keys, chosen // count, chosen % count, from_data)
                parts.append(weight * integrand(pairs))
        values = torch.cat(parts).reshape(batch, count // 2, 2)
        apart = (values[:, :, 0] - values[:, :, 1]).square()
        evaluations = torch.full((batch,), count, dtype=torch.int64, device=device)
        return Integral(values.mean((1, 2)), apart.sum(1) / count**2, evaluations)

    def _pairs(self, keys: Tensor, row: Tensor, number: Tensor, from_data: bool) -> tuple[Pairs, Tensor]:
        """The pairs of samples `row` and draws `number`, and the weight (n,) of each: 1 / density of half_log_snr."""
        sde, x, mine = self.sde, self.x[row], keys[row]
        strata = self.plan.draws // 2
        u = (number // 2 + 1.0 - _random.uniform(mine, 2 * number)) / strata
        drawn = self.plan.times.at(sde, u)
        t = sde.clamp(drawn.t)
        noise = _random.normal(mine, 2 * number + 1, flatten(x).shape[1], torch.float64).reshape(x.shape).to(x.dtype)
        scale, spread, kappa, delta = _path(sde, t, from_data)
        state = column(scale, x) * x + column(spread, x) * noise
        pairs = Pairs(self.model.take(row), row, number, state, noise, t, kappa, delta)
        return pairs, -sde.dhalf_log_snr(t) / drawn.density


def _path(sde: SDE, t: Tensor, from_data: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, kappa and delta at times `t`."""
    delta = (sde.half_log_snr(as_time(sde.t_min)) - sde.half_log_snr(t)).clamp(min=_NEAREST)
    if from_data:
        return sde.alpha(t), sde.sigma(t), torch.ones_like(t), delta
    share = (-torch.expm1(-2.0 * delta)).sqrt()
    return torch.exp(sde.log_alpha(t) - sde.log_alpha(sde.t_min)), sde.sigma(t) * share, share.reciprocal(), delta


def mean_log_gaussian(law: Gaussian, sde: SDE, x: Tensor, t: float, spread: Spread) -> Tensor:
    """(B,) E[log p_t(a x + b z)] for a Gaussian `law` of the data: at the mean, and half b^2 times the curvature."""
    center = spread.scale.to(x.device) * x.double()
    curvature = law.divergence(sde, center, t)
    return law.marginal_log_prob(sde, center, t) + 0.5 * spread.variance.to(x.device) * curvature

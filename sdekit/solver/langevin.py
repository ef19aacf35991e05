"""Correctors: moves that leave the marginal p_t where it is, at a time that stands still.

With the score at time t, a step e = e(t) and standard normals z,

    Langevin      x <- x + e score(x) + sqrt(2 e) z
    MALA          the same, kept with the probability that makes p_t invariant exactly; it needs log p_t
    Underdamped   Langevin dynamics with a momentum, split as kick, drift, refresh, drift, kick (BAOAB)

Without a test of acceptance the law is p_t up to the bias of a finite step. On N(0, V) that is known: Langevin ends at
the variance V / (1 - e/(2V)) and forgets its start by 1 - e/V a move; Underdamped ends at V exactly.

A step in units of sigma(t)^2 is never too long for a Gaussian, for V = alpha^2 v + sigma^2 >= sigma^2.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import require_count, require_positive
from .._tensor import column, dot, select
from ..brownian import BrownianPath
from ..sde.base import SDE
from ..terms import Term
from .predictor_corrector import Corrector, Moved, StepNoise


class _Unadjusted(Corrector):
    """Langevin moves that are never refused; a subclass says how long."""

    @property
    def evaluations(self) -> int:
        return self.moves

    @abstractmethod
    def _size(self, sde: SDE, t: Tensor, score: Tensor, noise: Tensor) -> Tensor:
        """(B,) float64 step e of a move from the score and the noise that it will use."""

    def move(self, term: Term, s: Tensor, z: Tensor, memory: Any, step: Tensor, path: BrownianPath) -> Moved:
        model, t, draws = term.model, term.time(s), StepNoise(path, step, self.moves)
        total = torch.zeros_like(t)
        for k in range(self.moves):
            score, noise = model.score(z, t), draws.normal(k, z)
            size = self._size(model.sde, t, score, noise)
            z = z + column(size, z) * score + column((2.0 * size).sqrt(), z) * noise
            total = total + size
        return Moved(z, memory, torch.ones_like(t), total / self.moves)


@dataclass(frozen=True)
class Langevin(_Unadjusted):
    """Unadjusted Langevin moves of the step e = delta sigma(t)^2.

    The default inflates the variance by delta / (2 - delta) = 1% at most, after any number of moves: that much in
    directions that hold nothing but noise, and less by sigma^2 / V elsewhere. An error of the variance that a predictor
    left there shrinks by 4% a move.

    Args:
        delta: The step in units of sigma(t)^2, in (0, 2): longer ones diverge where V = sigma^2.
        moves: Moves a step, >= 1; an evaluation each.

    Source: Roberts and Tweedie 1996, Exponential convergence of Langevin distributions.
    """

    delta: float = 0.02
    moves: int = 1

    @property
    def linear(self) -> bool:
        return True

    def __post_init__(self) -> None:
        _require_below("delta", self.delta, 2.0)
        require_count("moves", self.moves)

    def _size(self, sde: SDE, t: Tensor, score: Tensor, noise: Tensor) -> Tensor:
        return self.delta * sde.sigma(t).square()


def AnnealedLangevin(snr: float = 0.16, moves: int = 1) -> Langevin:
    """Langevin moves of the step e = 2 (snr sigma(t))^2, as annealed Langevin dynamics is parametrized.

    Args:
        snr: In (0, 1).
        moves: Moves a step, >= 1.

    Source: Song et al. 2021, Score-based generative modeling through stochastic differential equations.
    """
    _require_below("snr", snr, 1.0)
    return Langevin(2.0 * snr * snr, moves)


@dataclass(frozen=True)
class SNRLangevin(_Unadjusted):
    """Langevin moves of the step e = 2 (snr |z| / |score|)^2, the norms those of each sample.

    Of high-dimensional samples the norms hardly vary, and on N(0, V I) the moves end at the variance (1 + snr^2) V:
    2.6% too much at 0.16. In D dimensions the norms inflate it by about 4/D more, so below some hundred dimensions
    `Langevin` is better; in one or two the variance after a move is infinite, and they are refused.

    The published factor alpha_i (1 for VE, the retention 1 - beta_i of one step of a discrete VP chain) is 1 here: in
    continuous time there is no such step, and in the usual chain of 1000 it is between 0.98 and 1.

    Args:
        snr: Ratio of the moves' drift to their noise, in (0, 1).
        moves: Moves a step, >= 1; an evaluation each.

    Source: Song et al. 2021, Score-based generative modeling through stochastic differential equations.
    """

    snr: float = 0.16
    moves: int = 1

    def __post_init__(self) -> None:
        _require_below("snr", self.snr, 1.0)
        require_count("moves", self.moves)

    def _memory(self, z: Tensor) -> None:
        if z.shape[1:].numel() <= 2:
            raise ValueError(
                f"x.shape={tuple(z.shape)}; SNRLangevin needs 3 dimensions or more, or its steps have no mean: "
                "pass Langevin(), or BatchSNRLangevin() for the published rule."
            )

    def _size(self, sde: SDE, t: Tensor, score: Tensor, noise: Tensor) -> Tensor:
        return _ratio_rule(self.snr, dot(noise, noise), dot(score, score))


@dataclass(frozen=True)
class BatchSNRLangevin(_Unadjusted):
    """Langevin moves of the published step e = 2 (snr mean|z| / mean|score|)^2, the means over the batch.

    It couples the samples: what comes out for one depends on the others in the batch and on how many there are, and a
    solve that drops its finished samples changes the step of those left. It is for reproduction; samples whose norm is
    not finite are left out of the means. The published factor alpha_i is 1 here, as in `SNRLangevin`.

    Args:
        snr: Ratio of the moves' drift to their noise, in (0, 1).
        moves: Moves a step, >= 1; an evaluation each.

    Source: Song et al. 2021, Score-based generative modeling through stochastic differential equations.
    """

    snr: float = 0.16
    moves: int = 1

    def __post_init__(self) -> None:
        _require_below("snr", self.snr, 1.0)
        require_count("moves", self.moves)

    @property
    def couples_samples(self) -> bool:
        return True

    def _size(self, sde: SDE, t: Tensor, score: Tensor, noise: Tensor) -> Tensor:
        lengths = torch.stack((dot(noise, noise), dot(score, score)), 1).sqrt()
        sound = torch.isfinite(lengths).all(1)
        means = torch.where(sound[:, None], lengths, 0.0).sum(0) / sound.sum().clamp(min=1)
        return _ratio_rule(self.snr, means[0].square(), means[1].square()).expand_as(t)


@dataclass(frozen=True)
class Underdamped(Corrector):
    """Langevin dynamics with a momentum p of mass 1, in units of sigma(t), by the splitting BAOAB.

    With h the step and F = sigma score, each move is

        p <- p + h/2 F;  x <- x + h/2 sigma p;  p <- e^{-friction h} p + sqrt(1 - e^{-2 friction h}) z;
        x <- x + h/2 sigma p;  p <- p + h/2 F.

    On Gaussians the stationary law of x is exact for every h < 2 and friction > 0. The momentum's is not of variance 1
    but a part of h^2 less, so the standard normals that it begins with heat x for some moves: by 1% under the default
    and 8% under h = 1. It lasts: fresh normals at every step would heat x for good. One call
    makes moves + 1 evaluations: since the last score of the call before, the predictor has moved x.

    Args:
        step: h, in (0, 2). Under strong friction it is a Langevin step of e = (h sigma)^2 / 2, reported as its size.
        friction: >= 0, a unit of h; 0 never refreshes the momentum, and what it began with is never forgotten.
        moves: Moves a step, >= 1.

    Source: Leimkuhler and Matthews 2013, Rational construction of stochastic numerical methods for molecular sampling.
    """

    step: float = 0.5
    friction: float = 2.0
    moves: int = 1

    @property
    def linear(self) -> bool:
        return True

    def __post_init__(self) -> None:
        _require_below("step", self.step, 2.0)
        if not (math.isfinite(self.friction) and self.friction >= 0):
            raise ValueError(f"friction={self.friction!r}; a finite number of at least 0 is needed.")
        require_count("moves", self.moves)

    @property
    def evaluations(self) -> int:
        return self.moves + 1

    def _memory(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def move(self, term: Term, s: Tensor, z: Tensor, memory: Tensor, step: Tensor, path: BrownianPath) -> Moved:
        model, t, draws = term.model, term.time(s), StepNoise(path, step, self.moves + 1)
        sigma = model.sde.sigma(t)
        drift, half = column(0.5 * self.step * sigma, z), 0.5 * self.step
        keep, fresh = math.exp(-self.friction * self.step), math.sqrt(-math.expm1(-2.0 * self.friction * self.step))
        momentum = select(step == 0, draws.normal(0, z), memory)
        kick = half * column(sigma, z) * model.score(z, t)
        for k in range(1, self.moves + 1):
            momentum = momentum + kick
            z = z + drift * momentum
            momentum = keep * momentum + fresh * draws.normal(k, z)
            z = z + drift * momentum
            kick = half * column(sigma, z) * model.score(z, t)
            momentum = momentum + kick
        return Moved(z, momentum, torch.ones_like(t), 0.5 * (self.step * sigma).square())


@dataclass(frozen=True)
class MALA(Corrector):
    """Langevin moves of the step e = delta sigma(t)^2, Metropolis-adjusted: the law p_t is kept exactly.

    It needs log p_t, and p_t of `log_prob` is the law that it keeps, whatever the network: a wrong score costs
    acceptance only. One call makes moves + 1 evaluations (the score at the last accepted point is kept from move to
    move) and asks `log_prob` as often, which is not counted.

    Args:
        delta: The step in units of sigma(t)^2, > 0.
        log_prob: `log_prob(x, t)` returns (B,) log densities, nats, up to a constant a time, of `x` (B, *event) at `t`
            (B,); of each sample on its own and of nothing else: finished samples leave the batch. For an exact target,
            `functools.partial(target.marginal_log_prob, sde)`.
        moves: Moves a step, >= 1.

    Source: Roberts and Tweedie 1996, Exponential convergence of Langevin distributions.
    """

    delta: float
    log_prob: Callable[[Tensor, Tensor], Tensor]
    moves: int = 1

    def __post_init__(self) -> None:
        require_positive("delta", self.delta)
        if not callable(self.log_prob):
            raise TypeError(f"log_prob={self.log_prob!r}; a function of (x, t) that returns (B,) is needed.")
        require_count("moves", self.moves)

    @property
    def evaluations(self) -> int:
        return self.moves + 1

    def _log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        value = self.log_prob(x, t)
        if not isinstance(value, Tensor) or value.shape != t.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"log_prob returned {found}; a tensor of shape {tuple(t.shape)} is needed, one a sample.")
        return value.double()

    def move(self, term: Term, s: Tensor, z: Tensor, memory: Any, step: Tensor, path: BrownianPath) -> Moved:
        model, t, draws = term.model, term.time(s), StepNoise(path, step, 2 * self.moves)
        size = self.delta * model.sde.sigma(t).square()
        kept, count = (z, model.score(z, t), self._log_prob(z, t)), torch.zeros_like(t)
        for k in range(self.moves):
            x, score, density = kept
            noise = draws.normal(2 * k, z)
            y = x + column(size, x) * score + column((2.0 * size).sqrt(), x) * noise
            there = (y, model.score(y, t), self._log_prob(y, t))
            # log q(x|y) - log q(y|x), with y - x put in: |y - x|^2 / (4 e) would cancel, and divide 0 by 0 at e = 0.
            both = score + there[1]
            back = -(0.5 * size).sqrt() * dot(noise, both) - 0.25 * size * dot(both, both)
            accept = draws.uniform(2 * k + 1).log() <= there[2] - density + back
            kept, count = select(accept, there, kept), count + accept
        return Moved(kept[0], memory, count / self.moves, size)


def _ratio_rule(snr: float, noise: Tensor, score: Tensor) -> Tensor:
    """2 snr^2 times the ratio of squared norms; 0 where the score is 0 and no step is right."""
    moves = score > 0
    return torch.where(moves, 2.0 * snr**2 * noise / torch.where(moves, score, 1.0), 0.0)


def _require_below(name: str, value: float, bound: float) -> None:
    require_positive(name, value)
    if not value < bound:
        raise ValueError(f"{name}={value!r}; a number below {bound:g} is needed.")

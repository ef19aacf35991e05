"""The equations to integrate, each in its own coordinates.

A term maps times and states into coordinates (s, z) and back, and gives dz/ds there. The sign of time lives here and
nowhere else.

    ProbabilityFlow   s = t,  z = x:                  dx/dt = f x - g^2/2 score
    ReverseSDE        s = -t, z = x:                  dx = -[f x - (1 + eta^2)/2 g^2 score] ds + eta g dw

`LikelihoodFlow` (likelihood_flow.py) is the third, in the mixed variable and with its log determinant.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import choose_device
from ._tensor import column, flatten
from .ledger import Note
from .model.parameterization import Mix
from .model.score_model import ScoreModel
from .sde.base import as_time


class Aux(NamedTuple):
    """What an evaluation gives besides the slope.

    Attributes:
        gradient: (B, D) gradient of the log density in the term's own coordinates, or None.
        note: What is kept of fresh probes, or None.
        coarse: (B,) float64 nats a unit of s that the network's rounding costs, where it has less precision than the
            state; else None.
    """

    gradient: Tensor | None
    note: Note | None
    coarse: Tensor | None = None


class Evaluation(NamedTuple):
    """dz/ds (a tree shaped like the state) and what came with it."""

    slope: Any
    aux: Aux


NO_AUX = Aux(None, None)


def in_all(rounded: Tensor) -> Tensor:
    """(B,) nats lost to rounding, of the sum (B, 2) of every step's `Term.rounding`."""
    return rounded[:, 0].sqrt() + rounded[:, 1]


class Term(ABC):
    """An equation in its own coordinates (s, z).

    To write one: `coordinate` and `time` are inverse and monotone; `enter` and `leave` are inverse; `evaluate` gives
    dz/ds of every sample on its own; `take` keeps the samples named. z is a tensor or a NamedTuple of tensors whose
    first axis is the batch.
    """

    model: ScoreModel

    @abstractmethod
    def coordinate(self, t: Tensor) -> Tensor:
        """s at time t, float64, the shape of `t`."""

    @abstractmethod
    def time(self, s: Tensor) -> Tensor:
        """t at s, float64, within [t_min, t_max], the shape of `s`."""

    @abstractmethod
    def enter(self, x: Tensor, s: Tensor) -> Any:
        """The state z of `x` (B, *event) at s (B,)."""

    @abstractmethod
    def leave(self, z: Any, s: Tensor) -> Tensor:
        """x (B, *event) of the state z at s (B,)."""

    @abstractmethod
    def evaluate(self, s: Tensor, z: Any, node: Tensor) -> Evaluation:
        """dz/ds at (s, z); `node` (B,) counts the accepted nodes of each sample and keys what is random."""

    @abstractmethod
    def take(self, rows: Tensor) -> Term:
        """This term for the samples `rows` only."""

    def parts(self) -> tuple[Tensor, ...] | None:
        """The (B, ...) tensors that belong to the samples, besides the model's; None: nobody knows which.

        A term that says so, and has `around`, can be compiled and captured.
        """
        return None

    def around(self, model: ScoreModel, parts: tuple[Tensor, ...]) -> Term:
        """This equation around another model, for the samples to whom `parts` belong."""
        raise TypeError(f"{type(self).__name__} does not say which tensors belong to its samples.")

    @property
    def has_density(self) -> bool:
        """Whether the term carries a log density, so that errors can be had in nats."""
        return False

    def watched(self, z: Any) -> Tensor:
        """(B, M) the part of a state (or of an error) that error control in the state's norm looks at."""
        return flatten(z)

    def nats(self, error: Any, aux: Aux) -> Tensor:
        """(B,) float64 what a local error costs in log density, (B, K) of K errors; defined for a LikelihoodFlow only.

        Raises:
            TypeError: This term carries no density.
        """
        raise TypeError(f"{type(self).__name__} carries no density; control in nats needs a LikelihoodFlow.")

    def rounding(self, length: Tensor, before: Any, after: Any, aux: Aux) -> Tensor:
        """(B, 2) float64 what rounding costs in a step of that length (B,) from one state to another; NaN if unknown.

        Squared nats of roundings that are independent from step to step; nats of those that are alike.
        """
        return torch.full_like(self.watched(before)[:, :1], math.nan, dtype=torch.float64).expand(-1, 2)


class ProbabilityFlow(Term):
    """The probability-flow ODE in (t, x); callable as `flow(t, x)`, as torchdiffeq.odeint takes it.

    Args:
        model: The score model.
    """

    def __init__(self, model: ScoreModel) -> None:
        self.model = model

    def __call__(self, t: Tensor | float, x: Tensor) -> Tensor:
        """dx/dt at (t, x), the shape and dtype of `x` (B, *event); `t`, a number or (B,), is clamped."""
        return self.model.velocity(x, self.model.sde.clamp(as_time(t)))

    def coordinate(self, t: Tensor) -> Tensor:
        return t

    def time(self, s: Tensor) -> Tensor:
        return self.model.sde.clamp(s)

    def enter(self, x: Tensor, s: Tensor) -> Tensor:
        return x

    def leave(self, z: Tensor, s: Tensor) -> Tensor:
        return z

    def evaluate(self, s: Tensor, z: Tensor, node: Tensor) -> Evaluation:
        return Evaluation(self.model.velocity(z, self.time(s)), NO_AUX)

    def take(self, rows: Tensor) -> ProbabilityFlow:
        return ProbabilityFlow(self.model.take(rows))

    def parts(self) -> tuple[Tensor, ...]:
        return ()

    def around(self, model: ScoreModel, parts: tuple[Tensor, ...]) -> ProbabilityFlow:
        return ProbabilityFlow(model)


class ReverseSDE(Term):
    """The reverse-time SDE of noise level eta in s = -t; as it is for torchsde.sdeint over `span`.

    Args:
        model: The score model.
        eta: Noise level, >= 0, or a function of t (B,) that returns it; 0 is the probability flow, 1 Anderson's SDE.
            Solvers keep their order where it is smooth; where it jumps, the exponential ones if that is at a time of
            the grid, the others have order 1.
    """

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, model: ScoreModel, eta: float | Callable[[Tensor], Tensor] = 1.0) -> None:
        if not callable(eta) and not eta >= 0:
            raise ValueError(f"eta={eta!r}; eta >= 0 is needed.")
        self.model = model
        self.eta = eta
        if callable(eta):
            _check_levels(eta, model)

    @property
    def span(self) -> tuple[float, float]:
        """(-t_max, -t_min): where s starts and ends, increasing, for torchsde."""
        return -self.model.sde.t_max, -self.model.sde.t_min

    def level(self, t: Tensor) -> Tensor:
        """(B,) float64 eta at time t (B,)."""
        return as_time(self.eta(t)).to(t.device).expand_as(t) if callable(self.eta) else torch.full_like(t, self.eta)

    def drift(self, s: Tensor, x: Tensor) -> Tensor:
        """dx/ds without the noise at s (B,), the shape and dtype of `x`."""
        t, sde = self.time(s), self.model.sde
        # f x - (1 + eta^2)/2 g^2 score as a x0 + b eps; score = -eps/sigma and x = alpha x0 + sigma eps.
        rate, alpha, sigma = sde.dlog_alpha(t), sde.alpha(t), sde.sigma(t)
        pull = 0.5 * (1.0 + self.level(t).square()) * -2.0 * sde.dhalf_log_snr(t) * sigma
        mix = Mix(rate * alpha, rate * sigma + pull)
        return -self.model.as_mix(x, t, self.model.output(x, t), mix)

    def noise_scale(self, s: Tensor) -> Tensor:
        """(B,) float64 eta g, what multiplies dw at s (B,)."""
        t = self.time(s)
        return self.level(t) * self.model.sde.diffusion(t)

    def f(self, s: Tensor | float, x: Tensor) -> Tensor:
        """The drift at s (a number), as torchsde asks for it; `x` is (B, D)."""
        return self.drift(as_time(s).to(x.device).expand(x.shape[0]), x)

    def g(self, s: Tensor | float, x: Tensor) -> Tensor:
        """The diagonal diffusion at s (a number), the shape of `x` (B, D), as torchsde asks for it."""
        return column(self.noise_scale(as_time(s).to(x.device).expand(x.shape[0])), x).expand_as(x)

    def coordinate(self, t: Tensor) -> Tensor:
        return -t

    def time(self, s: Tensor) -> Tensor:
        return self.model.sde.clamp(-s)

    def enter(self, x: Tensor, s: Tensor) -> Tensor:
        return x

    def leave(self, z: Tensor, s: Tensor) -> Tensor:
        return z

    def evaluate(self, s: Tensor, z: Tensor, node: Tensor) -> Evaluation:
        return Evaluation(self.drift(s, z), NO_AUX)

    def take(self, rows: Tensor) -> ReverseSDE:
        return self._of(self.model.take(rows))

    def parts(self) -> tuple[Tensor, ...] | None:
        return None if callable(self.eta) else ()  # a function of the user's own may keep a state

    def around(self, model: ScoreModel, parts: tuple[Tensor, ...]) -> ReverseSDE:
        return self._of(model)

    def _of(self, model: ScoreModel) -> ReverseSDE:
        other = copy.copy(self)
        other.model = model
        return other


def _check_levels(eta: Callable[[Tensor], Tensor], model: ScoreModel) -> None:
    """ValueError where `eta` is seen not to return noise levels; at the ends it may be infinite."""
    first, last, device = model.sde.t_min, model.sde.t_max, choose_device(model, None)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        t = torch.full((1,), first + share * (last - first), dtype=torch.float64, device=device)
        level = as_time(eta(t))
        if not bool(((level >= 0) & level.isfinite()).all()):
            raise ValueError(f"eta(t) is {level.tolist()} at t={float(t):.4g}; a finite eta(t) >= 0 is needed.")

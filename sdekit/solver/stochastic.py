"""One-step solvers that draw noise: for the reverse SDE, and churn for the probability flow.

A step runs from the noisier time t0 (s0 = -t0) to t1 < t0 (s1 = -t1). Over it the forward process is, exactly,

    x_{t0} | x_{t1} ~ N(a x_{t1}, G^2 I),    a = alpha_0 / alpha_1,    G^2 = sigma_0^2 - a^2 sigma_1^2
                                                                           = sigma_0^2 (1 - e^{-2h}),

h = lambda_1 - lambda_0 in the half log signal-to-noise ratio. `Ancestral` and `ReverseDiffusion` take a and G for f and
g, so that a step may be as long as the whole way. Noise of a given variance is the path's increment, scaled: solutions
on one path converge to one another, not only their laws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._checks import require_positive
from .._tensor import column
from ..brownian import BrownianPath
from ..model.parameterization import Mix
from ..terms import NO_AUX, ProbabilityFlow, ReverseSDE, Term
from .base import Proposal, Solver, counters

_MOST_RAISED = math.sqrt(2.0) - 1.0  # of the noise level in one step: its variance at most doubles (Karras et al. 2022)


def require_reverse(solver: Solver, term: Term) -> ReverseSDE:
    """`term`; raises TypeError unless it is a ReverseSDE."""
    if not isinstance(term, ReverseSDE):
        raise TypeError(f"{type(solver).__name__} integrates a ReverseSDE, not a {type(term).__name__}.")
    return term


def require_path(solver: Solver, path: BrownianPath | None) -> BrownianPath:
    """`path`; raises ValueError if there is none."""
    if path is None:
        raise ValueError(f"path=None; {type(solver).__name__} needs a Brownian path, e.g. IndependentIncrements.")
    return path


def stepped(z: Tensor, error: Tensor | None, memory: Tensor) -> Proposal:
    """The proposal of a solver that remembers nothing but its count (B,) of steps."""
    return Proposal(z, error, NO_AUX, memory + 1, torch.ones_like(memory, dtype=torch.bool))


@dataclass(frozen=True)
class FirstOrder(Solver):
    """What the solvers of order 1 with one evaluation a step share: abstract."""

    @property
    def order(self) -> int:
        return 1

    @property
    def strong_order(self) -> float:
        """The order of the root-mean-square error on one path."""
        return 1.0

    @property
    def error_order(self) -> None:
        return None

    @property
    def evaluations(self) -> int:
        return 1


@dataclass(frozen=True)
class EulerMaruyama(FirstOrder):
    """Euler and Maruyama's method: z + h drift + eta g dW, coefficients at the step's start, on a fixed grid.

    Weak order 1 and strong order 1 (the noise is additive).
    """

    def init(self, term: Term, z: Tensor) -> Tensor:
        require_reverse(self, term)
        return counters(z)

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: Tensor, path: BrownianPath | None
    ) -> Proposal:
        noise = require_path(self, path).increment(s0, s1, memory, z)
        assert isinstance(term, ReverseSDE)  # checked by init
        moved = z + column(s1 - s0, z) * term.drift(s0, z) + column(term.noise_scale(s0), z) * noise
        return stepped(moved, None, memory)


def _per_root_time(term: Term, variance: Tensor, t0: Tensor, length: Tensor) -> Tensor:
    """(B,) what multiplies an increment over `length` for it to have `variance`; its limit g where there is none."""
    rate = variance.clamp(min=0.0) / length  # below 0 by rounding, where the step is a few ulp long
    return torch.where(length > 0, rate.sqrt(), term.model.sde.diffusion(t0))


@dataclass(frozen=True)
class Ancestral(FirstOrder):
    """The ancestral step of DDPM in continuous time, exact in h: data and noise predicted where the step starts.

        x_1 = alpha_1 x0 + sigma_1 e^{-h} eps + r z = (sigma_1/sigma_0) e^{-h} x + alpha_1 (1 - e^{-2h}) x0 + r z

    is the mean of q(x_1 | x, x0) for every SDE, and r^2 its variance ("small") or the forward transition's ("large").
    For eta = 1 and any number of steps: "small" is exact for data at one point, "large" for standard normal data under
    a variance-preserving SDE. Weak order 1, strong order 1, on a fixed grid.

    Args:
        variance: "small", sigma_1^2 (1 - e^{-2h}), or "large", sigma_0^2 (1 - e^{-2h}) (beta_i of a discrete chain).

    Raises:
        ValueError: Another variance.

    Source: Ho et al. 2020, denoising diffusion probabilistic models.
    """

    variance: Literal["small", "large"] = "small"

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise ValueError(f"variance={self.variance!r}; 'small' or 'large' is needed.")

    def init(self, term: Term, z: Tensor) -> Tensor:
        eta = require_reverse(self, term).eta
        if callable(eta) or eta != 1:
            raise TypeError(
                "Ancestral draws from the forward chain's posterior, a reverse SDE of eta=1, and this ReverseSDE has "
                f"eta={eta!r}: pass eta=1.0, or sdekit.EulerMaruyama() for any eta."
            )
        return counters(z)

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: Tensor, path: BrownianPath | None
    ) -> Proposal:
        noise = require_path(self, path).increment(s0, s1, memory, z)
        sde, t0, t1 = term.model.sde, term.time(s0), term.time(s1)
        h = sde.half_log_snr(t1) - sde.half_log_snr(t0)
        mix = Mix(sde.alpha(t1), sde.sigma(t1) * torch.exp(-h))  # exactly z's own where h is 0
        mean = term.model.as_mix(z, t0, term.model.output(z, t0), mix)
        scale = sde.sigma(t1 if self.variance == "small" else t0)
        level = _per_root_time(term, scale.square() * -torch.expm1(-2.0 * h), t0, s1 - s0)
        return stepped(mean + column(level, z) * noise, None, memory)


@dataclass(frozen=True)
class ReverseDiffusion(FirstOrder):
    """Song's reverse diffusion: the forward transition over the step, undone as one Euler step would.

        x_1 = x + (1 - a) x + (1 + eta^2)/2 G^2 score + eta G z

    with score and eta where the step starts; the published rules for VP and VE have eta = 1, or 0 for their flow. Weak
    order 1, strong order 1, on a fixed grid. The factor 2 - a stands for 1/a: steps over which alpha changes much are
    coarse, those of `Ancestral` are not bound by that.

    Source: Song et al. 2021, score-based generative modeling through SDEs.
    """

    def init(self, term: Term, z: Tensor) -> Tensor:
        require_reverse(self, term)
        return counters(z)

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: Tensor, path: BrownianPath | None
    ) -> Proposal:
        noise = require_path(self, path).increment(s0, s1, memory, z)
        assert isinstance(term, ReverseSDE)  # checked by init
        sde, t0, t1 = term.model.sde, term.time(s0), term.time(s1)
        alpha, sigma, eta = sde.alpha(t0), sde.sigma(t0), term.noise_scale(s0) / sde.diffusion(t0)
        share = -torch.expm1(-2.0 * (sde.half_log_snr(t1) - sde.half_log_snr(t0)))  # G^2 / sigma_0^2
        stretch = 1.0 - torch.expm1(sde.log_alpha(t0) - sde.log_alpha(t1))  # 1 + (1 - a)
        pull = 0.5 * (1.0 + eta.square()) * share  # G^2 score = -sigma_0 share eps
        mix = Mix(stretch * alpha, (stretch - pull) * sigma)
        mean = term.model.as_mix(z, t0, term.model.output(z, t0), mix)
        level = eta * _per_root_time(term, sigma.square() * share, t0, s1 - s0)
        return stepped(mean + column(level, z) * noise, None, memory)


@dataclass(frozen=True)
class StochasticHeun(Solver):
    """Heun's method with the same increment in both stages (improved Euler), the difference to Euler's its error.

        K_1 = h drift(s0, z) + eta g(s0) dW,   K_2 = h drift(s1, z + K_1) + eta g(s1) dW,   z_1 = z + (K_1 + K_2)/2

    Weak order 2 and strong order 1 (the noise is additive). The error estimate is that of Euler and Maruyama's step
    on the same path, so error control needs a path that can be refined.
    """

    @property
    def order(self) -> int:
        return 2

    @property
    def strong_order(self) -> float:
        """The order of the root-mean-square error on one path."""
        return 1.0

    @property
    def error_order(self) -> int:
        return 1

    @property
    def evaluations(self) -> int:
        return 2

    def init(self, term: Term, z: Tensor) -> Tensor:
        require_reverse(self, term)
        return counters(z)

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: Tensor, path: BrownianPath | None
    ) -> Proposal:
        noise = require_path(self, path).increment(s0, s1, memory, z)
        assert isinstance(term, ReverseSDE)  # checked by init
        h = column(s1 - s0, z)
        first = h * term.drift(s0, z) + column(term.noise_scale(s0), z) * noise
        second = h * term.drift(s1, z + first) + column(term.noise_scale(s1), z) * noise
        return stepped(z + 0.5 * (first + second), 0.5 * (second - first), memory)


@dataclass(frozen=True)
class EDMChurn(Solver):
    """The stochastic sampler of EDM: raise the noise level, then a Heun step of the probability flow down to t1.

    In y = x/alpha and rho = sigma/alpha, for every SDE,

        rho' = (1 + gamma) rho_0,   y' = y + S_noise sqrt(rho'^2 - rho_0^2) z,   then Heun's rule for dy/drho = eps

    from rho' to rho_1, gamma = min(churn h, sqrt 2 - 1). So small steps follow the reverse SDE of eta^2 = churn, with
    weak order 2. rho' never passes the level of t_max. Steps towards the noise are not churned; with gamma = 0 it is
    Heun's method in rho. Integrates a ProbabilityFlow, on a fixed grid.

    The published gamma = min(S_churn/N, sqrt 2 - 1) is the same for each of N steps, whatever their length: with N
    steps equally long in half_log_snr, S_churn = churn (lambda(t_min) - lambda(t_max)).

    Args:
        churn: eta^2, >= 0: noise raised per unit of half_log_snr gone.
        start: Level rho, > 0, below which churn starts (S_tmax).
        stop: Level rho, >= 0 and at most `start`, below which churn stops (S_tmin).
        noise: S_noise, > 0: the fresh noise is this times too large; other than 1 is a deliberate bias.

    Raises:
        TypeError, ValueError: Numbers out of range.

    Source: Karras et al. 2022, elucidating the design space of diffusion-based generative models, algorithm 2.
    """

    churn: float = 1.0
    start: float = math.inf
    stop: float = 0.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        require_positive("noise", self.noise)
        if not (math.isfinite(self.churn) and self.churn >= 0):
            raise ValueError(f"churn={self.churn!r}; a finite number of at least 0 is needed.")
        if not (self.start > 0 and 0 <= self.stop <= self.start):
            raise ValueError(f"start={self.start!r}, stop={self.stop!r}; 0 <= stop <= start, start > 0 are needed.")

    @property
    def order(self) -> int:
        return 2

    @property
    def error_order(self) -> None:
        return None

    @property
    def evaluations(self) -> int:
        return 2

    def init(self, term: Term, z: Tensor) -> Tensor:
        if not isinstance(term, ProbabilityFlow):
            raise TypeError(f"EDMChurn integrates a ProbabilityFlow, not a {type(term).__name__}.")
        return counters(z)

    def _raised(self, term: Term, t0: Tensor, t1: Tensor) -> Tensor:
        """(B,) the time whose level is (1 + gamma) rho_0; exactly t0 where gamma is 0."""
        sde = term.model.sde
        here = sde.half_log_snr(t0)
        gamma = (self.churn * (sde.half_log_snr(t1) - here)).clamp(0.0, _MOST_RAISED)
        churned = (torch.exp(-here) <= self.start) & (torch.exp(-here) >= self.stop) & (gamma > 0)
        there = sde.clamp(sde.time_at(here - torch.log1p(gamma)))
        return torch.where(churned, torch.maximum(there, t0), t0)

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: Tensor, path: BrownianPath | None
    ) -> Proposal:
        drawn = require_path(self, path).normal(memory, z)
        model, sde, t0, t1 = term.model, term.model.sde, term.time(s0), term.time(s1)
        top = self._raised(term, t0, t1)
        here = sde.half_log_snr(top)
        variance = sde.sigma(top).square() * -torch.expm1(-2.0 * (sde.half_log_snr(t0) - here).clamp(min=0.0))  # G^2
        kept = torch.exp(sde.log_alpha(top) - sde.log_alpha(t0))
        x = column(kept, z) * z + column(self.noise * variance.sqrt(), z) * drawn
        scaled = column(torch.exp(sde.log_alpha(t1) - sde.log_alpha(top)), z) * x
        fall = column(sde.sigma(t1) * -torch.expm1(sde.half_log_snr(t1) - here), z)  # alpha_1 (rho_1 - rho')
        first = model.noise(x, top)  # Heun's rule for y, times alpha_1
        second = model.noise(scaled + fall * first, t1)
        return stepped(scaled + 0.5 * fall * (first + second), None, memory)

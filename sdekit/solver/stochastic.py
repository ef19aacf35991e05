"""One-step solvers of the reverse SDE.

A step runs from the noisier time t0 (s0 = -t0) to t1 < t0 (s1 = -t1). Over it the forward process is, exactly,

    x_{t0} | x_{t1} ~ N(a x_{t1}, G^2 I),    a = alpha_0 / alpha_1,    G^2 = sigma_0^2 - a^2 sigma_1^2
                                                                           = sigma_0^2 (1 - e^{-2h}),

h = lambda_1 - lambda_0 in the half log signal-to-noise ratio. `Ancestral` and `ReverseDiffusion` take a and G for f and
g, so that a step may be as long as the whole way. Noise of a given variance is the path's increment, scaled: solutions
on one path converge to one another, not only their laws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._tensor import column
from ..brownian import BrownianPath
from ..model.parameterization import Mix
from ..terms import NO_AUX, ReverseSDE, Term
from .base import Equation, Proposal, Solver, counters, require_path, require_reverse


def stepped(z: Tensor, error: Tensor | None, memory: Tensor) -> Proposal:
    """The proposal of a solver that remembers nothing but its count (B,) of steps."""
    return Proposal(z, error, NO_AUX, memory + 1, torch.ones_like(memory, dtype=torch.bool))


@dataclass(frozen=True)
class FirstOrder(Solver):
    """What the solvers of order 1 with one evaluation a step share: abstract."""

    @property
    def linear(self) -> bool:
        return True

    @property
    def equation(self) -> Equation:
        return "reverse"

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
    def equation(self) -> Equation:
        return "reverse"

    @property
    def linear(self) -> bool:
        return True

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

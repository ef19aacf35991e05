"""EDM's stochastic sampler: noise raised before each step of the probability flow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import require_positive
from .._tensor import column
from ..brownian import BrownianPath
from ..terms import Term
from .base import Equation, Proposal, Solver, counters, require_flow, require_path
from .stochastic import stepped

_MOST_RAISED = math.sqrt(2.0) - 1.0  # of the noise level in one step: its variance at most doubles (Karras et al. 2022)


@dataclass(frozen=True)
class EDMChurn(Solver):
    """The stochastic sampler of EDM: raise the noise level, then a Heun step of the probability flow down to t1.

    In y = x/alpha and rho = sigma/alpha, for every SDE,

        rho' = (1 + gamma) rho_0,   y' = y + S_noise sqrt(rho'^2 - rho_0^2) z,   then Heun's rule for dy/drho = eps

    from rho' to rho_1, gamma = min(churn h, sqrt 2 - 1). So small steps follow the reverse SDE of eta^2 = churn. The
    marginal law has order 2 where the start has its own; given the start, the order is 1, and so an error of the start
    (the prior's) is carried along by an SDE of eta^2 = churn + O(h). rho' never passes the
    level of t_max. Steps towards the noise are not churned; with gamma = 0 it is Heun's method in rho. Integrates a
    ProbabilityFlow, on a fixed grid.

    The published gamma = min(S_churn/N, sqrt 2 - 1) is the same for each of N steps, whatever their length: that is
    `gamma`, and reproduces published samples. Of no order: noise is added in more steps as there are more of them.

    Args:
        churn: eta^2, >= 0: noise raised per unit of half_log_snr gone.
        start: Level rho, > 0, below which churn starts (S_tmax).
        stop: Level rho, >= 0 and at most `start`, below which churn stops (S_tmin).
        noise: S_noise, > 0: the fresh noise is this times too large; other than 1 is a deliberate bias.
        gamma: The same share of the noise level raised in each step, 0 to sqrt 2 - 1, instead of `churn`.

    Raises:
        TypeError, ValueError: Numbers out of range.

    Source: Karras et al. 2022, elucidating the design space of diffusion-based generative models, algorithm 2.
    """

    churn: float = 1.0
    start: float = math.inf
    stop: float = 0.0
    noise: float = 1.0
    gamma: float | None = None

    def __post_init__(self) -> None:
        if self.gamma is not None and not 0 <= self.gamma <= _MOST_RAISED * (1 + 1e-12):
            raise ValueError(
                f"gamma={self.gamma!r}; 0 <= gamma <= sqrt(2) - 1 is needed: min(S_churn / steps, sqrt(2) - 1)."
            )
        require_positive("noise", self.noise)
        if not (math.isfinite(self.churn) and self.churn >= 0):
            raise ValueError(f"churn={self.churn!r}; a finite number of at least 0 is needed.")
        if not (self.start > 0 and 0 <= self.stop <= self.start):
            raise ValueError(f"start={self.start!r}, stop={self.stop!r}; 0 <= stop <= start, start > 0 are needed.")

    @property
    def equation(self) -> Equation:
        return "flow"

    @property
    def draws(self) -> bool:
        return True

    @property
    def linear(self) -> bool:
        return True

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
        require_flow(self, term)
        return counters(z)

    def _raised(self, term: Term, t0: Tensor, t1: Tensor) -> Tensor:
        """(B,) the time whose level is (1 + gamma) rho_0; exactly t0 where gamma is 0."""
        sde = term.model.sde
        here = sde.half_log_snr(t0)
        gone = sde.half_log_snr(t1) - here
        gamma = (self.churn * gone).clamp(0.0, _MOST_RAISED)
        if self.gamma is not None:
            gamma = torch.full_like(gone, self.gamma) * (gone > 0)
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

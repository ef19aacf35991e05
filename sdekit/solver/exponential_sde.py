"""Stochastic methods on the exact linear part of the reverse SDE: SDE-DPM-Solver, SDE-DPM-Solver++, SEEDS.

The noise of a step is the path's increment over it, scaled to the exact variance: a coupling of strong order 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._tensor import column
from ..brownian import BrownianPath
from ..terms import NO_AUX, ReverseSDE, Term
from .base import Equation, Proposal, Solver, counters, require_reverse
from .exponential import published
from .multistep import Multistep, unit_noise
from .semilinear import Form, Linear
from .start import History, empty


@dataclass(frozen=True)
class SDEDPMSolver(Multistep):
    """SDE-DPM-Solver-1: order 1 in the noise prediction, for a ReverseSDE of any eta. At eta = 1 SEEDS-1.

    Source: Lu et al. 2022, DPM-Solver++.
    """

    @property
    def equation(self) -> Equation:
        return "reverse"

    @property
    def form(self) -> Form:
        return "noise"

    @property
    def depth(self) -> int:
        return 1

    def init(self, term: Term, z: Tensor) -> History:
        require_reverse(self, term)
        return empty(z, 1)


@dataclass(frozen=True)
class SDEDPMSolverPP(Multistep):
    """SDE-DPM-Solver++(1) or (2M): in the data prediction, for a ReverseSDE of any eta.

    At order 1 and eta = 1 a step draws from the exact posterior q(x_1 | x_0, data): the exact-transition method. Weak
    order as stated, strong order 1.

    Args:
        order: 1 or 2.
        compat: The published "midpoint" coefficient in the second order, to reproduce published samples.

    Source: Lu et al. 2022, DPM-Solver++.
    """

    order: int = 2
    compat: bool = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order={self.order!r}; 1 or 2 is needed.")

    @property
    def equation(self) -> Equation:
        return "reverse"

    @property
    def form(self) -> Form:
        return "data"

    @property
    def depth(self) -> int:
        return self.order

    def init(self, term: Term, z: Tensor) -> History:
        require_reverse(self, term)
        return empty(z, self.order)

    def weigh(self, term: Term, step: Linear, history: History, valid: Tensor) -> Tensor:
        if not self.compat or self.order == 1:
            return super().weigh(term, step, history, valid)
        return published(step, history.nodes, valid)


@dataclass(frozen=True)
class SEEDS(Solver):
    """SEEDS-1 or SEEDS-2: single-step in the noise prediction, for the ReverseSDE of eta = 1.

    SEEDS-2 evaluates twice a step; the noise of its stage is the first part of the noise of its step, without which
    its weak order would be 1.

    Args:
        order: 1 or 2: the weak order and the evaluations of a step.

    Source: Gonzalez et al. 2023, SEEDS.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order={self.order!r}; 1 or 2 is needed.")

    @property
    def linear(self) -> bool:
        return True

    @property
    def equation(self) -> Equation:
        return "reverse"

    @property
    def error_order(self) -> None:
        return None

    @property
    def evaluations(self) -> int:
        return self.order

    def init(self, term: Term, z: Tensor) -> Tensor:
        require_reverse(self, term)
        assert isinstance(term, ReverseSDE)
        if term.eta != 1:
            raise ValueError(f"SEEDS on ReverseSDE(eta={term.eta!r}); its coefficients are those of eta=1.")
        return counters(z)

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: Tensor, path: BrownianPath | None
    ) -> Proposal:
        sde, t0, t1 = term.model.sde, term.time(s0), term.time(s1)
        start, end = sde.half_log_snr(t0), sde.half_log_snr(t1)
        h = end - start
        slope = term.model.noise(z, t0)

        def ahead(t: Tensor, length: Tensor, noise: Tensor) -> Tensor:
            keep = torch.exp(sde.log_alpha(t) - sde.log_alpha(t0))
            gain = -2.0 * sde.sigma(t) * torch.expm1(length)
            return column(keep, z) * z + column(gain, z) * noise

        if self.order == 1:
            size = sde.sigma(t1) * torch.expm1(2.0 * h).clamp(min=0.0).sqrt()
            moved = ahead(t1, h, slope) + column(size, z) * unit_noise(self, path, s0, s1, memory, z)
        else:
            middle = torch.where(h == 0, t0, sde.clamp(sde.time_at(start + 0.5 * h)))
            inner = term.coordinate(middle)
            first = unit_noise(self, path, s0, inner, memory, z)
            second = unit_noise(self, path, inner, s1, memory, z, lane=1)
            unit = torch.expm1(h).clamp(min=0.0).sqrt()
            stage = ahead(middle, 0.5 * h, slope) + column(sde.sigma(middle) * unit, z) * first
            slope = term.model.noise(stage, middle)
            moved = ahead(t1, h, slope)
            moved = moved + column(sde.sigma(t1) * torch.exp(0.5 * h) * unit, z) * first
            moved = moved + column(sde.sigma(t1) * unit, z) * second
        return Proposal(moved, None, NO_AUX, memory + 1, torch.ones_like(s0, dtype=torch.bool))

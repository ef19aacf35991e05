"""Exponential integrators in the half log signal-to-noise ratio.

With h = lambda(s1) - lambda(s0) and the data prediction x0 along the way, the probability flow solves to

    x_1 = (sigma_1/sigma_0) x_0 + alpha_1 int_0^h e^{-(h-r)} x0(lambda_0 + r) dr:

the linear part is exact, and the integral is taken over a polynomial through past data predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._tensor import column
from ..brownian import BrownianPath
from ..terms import NO_AUX, ProbabilityFlow, Term
from .base import Proposal, Solver, counters


class Memory(NamedTuple):
    """(B,) steps made; the previous data prediction (B, *event); half_log_snr where it was made (B,)."""

    entered: Tensor
    data: Tensor
    half_log_snr: Tensor


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++(2M): multistep in the data prediction, one evaluation a step, on a fixed grid.

    Args:
        order: 2, or 1 for its first-order form (DDIM).

    Source: Lu et al. 2022, DPM-Solver++, with the exact second coefficient.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order={self.order!r}; 1 or 2 is needed.")

    @property
    def error_order(self) -> None:
        return None

    @property
    def evaluations(self) -> int:
        return 1

    def init(self, term: Term, z: Tensor) -> Memory:
        if not isinstance(term, ProbabilityFlow):
            raise TypeError(f"DPMSolverPP integrates a ProbabilityFlow, not a {type(term).__name__}.")
        count = counters(z)
        return Memory(count, torch.zeros_like(z), count.double())

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: Memory, path: BrownianPath | None
    ) -> Proposal:
        sde, t0, t1 = term.model.sde, term.time(s0), term.time(s1)
        data = term.model.data(z, t0)
        here = sde.half_log_snr(t0)
        h = sde.half_log_snr(t1) - here
        gain = -torch.expm1(-h)
        moved = column(torch.exp(sde.log_sigma(t1) - sde.log_sigma(t0)), z) * z
        moved = moved + column(sde.alpha(t1) * gain, z) * data
        if self.order == 2:
            # int e^{-(h-r)} r dr / h = phi(h); its limit at h = 0 is h/2, and a first step has no slope.
            past = here - memory.half_log_snr
            usable = (memory.entered > 0) & (past != 0) & (h != 0)
            ratio = torch.where(usable, h / torch.where(usable, past, 1.0), 0.0)
            curve = torch.where(
                h.abs() > 1e-3, 1.0 - gain / torch.where(h == 0, 1.0, h), h * (0.5 - h / 6.0 + h * h / 24.0)
            )
            moved = moved + column(sde.alpha(t1) * curve * ratio, z) * (data - memory.data)
        kept = Memory(memory.entered + 1, data, here)
        return Proposal(moved, None, NO_AUX, kept, torch.ones_like(s0, dtype=torch.bool))

"""Single-step methods on the exact linear part: several evaluations a step, no memory.

With predictions m at half log SNR lambda_0, lambda_0 + r_1 h, .. and psi of semilinear.py, the integral of the step
(data form; the noise form has h for -h and -sigma for alpha) is

    order 2   h psi_1 m_0 + h psi_1 (m(r) - m_0) / (2 r)                      r = 1/2
    order 3   h psi_1 m_0 + (h/r_2) psi_2 (m(r_2) - m_0)                      r_1, r_2 = 1/3, 2/3

where the state at r_2 h is itself of order 2, through m(r_1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..brownian import BrownianPath
from ..terms import NO_AUX, Term
from .base import Equation, Proposal, Solver, require_flow
from .semilinear import Form, Linear, combine, linear, predict, psi
from .start import History, empty


@dataclass(frozen=True)
class DPMSolver(Solver):
    """DPM-Solver: single-step, in the noise prediction.

    Args:
        order: 1, 2 or 3: also the evaluations of a step.

    Source: Lu et al. 2022, DPM-Solver.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order!r}; 1, 2 or 3 is needed.")

    @property
    def linear(self) -> bool:
        return True

    @property
    def remembers(self) -> bool:
        return False

    @property
    def equation(self) -> Equation:
        return "flow"

    @property
    def error_order(self) -> None:
        return None

    @property
    def evaluations(self) -> int:
        return self.order

    def init(self, term: Term, z: Tensor) -> History:
        require_flow(self, term)
        return empty(z, 0)

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: History, path: BrownianPath | None
    ) -> Proposal:
        return propose_single(term, "noise", self.order, s0, s1, z, memory)


def propose_single(term: Term, form: Form, order: int, s0: Tensor, s1: Tensor, z: Tensor, memory: History) -> Proposal:
    """A step of the single-step method of `order` 1, 2 or 3 in the data or noise form."""
    sde, t0, t1 = term.model.sde, term.time(s0), term.time(s1)
    none = torch.zeros_like(t0)
    step = linear(sde, form, t0, t1, none)

    def inside(share: float) -> tuple[Linear, Tensor]:
        t = torch.where(step.length == 0, t0, sde.clamp(sde.time_at(step.start + share * step.length)))
        return linear(sde, form, t0, t, none), t

    first = predict(term, form, z, t0)
    found: tuple[Tensor, ...] = (first,)
    each: tuple[Tensor, ...]
    if order == 1:
        each = (_whole(step),)
    elif order == 2:
        part, t = inside(0.5)
        x = combine(part.keep, z, _whole(part)[:, None], found)
        found = (first, predict(term, form, x, t))
        each = (torch.zeros_like(none), _whole(step))
    else:
        part, t = inside(1 / 3)
        x = combine(part.keep, z, _whole(part)[:, None], found)
        second = predict(term, form, x, t)
        part, t = inside(2 / 3)
        bend = 2.0 * _bend(part)
        x = combine(part.keep, z, torch.stack((_whole(part) - bend, bend), 1), (first, second))
        found, bend = (first, predict(term, form, x, t)), 1.5 * _bend(step)
        each = (_whole(step) - bend, bend)
    moved = combine(step.keep, z, torch.stack(each, 1), found)
    kept = memory._replace(entered=memory.entered + 1)
    return Proposal(moved, None, NO_AUX, kept, torch.ones_like(s0, dtype=torch.bool))


def _whole(step: Linear) -> Tensor:
    """gain times the integral of the kernel."""
    return step.gain * step.length * psi(1, step.exponent * step.length)


def _bend(step: Linear) -> Tensor:
    """gain times the integral of the kernel times r/h."""
    return step.gain * step.length * psi(2, step.exponent * step.length)

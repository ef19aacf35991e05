"""Steps by the size of the error in the state, for equations without a density.

    ratio = rms(e / (atol + rtol |z|)),     next step = step * 0.9 ratio^(-k (1 - p/2)) ratio_before^(k p/2)

with k = 1/(order + 1), p the proportional share, and ratio_before that of the last accepted step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._numbers import alike, at_least, between, isfinite, power, sign, where
from .controller import Controller, Step, Verdict, on_lattice
from .solver.base import Proposal, Solver, estimated_order
from .terms import Term


class PIDState(NamedTuple):
    """(B,) next step length (signed); (B,) the last accepted step's error ratio."""

    step: Tensor
    ratio: Tensor


@dataclass(frozen=True)
class PID(Controller):
    """Steps that hold the root-mean-square of error / (atol + rtol |z|) below 1, per sample.

    Args:
        rtol: Relative tolerance, >= 0.
        atol: Absolute tolerance in the term's coordinates, >= 0; not both 0.
        first: The first step, as a share of the way, in (0, 1].
        floor: Smallest step, as a share of the way; a sample that cannot make it fails.
        proportional: Exponent share of the last ratio (0: integral control only).
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    first: float = 0.01
    floor: float = 1e-10
    proportional: float = 0.4

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value!r}; a finite number of at least 0 is needed.")
        if self.rtol == 0 and self.atol == 0:
            raise ValueError("rtol=0, atol=0; at least one must be above 0.")
        if not (0 < self.floor < self.first <= 1):
            raise ValueError(f"first={self.first!r}, floor={self.floor!r}; 0 < floor < first <= 1 is needed.")

    def start(self, term: Term, s0: Tensor, s_end: Tensor) -> PIDState:
        return PIDState(self.first * (s_end - s0), torch.ones_like(s0))

    def target(self, s: Tensor, s_end: Tensor, state: PIDState) -> Tensor:
        rest = s_end - s
        step = where(abs(state.step) > 0.5 * abs(rest), 0.5 * rest, state.step)
        return where(abs(state.step) >= abs(rest), s_end, s + step)

    def judge(
        self, term: Term, solver: Solver, proposal: Proposal, step: Step, s_end: Tensor, state: PIDState
    ) -> Verdict:
        error, old, new = (term.watched(part) for part in (proposal.error, step.z, proposal.z))
        scale = self.atol + self.rtol * torch.maximum(old.abs(), new.abs())
        # Where atol is 0 and a coordinate stays 0, its error is 0 too.
        found = torch.where(error == 0, 0.0, error / scale).square().mean(1, dtype=torch.float64).sqrt()
        ratio = alike(found, step.s0)
        finite = isfinite(ratio) & step.finite
        accept = finite & (ratio <= 1.0)
        exponent, share = 1.0 / (estimated_order(solver, proposal) + 1.0), 0.5 * self.proportional
        safe = at_least(ratio, 1e-10)
        factor = 0.9 * power(safe, -exponent * (1.0 - share)) * power(state.ratio, share * exponent)
        factor = where(finite, factor, 0.0)
        factor = where(accept, between(factor, 0.2, 5.0), between(factor, 0.1, 0.9))
        length = step.s1 - step.s0
        following = sign(length) * on_lattice(abs(length) * factor)
        small = abs(following) < self.floor * abs(s_end - step.s0)
        return Verdict(accept, PIDState(following, where(accept, safe, state.ratio)), ~accept & small)

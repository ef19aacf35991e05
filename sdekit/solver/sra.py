"""Roessler's stochastic Runge-Kutta methods for additive noise, of strong order 1.5.

For dz = a(s, z) ds + b(s) dW, with W the increment over a step of length h and I = int (W(s) - W(s0)) ds its area,

    Z_i = z + h sum_{j<i} A_ij a(s0 + c0_j h, Z_j) + (I/h) sum_j B_ij b(s0 + c1_j h)
    z_1 = z + h sum_i alpha_i a(s0 + c0_i h, Z_i) + sum_i (beta1_i W + beta2_i I/h) b(s0 + c1_i h)

The noise of a time-dependent b needs the area: int b dW = b(s1) W - (b(s1) - b(s0)) I/h + O(h^2.5), and with beta2 of
the opposite sign the strong order is 1, which a constant b would not show. A path gives I/h as W/2 + H.

The order conditions, each exact in the rational coefficients:

    sum alpha = 1    sum alpha c0 = 1/2    sum alpha (B e) = 1    sum alpha (B e)^2 = 3/2
    sum beta1 = 1    sum beta1 c1 = 1      sum beta2 = 0          sum beta2 c1 = -1

Source: Roessler 2010, Runge-Kutta methods for the strong approximation of solutions of SDEs.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction as Q

import torch
from torch import Tensor

from .._tensor import column
from ..brownian import BrownianPath
from ..terms import ReverseSDE, Term
from .base import Equation, Proposal, Solver, counters, require_path, require_reverse
from .stochastic import stepped


@dataclass(frozen=True)
class AdditiveTableau:
    """Coefficients of one explicit method with n stages for additive noise.

    Attributes:
        name: Of the method.
        alpha: Weights of the drifts, n rationals that sum to 1.
        c0: Times of the drifts, n rationals in [0, 1].
        c1: Times of the noise, n rationals in [0, 1]; those that no weight uses are 0.
        a: Strictly lower triangle; row i holds i rationals that sum to c0[i].
        b: Weights of b I/h in the stages; row i holds i rationals.
        beta1: Weights of b W, n rationals that sum to 1.
        beta2: Weights of b I/h, n rationals that sum to 0.
    """

    name: str
    alpha: tuple[Q, ...]
    c0: tuple[Q, ...]
    c1: tuple[Q, ...]
    a: tuple[tuple[Q, ...], ...]
    b: tuple[tuple[Q, ...], ...]
    beta1: tuple[Q, ...]
    beta2: tuple[Q, ...]

    @property
    def stages(self) -> int:
        """The number n of stages."""
        return len(self.alpha)


SRA_1 = AdditiveTableau(
    name="SRA1",
    alpha=(Q(1, 3), Q(2, 3)),
    c0=(Q(0), Q(3, 4)),
    c1=(Q(1), Q(0)),
    a=((), (Q(3, 4),)),
    b=((), (Q(3, 2),)),
    beta1=(Q(1), Q(0)),
    beta2=(Q(-1), Q(1)),
)

SRA_2 = AdditiveTableau(
    name="SRA2",
    alpha=(Q(1, 3), Q(2, 3)),
    c0=(Q(0), Q(3, 4)),
    c1=(Q(1, 3), Q(1)),
    a=((), (Q(3, 4),)),
    b=((), (Q(3, 2),)),
    beta1=(Q(0), Q(1)),
    beta2=(Q(3, 2), Q(-3, 2)),
)

SRA_3 = AdditiveTableau(
    name="SRA3",
    alpha=(Q(1, 6), Q(1, 6), Q(2, 3)),
    c0=(Q(0), Q(1), Q(1, 2)),
    c1=(Q(1), Q(0), Q(0)),
    a=((), (Q(1),), (Q(1, 4), Q(1, 4))),
    b=((), (Q(0),), (Q(1), Q(1, 2))),
    beta1=(Q(1), Q(0), Q(0)),
    beta2=(Q(-1), Q(1), Q(0)),
)


@dataclass(frozen=True)
class SRA(Solver):
    """The method of a tableau for the reverse SDE, of any eta(t), on a fixed grid.

    Strong order 1.5 and weak order 2, where eta(t) has no jump. Without noise, of order 2 or 3.

    Args:
        tableau: Its coefficients.
    """

    tableau: AdditiveTableau

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
        return 1.5

    @property
    def error_order(self) -> None:
        return None

    @property
    def evaluations(self) -> int:
        return self.tableau.stages

    def init(self, term: Term, z: Tensor) -> Tensor:
        require_reverse(self, term)
        return counters(z)

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: Tensor, path: BrownianPath | None
    ) -> Proposal:
        increment, levy = require_path(self, path).levy(s0, s1, memory, z)
        assert isinstance(term, ReverseSDE)  # checked by init
        tab, h = self.tableau, s1 - s0
        length = column(h, z)
        area = 0.5 * increment + levy  # I/h, and its limit 0 where h is 0
        levels = [term.noise_scale(_node(s0, s1, c)) for c in tab.c1]
        drifts: list[Tensor] = []
        for c, a, b in zip(tab.c0, tab.a, tab.b, strict=True):
            stage = z + length * _combine(a, drifts, z) + column(_combine(b, levels, h), z) * area
            drifts.append(term.drift(_node(s0, s1, c), stage))
        moved = z + length * _combine(tab.alpha, drifts, z)
        moved = moved + column(_combine(tab.beta1, levels, h), z) * increment
        moved = moved + column(_combine(tab.beta2, levels, h), z) * area
        return stepped(moved, None, memory)


def _node(s0: Tensor, s1: Tensor, c: Q) -> Tensor:
    """s0 + c h, its end exactly s1."""
    return s1 if c == 1 else s0 + float(c) * (s1 - s0)


def _combine(weights: tuple[Q, ...], values: list[Tensor], like: Tensor) -> Tensor:
    """Sum of weights * values, as many as both hold, in the shape and dtype of `like`."""
    total = torch.zeros_like(like)
    for weight, value in zip(weights, values, strict=False):
        total = total + float(weight) * value
    return total


def SRA1() -> SRA:
    """SRA1: two evaluations, strong order 1.5, drift order 2."""
    return SRA(SRA_1)


def SRA2() -> SRA:
    """SRA2: as SRA1, the noise's level taken at 1/3 and at the end of a step."""
    return SRA(SRA_2)


def SRA3() -> SRA:
    """SRA3: three evaluations, strong order 1.5, drift order 3."""
    return SRA(SRA_3)

"""Explicit Runge-Kutta methods, from their tableaus.

    k_i = F(s0 + c_i h, z + h sum_{j<i} a_ij k_j),   z1 = z + h sum_i b_i k_i,   error = h sum_i (b_i - b_hat_i) k_i

A method whose last stage is the next step's first keeps that slope as its memory and evaluates one stage less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._numbers import on_host, where, zeros_like
from .._tensor import column, tree_map
from ..brownian import BrownianPath
from ..terms import Term
from . import tableau as tables
from .base import Proposal, Solver, counters, refuse_noise
from .tableau import Tableau


class Memory(NamedTuple):
    """(B,) accepted steps, and the slope at the current state for methods that reuse their last stage, else None."""

    entered: Tensor
    slope: Any


@dataclass(frozen=True)
class RungeKutta(Solver):
    """The explicit Runge-Kutta method of a tableau.

    Args:
        tableau: Its coefficients.
    """

    tableau: Tableau

    @property
    def linear(self) -> bool:
        return True

    @property
    def remembers(self) -> bool:
        return self.tableau.first_same_as_last

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def error_order(self) -> int | None:
        return self.tableau.error_order

    @property
    def evaluations(self) -> int:
        return self.tableau.stages - int(self.tableau.first_same_as_last)

    def init(self, term: Term, z: Any) -> Memory:
        refuse_noise(self, term)
        return Memory(counters(z), tree_map(torch.zeros_like, z) if self.tableau.first_same_as_last else None)

    def ready(self, memory: Memory) -> Tensor | None:
        return memory.entered > 0 if self.tableau.first_same_as_last else None

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Any, memory: Memory, path: BrownianPath | None
    ) -> Proposal:
        tab = self.tableau
        slopes, aux = [], None
        if tab.first_same_as_last:
            s1 = where(memory.entered > 0, s1, s0)  # the first advance evaluates in place
            slopes.append(memory.slope)
        h = s1 - s0
        for i in range(len(slopes), tab.stages):
            s = s1 if tab.c[i] == 1 else s0 + float(tab.c[i]) * h
            slope, aux = term.evaluate(s, _combine(z, h, tab.a[i], slopes), memory.entered)
            slopes.append(slope)
        assert aux is not None  # every tableau has a stage to evaluate
        error = None
        if tab.b_hat is not None:
            weights = tuple(b - b_hat for b, b_hat in zip(tab.b, tab.b_hat, strict=True))
            error = _combine(tree_map(zeros_like, z), h, weights, slopes)
        kept = slopes[-1] if tab.first_same_as_last else None
        moved = _combine(z, h, tab.b, slopes)
        return Proposal(moved, error, aux, Memory(memory.entered + 1, kept), memory.entered >= 0)


def _combine(z: Any, h: Tensor, weights: tuple[Any, ...], slopes: list[Any]) -> Any:
    """z + h sum_j weights_j slopes_j, leaf by leaf."""
    used = [(float(w), slope) for w, slope in zip(weights, slopes, strict=False) if w != 0]
    if not used:
        return z

    def leaf(state: Tensor, *rates: Tensor) -> Tensor:
        total = rates[0] * used[0][0]
        for (weight, _), rate in zip(used[1:], rates[1:], strict=True):
            total = total + rate * weight
        if on_host(state):
            return state + h[:, None] * total
        return state + column(h, state) * total.to(state.dtype)

    return tree_map(leaf, z, *[slope for _, slope in used])


def Euler() -> RungeKutta:
    """Euler's method, order 1."""
    return RungeKutta(tables.EULER)


def Heun() -> RungeKutta:
    """Heun's method, order 2, with an embedded Euler step."""
    return RungeKutta(tables.HEUN)


def Midpoint() -> RungeKutta:
    """The explicit midpoint rule, order 2, with an embedded Euler step."""
    return RungeKutta(tables.MIDPOINT)


def RK4() -> RungeKutta:
    """The classical Runge-Kutta method, order 4, for fixed grids."""
    return RungeKutta(tables.RK4)


def BogackiShampine() -> RungeKutta:
    """Bogacki and Shampine's method, order 3(2)."""
    return RungeKutta(tables.BOGACKI_SHAMPINE)


def Dopri5() -> RungeKutta:
    """Dormand and Prince's method, order 5(4)."""
    return RungeKutta(tables.DORMAND_PRINCE_5)


def Tsit5() -> RungeKutta:
    """Tsitouras's method, order 5(4)."""
    return RungeKutta(tables.TSITOURAS_5)


def Dopri8() -> RungeKutta:
    """Dormand and Prince's method of order 8 as in DOP853, with a fifth-order error estimate."""
    return RungeKutta(tables.DORMAND_PRINCE_8)

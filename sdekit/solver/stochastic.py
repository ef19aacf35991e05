"""Solvers for the reverse SDE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._tensor import column
from ..brownian import BrownianPath
from ..terms import NO_AUX, ReverseSDE, Term
from .base import Equation, Proposal, Solver, counters


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """Euler and Maruyama's method: z + h drift + eta g dW, coefficients at the step's start, on a fixed grid.

    Strong order 1 here (the noise is additive), weak order 1.
    """

    @property
    def equation(self) -> Equation:
        return "reverse"

    @property
    def order(self) -> int:
        return 1

    @property
    def error_order(self) -> None:
        return None

    @property
    def evaluations(self) -> int:
        return 1

    def init(self, term: Term, z: Tensor) -> Tensor:
        if not isinstance(term, ReverseSDE):
            raise TypeError(f"EulerMaruyama integrates a ReverseSDE, not a {type(term).__name__}.")
        return counters(z)

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: Tensor, path: BrownianPath | None
    ) -> Proposal:
        if path is None:
            raise ValueError("path=None; EulerMaruyama needs a Brownian path, for example IndependentIncrements.")
        assert isinstance(term, ReverseSDE)  # checked by init
        moved = z + column(s1 - s0, z) * term.drift(s0, z)
        moved = moved + column(term.noise_scale(s0), z) * path.increment(s0, s1, memory, z)
        return Proposal(moved, None, NO_AUX, memory + 1, torch.ones_like(s0, dtype=torch.bool))

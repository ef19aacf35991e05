"""Explicit multistep methods on the exact linear part: one evaluation a step, past predictions reused.

Each step evaluates the prediction where it starts and integrates the polynomial through the last `depth` of them. How a
method of order 3 or 4 begins is told in start.py.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .._tensor import column, select
from ..brownian import BrownianPath
from ..terms import NO_AUX, ReverseSDE, Term
from .base import Equation, Proposal, Solver, require_flow, require_path
from .semilinear import Form, Linear, Variable, combine, level_of, linear, predict, variable_of, weights
from .start import EXPLICIT, History, Start, empty, enter, held, shares


@dataclass(frozen=True)
class Multistep(Solver):
    """An explicit multistep method; subclasses state `form`, `variable` and `depth`."""

    @property
    def linear(self) -> bool:
        return True

    @property
    def equation(self) -> Equation:
        return "flow"

    @property
    @abstractmethod
    def form(self) -> Form:
        """Which prediction is integrated."""

    @property
    def variable(self) -> Variable:
        """In which variable the polynomial is one."""
        return "half_log_snr"

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many predictions it passes through."""

    @property
    def start(self) -> Start:
        """How the history is begun."""
        return EXPLICIT[self.depth]

    @property
    def order(self) -> int:
        return self.depth

    @property
    def error_order(self) -> None:
        return None

    @property
    def evaluations(self) -> int:
        return 1

    def init(self, term: Term, z: Tensor) -> History:
        require_flow(self, term)
        return empty(z, self.depth)

    def ready(self, memory: History) -> Tensor | None:
        return None if len(self.start) == 1 else memory.entered >= len(self.start) - 1

    def weigh(self, term: Term, step: Linear, history: History, valid: Tensor) -> Tensor:
        """(B, K) weights of the predictions in a step."""
        return weights(step, history.nodes, valid, variable_of(term.model.sde, self.variable))

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: History, path: BrownianPath | None
    ) -> Proposal:
        sde, t0, t1 = term.model.sde, term.time(s0), term.time(s1)
        step = linear(sde, self.form, t0, t1, level_of(term, t0, t1))
        x, t, node = z, t0, step.start
        if len(self.start) > 1:
            share = shares(self.start, memory.entered)
            node = torch.where(share > 0, step.start + share * step.length, step.start)
            t = torch.where(share > 0, sde.clamp(sde.time_at(node)), t0)
            part = linear(sde, self.form, t0, t, torch.zeros_like(t0))
            known = held(self.start, memory.entered, self.depth)
            each = weights(part, memory.nodes, known, variable_of(sde, self.variable))
            x = combine(part.keep, z, torch.where(share[:, None] > 0, each, 0.0), memory.past)
        history = enter(self.start, memory, node, predict(term, self.form, x, t))
        valid = held(self.start, history.entered, self.depth)
        moved = combine(step.keep, z, self.weigh(term, step, history, valid), history.past)
        if isinstance(term, ReverseSDE):
            moved = moved + column(step.noise, z) * unit_noise(self, path, s0, s1, memory.entered, z)
        ready = self.ready(memory)
        if ready is not None:
            moved = select(ready, moved, z)
        return Proposal(moved, None, NO_AUX, history, torch.ones_like(s0, dtype=torch.bool))


def unit_noise(
    solver: Solver, path: BrownianPath | None, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor, lane: int = 0
) -> Tensor:
    """Standard normals like `like` from the path's increment over the step; 0 where the step has no length."""
    path = require_path(solver, path)
    length = (s1 - s0).abs().sqrt()
    scale = torch.where(length > 0, 1.0 / torch.where(length > 0, length, 1.0), 0.0)
    return column(scale, like) * path.increment(s0, s1, step, like, lane)

"""Predictor-corrector multistep methods on the exact linear part: UniPC and SA-Solver.

Each step predicts with the polynomial through the last predictions, evaluates once at the predicted point, and corrects
with the polynomial through that evaluation too. The evaluation kept is that at the predicted point, so the corrector's
order, one above the predictor's, costs no evaluation. A first advance in place evaluates where the solve starts; how
a predictor of three points begins is told in start.py.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._tensor import column, select
from ..brownian import BrownianPath
from ..terms import NO_AUX, ProbabilityFlow, ReverseSDE, Term
from .base import Equation, Proposal, Solver, require_flow, require_reverse
from .multistep import unit_noise
from .semilinear import Form, Linear, Variable, combine, level_of, linear, predict, variable_of, weights
from .start import CORRECTED, History, empty, enter, held, shares


@dataclass(frozen=True)
class PredictCorrect(Solver):
    """A predictor of `points` predictions with a corrector of `corrected` of them and the new one (-1: none)."""

    @property
    def linear(self) -> bool:
        return True

    @property
    def equation(self) -> Equation:
        return "flow"

    @property
    def form(self) -> Form:
        """Which prediction is integrated."""
        return "data"

    @property
    def variable(self) -> Variable:
        """In which variable the polynomial is one."""
        return "half_log_snr"

    @property
    @abstractmethod
    def points(self) -> int:
        """How many past predictions the predictor takes."""

    @property
    def corrected(self) -> int:
        """How many past predictions the corrector takes, besides the new one."""
        return self.points

    @property
    def error_order(self) -> None:
        return None

    @property
    def evaluations(self) -> int:
        return 1

    def init(self, term: Term, z: Tensor) -> History:
        require_flow(self, term)
        return empty(z, max(self.points, self.corrected))

    def ready(self, memory: History) -> Tensor:
        return memory.entered >= len(CORRECTED[self.points])

    def weigh(self, term: Term, step: Linear, nodes: Tensor, valid: Tensor, correct: bool) -> Tensor:
        """(B, K) weights of the predictions at `nodes` in a step."""
        return weights(step, nodes, valid, variable_of(term.model.sde, self.variable))

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: History, path: BrownianPath | None
    ) -> Proposal:
        start, sde = CORRECTED[self.points], term.model.sde
        begun = memory.entered >= len(start)
        t0, t1 = term.time(s0), term.time(s1)
        level = level_of(term, t0, t1)
        step = linear(sde, self.form, t0, t1, level)
        # While it starts, the step predicted ends inside of the step to come.
        share = torch.where(begun, 1.0, shares(start, memory.entered))
        node = torch.where(begun, step.start + step.length, step.start + share * step.length)
        t = torch.where(begun, t1, torch.where(share > 0, sde.clamp(sde.time_at(node)), t0))
        part = linear(sde, self.form, t0, t, torch.where(begun, level, 0.0))
        depth = len(memory.past)
        places = torch.arange(depth + 1, device=s0.device)
        known = held(start, memory.entered, depth) & (places[:depth] < self.points)
        each = self.weigh(term, part, memory.nodes, known, False)
        x = combine(part.keep, z, torch.where(share[:, None] > 0, each, 0.0), memory.past)
        noise = torch.zeros_like(z)
        if isinstance(term, ReverseSDE):
            steps = (memory.entered - len(start)).clamp(min=0)
            noise = column(part.noise, z) * unit_noise(self, path, s0, s1, steps, z)
            x = x + noise
        new = predict(term, self.form, x, t)
        history = enter(start, memory, node, new)
        moved = x
        if self.corrected >= 0:
            nodes = torch.cat((node[:, None], memory.nodes), 1)
            valid = torch.cat((torch.ones_like(known[:, :1]), held(start, memory.entered, depth)), 1)
            valid = valid & (places <= self.corrected)
            each = self.weigh(term, step, nodes, valid, True)
            moved = combine(step.keep, z, each, (new, *memory.past)) + noise
        moved = select(begun, moved, z)
        return Proposal(moved, None, NO_AUX, history, torch.ones_like(begun))


@dataclass(frozen=True)
class UniPC(PredictCorrect):
    """UniPC: multistep predictor and corrector; of order `predictor` + 1.

    Args:
        predictor: How many past predictions the predictor takes, 1, 2 or 3.
        variant: "bh2" or "bh1". They differ only where the published method puts 1/2 for a coefficient: in the
            predictor of 2 points and the corrector of 1.
        prediction: "data" or "noise".

    Source: Zhao et al. 2023, UniPC.
    """

    predictor: int = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    prediction: Form = "data"

    def __post_init__(self) -> None:
        if self.predictor not in (1, 2, 3):
            raise ValueError(f"predictor={self.predictor!r}; 1, 2 or 3 is needed.")
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"variant={self.variant!r}; 'bh1' or 'bh2' is needed.")
        if self.prediction not in ("data", "noise"):
            raise ValueError(f"prediction={self.prediction!r}; 'data' or 'noise' is needed.")

    @property
    def order(self) -> int:
        return self.predictor + 1

    @property
    def form(self) -> Form:
        return self.prediction

    @property
    def points(self) -> int:
        return self.predictor

    def weigh(self, term: Term, step: Linear, nodes: Tensor, valid: Tensor, correct: bool) -> Tensor:
        exact = super().weigh(term, step, nodes, valid, correct)
        if self.predictor != (1 if correct else 2):
            return exact
        # One slope D between two predictions, a and b, with 1/2 for its coefficient: base + B (a - b) / (2 r).
        exponent = step.exponent * step.length
        half = 0.5 * step.gain * (step.exponent * torch.expm1(exponent) if self.variant == "bh2" else step.length)
        whole = step.gain * step.exponent * torch.expm1(exponent)
        a, b, both = nodes[:, 0], nodes[:, 1], valid[:, 0] & valid[:, 1] & (nodes[:, 0] != nodes[:, 1])
        apart = torch.where(both, a - b, 1.0)
        slope = torch.where(both, half * step.length / apart, 0.0)
        base = torch.stack((torch.zeros_like(whole), whole) if correct else (whole, torch.zeros_like(whole)), 1)
        pair = base + torch.stack((slope, -slope), 1)
        pair = torch.nn.functional.pad(pair, (0, nodes.shape[1] - 2))
        return torch.where(both[:, None], pair, exact)


@dataclass(frozen=True)
class SASolver(PredictCorrect):
    """SA-Solver: stochastic Adams, multistep predictor and corrector in the data prediction, for a ReverseSDE.

    The noise level tau(t) is the ReverseSDE's eta; the published default is 1 for 0.2 <= t <= 0.8 and 0 else. Predictor
    and corrector share the step's noise. Weak order 2 (1 with corrector=0, or predictor=1 and none), strong order 1;
    where eta = 0, of order `predictor` + 1 (corrector as deep) like UniPC. That is for a smooth eta: where it jumps, as
    the published one does, weak order 1 of the transition, unless the jumps are times of the grid.

    Args:
        predictor: How many past predictions the predictor takes, 1, 2 or 3.
        corrector: How many the corrector takes besides the new one, 0 to 3; None for no corrector.

    Source: Xue et al. 2023, SA-Solver.
    """

    predictor: int = 3
    corrector: int | None = 3

    def __post_init__(self) -> None:
        if self.predictor not in (1, 2, 3):
            raise ValueError(f"predictor={self.predictor!r}; 1, 2 or 3 is needed.")
        if self.corrector not in (None, 0, 1, 2, 3):
            raise ValueError(f"corrector={self.corrector!r}; None, 0, 1, 2 or 3 is needed.")

    @property
    def equation(self) -> Equation:
        return "both"

    @property
    def order(self) -> int:
        return 1 if (self.corrector == 0 or (self.corrector is None and self.predictor == 1)) else 2

    @property
    def points(self) -> int:
        return self.predictor

    @property
    def corrected(self) -> int:
        return -1 if self.corrector is None else self.corrector

    def init(self, term: Term, z: Tensor) -> History:
        if not isinstance(term, ProbabilityFlow):
            require_reverse(self, term)
        return empty(z, max(self.points, self.corrected))

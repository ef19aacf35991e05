"""Predictor-corrector: a solver's step in time, then moves that stand still in time and draw the law back to p_t.

Here is what a corrector is, and the solver that joins one to a predictor; langevin.py has the correctors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .._tensor import select
from ..brownian import BrownianPath
from ..terms import ProbabilityFlow, ReverseSDE, Term
from .base import Equation, Proposal, Solver, counters


class Moved(NamedTuple):
    """Where a corrector moved.

    Attributes:
        z: The state, at the time it was at before.
        memory: To be committed if the step is accepted.
        accepted: (B,) float64 share of the moves that were accepted; 1 where nothing is ever refused.
        size: (B,) float64 mean step e, in the units of x squared.
    """

    z: Tensor
    memory: Any
    accepted: Tensor
    size: Tensor


class Corrector(ABC):
    """Moves of every sample that leave its marginal p_t invariant, for terms in x coordinates.

    To write one, subclass as a frozen dataclass and state the abstract members. `move` is as pure as a solver's
    `propose`, makes `evaluations` network calls, and draws through a `StepNoise` only.
    """

    moves: int

    @property
    def linear(self) -> bool:
        """Whether a move is linear in the state, the network's outputs and the draws."""
        return False

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Network evaluations of one call of `move`, all its inner moves together."""

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's move depends on which others are in the batch."""
        return False

    def init(self, term: Term, z: Tensor) -> Any:
        """The memory at the start, without a network call.

        Raises:
            TypeError: The term's coordinates are not those of x.
        """
        if not isinstance(term, (ProbabilityFlow, ReverseSDE)):
            raise TypeError(
                f"{type(self).__name__} moves x, and a {type(term).__name__} has other coordinates: "
                "pass a ProbabilityFlow or a ReverseSDE."
            )
        return self._memory(z)

    def _memory(self, z: Tensor) -> Any:
        """What `init` returns: nothing, unless a subclass remembers."""
        return None

    @abstractmethod
    def move(self, term: Term, s: Tensor, z: Tensor, memory: Any, step: Tensor, path: BrownianPath) -> Moved:
        """`moves` moves of every sample at s (B,); `step` (B,) counts its accepted steps and keys its draws."""


@dataclass(frozen=True)
class StepNoise:
    """The draws of a corrector in one step, each by its number from 0.

    Lanes 4 to 15 are the corrector's, those below the predictor's. A corrector that needs more than these twelve counts
    each step as several, always as many: no two draws meet, and none meets the predictor's, whatever their numbers.

    Args:
        path: Where they come from.
        step: (B,) accepted steps so far.
        count: How many draws a step has.
    """

    path: BrownianPath
    step: Tensor
    count: int

    _FIRST = 4
    _LANES = 12

    def normal(self, draw: int, like: Tensor) -> Tensor:
        """Standard normals like `like` (B, *event)."""
        number, lane = self._place(draw)
        return self.path.normal(number, like, lane)

    def uniform(self, draw: int) -> Tensor:
        """(B,) float64 uniform on (0, 1]; no draw is both a normal and a uniform."""
        return self.path.uniform(*self._place(draw))

    def _place(self, draw: int) -> tuple[Tensor, int]:
        blocks = -(-self.count // self._LANES)
        return self.step * blocks + draw // self._LANES, self._FIRST + draw % self._LANES


class Memory(NamedTuple):
    """What predictor and corrector remember, and what the corrector did.

    Attributes:
        predictor: The predictor's own.
        corrector: The corrector's own.
        steps: (B,) int64 steps corrected.
        accepted: (B,) float64 sum over them of the share of moves accepted.
        size: (B,) float64 sum over them of the mean step e.
    """

    predictor: Any
    corrector: Any
    steps: Tensor
    accepted: Tensor
    size: Tensor


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """A step of `predictor` from s0 to s1, then the moves of `corrector` at s1; on a fixed grid.

    Any solver predicts: deterministic ones on a ProbabilityFlow, stochastic ones on a ReverseSDE. One that remembers
    (multistep methods, Runge-Kutta methods that reuse their last slope) keeps what it saw at points that the corrector
    has left since, and takes the displacement for a slope. The law converges all the same, at order 1, but few steps
    with strong corrections end worse than without: `DPMSolverPP(2)`, 24 steps to t = 0.05 on a VP Gaussian, with a
    variance 5% too large alone and 82% with `Langevin(0.3, 5)`, `Heun()` with 1% and 6%. Better predictors here are
    `EulerMaruyama()`, `Heun()` and `DPMSolverPP(1)`. An advance that only fills the predictor's memory goes without
    correction.

    The state that comes out has the corrector's noise in it. There is no option to leave that out of the last move:
    denoising what was sampled is the sampler's option.

    Args:
        predictor: Any solver but another PredictorCorrector.
        corrector: `Langevin`, `Underdamped`, `MALA`, ...
        corrector_first: The corrector at s0 and then the predictor, as the published code has it; the same moves in
            the same order, but for one more at the start and one fewer at the end.

    Raises:
        TypeError: Of other kinds.

    Source: Song et al. 2021, Score-based generative modeling through stochastic differential equations.
    """

    predictor: Solver
    corrector: Corrector
    corrector_first: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, Solver):
            raise TypeError(f"predictor={self.predictor!r}; a Solver is needed, for example sdekit.EulerMaruyama().")
        if isinstance(self.predictor, PredictorCorrector):
            raise TypeError(
                "predictor is a PredictorCorrector, and both correctors would draw the same noise: "
                "pass its own predictor, and a corrector with more moves."
            )
        if not isinstance(self.corrector, Corrector):
            raise TypeError(f"corrector={self.corrector!r}; a Corrector is needed, for example Langevin().")
        if not isinstance(self.corrector_first, bool):
            raise TypeError(f"corrector_first={self.corrector_first!r}; True or False is needed.")

    @property
    def equation(self) -> Equation:
        return "flow" if self.predictor.equation == "any" else self.predictor.equation

    @property
    def draws(self) -> bool:
        return True

    @property
    def linear(self) -> bool:
        return self.predictor.linear and self.corrector.linear

    @property
    def order(self) -> int:
        """That of the predictor."""
        return self.predictor.order

    @property
    def error_order(self) -> None:
        return None

    @property
    def evaluations(self) -> int:
        return self.predictor.evaluations + self.corrector.evaluations

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's result depends on which others are in the batch; only a corrector may do that."""
        return self.corrector.couples_samples

    def init(self, term: Term, z: Tensor) -> Memory:
        corrector, predictor, count = self.corrector.init(term, z), self.predictor.init(term, z), counters(z)
        return Memory(predictor, corrector, count, count.double(), count.double())

    def ready(self, memory: Memory) -> Tensor | None:
        return self.predictor.ready(memory.predictor)

    def report(self, memory: Memory) -> dict[str, Tensor]:
        """The predictor's report, and (B,) means over the steps: `acceptance`, and `corrector_step` e.

        NaN for a sample that made no step.
        """
        return {
            **self.predictor.report(memory.predictor),
            "acceptance": memory.accepted / memory.steps,
            "corrector_step": memory.size / memory.steps,
        }

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: Memory, path: BrownianPath | None
    ) -> Proposal:
        if path is None:
            raise ValueError(
                "path=None; the corrector draws noise, even where the predictor does not: pass "
                "sdekit.IndependentIncrements(seed, torch.arange(len(x0)))."
            )
        ready = self.ready(memory)
        if self.corrector_first:
            z, memory = self._corrected(term, s0, z, memory, ready, path)
        proposal = self.predictor.propose(term, s0, s1, z, memory.predictor, path)
        moved, memory = proposal.z, memory._replace(predictor=proposal.memory)
        if not self.corrector_first:
            moved, memory = self._corrected(term, s1, moved, memory, ready, path)
        return Proposal(moved, None, proposal.aux, memory, proposal.settled)

    def _corrected(
        self, term: Term, s: Tensor, z: Tensor, memory: Memory, ready: Tensor | None, path: BrownianPath
    ) -> tuple[Tensor, Memory]:
        """State and memory after the corrector, of the samples whose predictor is `ready`."""
        moved = self.corrector.move(term, s, z, memory.corrector, memory.steps, path)
        after = memory._replace(
            corrector=moved.memory,
            steps=memory.steps + 1,
            accepted=memory.accepted + moved.accepted,
            size=memory.size + moved.size,
        )
        return (moved.z, after) if ready is None else select(ready, (moved.z, after), (z, memory))

"""What a solver is: a frozen value that proposes one step for every sample.

    init(term, z) -> memory                            no network call
    ready(memory) -> (B,) bool                         False: the sample's next advance fills the memory, in place
    propose(term, s0, s1, z, memory, path) -> Proposal
    report(memory) -> dict                             what a finished solve has to say besides, (B,) tensors

Memory is state of (B, ...) tensors, committed only where the step is accepted. Advances that fill the memory before
the first step are ordinary ones that leave the state where it is: `propose` is told where the step will end, and
returns z. So a refilled slot or a captured graph needs no second code path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..brownian import BrownianPath
from ..terms import Aux, ProbabilityFlow, ReverseSDE, Term

Equation = Literal["any", "flow", "reverse", "both"]


class Proposal(NamedTuple):
    """One proposed step.

    Attributes:
        z: The state at s1.
        error: A tree like `z`, the estimated local error, or None for a solver without one.
        aux: Of the step's last evaluation.
        memory: To be committed if the step is accepted.
        settled: (B,) whether the solver worked at its full order (False while a multistep method starts up).
        error_order: (B,) of the solution whose error is estimated, where each sample has its own; None: the solver's.
        cost: (B,) nats that the error costs, where the solver has found out; else None.
    """

    z: Any
    error: Any
    aux: Aux
    memory: Any
    settled: Tensor
    error_order: Tensor | None = None
    cost: Tensor | None = None


@dataclass(frozen=True)
class Solver(ABC):
    """A method of integration. To write one, subclass as a frozen dataclass and state the abstract members."""

    @property
    @abstractmethod
    def order(self) -> int:
        """The order of the propagated solution."""

    @property
    @abstractmethod
    def error_order(self) -> int | None:
        """The order of the solution whose error is estimated; None: no estimate, a fixed grid is needed."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Network evaluations of one advance."""

    @property
    def equation(self) -> Equation:
        """What it integrates: "any" equation without noise, the ProbabilityFlow ("flow"), a ReverseSDE, or "both"."""
        return "any"

    @property
    def draws(self) -> bool:
        """Whether it needs a path to draw from."""
        return self.equation == "reverse"

    @property
    def linear(self) -> bool:
        """Whether on a fixed grid its result is linear in the start, the network's outputs and the draws."""
        return False

    @property
    def remembers(self) -> bool:
        """Whether a step makes use of more than the state it starts from: of slopes or predictions before it."""
        return True

    @property
    def needs_control(self) -> bool:
        """Whether it is for controlled steps only: what it does in a step depends on the states before in jumps."""
        return False

    @property
    def weighs_nodes(self) -> bool:
        """Whether the solver keeps the weight of every node's probe, as fresh probes need."""
        return False

    def for_compiler(self) -> Solver:
        """The same method, written as suits a compiler."""
        return self

    @abstractmethod
    def init(self, term: Term, z: Any) -> Any:
        """The memory at the start, without a network call."""

    def ready(self, memory: Any) -> Tensor | None:
        """(B,) whether the next advance may move; None: always."""
        return None

    def report(self, memory: Any) -> dict[str, Tensor]:
        """What a finished solve has to say besides, by name, (B,) each: acceptance rates and the like."""
        return {}

    @abstractmethod
    def propose(self, term: Term, s0: Tensor, s1: Tensor, z: Any, memory: Any, path: BrownianPath | None) -> Proposal:
        """A step from s0 to s1 (B,) for every sample."""


def estimated_order(solver: Solver, proposal: Proposal) -> Tensor | int:
    """The order of the solution whose error is estimated: with the step's length to its power + 1 the error goes."""
    if proposal.error_order is not None:
        return proposal.error_order
    return solver.error_order or solver.order


def batch_of(z: Any) -> Tensor:
    """A leaf of the state, for its batch size and device."""
    while not isinstance(z, Tensor):
        z = z[0]
    return z


def counters(z: Any) -> Tensor:
    """(B,) int64 zeros."""
    leaf = batch_of(z)
    return torch.zeros(leaf.shape[0], dtype=torch.int64, device=leaf.device)


def refuse_noise(solver: Solver, term: Term) -> None:
    """Raises TypeError for an equation with noise, which `solver` would drop: its law would be wrong without a word."""
    if isinstance(term, ReverseSDE) and term.eta != 0:
        raise TypeError(
            f"{type(solver).__name__} integrates equations without noise, and this ReverseSDE has eta={term.eta!r}: "
            "pass sdekit.EulerMaruyama(), or eta=0."
        )


def require_flow(solver: Solver, term: Term) -> None:
    """Raises TypeError unless the term is a ProbabilityFlow."""
    if not isinstance(term, ProbabilityFlow):
        hint = " (its noise would be dropped; eta=0 is the flow)" if isinstance(term, ReverseSDE) else ""
        raise TypeError(f"{type(solver).__name__} integrates a ProbabilityFlow, not a {type(term).__name__}{hint}.")


def require_reverse(solver: Solver, term: Term) -> ReverseSDE:
    """`term`; raises TypeError unless it is a ReverseSDE."""
    if not isinstance(term, ReverseSDE):
        raise TypeError(f"{type(solver).__name__} integrates a ReverseSDE, not a {type(term).__name__}.")
    return term


def require_path(solver: Solver, path: BrownianPath | None) -> BrownianPath:
    """`path`; raises ValueError if there is none."""
    if path is None:
        raise ValueError(
            f"path=None; {type(solver).__name__} needs a Brownian path, for example sdekit.IndependentIncrements."
        )
    return path

"""How a step runs: eagerly, compiled, or captured in a CUDA graph. The numbers are the same, to rounding.

    eager            operation by operation: begins at once, and takes any equation, solver and network
    compile          fused between network calls (compiled.py): tens of seconds once, then less a step
    graph            one launch for the whole step, operations and network (captured.py): CUDA only
    compiled-graph   one launch for the fused step, network included: CUDA only

What cannot be run as asked is run eagerly, with a warning that says why. "auto" is "eager": compiling costs more than
it saves in most single solves on a CPU, and graphs have not been measured yet.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from ._numbers import to_host
from ._tensor import leaves, rebuilt, tensor, tree_map
from .captured import Captured
from .compiled import compiled, run
from .controller import FixedGrid, Nats
from .errors import SdekitWarning
from .ledger import Ledger
from .likelihood_flow import FlowState, LikelihoodFlow
from .loop import Carry, Problem, Stray, advance, still_running
from .parts import CannotCompileError, kind, own_parts
from .pid import PID
from .resident import Resident, can_stay
from .solver.adams import Adams
from .solver.base import batch_of
from .solver.runge_kutta import RungeKutta

Runtime = Literal["auto", "eager", "compile", "graph", "compiled-graph"]
GRAPHS = ("graph", "compiled-graph")
_RUNTIMES = get_args(Runtime)

_STAYS = 2  # the step that is recorded: where samples change after each, there is nothing to gain
_COMPACT_SHARE = 0.85  # finished samples leave the batch when fewer than this share still run ...
_COMPACT_LEAST = 8  # ... unless the batch is so small that a call costs the same


class Step(Protocol):
    """The samples in work, and how they are taken a step further."""

    def enter(self, problem: Problem, carry: Carry) -> None:
        """Puts these samples to work, in the place of those before."""
        ...

    def advance(self) -> Tensor:
        """Takes all a step further; how many still run (a number on their device)."""
        ...

    def carry(self) -> Carry:
        """Where they are, in memory that no later step writes to."""
        ...

    def size(self, needed: int, now: int) -> int:
        """How many samples to have in work where `needed` of the `now` in work run."""
        ...

    def close(self) -> None:
        """Ends the work; what can serve later solves is kept for them."""
        ...


def require_runtime(runtime: str) -> None:
    """Raises ValueError unless `runtime` is one of those that there are."""
    if runtime not in _RUNTIMES:
        raise ValueError(f"runtime={runtime!r}; one of {', '.join(map(repr, _RUNTIMES))} is needed.")


def stepper(runtime: Runtime, problem: Problem, carry: Carry) -> Step:
    """These samples at work as asked; what cannot be as asked is eager, with a warning that says why."""
    if runtime in ("auto", "eager") or not carry.s.numel() or torch.is_grad_enabled():
        return at_work(Eager(), runtime, problem, carry)
    try:
        if runtime in GRAPHS and not carry.s.is_cuda:
            raise CannotCompileError(f"its samples are on {str(carry.s.device)!r}, and only CUDA has graphs")
        step = Captured(runtime == "compiled-graph") if runtime in GRAPHS else Compiled(problem, carry)
    except CannotCompileError as error:
        _warn(runtime, error)
        return at_work(Eager(), runtime, problem, carry)
    return at_work(step, runtime, problem, carry)


def at_work(step: Step, runtime: Runtime, problem: Problem, carry: Carry) -> Step:
    """The step with these samples at work; an eager one, with a warning, where it cannot take them."""
    try:
        step.enter(problem, carry)
    except CannotCompileError as error:
        _warn(runtime, error)
        step = Eager()
        step.enter(problem, carry)
    return step


def _warn(runtime: Runtime, reason: CannotCompileError) -> None:
    text = f"runtime={runtime!r} is not possible for this solve: {reason}. It runs eagerly."
    warnings.warn(text, SdekitWarning, stacklevel=2)


def _fewer(needed: int, now: int) -> int:
    return needed if now >= _COMPACT_LEAST and needed < _COMPACT_SHARE * now else now


def hosted(problem: Problem, carry: Carry) -> tuple[Problem, Carry]:
    """The same with the samples' numbers on the host, where a step that is made operation by operation takes them so.

    On a CPU those do of a LikelihoodFlow by `Adams` or a Runge-Kutta method: likelihoods, adaptive flows.
    """
    on_cpu = carry.s.device.type == "cpu" and carry.s.numel() > 0 and not torch.is_grad_enabled()
    known = type(problem.term) is LikelihoodFlow and type(problem.solver) in (Adams, RungeKutta)
    if not (on_cpu and known and type(problem.controller) in (Nats, PID, FixedGrid)):
        return problem, carry
    return problem._replace(s_end=to_host(problem.s_end)), _hosted(carry)


def _hosted(tree: Any) -> Any:
    """The tree with arrays in the place of tensors, but for the states in it, (B, D)."""
    if isinstance(tree, FlowState):
        return tree._replace(log_det=to_host(tree.log_det))
    if isinstance(tree, Stray):
        return tree
    if isinstance(tree, Ledger):
        return to_host(tree)._replace(mark=tree.mark)
    if isinstance(tree, tuple):
        parts = map(_hosted, tree)
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return to_host(tree)


class Eager:
    """Operation by operation."""

    def enter(self, problem: Problem, carry: Carry) -> None:
        self._problem, self._carry = hosted(problem, carry)

    def advance(self) -> Tensor:
        with np.errstate(all="ignore"):  # what is not finite is judged, sample by sample
            self._carry = advance(self._problem, self._carry)
            return still_running(self._carry)

    def carry(self) -> Carry:
        return tree_map(tensor, self._carry)

    def size(self, needed: int, now: int) -> int:
        return _fewer(needed, now)

    def close(self) -> None:
        pass


class Compiled:
    """Fused between network calls.

    What the network rounds its answers to is a part of the step and shows when it is asked. So for one that was not
    asked yet the first step is made operation by operation, and compiled after it.

    Args:
        problem: Whose kind is compiled.
        carry: Where its samples are.

    Raises:
        CannotCompileError: With the reason.
    """

    def __init__(self, problem: Problem, carry: Carry) -> None:
        kind(problem, carry)  # says so at once if there is none
        self._asked = problem.term.model.knows_precision(batch_of(carry.z))
        self._program = compiled(problem, carry) if self._asked else None

    def enter(self, problem: Problem, carry: Carry) -> None:
        self._problem, self._like = problem, carry
        self._answer = problem.term.model.asker(batch_of(carry.z))
        self._given = [part.contiguous() for part in own_parts(problem)]  # as the trace had them
        self._leaves = [leaf.contiguous() for leaf in leaves(carry)]
        self._resident: Resident | None = None
        self._steps = 0

    def advance(self) -> Tensor:
        if self._resident is not None:
            return self._resident.advance()
        if self._program is None:
            return self._by_operations()
        self._steps += 1
        if self._steps == _STAYS and self._like.s.device.type == "cpu" and can_stay(self._program):
            resident = Resident(self._program, self._problem.term, self._answer, self._given, self._leaves)
            self._leaves, self._resident = resident.leaves(), resident if resident.stays else None
            return resident.left
        *self._leaves, left = run(self._program, self._problem.term, self._answer, (*self._given, *self._leaves))
        return left

    def _by_operations(self) -> Tensor:
        carry = advance(self._problem, self.carry())
        self._leaves = [leaf.contiguous() for leaf in leaves(carry)]
        if not self._asked:
            self._asked = True
            try:
                self._program = compiled(self._problem, carry)
                self._answer = self._problem.term.model.asker(batch_of(carry.z))  # leaner, now that it was asked
            except CannotCompileError as error:
                _warn("compile", error)
        return still_running(carry)

    def carry(self) -> Carry:
        return rebuilt(self._like, self._leaves if self._resident is None else self._resident.leaves())

    def size(self, needed: int, now: int) -> int:
        return _fewer(needed, now)

    def close(self) -> None:
        pass

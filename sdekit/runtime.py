"""How a step runs: eagerly, compiled, or captured in a CUDA graph. The numbers are the same, to rounding.

    eager     operation by operation: begins at once, and takes any equation, solver and network
    compile   fused between network calls (compiled.py): seconds once for a kind of solve, then a fraction of the cost
    graph     one launch for the whole step, network included (captured.py): CUDA only

What cannot be run as asked is run eagerly, with a warning that says why. "auto" is "eager": compiling costs more than
it saves in most single solves on a CPU, and graphs have not been measured yet.
"""

from __future__ import annotations

import warnings
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from .captured import Captured
from .compiled import compiled, step
from .errors import SdekitWarning
from .loop import Carry, Problem, advance
from .parts import CannotCompileError
from .solution import Status
from .tracing import Program

Runtime = Literal["auto", "eager", "compile", "graph"]

_COMPACT_SHARE = 0.85  # finished samples leave the batch when fewer than this share still run ...
_COMPACT_LEAST = 8  # ... unless the batch is so small that a call costs the same


class Step(Protocol):
    """One step of all samples in work."""

    def __call__(self, problem: Problem, carry: Carry) -> tuple[Carry, Tensor]:
        """The carry after the step, and how many samples still run."""
        ...

    def settled(self, carry: Carry) -> Carry:
        """The carry, in memory that no later step writes to."""
        ...

    def size(self, needed: int, now: int) -> int:
        """How many samples to have in work where `needed` of the `now` in work run."""
        ...


def require_runtime(runtime: str) -> None:
    """Raises ValueError unless `runtime` is one of those that there are."""
    if runtime not in get_args(Runtime):
        raise ValueError(f"runtime={runtime!r}; one of {', '.join(map(repr, get_args(Runtime)))} is needed.")


def stepper(runtime: Runtime, problem: Problem, carry: Carry) -> Step:
    """How the steps of this problem run; what cannot be as asked is eager, with a warning that says why."""
    if runtime in ("auto", "eager") or not carry.s.numel() or torch.is_grad_enabled():
        return Eager()
    try:
        if runtime == "compile":
            return Compiled(compiled(problem, carry))
        if not carry.s.is_cuda:
            raise CannotCompileError(f"its samples are on {str(carry.s.device)!r}, and only CUDA has graphs")
        return Captured(problem, carry)
    except CannotCompileError as error:
        warnings.warn(
            f"runtime={runtime!r} is not possible for this solve: {error}. It runs eagerly.",
            SdekitWarning,
            stacklevel=2,
        )
        return Eager()


def _fewer(needed: int, now: int) -> int:
    return needed if now >= _COMPACT_LEAST and needed < _COMPACT_SHARE * now else now


class Eager:
    """Operation by operation."""

    def __call__(self, problem: Problem, carry: Carry) -> tuple[Carry, Tensor]:
        after = advance(problem, carry)
        return after, (after.status == Status.RUNNING).sum()

    def settled(self, carry: Carry) -> Carry:
        return carry

    def size(self, needed: int, now: int) -> int:
        return _fewer(needed, now)


class Compiled:
    """Fused between network calls."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __call__(self, problem: Problem, carry: Carry) -> tuple[Carry, Tensor]:
        return step(problem, carry, self._program)

    def settled(self, carry: Carry) -> Carry:
        return carry

    def size(self, needed: int, now: int) -> int:
        return _fewer(needed, now)

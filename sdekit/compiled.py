"""The step compiled: one fused loop before each network call and one after it.

The network itself is called as ever, between the pieces (tracing.py): nothing of it goes into the trace, so what was
compiled serves every network, condition, seed and batch of the same shapes, and no change of weights or modes can be
missed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any

from torch import Tensor

from .divergence import Exact, Hutchinson
from .likelihood_flow import LikelihoodFlow
from .loop import Carry, Problem
from .parts import CannotCompileError, kind
from .terms import Term
from .tracing import VALUE, Program, made

Answer = Callable[[Tensor, Tensor], Tensor]

_KEPT = 32  # compiled steps held


def run(program: Program, term: Term, answer: Answer, given: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of the carry after a step, and how many samples still run.

    Args:
        program: From `compiled`.
        term: How its divergence is had.
        answer: What its network says of an input and a label.
        given: The problem's own parts, then the leaves of the carry.
    """
    values: list[Any] = [*given, *program.rest]
    for cut in program.cuts:
        taken = [None if place is None else values[place] for place in cut.takes]
        found = ask(term, answer, cut.kind, taken) if cut.run is None else cut.run(*taken)
        for place, value in zip(cut.gives, found, strict=True):
            values[place] = value
    return [values[place] for place in program.results]


def ask(term: Term, answer: Answer, kind: int, taken: list[Any]) -> Sequence[Tensor]:
    """What the network answers at a mark of this kind, of what it sees."""
    seen, label, vectors = taken
    if kind == VALUE:
        return (answer(seen, label).contiguous(),)
    divergence = term.divergence if isinstance(term, LikelihoodFlow) else None

    def field(state: Tensor) -> Tensor:
        return answer(state, label)

    if isinstance(divergence, Hutchinson):
        return [part.contiguous() for part in divergence.push(field, seen, vectors)]
    assert isinstance(divergence, Exact)  # nothing else asks for a trace
    return [part.contiguous() for part in divergence.evaluate(field, seen, None)[:2]]


_programs: OrderedDict[Hashable, Program] = OrderedDict()
_lock = Lock()


def compiled(problem: Problem, carry: Carry) -> Program:
    """The program for this kind of problem, from the cache or made now.

    Raises:
        CannotCompileError: With the reason.
    """
    key = kind(problem, carry)
    with _lock:
        if key in _programs:
            _programs.move_to_end(key)
            return _programs[key]
    try:
        program = made(problem, carry)
    except CannotCompileError:
        raise
    except Exception as error:  # a compiler may fail in any way: none of them is a reason not to solve
        lines = str(error).strip().splitlines()
        raise CannotCompileError(f"{type(error).__name__}: {lines[0] if lines else error!r}") from error
    with _lock:
        _programs[key] = program
        while len(_programs) > _KEPT:
            _programs.popitem(last=False)
    return program

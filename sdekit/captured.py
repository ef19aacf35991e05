"""The step captured in a CUDA graph, network included: one launch, whatever is in it.

A graph reads and writes the memory it was captured with. So the samples in work live in buffers of fixed shape; what
enters is copied into them, and what leaves is copied out (`settled`). A smaller batch needs another graph: samples
in work shrink by halves only, and who is done stays along until then.

Not captured, with the reason: networks that ask something of the host in a call (a branch on a tensor, `.item()`), and
what compiled.py does not take. A graph lives as long as the solve it was captured for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._tensor import leaves, tree_map
from .errors import NetworkError
from .loop import Carry, Problem, advance, still_running
from .parts import CannotCompileError, having, kind, own_parts

_WARM_UP = 2  # steps on a stream of their own before a capture, as torch asks for
_LEAST = 8  # a batch smaller than that is not made smaller


class Captured:
    """The step of a batch of one size at a time.

    Raises:
        CannotCompileError: With the reason, where samples enter.
    """

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._carry: Carry | None = None

    def enter(self, problem: Problem, carry: Carry) -> None:
        if self._carry is None or carry.s.shape[0] != self._carry.s.shape[0]:
            self._capture(problem, carry)
        for buffer, value in zip(_tensors(self._problem, self._buffers), _tensors(problem, carry), strict=True):
            buffer.copy_(value)

    def advance(self) -> Tensor:
        assert self._graph is not None  # captured where samples entered
        self._graph.replay()
        return self._left

    def carry(self) -> Carry:
        return tree_map(torch.clone, self._buffers)

    def size(self, needed: int, now: int) -> int:
        return now // 2 if now >= 2 * _LEAST and needed <= now // 2 else now

    @property
    def _buffers(self) -> Carry:
        assert self._carry is not None  # made where samples entered
        return self._carry

    def _capture(self, problem: Problem, carry: Carry) -> None:
        """Captures the step of a batch of this size, in buffers of its own."""
        kind(problem, carry)  # raises for what is the user's own
        own = tree_map(torch.clone, own_parts(problem))
        around = problem.term.model.take(torch.arange(len(carry.s), device=carry.s.device))  # its condition copied
        self._problem, self._carry = having(problem, own, around), tree_map(torch.clone, carry)
        self._left = torch.zeros((), dtype=torch.int64, device=carry.s.device)
        here = torch.cuda.current_stream(carry.s.device)
        stream = torch.cuda.Stream(carry.s.device)  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        try:
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):  # kernels are chosen and small tables made
                    advance(self._problem, self._buffers)
            here.wait_stream(stream)
            with torch.cuda.graph(graph):
                self._in_place()
        except NetworkError as error:  # eagerly it fails in its place, with what was done before
            raise CannotCompileError(f"the network cannot be captured: {error}") from error
        except RuntimeError as error:
            raise CannotCompileError(f"the step cannot be captured: {str(error).splitlines()[0]}") from error
        self._graph = graph

    def _in_place(self) -> None:
        """One step, written to where it was read from."""
        after = advance(self._problem, self._buffers)
        for buffer, value in zip(leaves(self._buffers), leaves(after), strict=True):
            buffer.copy_(value)
        self._left.copy_(still_running(after))


def _tensors(problem: Problem, carry: Carry) -> list[Tensor]:
    """All that a step reads and that belongs to its samples."""
    bound = [value for value in problem.term.model.bound.values() if isinstance(value, Tensor)]
    return [*own_parts(problem), *bound, *leaves(carry)]

"""A step captured in a CUDA graph, in buffers of its own.

What Python decides in the network's call is decided once, at the capture. So a graph is used only if its first replay
gives what the step itself gives: networks that draw or count are told so. Networks that ask something of the host in a
call (a branch on a tensor, `.item()`) cannot be captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ._tensor import leaves, tree_map
from .compiled import compiled, run
from .errors import SdekitWarning
from .loop import Carry, Problem, advance, still_running
from .parts import CannotCompileError, having, own_parts
from .solver.base import batch_of

_AGREES = 1e-3  # a replay and the step itself, of the largest number in a tensor: kernels may add in any order
_capturing = RLock()  # one capture at a time


class Capture(NamedTuple):
    """A graph and its memory.

    Attributes:
        graph: One step, of and into the buffers.
        given: What enters: the problem's own parts, the network's condition and the leaves of the carry.
        carry: The carry in the buffers.
        left: How many samples still run.
        done: When the solve before was done with it.
        reads: What else is kept alive: what the graph reads, and what its key names.
    """

    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    carry: Carry
    left: Tensor
    done: torch.cuda.Event
    reads: list[Any]


def captured(problem: Problem, carry: Carry, fused: bool, reads: list[Any]) -> Capture:
    """Captures the step of a batch of this size.

    Args:
        problem: Copied, with its condition; the network is not.
        carry: Copied.
        fused: Whether the step as `compiled` makes it is captured, or operation by operation.
        reads: To be kept alive with the graph.

    Raises:
        CannotCompileError: The network cannot be captured; so say NetworkError and RuntimeError.
    """
    model, device = problem.term.model, carry.s.device
    if torch.cuda.is_current_stream_capturing():
        raise CannotCompileError("another capture is going on, of which this solve is a part")
    around = model.take(torch.arange(len(carry.s), device=device))  # its condition copied
    own = [_copied(part) for part in own_parts(problem)]
    problem, carry = having(problem, own, around), tree_map(_copied, carry)
    step, program = _step(problem, carry, own, fused)
    left = torch.zeros((), dtype=torch.int64, device=device)
    buffers = [*leaves(carry), left]
    here, stream, graph = torch.cuda.current_stream(device), _aside(device), torch.cuda.CUDAGraph()
    with _capturing, torch.cuda.stream(here), _own_casts():  # that stream again, however a capture ends
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            step()  # kernels are chosen and small tables made
            with _Read() as read:
                wanted = step()
        here.wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            _write(buffers, step())
        graph.replay()
    least = batch_of(carry.z).numel()  # states and slopes: an estimate of errors may be all rounding
    checked = [
        _agree(*pair)
        for pair in zip(buffers, wanted, strict=True)
        if pair[0].numel() >= least and pair[0].is_floating_point()
    ]
    if not bool(torch.stack(checked).all()):
        raise CannotCompileError("the network does not answer the same when it is asked again")
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return Capture(graph, tensors(problem, carry), carry, left, done, [problem, program, *read.found, *reads])


def _step(problem: Problem, carry: Carry, own: list[Tensor], fused: bool) -> tuple[Callable[[], list[Tensor]], object]:
    """What makes the leaves of the carry after a step, and how many samples still run; and what has to live with it."""

    def eager() -> list[Tensor]:
        after = advance(problem, carry)
        return [*leaves(after), still_running(after)]

    if not fused:
        return eager, None
    try:
        program = compiled(problem, carry)
    except CannotCompileError as error:
        text = f"runtime='compiled-graph': the step is captured operation by operation, not compiled: {error}."
        warnings.warn(text, SdekitWarning, stacklevel=2)
        return eager, None
    term, dtype, given = problem.term, problem.term.model.network_dtype(batch_of(carry.z)), [*own, *leaves(carry)]
    return lambda: run(program, term, dtype, given), program


def _copied(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _write(buffers: list[Tensor], values: list[Tensor]) -> None:
    """Writes the values into the buffers, of which some may be views of others."""
    places = {buffer.data_ptr() for buffer in buffers}
    apart = [value.clone() if value.data_ptr() in places else value for value in values]
    for buffer, value in zip(buffers, apart, strict=True):
        buffer.copy_(value)


def _agree(found: Tensor, wanted: Tensor) -> Tensor:
    """Whether a replay has left what the step itself gives."""
    known = wanted.isfinite()
    scale = torch.where(known, wanted, 0.0).abs().max()
    same = torch.where(known, (found - wanted).abs() <= _AGREES * scale, found.isfinite() == known)
    return same.all()


class _Read(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what operations read that none of them has made: a graph reads it too, whoever lets go of it.

    Attributes:
        found: Those tensors.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._known:
                self._known.add(leaf.untyped_storage()._cdata)
                self.found.append(leaf.detach())
        out = func(*args, **(kwargs or {}))
        self._known.update(leaf.untyped_storage()._cdata for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


@lru_cache(maxsize=64)
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream on which the steps of a device are captured."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _own_casts() -> Iterator[None]:
    """Casts that autocast keeps for the time of its block would be gone when a graph is replayed."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def tensors(problem: Problem, carry: Carry) -> list[Tensor]:
    """All that a step reads and that belongs to its samples."""
    bound = [value for value in problem.term.model.bound.values() if isinstance(value, Tensor)]
    return [*own_parts(problem), *bound, *leaves(carry)]

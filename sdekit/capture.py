"""A step captured in a CUDA graph, in buffers of its own.

What Python decides in the network's call is decided once, at the capture. So a graph is used only if its first replay
changes the states as the step itself does, and none of the host's random numbers were drawn: networks that draw or
count are found out. Networks that ask something of the device in a call (a branch on a tensor, `.item()`) are too,
before they are captured: a capture that fails leaves memory behind, in some versions of torch.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ._tensor import leaves, tree_map
from .compiled import compiled, run
from .errors import SdekitWarning
from .loop import Carry, Problem, advance, still_running
from .model.score_model import ScoreModel
from .parts import CannotCompileError, having, own_parts
from .solver.base import batch_of

_AGREES = 1e-3  # a replay and the step itself, of the largest change in a tensor: kernels may add in any order
_STREAMS = 32  # that torch has of a device, handed out in turn
_PATIENCE = 60.0  # seconds to wait for the capture of another thread
_capturing = Lock()  # one capture at a time
_streams: WeakSet[torch.cuda.Stream] = WeakSet()  # those of graphs
_WAITS = {  # operations whose result the host reads, or whose shape is a result
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.item.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.unique_dim.default,
}
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Capture(NamedTuple):
    """A graph and its memory.

    Attributes:
        graph: One step, of and into the buffers.
        given: What enters: the problem's own parts, the network's condition and the leaves of the carry.
        carry: The carry in the buffers.
        left: How many samples still run.
        done: When the solve before was done with it.
        stream: On which it was captured.
        reads: What else is kept alive: what the graph reads, and what its key names.
    """

    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    carry: Carry
    left: Tensor
    done: torch.cuda.Event
    stream: torch.cuda.Stream
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
    here, warm, graph = torch.cuda.current_stream(device), _warm(device), torch.cuda.CUDAGraph()
    with _own_casts():
        warm.wait_stream(here)
        with torch.cuda.stream(warm):
            step()  # kernels are chosen and small tables made
            with torch.compiler.set_stance("force_eager"), _Read() as read:  # a compiled network knows no such mode
                step()
            drawn = _drawn(device)
            wanted = step()
        here.wait_stream(warm)
        if _drawn(device) != drawn:
            raise CannotCompileError("the network draws random numbers")
        before = [buffer.clone() for buffer in buffers]
        stream = _record(graph, here, lambda: _write(buffers, step()))
        graph.replay()
    if not _agree(before, buffers, wanted, batch_of(carry.z).numel(), model):
        raise CannotCompileError("the network does not answer the same when it is asked again")
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    reads = [problem, program, *read.found, *reads]
    return Capture(graph, tensors(problem, carry), carry, left, done, stream, reads)


def _record(graph: torch.cuda.CUDAGraph, here: torch.cuda.Stream, call: Callable[[], None]) -> torch.cuda.Stream:
    """Captures what a call does; the stream it was captured on, which no other graph may share.

    The workspaces of matrix products belong to a stream. A graph keeps their address, and torch frees those of its
    stream with it.
    """
    if not _capturing.acquire(timeout=_PATIENCE):
        raise CannotCompileError("another thread's capture does not end")
    try:
        stream = _alone(here.device)
        again = torch.cuda.stream(here)  # however a capture ends
        with again, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
    finally:
        _capturing.release()
    return stream


def _step(problem: Problem, carry: Carry, own: list[Tensor], fused: bool) -> tuple[Callable[[], list[Tensor]], object]:
    """What makes the leaves of the carry after a step, and how many samples still run; and what has to live with it."""

    def eager() -> list[Tensor]:
        after = advance(problem, carry)
        return [*leaves(after), still_running(after)]

    if not fused:
        return eager, None
    if not problem.term.model.knows_precision(batch_of(carry.z)):
        eager()  # what the network rounds its answers to is a part of the step
    try:
        program = compiled(problem, carry)
    except CannotCompileError as error:
        text = f"runtime='compiled-graph': the step is captured operation by operation, not compiled: {error}."
        warnings.warn(text, SdekitWarning, stacklevel=2)
        return eager, None
    term, answer, given = problem.term, problem.term.model.asker(batch_of(carry.z)), [*own, *leaves(carry)]
    return lambda: run(program, term, answer, given), program


def _copied(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _write(buffers: list[Tensor], values: list[Tensor]) -> None:
    """Writes the values into the buffers, of which some may be views of others."""
    places = {buffer.data_ptr() for buffer in buffers}
    apart = [value.clone() if value.data_ptr() in places else value for value in values]
    for buffer, value in zip(buffers, apart, strict=True):
        buffer.copy_(value)


def _agree(before: list[Tensor], found: list[Tensor], wanted: list[Tensor], least: int, model: ScoreModel) -> bool:
    """Whether a replay has changed states and slopes as the step itself does.

    Estimates of errors, which are smaller than `least` numbers, may be all rounding.
    """
    share = _AGREES + 16 * torch.finfo(model.precision(wanted[0])).eps
    checked = []
    for old, new, other in zip(before, found, wanted, strict=True):
        if other.numel() < least or not other.is_floating_point():
            continue
        known = other.isfinite()
        change = torch.where(known, other - old, 0.0).abs().max()
        size = torch.where(known, other, 0.0).abs().max()
        close = (new - other).abs() <= share * change + 64 * torch.finfo(other.dtype).eps * size
        checked.append(torch.where(known, close, new.isfinite() == known).all())
    return bool(torch.stack(checked).all())


def _drawn(device: torch.device) -> list[object]:
    """What tells whether random numbers have been drawn."""
    own = torch.get_rng_state(), torch.cuda.get_rng_state(device)
    numpy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    return [random.getstate(), numpy[1].tobytes(), numpy[2], *(part.numpy().tobytes() for part in own)]


class _Read(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what operations read that none of them has made: a graph reads it too, whoever lets go of it.

    Attributes:
        found: Those tensors.

    Raises:
        CannotCompileError: An operation waits for the device, or copies to it from the host.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.found += [leaf.detach() for leaf in given if self._new(leaf)]
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        asked, told = any(leaf.is_cuda for leaf in given), any(leaf.is_cuda for leaf in made)
        if asked and (
            func in _WAITS or (func in _COPIES and not told)
        ):  # attention makes seeds on the host, and waits not
            raise CannotCompileError(f"the network cannot be captured: it waits for the device ({func})")
        if told and func in _COPIES and any(leaf.is_cpu for leaf in given):
            raise CannotCompileError("the network cannot be captured: it copies something of the host's to the device")
        for leaf in made:
            self._new(leaf)
        return out

    def _new(self, leaf: Tensor) -> bool:
        """Whether its memory has not been met."""
        try:
            place = leaf.untyped_storage()._cdata
        except NotImplementedError:  # sparse, or another's
            return True
        new = place not in self._known
        self._known.add(place)
        return new


@lru_cache(maxsize=64)
def _warm(device: torch.device) -> torch.cuda.Stream:
    """Where steps run before they are captured."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _alone(device: torch.device) -> torch.cuda.Stream:
    """A stream on which no graph was captured that still is."""
    taken = {stream.cuda_stream for stream in _streams} | {_warm(device).cuda_stream}
    for _ in range(_STREAMS):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if stream.cuda_stream not in taken:
            _streams.add(stream)
            return stream
    raise CannotCompileError(f"{len(_streams)} graphs are alive, and each has a stream of its own")


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

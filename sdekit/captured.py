"""The step captured in a CUDA graph, network included: one launch, whatever is in it.

A graph reads and writes the memory it was captured with. So the samples in work live in buffers of fixed shape; what
enters is copied into them, and what leaves is copied out (`carry`). A smaller batch needs another graph: samples
in work shrink by halves only, and who is done stays along until then.

Capturing costs as much as some tens of steps, so a graph outlives its solve and serves the next of its kind, as long as
nothing has changed that the network's calls depend on (_fingerprint.py) but the contents of its weights. The eight that
were used last are kept, none longer than its network lives, none where memory runs out.

Not captured, with the reason: networks that ask something of the host in a call (a branch on a tensor, `.item()`), and
what compiled.py does not take.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._fingerprint import fingerprint
from ._memory import on_release, ran_out
from ._tensor import leaves, tree_map
from .errors import NetworkError
from .loop import Carry, Problem, advance, still_running
from .model.score_model import ScoreModel
from .parts import CannotCompileError, having, kind, own_parts

_WARM_UP = 2  # steps on a stream of their own before a capture, as torch asks for
_LEAST = 8  # a batch smaller than that is not made smaller
_KEPT = 8  # graphs that no solve is using


class Capture(NamedTuple):
    """A graph and its memory.

    Attributes:
        graph: One step, of and into the buffers.
        given: What enters: the problem's own parts, the network's condition and the leaves of the carry.
        carry: The carry in the buffers.
        left: How many samples still run.
        done: When the solve before was done with it.
        parts: What else the graph reads, kept alive.
    """

    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    carry: Carry
    left: Tensor
    done: torch.cuda.Event
    parts: Problem


_idle: OrderedDict[Hashable, tuple[weakref.ref[nn.Module], Capture]] = OrderedDict()
_lock = RLock()  # entered again where a network is collected within
_capturing = Lock()  # a process can do one capture at a time


def forget() -> None:
    """Lets all graphs go that no solve is using."""
    with _lock:
        _idle.clear()


on_release(forget)


class Captured:
    """The step of a batch of one size at a time.

    Raises:
        CannotCompileError: With the reason, where samples enter.
    """

    def __init__(self) -> None:
        self._held: tuple[Hashable, weakref.ref[nn.Module], Capture] | None = None

    def enter(self, problem: Problem, carry: Carry) -> None:
        if self._held is None or carry.s.shape[0] != self._capture.carry.s.shape[0]:
            self.close()
            self._held = _lent(problem, carry)
        for buffer, value in zip(self._capture.given, _tensors(problem, carry), strict=True):
            buffer.copy_(value)

    def advance(self) -> Tensor:
        self._capture.graph.replay()
        return self._capture.left

    def carry(self) -> Carry:
        return tree_map(torch.clone, self._capture.carry)

    def size(self, needed: int, now: int) -> int:
        return now // 2 if now >= 2 * _LEAST and needed <= now // 2 else now

    def close(self) -> None:
        """Gives the graph back, for solves to come."""
        if self._held is None:
            return
        key, network, capture = self._held
        self._held = None
        capture.done.record(torch.cuda.current_stream(capture.left.device))
        with _lock:
            _idle[key] = network, capture
            _idle.move_to_end(key)
            while len(_idle) > _KEPT:
                _idle.popitem(last=False)

    @property
    def _capture(self) -> Capture:
        assert self._held is not None  # lent where samples entered
        return self._held[2]


def _key(problem: Problem, carry: Carry) -> Hashable:
    """What a graph stands for. Raises CannotCompileError for what is the user's own."""
    model = problem.term.model
    bound = {name: None if isinstance(part, Tensor) else part for name, part in model.bound.items()}
    shapes = tuple((part.dtype, part.shape) for part in _tensors(problem, carry))
    return kind(problem, carry), shapes, fingerprint(model.net, bound)


def _lent(problem: Problem, carry: Carry) -> tuple[Hashable, weakref.ref[nn.Module], Capture]:
    """A graph for a batch of this size: one that is idle, or a new one."""
    key, net = _key(problem, carry), problem.term.model.net
    with _lock:
        network, capture = _idle.pop(key, (None, None))
    if network is not None and capture is not None:
        torch.cuda.current_stream(carry.s.device).wait_event(capture.done)
        return key, network, capture
    try:
        with _capturing:
            capture = _made(problem, carry)
    except NetworkError as error:  # eagerly it fails in its place, with what was done before
        raise CannotCompileError(f"the network cannot be captured: {error}") from error
    except CannotCompileError:
        raise
    except RuntimeError as error:
        if ran_out(error):
            forget()
        raise CannotCompileError(f"the step cannot be captured: {str(error).splitlines()[0]}") from error
    return _key(problem, carry), weakref.ref(net, _drop), capture  # a call may have changed the network


def _drop(network: weakref.ref[nn.Module]) -> None:
    """Lets the graphs of a network go that is no more."""
    with _lock:
        for key in [key for key, (other, _) in list(_idle.items()) if other is network]:
            _idle.pop(key, None)


def _made(problem: Problem, carry: Carry) -> Capture:
    """Captures the step of a batch of this size, in buffers of its own."""
    model, device = problem.term.model, carry.s.device
    around = model.take(torch.arange(len(carry.s), device=device))  # its condition copied
    own = [part.clone() for part in own_parts(problem)]
    problem, carry = having(problem, own, around), tree_map(torch.clone, carry)
    step = _eager(problem, carry)
    left = torch.zeros((), dtype=torch.int64, device=device)
    here, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(here)
    with _own_casts():
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):  # kernels are chosen and small tables made
                step()
        here.wait_stream(stream)
        before = fingerprint(model.net)
        with torch.cuda.graph(graph, stream=stream):  # of the samples' device, whichever is the current one
            for buffer, value in zip((*leaves(carry), left), step(), strict=True):
                buffer.copy_(value)
    if fingerprint(model.net) != before:
        raise CannotCompileError("the network changes itself in its calls, or cannot be compared")
    others = ScoreModel(nn.Module(), model.sde, model.parameterization, model.data_std, around.bound)  # but no weights
    parts = having(problem, own, others)
    return Capture(graph, _tensors(problem, carry), carry, left, torch.cuda.Event(), parts)  # type: ignore[no-untyped-call]


def _eager(problem: Problem, carry: Carry) -> Callable[[], list[Tensor]]:
    """A step operation by operation: the leaves of the carry after it, and how many samples still run."""

    def step() -> list[Tensor]:
        after = advance(problem, carry)
        return [*leaves(after), still_running(after)]

    return step


@contextmanager
def _own_casts() -> Iterator[None]:
    """Casts that autocast keeps for the time of its block would be gone when a graph is replayed."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _tensors(problem: Problem, carry: Carry) -> list[Tensor]:
    """All that a step reads and that belongs to its samples."""
    bound = [value for value in problem.term.model.bound.values() if isinstance(value, Tensor)]
    return [*own_parts(problem), *bound, *leaves(carry)]

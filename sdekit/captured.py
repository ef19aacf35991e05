"""The step captured in a CUDA graph, network included: one launch, whatever is in it.

A graph reads and writes the memory it was captured with. So the samples in work live in buffers of fixed shape; what
enters is copied into them, and what leaves is copied out (`carry`). A smaller batch needs another graph: samples
in work shrink by halves only, and who is done stays along until then.

What Python decides in the network's call is decided once, at the capture (capture.py). So a graph ends with its solve,
unless whoever calls says by `keep_graphs` that the network stays as it is: graphs then serve all solves of their shape.

Not captured, with the reason: networks that capture.py does not take, and what compiled.py does not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ._memory import on_release, ran_out
from ._tensor import tree_map
from .capture import Capture, captured, tensors
from .errors import NetworkError
from .loop import Carry, Problem
from .model.score_model import ScoreModel
from .parts import CannotCompileError, kind

_LEAST = 8  # a batch smaller than that is not made smaller
_KEPT = 8  # graphs held that no solve is using


class Graphs:
    """Graphs that no solve is using, those used last.

    Attributes:
        idle: By what tells them apart.
        refused: Why there is none of a kind; with what its key names.
        closed: Whether none is kept any more.
    """

    def __init__(self) -> None:
        self.idle: OrderedDict[Hashable, Capture] = OrderedDict()
        self.refused: dict[Hashable, tuple[str, list[Any]]] = {}
        self.closed = False
        _all.add(self)

    def take(self, key: Hashable) -> Capture | None:
        """A graph of this kind, which is the taker's from now on.

        Raises:
            CannotCompileError: There was none to be had before.
        """
        if key in self.refused:
            raise CannotCompileError(self.refused[key][0])
        return self.idle.pop(key, None)

    def give(self, key: Hashable, capture: Capture) -> None:
        """Keeps a graph for others."""
        self.idle[key] = capture
        self._shorten(0 if self.closed else _KEPT)

    def clear(self) -> None:
        """Lets all go."""
        self._shorten(0)

    def close(self) -> None:
        """Lets all go, for good."""
        self.closed = True
        self.clear()
        self.refused.clear()

    def _shorten(self, most: int) -> None:
        while len(self.idle) > most:
            try:
                end(self.idle.popitem(last=False)[1])
            except KeyError:  # another thread has it
                return


_all: WeakSet[Graphs] = WeakSet()
_kept: ContextVar[Graphs | None] = ContextVar("graphs", default=None)


def _around() -> Graphs | None:
    """Those of the block that we are in."""
    graphs = _kept.get()
    return None if graphs is None or graphs.closed else graphs


@contextmanager
def keep_graphs() -> Iterator[None]:
    """A block in which graphs of `runtime="graph"` and `"compiled-graph"` are kept: solves alike capture one.

    Within the block nothing may change that a call of the network depends on, but the contents of its weights and
    buffers, and conditions that are tensors: numbers and functions in its attributes, hooks, globals, lists that it was
    conditioned on, torch's settings are what they were at the capture. (Train and eval mode, weights put in the place
    of others and autocast are compared.) The eight graphs used last are kept, and none where memory runs out; with the
    block all are freed. Blocks within a block are part of it. In a generator, what its consumer does between two
    values is within the block too.

    Returns:
        The context.
    """
    if _around() is not None:
        yield
        return
    graphs = Graphs()
    token = _kept.set(graphs)
    try:
        yield
    finally:
        graphs.close()
        with suppress(ValueError):  # another context's: an asynchronous generator may be closed from elsewhere
            _kept.reset(token)


def forget() -> None:
    """Lets all graphs go that no solve is using."""
    for graphs in list(_all):
        graphs.clear()


on_release(forget)


class Captured:
    """The step of a batch of one size at a time.

    Args:
        fused: Whether what is captured is the step as `compiled` makes it, or operation by operation.

    Raises:
        CannotCompileError: With the reason, where samples enter.
    """

    def __init__(self, fused: bool) -> None:
        self._fused = fused
        self._graphs = _around()
        self._held: tuple[Hashable, Capture] | None = None

    def enter(self, problem: Problem, carry: Carry) -> None:
        if self._held is None or carry.s.shape[0] != self._capture.carry.s.shape[0]:
            self.close()
            self._held = self._lent(problem, carry)
        for buffer, value in zip(self._capture.given, tensors(problem, carry), strict=True):
            buffer.copy_(value)

    def advance(self) -> Tensor:
        self._capture.graph.replay()
        return self._capture.left

    def carry(self) -> Carry:
        return tree_map(torch.clone, self._capture.carry)

    def size(self, needed: int, now: int) -> int:
        return now // 2 if now >= 2 * _LEAST and needed <= now // 2 else now

    def close(self) -> None:
        """Gives the graph back, for solves to come, or lets it go."""
        if self._held is None:
            return
        key, capture = self._held
        self._held = None
        capture.done.record(torch.cuda.current_stream(capture.left.device))
        if self._graphs is None:
            end(capture)
        else:
            self._graphs.give(key, capture)

    @property
    def _capture(self) -> Capture:
        assert self._held is not None  # lent where samples entered
        return self._held[1]

    def _lent(self, problem: Problem, carry: Carry) -> tuple[Hashable, Capture]:
        """A graph for a batch of this size: one that is idle, or a new one."""
        key, named = (self._fused, *_key(problem, carry)), _named(problem.term.model)
        capture = None if self._graphs is None else self._graphs.take(key)
        if capture is not None:
            torch.cuda.current_stream(carry.s.device).wait_event(capture.done)
            return key, capture
        try:
            return key, _made(problem, carry, self._fused, named)
        except CannotCompileError as error:
            if self._graphs is not None:
                self._graphs.refused[key] = str(error), named
            raise


def _made(problem: Problem, carry: Carry, fused: bool, named: list[Any]) -> Capture:
    """A new graph; where memory runs out, after all others have gone."""
    try:
        return captured(problem, carry, fused, named)
    except (NetworkError, RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise _refused(error) from error
    forget()  # outside of the handler, whose error holds what the capture had
    try:
        return captured(problem, carry, fused, named)
    except (NetworkError, RuntimeError, MemoryError) as error:
        raise _refused(error) from error


def _refused(error: Exception) -> CannotCompileError:
    """Why there is no graph; the first cause is what the user's network did, what follows it is what CUDA says."""
    first = error.__cause__ or error.__context__ or error
    if isinstance(first, CannotCompileError):
        return first
    what = "the network" if isinstance(error, NetworkError) else "the step"
    return CannotCompileError(f"{what} cannot be captured: {(str(first) or repr(first)).splitlines()[0]}")


def end(capture: Capture) -> None:
    """Frees a graph once the device is done with it."""
    capture.done.synchronize()
    capture.graph.reset()


def _key(problem: Problem, carry: Carry) -> tuple[Hashable, ...]:
    """What tells graphs apart that are kept; the objects named are kept alive with them (`_named`).

    Raises:
        CannotCompileError: Something is the user's own.
    """
    model = problem.term.model
    shapes = tuple((part.dtype, part.shape) for part in tensors(problem, carry))
    bound = tuple((name, _value(part)) for name, part in model.bound.items())
    modes = tuple((id(part), part.training) for part in model.net.modules())
    places = tuple((id(part), _place(part)) for part in _weights(model))
    casts = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return kind(problem, carry), shapes, bound, modes, places, casts


def _named(model: ScoreModel) -> list[Any]:
    """What a key names."""
    return [model.net, *model.net.modules(), *_weights(model), dict(model.bound)]


def _value(part: Any) -> Hashable:
    """What tells one condition from another: nothing of a tensor, which enters with the samples."""
    if isinstance(part, Tensor):
        return None
    return (type(part), repr(part)) if type(part) in (bool, int, float, str) else id(part)


def _place(weight: Tensor) -> int:
    """Where it lies; 0 where there is no one place."""
    try:
        return weight.data_ptr()
    except (RuntimeError, ValueError):  # sparse, of parts, or not made yet
        return 0


def _weights(model: ScoreModel) -> list[Tensor]:
    return [*model.net.parameters(), *model.net.buffers()]

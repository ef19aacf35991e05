"""Batches that do not fit: a function of samples applied in chunks, the results joined as if there had been one batch.

No result of sdekit depends on the batch it was computed in, so cutting a batch changes cost only:

    out = chunked(lambda part, rows: log_likelihood(model.take(rows), part, indices=rows), x)

`rows` are the samples' places in x: pass them on as `indices`, so that each sample keeps its own noise, and to
`model.take`, so that it keeps its own condition.

The size of a chunk is chosen from the memory that is free and from what the chunks before it took at their peak. What
a part of a computation takes is a + b n for n samples, a >= 0 (or less, where traces are taken in chunks of their own),
so peak(m) <= (m/n) peak(n) for m > n: beginning with two samples, the next chunk is the largest which that keeps within
the room, and chunks grow to the largest that fits without ever being too large. Where memory runs out all the same
(kernels take some for themselves, and others may), a chunk is halved and tried again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ._checks import require_count
from ._memory import free_bytes, peak_of, ran_out, release
from .errors import NetworkError, PartialResultWarning, SolveError
from .solution import Path, Status

Result = TypeVar("Result")

_FIRST = 2  # samples in the first chunk where the size is chosen
_SHARE = 0.5  # of the free memory
_GROWING = 1.25  # a next chunk that would be less than this times the last is no longer worth a measurement
_REST = int(Status.INTERRUPTED)  # how a sample is marked that was not reached


def chunked(
    function: Callable[[Tensor, Tensor], Result],
    x: Tensor,
    *,
    chunk: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Result:
    """`function` of all samples, from chunks of them: the result it would return for `x` whole, to rounding.

    Args:
        function: Called with (part, rows): some samples (n, ...) of `x` and their places (n,) int64. Returns a
            LogLikelihood, a Solution or any other nest of NamedTuples, tuples, dicts and tensors of leading size n;
            numbers (network calls) are added up. No sample may influence another.
        x: (B, ...) samples: data, latents, or whatever has one entry a sample.
        chunk: Samples at once, at most. None: chosen, from half of the free memory.
        device: Whose memory decides; default that of `x`.
        progress: Show a progress bar.

    Returns:
        The joined result. After Ctrl-C, with a warning: samples not reached are NaN and have Status.INTERRUPTED.

    Raises:
        ValueError, TypeError: Arguments that do not fit, a result whose leading size is not that of its chunk.
        SolveError: Some samples failed (all chunks are done first), or a chunk could not be computed; its `.solution`
            is the joined result of what there is.
    """
    if not isinstance(x, Tensor) or x.dim() == 0:
        kind = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is a {kind}; a tensor (B, ...) with one entry a sample is needed.")
    if chunk is not None:
        require_count("chunk", chunk)
    if x.shape[0] == 0:
        return function(x, torch.zeros(0, dtype=torch.int64, device=x.device))
    parts = _Parts(function, x, torch.device(x.device if device is None else device))
    bar = tqdm(total=x.shape[0], disable=not progress, unit="sample")
    try:
        size, growing = (_FIRST, True) if chunk is None else (chunk, False)
        room = _SHARE * free_bytes(parts.device) if growing else 0.0
        while not parts.finished:
            size, growing = parts.grow(size, room) if growing else (parts.step(size), False)
            bar.update(parts.reached - bar.n)
    except KeyboardInterrupt:
        if not parts.done:
            raise
        parts.interrupted = True
    finally:
        bar.close()
    return cast(Result, parts.result())


class _Parts:
    """The chunks done so far, and what went wrong.

    Attributes:
        done: Their results.
        reached: How many samples they hold.
        failure: The first error of a chunk, if there was one.
        failed: How many chunks had errors.
        broken: Whether an error ends the work: the next chunk would have it too.
        interrupted: Whether Ctrl-C did.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Any], x: Tensor, device: torch.device) -> None:
        self.function = function
        self.x = x
        self.device = device
        self.done: list[Any] = []
        self.reached = 0
        self.failure: Exception | None = None
        self.failed = 0
        self.broken = False
        self.interrupted = False

    @property
    def finished(self) -> bool:
        return self.reached >= self.x.shape[0] or self.broken or self.interrupted

    def _call(self, start: int, stop: int) -> Any:
        rows = torch.arange(start, stop, device=self.x.device)
        return self.function(self.x[start:stop], rows)

    def grow(self, size: int, room: float) -> tuple[int, bool]:
        """One chunk, measured; the size for the next one, so that it stays within `room`, and whether to measure it."""
        before = self.reached
        following, peak = peak_of(lambda: self.step(size), self.device)
        done = self.reached - before
        if done == 0:  # memory ran out
            return following, False
        wanted = max(1, int(done * room / max(peak, 1)))
        return wanted, wanted > _GROWING * done

    def step(self, size: int) -> int:
        """One chunk of at most `size` samples; the size for the next one: half, where memory ran out."""
        stop = min(self.reached + size, self.x.shape[0])
        try:
            found = self._call(self.reached, stop)
        except Exception as error:
            if not ran_out(error):
                self._fail(error, stop)
                return size
            if stop - self.reached == 1:
                self._fail(error, stop)
                return size
        else:
            self._keep(found, stop)
            return size
        release(self.device)  # outside of the handler, whose error holds the tensors of its frames
        return max(1, (stop - self.reached) // 2)

    def _keep(self, found: Any, stop: int) -> None:
        _check(found, stop - self.reached)
        if self.done and type(found) is not type(self.done[0]):  # what failed before was a part of the function
            self.done = [_empty(found, _rows(part)) for part in self.done]
        self.done.append(found)
        self.reached = stop
        self.interrupted = any(bool((status == _REST).any()) for status in _statuses(found))

    def _fail(self, error: Exception, stop: int) -> None:
        """Books the error of a chunk: keeps what it carries, and raises it where nothing is to be kept."""
        partial = error.solution if isinstance(error, SolveError) else None
        if partial is None and not self.done:
            raise error
        if partial is not None and self.done and type(partial) is not type(self.done[0]):
            self._keep(_empty(self.done[0], stop - self.reached), stop)  # it is of a part of the function
            self.interrupted = False
        elif partial is not None:
            self._keep(partial, stop)
        self.failure, self.failed = self.failure or error, self.failed + 1
        self.broken = partial is None or isinstance(error.__cause__, NetworkError)

    def result(self) -> Any:
        """The joined result; raises or warns for what is not in it."""
        total, rest = self.x.shape[0], self.x.shape[0] - self.reached
        whole = _joined([*self.done, _empty(self.done[-1], rest)] if rest else self.done)
        if self.failure is not None:
            more = f" (and {self.failed - 1} chunks more)" if self.failed > 1 else ""
            left = f" {rest} of {total} samples were not reached." if rest else ""
            raise SolveError(f"{self.failure}{more}{left}", whole) from self.failure
        if rest:
            warnings.warn(
                f"interrupted: {rest} of {total} samples were not reached; they hold NaN and Status.INTERRUPTED.",
                PartialResultWarning,
                stacklevel=3,
            )
        return whole


_SUMS = ("calls",)  # numbers that add up over chunks; others are the same in each


class _Leaf(NamedTuple):
    """A leaf of a result, and the name of the field that holds it."""

    name: str
    value: Any


def _leaves(tree: Any, name: str = "") -> Iterator[_Leaf]:
    """All leaves of a nest of (named) tuples and dicts."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, str(key))
    elif isinstance(tree, tuple):
        names = getattr(tree, "_fields", (name,) * len(tree))
        for field, value in zip(names, tree, strict=True):
            yield from _leaves(value, field)
    else:
        yield _Leaf(name, tree)


def _statuses(tree: Any) -> Iterator[Tensor]:
    """What tells how each sample ended, wherever it stands in a result."""
    return (leaf.value for leaf in _leaves(tree) if leaf.name == "status" and isinstance(leaf.value, Tensor))


def _check(found: Any, count: int) -> None:
    for name, value in _leaves(found):
        if isinstance(value, Tensor) and (value.dim() == 0 or value.shape[0] != count):
            raise ValueError(
                f"function returned {name or 'a tensor'} of shape {tuple(value.shape)} for {count} samples; a leading "
                "size of one entry a sample is needed."
            )


def _joined(parts: list[Any], name: str = "") -> Any:
    """The results of consecutive chunks as one."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Path):
        length = max(part.t.shape[1] for part in parts)
        return Path(
            *(torch.cat([_lengthened(value, length) for value in column]) for column in zip(*parts, strict=True))
        )
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts], str(key)) for key in first}
    if isinstance(first, tuple):
        names = getattr(first, "_fields", (name,) * len(first))
        columns = (_filled(column, parts) for column in zip(*parts, strict=True))
        children = [_joined(column, field) for column, field in zip(columns, names, strict=True)]
        return type(first)(*children) if hasattr(first, "_fields") else tuple(children)
    return sum(parts) if name in _SUMS else first


def _filled(column: tuple[Any, ...], parts: list[Any]) -> list[Any]:
    """The column of one field; where only some chunks have it (others failed before), theirs is as if not reached."""
    known = [value for value in column if value is not None]
    if not known or len(known) == len(column):
        return list(column)
    return [
        _empty(known[0], _rows(part)) if value is None else value for value, part in zip(column, parts, strict=True)
    ]


def _rows(part: Any) -> int:
    """How many samples a chunk's result is of."""
    return next(leaf.value.shape[0] for leaf in _leaves(part) if isinstance(leaf.value, Tensor))


def _lengthened(value: Tensor, length: int) -> Tensor:
    """A path's (n, m, ...) made (n, length, ...): samples that took fewer steps stay at their last."""
    last = value[:, -1:].expand(-1, length - value.shape[1], *value.shape[2:])
    return torch.cat((value, last), 1)


def _empty(like: Any, count: int, name: str = "") -> Any:
    """A result of `count` samples that were not reached: NaN, 0, and as their status INTERRUPTED."""
    if isinstance(like, Tensor):
        value = _REST if name == "status" else float("nan") if like.is_floating_point() else 0
        return torch.full((count, *like.shape[1:]), value, dtype=like.dtype, device=like.device)
    if isinstance(like, dict):
        return {key: _empty(value, count, str(key)) for key, value in like.items()}
    if isinstance(like, tuple):
        names = getattr(like, "_fields", (name,) * len(like))
        children = [_empty(value, count, field) for field, value in zip(names, like, strict=True)]
        return type(like)(*children) if hasattr(like, "_fields") else tuple(children)
    return 0 if name in _SUMS else like

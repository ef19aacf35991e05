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
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ._checks import require_count
from ._memory import free_bytes, peak_of, ran_out, release
from ._nests import REST, empty, joined, require_joinable, require_rows, rows, statuses
from .errors import NetworkError, PartialResultWarning, SolveError

Result = TypeVar("Result")

_FIRST = 2  # samples in the first chunk where the size is chosen
_SHARE = 0.5  # of the free memory
_GROWING = 1.25  # a next chunk that would be less than this times the last is no longer worth a measurement


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
            LogLikelihood, a Solution or any other nest of NamedTuples, tuples, dicts and tensors of leading size n.
            Network calls are added up; what else is no tensor has to be the same of every chunk. No sample may
            influence another.
        x: (B, ...) samples: data, latents, or whatever has one entry a sample.
        chunk: Samples at once, at most. None: chosen, from half of the free memory.
        device: Whose memory decides; default that of `x`.
        progress: Show a progress bar.

    Returns:
        The joined result. After Ctrl-C, with a warning: samples not reached are NaN and have Status.INTERRUPTED.

    Raises:
        ValueError, TypeError: Arguments that do not fit, a result whose leading size is not that of its chunk, or that
            cannot be joined (lists, numpy arrays, other numbers in each chunk).
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
        require_rows(found, stop - self.reached)
        if self.done and type(found) is not type(self.done[0]):  # what failed before was a part of the function
            self.done = [empty(found, rows(part)) for part in self.done]
        elif self.done:
            require_joinable(self.done[0], found)
        self.done.append(found)
        self.reached = stop
        self.interrupted = any(bool((status == REST).any()) for status in statuses(found))

    def _fail(self, error: Exception, stop: int) -> None:
        """Books the error of a chunk: keeps what it carries, and raises it where nothing is to be kept."""
        partial = error.solution if isinstance(error, SolveError) else None
        if partial is None and not self.done:
            raise error
        if partial is not None and self.done and type(partial) is not type(self.done[0]):
            self._keep(empty(self.done[0], stop - self.reached), stop)  # it is of a part of the function
            self.interrupted = False
        elif partial is not None:
            self._keep(partial, stop)
        self.failure, self.failed = self.failure or error, self.failed + 1
        self.broken = partial is None or isinstance(error.__cause__, NetworkError)

    def result(self) -> Any:
        """The joined result; raises or warns for what is not in it."""
        total, rest = self.x.shape[0], self.x.shape[0] - self.reached
        whole = joined([*self.done, empty(self.done[-1], rest)] if rest else self.done)
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

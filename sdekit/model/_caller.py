"""The network's calls of a solve that is played back, with as little around each as can be.

Inputs and outputs of such a solve are kept while later sums need them. So it matters whether the network writes into
what it is given, and whether it answers in the same memory again. Both are found out in a model's first calls, by
copies; from then on they are only looked at, and a network that begins with either later is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, starmap
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from ._seen import SHARES, WRITES, raised, share_memory, versions

_WATCHED = 4  # calls of a solve in which answers are looked at for a buffer that is used again
Caller = Callable[[Tensor, int], Tensor]


class Memory:
    """Whether a network answers in memory that it has answered in before: what was seen of it so far.

    Attributes:
        shared: Whether it does; None as long as that is not known.
    """

    def __init__(self) -> None:
        self.shared: bool | None = None
        self._of: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()  # copies have seen nothing, and what compiled the network could not be copied

    def about(self, net: nn.Module) -> Memory:
        """Itself, with all forgotten that was seen of another network, or of this one before it was compiled."""
        kind = net, net._compiled_call_impl
        if self._of != kind:
            self._of, self.shared = kind, None
        return self


def watching(answer: Callable[[Tensor, int], Tensor], memory: Memory) -> Caller:
    """Calls whose answers are copied while it is not known whether they share memory, and for ever if they do.

    Args:
        answer: The network's checked output for an input and the number of a label.
        memory: Takes down what is seen.
    """
    first: list[Tensor] = []  # kept so that none has another's memory by chance

    def call(seen: Tensor, number: int) -> Tensor:
        out = answer(seen, number)
        if len(first) < _WATCHED:
            memory.shared = memory.shared or any(share_memory(out, other) for other in first) or None
            first.append(out)
            return out.clone()
        if memory.shared is None:
            memory.shared = False
        return out.clone() if memory.shared else out

    return call


def trusting(
    net: nn.Module,
    rows: tuple[Tensor, ...],
    bound: dict[str, Any],
    shape: torch.Size,
    dtype: torch.dtype,
    check: Callable[[Any, Tensor], Tensor],
    keeps: bool,
) -> Caller:
    """Calls of a network that was seen to leave its input alone and to answer in memory of its own.

    Args:
        net: It.
        rows: Its labels.
        bound: Its keyword arguments.
        shape: Of its input.
        dtype: Of its input and parameters.
        check: What becomes of an answer that is not as usual.
        keeps: Whether answers are kept, and so have to be in memory of their own.
    """
    first: list[Tensor] = []

    def call(seen: Tensor, number: int) -> Tensor:
        version = versions(seen, bound) if bound else seen._version
        try:
            out = net(seen, rows[number], **bound)
            usual = type(out) is Tensor and out.dtype is dtype and out.shape == shape
        except Exception as error:
            raise raised(error, seen, dtype) from error
        if (versions(seen, bound) if bound else seen._version) != version:
            raise NetworkError(WRITES)
        answer: Tensor = out if usual else check(out, seen)
        if number < _WATCHED and keeps:
            first.append(answer)
            if number == _WATCHED - 1 and any(starmap(share_memory, combinations(first, 2))):
                raise NetworkError(SHARES)
        return answer

    return call


def steady(
    net: nn.Module, bound: dict[str, Any], kind: torch.dtype, check: Callable[[Any, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The answer of a network that was seen to leave its input alone, to an input and a label.

    Args:
        net: It.
        bound: Its keyword arguments.
        kind: The type of labels.
        check: What becomes of an answer that is not as usual.
    """

    def answer(seen: Tensor, label: Tensor) -> Tensor:
        level = label if label.dtype is kind else label.to(kind)
        before = seen._version, versions(level, bound)
        try:
            out = net(seen, level, **bound)
            usual = type(out) is Tensor and out.dtype is seen.dtype and out.shape == seen.shape
        except Exception as error:
            raise raised(error, seen, seen.dtype) from error
        if (seen._version, versions(level, bound)) != before:
            raise NetworkError(WRITES)
        return out if usual else check(out, seen)

    return answer

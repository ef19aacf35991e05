"""Nests of results: named tuples, tuples and dicts of tensors, made of consecutive chunks of samples and joined.

A leaf may be a tensor with an entry a sample, None, a number of network calls, which adds up, or a value that is the
same of every chunk. Whatever else would be lost in joining is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .solution import Path, Status

REST = int(Status.INTERRUPTED)  # how a sample is marked that was not reached
_SUMS = ("calls", "paid")  # numbers that add up over chunks; others are the same in each


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


def statuses(tree: Any) -> Iterator[Tensor]:
    """What tells how each sample ended, wherever it stands in a result."""
    return (leaf.value for leaf in _leaves(tree) if leaf.name == "status" and isinstance(leaf.value, Tensor))


_NEEDED = "tensors with an entry a sample are needed, in tuples, named tuples or dicts"


def require_rows(found: Any, count: int) -> None:
    """Raises unless a result holds nothing but tensors of `count` entries and values that can be compared."""
    for name, value in _leaves(found):
        if isinstance(value, (list, set, frozenset, np.ndarray)) or _holds_tensors(value):
            raise TypeError(f"function returned {name or 'a value'} of type {type(value).__name__}; {_NEEDED}.")
        if isinstance(value, Tensor) and (value.dim() == 0 or value.shape[0] != count):
            raise ValueError(
                f"function returned {name or 'a tensor'} of shape {tuple(value.shape)} for {count} samples; a leading "
                "size of one entry a sample is needed."
            )


def _holds_tensors(value: Any) -> bool:
    return is_dataclass(value) and any(isinstance(getattr(value, part.name), Tensor) for part in fields(value))


def require_joinable(first: Any, other: Any, name: str = "") -> None:
    """Raises TypeError where the results of two chunks cannot be joined: at once, not after the last chunk."""
    if isinstance(first, dict) and isinstance(other, dict) and first.keys() == other.keys():
        for key in first:
            require_joinable(first[key], other[key], str(key))
    elif isinstance(first, tuple) and type(first) is type(other) and len(first) == len(other):
        for field, one, two in zip(getattr(first, "_fields", (name,) * len(first)), first, other, strict=True):
            require_joinable(one, two, field)
    elif not (first is None or other is None or name in _SUMS or _same(first, other) or _both(Tensor, first, other)):
        raise TypeError(
            f"function returned {name or 'a value'} that is {_shown(first)} of one chunk and {_shown(other)} of "
            f"another: these cannot be joined; {_NEEDED}, or one value that is the same of every chunk."
        )


def _both(kind: type, *values: Any) -> bool:
    return all(isinstance(value, kind) for value in values)


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (Tensor, dict, tuple)) else repr(value)


def _same(one: Any, other: Any) -> bool:
    """Whether two leaves are the same and say so plainly; a NaN is the same as another."""
    if one is other:
        return True
    try:
        equal = one == other or (_both(float, one, other) and one != one and other != other)
    except Exception:  # tensors within a dataclass, for example
        return False
    return equal is True


def joined(parts: list[Any], name: str = "") -> Any:
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
        return {key: joined([part[key] for part in parts], str(key)) for key in first}
    if isinstance(first, tuple):
        names = getattr(first, "_fields", (name,) * len(first))
        columns = (_filled(column, parts) for column in zip(*parts, strict=True))
        children = [joined(column, field) for column, field in zip(columns, names, strict=True)]
        return type(first)(*children) if hasattr(first, "_fields") else tuple(children)
    return sum(parts) if name in _SUMS else first


def _filled(column: tuple[Any, ...], parts: list[Any]) -> list[Any]:
    """The column of one field; where only some chunks have it (others failed before), theirs is as if not reached."""
    known = [value for value in column if value is not None]
    if not known or len(known) == len(column):
        return list(column)
    return [empty(known[0], rows(part)) if value is None else value for value, part in zip(column, parts, strict=True)]


def rows(part: Any) -> int:
    """How many samples a chunk's result is of."""
    return next(leaf.value.shape[0] for leaf in _leaves(part) if isinstance(leaf.value, Tensor))


def _lengthened(value: Tensor, length: int) -> Tensor:
    """A path's (n, m, ...) made (n, length, ...): samples that took fewer steps stay at their last."""
    last = value[:, -1:].expand(-1, length - value.shape[1], *value.shape[2:])
    return torch.cat((value, last), 1)


def empty(like: Any, count: int, name: str = "") -> Any:
    """A result of `count` samples that were not reached: NaN, 0, and as their status INTERRUPTED."""
    if isinstance(like, Tensor):
        value = REST if name == "status" else float("nan") if like.is_floating_point() else 0
        return torch.full((count, *like.shape[1:]), value, dtype=like.dtype, device=like.device)
    if isinstance(like, dict):
        return {key: empty(value, count, str(key)) for key, value in like.items()}
    if isinstance(like, tuple):
        names = getattr(like, "_fields", (name,) * len(like))
        children = [empty(value, count, field) for field, value in zip(names, like, strict=True)]
        return type(like)(*children) if hasattr(like, "_fields") else tuple(children)
    return 0 if name in _SUMS else like

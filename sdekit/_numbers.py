"""A sample's numbers, as a tensor or on the host: the same formulas on either.

A step makes some three hundred operations on (B,) numbers: times, errors, weights, counts. On a CPU each costs four
times as much by torch as by numpy, whose arrays have the same operators, and in small batches that is more than the
network. So where a step runs operation by operation on a CPU its numbers are numpy arrays, and its states, (B, D),
stay tensors. What is written for both is annotated `Tensor`, uses operators and indices, and finds here the functions
whose names differ. Nothing is ever written to: an array and the tensor it was made from share their memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ._tensor import Numbers, constant, there, tree_map

Tree = TypeVar("Tree")
_ROW = 64  # numbers from which on a loop over rows is faster than numpy's own, which goes down columns


def on_host(value: Numbers) -> bool:
    """Whether these numbers are a numpy array."""
    return isinstance(value, np.ndarray)


def to_host(tree: Tree) -> Tree:
    """The same numbers as arrays, leaf by leaf, in the same memory."""
    return tree_map(lambda leaf: cast(Tensor, leaf.detach().numpy()), tree)


def alike(value: Numbers, like: Numbers) -> Tensor:
    """The numbers of a tensor, as an array where `like` is one."""
    return cast(Tensor, value.numpy()) if isinstance(like, np.ndarray) and isinstance(value, Tensor) else value


def _either(array: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Tensor]:
    """One function for both, told apart by the first argument."""

    def function(first: Numbers, *rest: Any) -> Tensor:
        return cast(Tensor, (array if isinstance(first, np.ndarray) else plain)(first, *rest))

    return function


def _sigmoid(value: Tensor) -> Tensor:
    """1 / (1 + exp(-value)); where that would be 0 the derivative is too."""
    return 1.0 / (1.0 + torch.exp(-value.clamp(min=-700.0 if value.dtype == torch.float64 else -80.0)))


# On a CPU torch's exp2, hypot, atan2, logaddexp, sigmoid and pow round the last few numbers of a row, which fill no
# vector, by other code than the rest: a sample's bits would depend on its place in the batch. exp, log and those below
# do not (tests/test_numbers.py), so these six are made of them.
exp = _either(np.exp, torch.exp)
expm1 = _either(np.expm1, torch.expm1)
exp2 = _either(np.exp2, lambda value: torch.exp(value * math.log(2.0)))
log = _either(np.log, torch.log)
log1p = _either(np.log1p, torch.log1p)
log2 = _either(np.log2, torch.log2)
sign = _either(np.sign, torch.sign)
sin = _either(np.sin, torch.sin)
tan = _either(np.tan, torch.tan)
asinh = _either(np.arcsinh, torch.asinh)
atan = _either(np.arctan, torch.atan)
hypot = _either(np.hypot, lambda a, b: (a * a + b * b).sqrt())
logaddexp = _either(np.logaddexp, lambda a, b: torch.maximum(a, b) + torch.log1p(torch.exp(-(a - b).abs())))
sigmoid = _either(lambda value: 1.0 / (1.0 + np.exp(-value)), _sigmoid)
floor = _either(np.floor, torch.floor)
sqrt = _either(np.sqrt, torch.sqrt)
square = _either(np.square, torch.square)
power = _either(np.power, lambda base, exponent: torch.exp(exponent * torch.log(base)))
isfinite = _either(np.isfinite, torch.isfinite)
isnan = _either(np.isnan, torch.isnan)
maximum = _either(np.maximum, torch.maximum)
minimum = _either(np.minimum, torch.minimum)
zeros_like = _either(np.zeros_like, torch.zeros_like)
ones_like = _either(np.ones_like, torch.ones_like)
full_like = _either(np.full_like, torch.full_like)
searchsorted = _either(np.searchsorted, lambda table, value: torch.searchsorted(table, value.contiguous()))
at_least = _either(np.maximum, lambda value, least: value.clamp(min=least))
at_most = _either(np.minimum, lambda value, most: value.clamp(max=most))
real = _either(lambda value: value.astype(np.float64), lambda value: value.double())
whole = _either(lambda value: value.astype(np.int64), lambda value: value.long())


def where(mask: Numbers, new: Numbers | float, old: Numbers | float) -> Tensor:
    """`new` where the mask holds, else `old`; of two floats, float64 numbers."""
    if isinstance(mask, np.ndarray):
        return cast(Tensor, np.where(mask, new, old))
    if isinstance(new, float) and isinstance(old, float):  # torch would make single precision of them
        new = torch.full((), new, dtype=torch.float64, device=mask.device)
    return torch.where(mask, new, old)


def between(value: Numbers, low: float, high: float) -> Tensor:
    """The numbers, those outside moved to `low` or `high`; NaN stays."""
    return at_most(at_least(value, low), high)


def cat(parts: Sequence[Numbers], axis: int) -> Tensor:
    """The parts one after another along an axis there is."""
    if isinstance(parts[0], np.ndarray):
        return cast(Tensor, np.concatenate(parts, axis))
    return torch.cat(list(parts), axis)


def stack(parts: Sequence[Numbers], axis: int) -> Tensor:
    """The parts (B,) side by side along a new axis, 0 or 1."""
    if isinstance(parts[0], np.ndarray):
        rows = np.array(parts)
        return cast(Tensor, rows.T if axis else rows)
    return torch.stack(list(parts), axis)


def mean(value: Numbers) -> Tensor:
    """The mean over the last axis."""
    return cast(Tensor, value.sum(-1) / value.shape[-1] if isinstance(value, np.ndarray) else value.mean(-1))


def total(value: Numbers, axis: int) -> Tensor:
    """The sum over an axis that is not the last, added in its order: torch's own depends on the place in a row."""
    return cast(Tensor, value.sum(axis) if isinstance(value, np.ndarray) else value.cumsum(axis).select(axis, -1))


def batch_first(value: Numbers) -> Tensor:
    """(B, ..) contiguous of numbers whose last axis is the batch."""
    last = len(value.shape) - 1
    if isinstance(value, np.ndarray):
        return cast(Tensor, np.ascontiguousarray(value.transpose(last, *range(last))))
    return cast(Tensor, value.movedim(-1, 0).contiguous())


def rows(value: Numbers) -> Tensor:
    """(K, B) of numbers (B, K), contiguous."""
    return cast(Tensor, np.ascontiguousarray(value.T) if isinstance(value, np.ndarray) else value.T)


def picked(table: Tensor, index: Numbers) -> Tensor:
    """(N, B) the columns `index` (B,) of a table (N, M) of the CPU."""
    if isinstance(index, np.ndarray):
        return cast(Tensor, table.numpy().take(index, 1))
    return there(table, index.device).index_select(1, index)


def entry(table: Numbers, place: Numbers) -> Tensor:
    """(B,) of each row of a table (B, N) the number at its place (B,)."""
    if isinstance(table, np.ndarray):
        return cast(Tensor, table[np.arange(len(table)), place])
    return cast(Tensor, table.gather(1, place[:, None]).squeeze(1))


def arange(count: int, like: Numbers) -> Tensor:
    """0, 1, .. below `count`, int64, where `like` is."""
    return cast(Tensor, np.arange(count) if isinstance(like, np.ndarray) else torch.arange(count, device=like.device))


def products(factors: Numbers, first: Numbers) -> Tensor:
    """(.., n + 1, B) `first` (.., B) times the product of the factors (.., n, B) before each place."""
    if not isinstance(factors, np.ndarray):
        return torch.cat((first[..., None, :], factors), -2).cumprod(-2)
    found = np.concatenate((first[..., None, :], factors), -2)
    if factors.shape[-1] < _ROW:
        return cast(Tensor, np.multiply.accumulate(found, -2))
    for k in range(factors.shape[-2]):
        np.multiply(found[..., k, :], found[..., k + 1, :], out=found[..., k + 1, :])
    return cast(Tensor, found)


@lru_cache(maxsize=64)
def _array(values: tuple[float, ...], kind: Any) -> Any:
    return np.array(values, kind)


def listed(values: tuple[float, ...], dtype: torch.dtype, like: Numbers) -> Tensor:
    """A few numbers, made once, where `like` is; not to be written to."""
    if isinstance(like, np.ndarray):
        return cast(Tensor, _array(values, np.int64 if dtype == torch.int64 else np.float64))
    return constant(values, dtype, like.device)


def beside(table: Tensor, like: Numbers) -> Tensor:
    """A table of the CPU, where `like` is."""
    return cast(Tensor, table.numpy()) if isinstance(like, np.ndarray) else there(table, like.device)

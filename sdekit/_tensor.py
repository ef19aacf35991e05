"""Broadcasting, masked selection and row selection over nested tuples of tensors.

Every evolving value is a tree: a tensor whose first axis is the batch, None, or a (named) tuple of trees. Three maps
are all that the loop needs: `select` (commit by mask), `take` (keep some rows) and `put` (write rows back). Leaves of
(B,) numbers may be numpy arrays (_numbers.py), and so may a mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Tree = TypeVar("Tree")
Numbers: TypeAlias = Any  # a tensor, or an array where numbers are on the host


def tree_map(function: Callable[..., Any], first: Tree, *others: Tree) -> Tree:
    """The tree of `function` applied leaf by leaf; None stays None.

    Args:
        function: Takes one leaf of each tree.
        first: A tensor, None, or a (named) tuple of trees; anything else is passed through untouched.
        others: Trees of the same structure.
    """
    if isinstance(first, (Tensor, np.ndarray)):
        return cast(Tree, function(first, *others))
    if isinstance(first, tuple):
        children = [tree_map(function, *leaves) for leaves in zip(first, *cast(Any, others), strict=True)]
        return cast(Tree, type(first)(*children) if hasattr(first, "_fields") else tuple(children))
    return first


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, tuple) else []


def rebuilt(tree: Tree, parts: Sequence[Tensor]) -> Tree:
    """The tree with other tensors in the place of its own, in the order of `leaves`."""
    following = iter(parts)
    return tree_map(lambda leaf: next(following), tree)


HALF = (torch.float16, torch.bfloat16)
_constants: dict[tuple[Any, ...], Tensor] = {}
_copies: Any = WeakTensorKeyDictionary()


def may_stay(made: Tensor) -> bool:
    """Whether a tensor can be kept for later solves: not one of a trace, without contents, nor of inference mode."""
    return type(made) is Tensor and not made.is_inference()


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of numbers, made once on each device: what is copied there in every step would be waited for.

    Not to be written to.
    """
    key = (tuple(values), dtype, device)
    if key in _constants:
        return _constants[key]
    made = torch.tensor(values, dtype=dtype, device=device)
    if may_stay(made):
        _constants[key] = made
    return made


def sent(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers; to CUDA from memory that the host need not wait for."""
    made = torch.tensor(values, dtype=dtype, device="cpu")
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def there(table: Tensor, device: torch.device) -> Tensor:
    """A table on a device, copied once."""
    if table.device == device:
        return table
    copies = _copies.setdefault(table, {})
    if device not in copies:
        copied = table.to(device)
        if not may_stay(copied):
            return copied
        copies[device] = copied
    found: Tensor = copies[device]
    return found


_ARRAYS = {torch.float64: np.float64, torch.float32: np.float32}


def tensor(value: Numbers, dtype: torch.dtype | None = None) -> Tensor:
    """These numbers, a tensor or an array, as a tensor, in a floating type if one is named."""
    if not isinstance(value, np.ndarray):
        return cast(Tensor, value if dtype is None else value.to(dtype))
    kind = None if dtype is None else _ARRAYS.get(dtype)
    made = torch.from_numpy(value if kind is None else np.ascontiguousarray(value, kind))
    return made if dtype is None or kind is not None else made.to(dtype)


def column(value: Numbers, like: Tensor) -> Tensor:
    """`value` of shape (B,) shaped (B, 1, ..., 1) to broadcast against `like`, in the dtype of `like`.

    The one place where a per-sample scalar meets a state: a float64 coefficient does not promote a float32 state.
    """
    made = tensor(value, like.dtype)
    return made.reshape(made.shape + (1,) * (like.dim() - made.dim()))


def added(total: Tensor, parts: Tensor) -> Tensor:
    """`total` (B, ...) and after it the rows of `parts` (m, B, ...), added one by one.

    So its bits are the same however many rows come at once; `parts.sum(0)` adds them in an order that depends on the
    layout.
    """
    if len(parts) < 2:
        return total + parts[0] if len(parts) else total
    return torch.cat((total[None], parts)).cumsum(0)[-1]


def mean_over(value: Tensor, axis: int) -> Tensor:
    """The mean over a short axis, added one by one: torch's own has bits that depend on what lies beside it."""
    total, *others = value.unbind(axis)
    for other in others:
        total = total + other
    return total / (len(others) + 1) if others else total


def select(mask: Numbers, new: Tree, old: Tree) -> Tree:
    """Rows of `new` where `mask` (B,) holds, rows of `old` elsewhere, of the same dtypes."""
    if isinstance(mask, np.ndarray) and mask.all():  # known without waiting for anything
        return new
    apart = tensor(mask)

    def choose(fresh: Numbers, kept: Numbers) -> Tensor:
        if fresh is kept:
            return cast(Tensor, kept)
        if isinstance(kept, np.ndarray):
            return cast(Tensor, np.where(np.reshape(mask, mask.shape + (1,) * (kept.ndim - 1)), fresh, kept))
        return torch.where(apart.reshape(apart.shape + (1,) * (kept.dim() - 1)), fresh, kept)

    return tree_map(choose, new, old)


def take(tree: Tree, rows: Tensor) -> Tree:
    """The rows `rows` (long, or a mask) of every leaf."""
    return tree_map(lambda leaf: leaf[rows], tree)


def put(tree: Tree, rows: Tensor, part: Tree) -> Tree:
    """A copy of `tree` whose rows `rows` (long) are those of `part`."""

    def write(whole: Tensor, piece: Tensor) -> Tensor:
        return whole.index_copy(0, rows, piece)

    return tree_map(write, tree, part)


def all_finite(tree: Any) -> Tensor:
    """(B,) whether every number of a sample is finite (a sum that overflows counts as not finite).

    Raises:
        ValueError: The tree holds no tensor.
    """
    total = _summed(tree)
    if total is None:
        raise ValueError("a tree without tensors has no samples to judge.")
    return cast(Tensor, np.isfinite(total)) if isinstance(total, np.ndarray) else torch.isfinite(total)


def _summed(tree: Any) -> Numbers | None:
    """(B,) the sum of all numbers of a sample, an array if one of the leaves is."""
    if isinstance(tree, Tensor):
        return tree if tree.dim() == 1 else tree.flatten(1).sum(1)
    if isinstance(tree, np.ndarray):
        return cast(Tensor, tree if tree.ndim == 1 else tree.reshape(len(tree), -1).sum(1))
    total = None
    for leaf in tree or ():
        part = _summed(leaf)
        if total is None or part is None:
            total = part if total is None else total
        elif isinstance(total, np.ndarray) or isinstance(part, np.ndarray):
            total = cast(Tensor, np.asarray(total) + np.asarray(part))
        else:
            total = total + part
    return total


@cache
def has_tf32(device: torch.device) -> bool:
    """Whether products of float32 numbers may be made of shorter ones there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def tf32(device: torch.device) -> tuple[bool, bool] | None:
    """Whether convolutions and matrix products in float32 are rounded to TF32 there; None where there is no TF32."""
    if not has_tf32(device):
        return None
    products, convolutions = torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None)
    if hasattr(convolutions, "fp32_precision") and hasattr(products, "fp32_precision"):
        return convolutions.fp32_precision == "tf32", products.fp32_precision == "tf32"  # type: ignore[union-attr]
    return torch.backends.cudnn.allow_tf32, products.allow_tf32  # torch before 2.9


def rounds_products(x: Tensor) -> bool:
    """Whether torch may round matrix products of tensors like `x` to less than their own precision.

    By autocast around a solve, or TF32 on CUDA: meant for networks, and a thousand times too coarse for a step's sums.
    """
    if x.dtype is torch.float64:
        return False
    switches = tf32(x.device)
    return torch.is_autocast_enabled(x.device.type) or (switches is not None and switches[1])


def flatten(x: Tensor) -> Tensor:
    """`x` of shape (B, *event) as (B, D); D = 1 for scalar events, and empty batches keep their D."""
    size = 1
    for extent in x.shape[1:]:
        size *= extent
    return x.reshape(x.shape[0], size)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(B,) inner product of each sample, accumulated in float64."""
    return (a * b).sum(tuple(range(1, a.dim())), dtype=torch.float64)


def widened(x: Tensor) -> Tensor:
    """`x`, its graph kept, in float32 where it is shorter.

    Half precision rounds a state by 1e-3 at every step, which no error estimate sees. The network is called in its own
    dtype all the same.
    """
    with torch.inference_mode(False):
        plain = x.clone() if x.is_inference() else x
    return plain.float() if plain.dtype in HALF else plain


def working(x: Tensor) -> Tensor:
    """`x` as a solve takes it: without a graph, and in float32 where it is shorter (`widened`)."""
    return widened(x.detach())


def digest(x: Tensor) -> str:
    """A text that tells tensors apart: type, shape, and a hash of the bytes."""
    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} {hashlib.sha256(raw.data).hexdigest()[:32]}"

"""What a network's calls depend on besides its input: to tell whether a recording of its operations still stands.

A captured graph reads weights where they lie, so weights may change in place; but whatever Python decides in a call is
decided once, when it is captured. Two fingerprints are equal only where nothing of that kind has changed: modes,
numbers and flags in attributes, hooks, functions and what they close over, where tensors of the device lie, what those
of the host contain. What cannot be compared by its value is compared by identity, and while it lives: an address that
is used again is not the same object. Not seen: what a network reads from globals, and what other packages keep outside
of Python. What is too much to compare (a network that holds its trainer), or does not let itself be looked
at, equals nothing, not even itself.
"""

from __future__ import annotations

import enum
import hashlib
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, type)
_NUMBERS = (bool, int, float, complex, str)
_MOST = 100_000  # values looked at: a large network has some 10,000


class Same:
    """Equal to another of the same object as long as that lives."""

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        self._ask: Callable[[], Any]
        try:
            self._ask = weakref.ref(value)
        except TypeError:  # kept alive instead
            self._ask = lambda: value

    def __eq__(self, other: object) -> bool:
        mine = self._ask()
        return mine is not None and isinstance(other, Same) and mine is other._ask()

    def __hash__(self) -> int:
        return self._hash


def fingerprint(*values: Any) -> Hashable:
    """What these values, networks among them, are at this moment."""
    seen: set[int] = set()
    try:
        found = (*(_of(value, seen) for value in values), _settings())
        hash(found)
    except Exception:  # attributes are anybody's code
        return object()
    return found


def _of(value: Any, seen: set[int]) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), repr(value) if isinstance(value, float) else value  # NaN is the NaN it was
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if id(value) in seen:  # as it was told before; objects of one moment do not share an address
        return "again", Same(value)
    if isinstance(value, (tuple, list, deque)):
        return type(value), tuple(_of(part, seen) for part in value)
    if isinstance(value, np.ndarray):
        plain = value.dtype != object
        return "array", value.dtype.str, value.shape, _digest(value.tobytes()) if plain else Same(value)
    if isinstance(value, (Iterator, array)):
        raise TypeError("its state is nowhere to be read.")
    seen.add(id(value))
    if len(seen) > _MOST:
        raise OverflowError("too much to compare.")
    if isinstance(value, dict):
        return type(value), tuple((_of(key, seen), _of(part, seen)) for key, part in value.items())
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_of(part, seen) for part in value)
    if isinstance(value, FunctionType):
        cells = tuple(_of(cell.cell_contents, seen) for cell in value.__closure__ or () if _filled(cell))
        return Same(value), Same(value.__code__), cells, _of(value.__defaults__, seen), _of(value.__kwdefaults__, seen)
    if isinstance(value, MethodType):
        return "method", _of(value.__func__, seen), _of(value.__self__, seen)
    if isinstance(value, partial):
        return "partial", _of(value.func, seen), _of(value.args, seen), _of(value.keywords, seen)
    if isinstance(value, BuiltinFunctionType):
        return Same(value)
    return _of_object(value, seen)


def _of_object(value: Any, seen: set[int]) -> Hashable:
    """Its identity and its attributes."""
    held = tuple((name, _of(part, seen)) for name, part in getattr(value, "__dict__", {}).items() if _says(value, part))
    kinds = type(value).__mro__
    slots = [name for kind in kinds for name in getattr(kind, "__slots__", ()) if hasattr(value, name)]
    kept = tuple(_of(getattr(value, name), seen) for name in slots if name != "__weakref__")
    return type(value), Same(value), held, kept, tuple(_of_class(kind, seen) for kind in kinds if id(kind) not in seen)


def _of_class(kind: type, seen: set[int]) -> Hashable:
    """Its functions, and its attributes that are plain."""
    seen.add(id(kind))
    held = [(name, part) for name, part in vars(kind).items() if isinstance(part, (FunctionType, *_NUMBERS))]
    return kind, tuple((name, Same(part) if isinstance(part, FunctionType) else _of(part, seen)) for name, part in held)


def _says(owner: Any, part: Any) -> bool:
    """Whether an attribute tells something: a module has a dozen of empty ones."""
    return not (isinstance(owner, nn.Module) and isinstance(part, (dict, set)) and not part)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _of_tensor(value: Tensor) -> Hashable:
    """Where it lies; of one on the host, whose numbers may have gone into a launch, its contents too."""
    place = value.dtype, value.device, value.shape, value.requires_grad
    if value.layout != torch.strided:
        return "tensor", *place, Same(value)
    if value.device.type != "cpu":
        return "tensor", *place, value.stride(), value.data_ptr()
    return "tensor", *place, _digest(value.detach().contiguous().view(-1).view(torch.uint8).numpy())


def _digest(contents: Any) -> bytes:
    return hashlib.blake2b(contents, digest_size=16).digest()


def _settings() -> Hashable:
    """What torch is told for all networks."""
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cpu")
    cudnn = torch.backends.cudnn
    return (
        *autocast,
        torch.get_autocast_dtype("cpu"),
        _precision(),
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )


def _precision() -> Hashable:
    """How products of single precision are computed on CUDA."""
    asked = []
    for place in (torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)):
        try:
            asked.append(str(place.fp32_precision) if hasattr(place, "fp32_precision") else str(place.allow_tf32))
        except RuntimeError:  # torch refuses to say where it was told in the older and in the newer words
            asked.append("mixed")
    return tuple(asked)

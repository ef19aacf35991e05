"""Counter-based noise: (seed, stream, sample index, counter) -> the same numbers in any batch, on any device.

No state is kept anywhere. A 64-bit word is the finaliser of SplitMix64 applied to a key and a lane number,

    key(seed, stream, index)  ->  key(.., counter)  ->  word(.., lane),

each arrow one application of the finaliser to the sum of what came before and a multiple of an odd constant. All of
it is int64 arithmetic that wraps, so integers and signs agree to the bit on every device; normals (Box-Muller) to
rounding. Those of float64 are computed in it; all others are the same numbers in float32, but for the logarithm, which
of a number next to 1 would lose most of its digits. On the CPU numpy does it, in place and in blocks that stay in the
cache, two to four times as fast; in float64, logarithms, sines and cosines are torch's there too.

Source: Steele, Lea and Flood 2014, fast splittable pseudorandom number generators.
"""

from __future__ import annotations

import math
import sys
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._tensor import constant

_GAMMA = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64
# SplitMix64's finaliser: shift right, exclusive or, multiply (as int64), twice; then shift and exclusive or.
_ROUNDS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
_LAST = 31
_UNUSED = 11  # lowest bits of a word, that a float64 has no place for
_TWO_53 = 2.0**-53
_MASK = (1 << 64) - 1
_BLOCK = 1 << 15  # words at once on the CPU: what is computed of them stays in the cache
_TURN = 2.0 * math.pi * _TWO_53
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
_TABLE = 1 << 12  # lanes, at most, that are kept as numbers on a device
_FEW = 4  # of so few numbers Python's own arithmetic is faster
_Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
_Reals = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class Stream(IntEnum):
    """What a key is used for: streams of one seed never meet."""

    PROBE = 1
    CONTROL = 2
    BROWNIAN = 3
    PRIOR = 4
    LEVY = 5
    CHAIN = 6
    DEQUANTISE = 7
    LEVEL = 11
    CHECK = 12
    BOUND = 13
    BOUND_CONTROL = 14


def _shift(word: Tensor, by: int) -> Tensor:
    """Logical right shift of int64 words."""
    return torch.bitwise_right_shift(word, by) & ((1 << (64 - by)) - 1)


def _finalise(word: Tensor) -> Tensor:
    for by, factor in _ROUNDS:
        word = (word ^ _shift(word, by)) * factor
    return word ^ _shift(word, _LAST)


def _finalise_int(number: int) -> int:
    """What `_finalise` does to one word, as an int64."""
    word = number & _MASK
    for by, factor in _ROUNDS:
        word = ((word ^ (word >> by)) * factor) & _MASK
    word ^= word >> _LAST
    return word - (1 << 64) if word >> 63 else word


_HOST_ROUNDS = tuple((np.uint64(by), np.uint64(factor & _MASK)) for by, factor in _ROUNDS)
_HOST_LAST, _HOST_UNUSED, _HOST_GAMMA = np.uint64(_LAST), np.uint64(_UNUSED), np.uint64(_GAMMA & _MASK)


def _finalise_host(word: _Words) -> _Words:
    """What `_finalise` does, to the words themselves."""
    spare = np.empty_like(word)
    for by, factor in _HOST_ROUNDS:
        np.right_shift(word, by, out=spare)
        np.bitwise_xor(word, spare, out=word)
        np.multiply(word, factor, out=word)
    np.right_shift(word, _HOST_LAST, out=spare)
    return np.bitwise_xor(word, spare, out=word)


def _on_host(keys: Tensor) -> bool:
    """Whether keys are numbers in the CPU's memory, and no part of a trace."""
    return type(keys) is Tensor and keys.device.type == "cpu" and not torch.compiler.is_compiling()


def _host(numbers: Tensor) -> _Words:
    """Int64 numbers as words, in the same memory."""
    return numbers.numpy().view(np.uint64)


@lru_cache(maxsize=16)
def _lanes(count: int) -> _Words:
    """(count,) the lanes 1, 2, .. of a word, multiplied as they enter it; not to be written to."""
    return np.arange(1, count + 1, dtype=np.uint64) * _HOST_GAMMA


def _lanes_on(device: torch.device, count: int) -> Tensor:
    """`_lanes` as int64: a table, for of products of numbers that it knows a compiler makes some that do not wrap."""
    if count <= _TABLE:
        return constant(_lanes(count).view(np.int64).tolist(), torch.int64, device)
    return torch.arange(1, count + 1, dtype=torch.int64, device=device) * _GAMMA


def _units(words: _Words) -> _Reals:
    """Uniforms on (0, 1] from words that are still to be finalised, which it is done to in place."""
    return _host_unit(_finalise_host(words))


def _host_unit(words: _Words) -> _Reals:
    """Uniforms on (0, 1] from words, which are written to."""
    np.right_shift(words, _HOST_UNUSED, out=words)
    drawn: _Reals = words.view(np.int64).astype(np.float64)
    drawn += 1.0
    drawn *= _TWO_53
    return drawn


@lru_cache(maxsize=2)
def _host_signs(dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """(256, 8) the signs that the bits of each byte stand for."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    return (2 * bits - 1).astype(_NUMPY[dtype])


def _counted(keys: Tensor, counter: Tensor) -> _Words:
    """(B,) what all lanes of a draw have in common."""
    if len(keys) <= _FEW:
        pairs = zip(keys.tolist(), counter.tolist(), strict=True)
        return np.array([_finalise_int(key + (many + 1) * _GAMMA) for key, many in pairs], np.int64).view(np.uint64)
    return _finalise_host(_host(keys) + (_host(counter) + np.uint64(1)) * _HOST_GAMMA)


def _host_double(words: _Words) -> tuple[Any, Any, Any]:
    """Radii, and cosines and sines of angles, from (2, ..) words that are still to be finalised."""
    radius, angle = _units(words)
    torch.from_numpy(radius).log_()
    radius *= -2.0
    angle *= 2.0 * math.pi
    cosine, sine = torch.from_numpy(angle).cos().numpy(), torch.from_numpy(angle).sin_().numpy()
    return np.sqrt(radius, out=radius), cosine, sine


def _host_single(words: _Words) -> tuple[Any, Any, Any]:
    """As `_host_double`, to float32's rounding."""
    _finalise_host(words)
    angle = (words[1].view(np.int64) >> _UNUSED).astype(np.float32)  # by its sign within half a turn of 0
    angle *= np.float32(_TURN)
    square = _host_unit(words[0])
    np.log(square, out=square)
    square *= -2.0
    radius = square.astype(np.float32)
    return np.sqrt(radius, out=radius), np.cos(angle), np.sin(angle)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What normals of a type are computed in: it, or float32 where it is coarser."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _host_normal(here: _Words, size: int, dtype: torch.dtype) -> Tensor:
    """(B, size) normals, block by block."""
    pairs, double = -(-size // 2), computed_in(dtype) is torch.float64
    out = np.empty((len(here), 2 * pairs), np.float64 if double else np.float32)
    drawn = out.reshape(len(here), 2, pairs)
    lanes = _lanes(2 * pairs).reshape(2, 1, pairs)
    across = max(1, min(pairs, _BLOCK // 2))
    down = max(1, _BLOCK // 2 // across)
    for top in range(0, len(here), down):
        for left in range(0, pairs, across):
            part = (slice(top, top + down), slice(left, left + across))
            words = here[part[0]].reshape(-1, 1) + lanes[:, :, part[1]]
            radius, cosine, sine = _host_double(words) if double else _host_single(words)
            np.multiply(radius, cosine, out=drawn[part[0], 0, part[1]])
            np.multiply(radius, sine, out=drawn[part[0], 1, part[1]])
    made = torch.from_numpy(out if size == 2 * pairs else out[:, :size])
    return made if made.dtype is dtype else made.to(dtype)


def _root(seed: int, stream: Stream) -> int:
    """What the keys of a stream have in common."""
    return _finalise_int(_finalise_int(seed + _GAMMA) + int(stream) * _GAMMA)


def sample_keys(seed: int, stream: Stream, indices: Tensor) -> Tensor:
    """(B,) int64 keys, one a sample.

    Args:
        seed: 0 <= seed < 2^63.
        stream: What the numbers are for.
        indices: (B,) int64 global sample numbers.
    """
    root = _root(seed, stream)
    if _on_host(indices):
        if len(indices) <= _FEW:
            keys = [_finalise_int(root + (index + 1) * _GAMMA) for index in indices.tolist()]
            return torch.from_numpy(np.array(keys, np.int64))
        added = (_host(indices) + np.uint64(1)) * _HOST_GAMMA + np.uint64(root & _MASK)
        return torch.from_numpy(_finalise_host(added).view(np.int64))
    return _finalise(root + (indices + 1) * _GAMMA)


def words(keys: Tensor, counter: Tensor, count: int) -> Tensor:
    """(B, count) int64 words of 64 random bits.

    Args:
        keys: (B,) from `sample_keys`.
        counter: (B,) int64: how many times this sample has drawn before.
        count: Words a sample.
    """
    if _on_host(keys) and _on_host(counter):
        drawn = _finalise_host(_counted(keys, counter)[:, None] + _lanes(count))
        return torch.from_numpy(drawn.view(np.int64))
    here = _finalise(keys + (counter + 1) * _GAMMA)
    return _finalise(here[:, None] + _lanes_on(keys.device, count))


def rademacher(keys: Tensor, counter: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, size) independent signs, -1 or +1 with equal probability."""
    drawn = words(keys, counter, -(-size // 64))
    if _on_host(drawn) and dtype in _NUMPY and sys.byteorder == "little":
        taken = _host_signs(dtype).take(drawn.numpy().view(np.uint8), 0)
        return torch.from_numpy(taken).flatten(1)[:, :size].contiguous()
    # Byte by byte, from a table of the 8 signs that each stands for: ten times as fast as bit by bit.
    place = torch.arange(8, dtype=torch.int64, device=keys.device)
    bits = torch.bitwise_right_shift(torch.arange(256, dtype=torch.int64, device=keys.device)[:, None], place) & 1
    signs = (2 * bits - 1).to(dtype)
    octets = torch.bitwise_right_shift(drawn[:, :, None], 8 * place) & 255
    return F.embedding(octets, signs).flatten(1)[:, :size].contiguous()


def normal(keys: Tensor, counter: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, size) independent standard normals by Box and Muller's transform, the same to rounding for every dtype."""
    if _on_host(keys) and _on_host(counter):
        return _host_normal(_counted(keys, counter), size, dtype)
    pairs, kind = -(-size // 2), computed_in(dtype)
    drawn = words(keys, counter, 2 * pairs)
    radius = (-2.0 * _unit(drawn[:, :pairs]).log()).to(kind).sqrt()
    if kind is torch.float64:
        angle = 2.0 * math.pi * _unit(drawn[:, pairs:])
    else:
        angle = torch.bitwise_right_shift(drawn[:, pairs:], _UNUSED).to(kind) * _TURN
    return torch.cat((radius * angle.cos(), radius * angle.sin()), 1)[:, :size].to(dtype)


def first_normal(seed: int, stream: Stream, indices: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, size) the first normals of a stream: those of `sample_keys` at counter 0."""
    if len(indices) <= _FEW and _on_host(indices):
        root = _root(seed, stream)
        keys = (_finalise_int(root + (index + 1) * _GAMMA) for index in indices.tolist())
        here = np.array([_finalise_int(key + _GAMMA) for key in keys], np.int64)
        return _host_normal(here.view(np.uint64), size, dtype)
    return normal(sample_keys(seed, stream, indices), torch.zeros_like(indices), size, dtype)


def uniforms(keys: Tensor, counter: Tensor, size: int) -> Tensor:
    """(B, size) independent float64 uniforms on (0, 1]."""
    if _on_host(keys) and _on_host(counter):
        return torch.from_numpy(_units(_counted(keys, counter)[:, None] + _lanes(size)))
    return _unit(words(keys, counter, size))


def _unit(words: Tensor) -> Tensor:
    """Float64 uniforms on (0, 1] from words: above 0, they have a logarithm."""
    return (_shift(words, _UNUSED).double() + 1.0) * _TWO_53


def uniform(keys: Tensor, counter: Tensor) -> Tensor:
    """(B,) float64 uniform on (0, 1]."""
    return uniforms(keys, counter, 1)[:, 0]


def sphere(keys: Tensor, counter: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, size) points uniform on the sphere of radius sqrt(size)."""
    drawn = normal(keys, counter, size, torch.float64)
    return (drawn * (math.sqrt(size) / drawn.square().sum(1, keepdim=True).sqrt())).to(dtype)

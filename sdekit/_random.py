"""Counter-based noise: (seed, stream, sample index, counter) -> the same numbers in any batch, on any device.

No state is kept anywhere. A 64-bit word is the finaliser of SplitMix64 applied to a key and a lane number,

    key(seed, stream, index)  ->  key(.., counter)  ->  word(.., lane),

each arrow one application of the finaliser to the sum of what came before and a multiple of an odd constant. All of
it is int64 arithmetic that wraps, so integers and signs agree to the bit on every device; normals (Box-Muller in
float64) to rounding.

Source: Steele, Lea and Flood 2014, fast splittable pseudorandom number generators.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional as F

_GAMMA = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64
_FIRST = -0x40A7B892E31B1A47  # SplitMix64's two multipliers, as int64
_SECOND = -0x6B2FB644ECCEEE15
_TWO_53 = 2.0**-53


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


def _shift(word: Tensor, by: int) -> Tensor:
    """Logical right shift of int64 words."""
    return torch.bitwise_right_shift(word, by) & ((1 << (64 - by)) - 1)


def _finalise(word: Tensor) -> Tensor:
    word = (word ^ _shift(word, 30)) * _FIRST
    word = (word ^ _shift(word, 27)) * _SECOND
    return word ^ _shift(word, 31)


def _finalise_int(number: int) -> int:
    """What `_finalise` does to one word, as an int64."""
    whole = (1 << 64) - 1
    word = number & whole
    word = ((word ^ (word >> 30)) * _FIRST) & whole
    word = ((word ^ (word >> 27)) * _SECOND) & whole
    word ^= word >> 31
    return word - (1 << 64) if word >> 63 else word


def sample_keys(seed: int, stream: Stream, indices: Tensor) -> Tensor:
    """(B,) int64 keys, one a sample.

    Args:
        seed: 0 <= seed < 2^63.
        stream: What the numbers are for.
        indices: (B,) int64 global sample numbers.
    """
    root = _finalise_int(_finalise_int(seed + _GAMMA) + int(stream) * _GAMMA)
    return _finalise(root + (indices + 1) * _GAMMA)


def words(keys: Tensor, counter: Tensor, count: int) -> Tensor:
    """(B, count) int64 words of 64 random bits.

    Args:
        keys: (B,) from `sample_keys`.
        counter: (B,) int64: how many times this sample has drawn before.
        count: Words a sample.
    """
    here = _finalise(keys + (counter + 1) * _GAMMA)
    lanes = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _GAMMA
    return _finalise(here[:, None] + lanes)


def rademacher(keys: Tensor, counter: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, size) independent signs, -1 or +1 with equal probability."""
    drawn = words(keys, counter, -(-size // 64))
    # Byte by byte, from a table of the 8 signs that each stands for: ten times as fast as bit by bit.
    place = torch.arange(8, dtype=torch.int64, device=keys.device)
    bits = torch.bitwise_right_shift(torch.arange(256, dtype=torch.int64, device=keys.device)[:, None], place) & 1
    signs = (2 * bits - 1).to(dtype)
    octets = torch.bitwise_right_shift(drawn[:, :, None], 8 * place) & 255
    return F.embedding(octets, signs).flatten(1)[:, :size].contiguous()


def normal(keys: Tensor, counter: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, size) independent standard normals, computed in float64 by Box and Muller's transform."""
    pairs = -(-size // 2)
    drawn = uniforms(keys, counter, 2 * pairs)  # above 0: it has a logarithm
    radius = (-2.0 * drawn[:, :pairs].log()).sqrt()
    angle = 2.0 * math.pi * drawn[:, pairs:]
    return torch.cat((radius * angle.cos(), radius * angle.sin()), 1)[:, :size].to(dtype)


def uniforms(keys: Tensor, counter: Tensor, size: int) -> Tensor:
    """(B, size) independent float64 uniforms on (0, 1]."""
    return (_shift(words(keys, counter, size), 11).double() + 1.0) * _TWO_53


def uniform(keys: Tensor, counter: Tensor) -> Tensor:
    """(B,) float64 uniform on (0, 1]."""
    return uniforms(keys, counter, 1)[:, 0]


def sphere(keys: Tensor, counter: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, size) points uniform on the sphere of radius sqrt(size)."""
    drawn = normal(keys, counter, size, torch.float64)
    return (drawn * (math.sqrt(size) / drawn.square().sum(1, keepdim=True).sqrt())).to(dtype)

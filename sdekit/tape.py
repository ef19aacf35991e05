"""What a recorded solve is made of: plain numbers, and the sums that they weigh (see recording.py)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Draw(NamedTuple):
    """A question put to a path: `kind` with its two times (normal: none), the number of the step and the lane."""

    kind: str
    s0: float
    s1: float
    step: int
    lane: int


class Sum(NamedTuple):
    """a z + sums of (coefficient, number): of inputs and outputs of calls, and of draws."""

    a: float
    inputs: tuple[tuple[float, int], ...]
    outputs: tuple[tuple[float, int], ...]
    draws: tuple[tuple[float, int], ...]


SAME = Sum(1.0, (), (), ())


class Call(NamedTuple):
    """A network call: what it is given, at which label and time; draws asked before it."""

    given: Sum
    label: float
    draws: tuple[int, ...]


class Step(NamedTuple):
    """The calls of a step; the state after it; draws asked before that; the time; calls and draws needed no more."""

    calls: tuple[Call, ...]
    after: Sum
    draws: tuple[int, ...]
    t: float
    spent: tuple[int, ...] = ()
    drawn: tuple[int, ...] = ()


class Tape(NamedTuple):
    """A recorded solve."""

    steps: tuple[Step, ...]
    draws: tuple[Draw, ...]
    calls: int


def added(
    terms: Sum, z: Tensor, inputs: dict[int, Tensor], outputs: dict[int, Tensor], noise: dict[int, Tensor]
) -> Tensor:
    """The sum, of tensors like `z`."""
    if terms is SAME:
        return z
    total = z * terms.a
    for coefficient, j in terms.inputs:
        total.add_(inputs[j], alpha=coefficient)
    for coefficient, j in terms.outputs:
        total.add_(outputs[j], alpha=coefficient)
    for coefficient, j in terms.draws:
        total.add_(noise[j], alpha=coefficient)
    return total

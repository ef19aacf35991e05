"""What a recorded solve is made of: plain numbers, and the sums that they weigh (see recording.py).

While it is played back, its tensors are in numbered places: the state in place 0, the input of call e in 1 + 2 e, what
is kept of its output in 2 + 2 e, and draw n behind all calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STATE = 0


def input_of(call: int) -> int:
    """The place of a call's input."""
    return 1 + 2 * call


def output_of(call: int) -> int:
    """The place of what is kept of a call's output."""
    return 2 + 2 * call


def draw_of(calls: int, number: int) -> int:
    """The place of a draw in a solve of so many calls."""
    return 1 + 2 * calls + number


class Draw(NamedTuple):
    """A question put to a path: `kind` with its two times (normal: none), the number of the step and the lane."""

    kind: str
    s0: float
    s1: float
    step: int
    lane: int


class Sum(NamedTuple):
    """a times what is in the place `base`, and terms (coefficient, place)."""

    a: float
    base: int
    terms: tuple[tuple[float, int], ...] = ()

    @property
    def places(self) -> tuple[int, ...]:
        """All that it takes from."""
        return (self.base, *(place for _, place in self.terms))

    @property
    def operations(self) -> int:
        """How many operations on tensors it takes."""
        return len(self.terms) + int(self.a != 1.0)


SAME = Sum(1.0, STATE)


class Call(NamedTuple):
    """A network call: what it is given; draws asked before it.

    Its output plus `tilt` times its input is kept: where later sums take the two in one ratio, that saves a term each.
    """

    given: Sum
    draws: tuple[int, ...]
    tilt: float = 0.0


class Step(NamedTuple):
    """The calls of a step; the state after it; draws asked before that; the time; places needed no more."""

    calls: tuple[Call, ...]
    after: Sum
    draws: tuple[int, ...]
    t: float
    spent: tuple[int, ...] = ()


class Tape(NamedTuple):
    """A recorded solve.

    Attributes:
        steps: In their order.
        draws: The questions that they put.
        labels: Of their network calls.
        chained: Whether inputs are made of inputs before them, so that the states between need not be.
    """

    steps: tuple[Step, ...]
    draws: tuple[Draw, ...]
    labels: tuple[float, ...]
    chained: bool = False

    @property
    def calls(self) -> int:
        """How many network calls it makes."""
        return len(self.labels)

    def draw_place(self, number: int) -> int:
        """The place of a draw."""
        return draw_of(self.calls, number)

    def empty(self) -> list[Tensor | None]:
        """The places, with nothing in them."""
        return [None] * self.draw_place(len(self.draws))


def added(terms: Sum, values: list[Tensor | None]) -> Tensor:
    """The sum of what is in the places; what it starts from itself, not a copy, if it is nothing else."""
    a, base, rest = terms
    total: Tensor = values[base]  # type: ignore[assignment]
    if a != 1.0:
        total = total * a
    elif rest:
        coefficient, place = rest[0]
        total, rest = torch.add(total, values[place], alpha=coefficient), rest[1:]  # type: ignore[arg-type]
    for coefficient, place in rest:
        total.add_(values[place], alpha=coefficient)  # type: ignore[arg-type]
    return total

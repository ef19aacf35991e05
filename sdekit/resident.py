"""A compiled step that stays in its memory.

What the compiler generates makes some tens of tensors a step and calls a kernel or two with them; for few samples it is
the making that takes the time. Here they are made once: a step is recorded, kernel by kernel with what it was given,
and from then on the kernels are called with the same tensors again. A step reads the carry in one set of tensors and
writes it to a second, so every other step goes the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compiled import Answer, ask
from .fusing import Call, Fused, same
from .terms import Term
from .tracing import Program


class _Piece(NamedTuple):
    """A piece of the step as calls of kernels, or the network.

    Attributes:
        run: The piece itself; None: the network.
        kind: Of what the network is asked.
        calls: What makes `gives` of `takes`.
        takes: What it is given.
        gives: Where its results are.
    """

    run: Fused | None
    kind: int
    calls: list[Call]
    takes: list[Any]
    gives: list[Any]


class Resident:
    """A step of so many samples, in tensors of its own.

    Args:
        program: The compiled step; `can_stay` says that it is made of kernels alone.
        term: How its divergence is had.
        answer: What its network says.
        given: The problem's own parts, which stay where they are.
        leaves: The leaves of the carry; a step is made of them.

    Attributes:
        left: How many samples still run.
        stays: Whether more steps can be made here; if not, the one that was made is all.
    """

    def __init__(
        self, program: Program, term: Term, answer: Answer, given: Sequence[Tensor], leaves: Sequence[Tensor]
    ) -> None:
        self._term, self._answer = term, answer
        first = [leaf.clone() for leaf in leaves]
        values: list[Any] = [*given, *first, *program.rest]
        pieces = []
        for cut in program.cuts:
            takes = [None if place is None else values[place] for place in cut.takes]
            run = cut.run
            if run is None:
                calls: list[Call] = []
                gives: list[Any] = [part.clone() for part in self._ask(cut.kind, takes)]
            else:
                assert isinstance(run, Fused)  # as `can_stay` has it
                calls, gives = run.recorded(*takes)
            for place, value in zip(cut.gives, gives, strict=True):
                values[place] = value
            pieces.append(_Piece(run, cut.kind, calls, takes, gives))
        *second, left = (values[place] for place in program.results)
        self.left: Tensor = left
        self._sets, self._now = (first, second), 1
        self.stays = _exchangeable(first, second, [*given, self.left])
        if self.stays:
            self._ways = pieces, [_the_other_way(piece, first, second) for piece in pieces]
            self.stays = all(piece.run is None or piece.run.proved for piece in pieces) or self._prove()

    def advance(self) -> Tensor:
        """One step; how many samples still run after it."""
        for piece in self._ways[self._now]:
            if piece.run is None:
                for place, part in zip(piece.gives, self._ask(piece.kind, piece.takes), strict=True):
                    place.copy_(part)
            for kernel, given in piece.calls:
                kernel(*given)
        self._now = 1 - self._now
        return self.left

    def _ask(self, kind: int, takes: list[Any]) -> Sequence[Tensor]:
        """What the network answers; what it is shown is not written to later, for it may keep that."""
        seen, label, vectors = takes
        return ask(self._term, self._answer, kind, [seen.clone(), label.clone(), vectors])

    def leaves(self) -> list[Tensor]:
        """The leaves of the carry, in memory that no later step writes to."""
        return [leaf.clone() for leaf in self._sets[self._now]]

    def _prove(self) -> bool:
        """Whether the kernels give what the pieces do, either way; the carry is as before."""
        kept, left, well = self.leaves(), self.left.clone(), True
        for way in (self._now, 1 - self._now):
            for piece in self._ways[way]:
                if piece.run is not None:
                    for kernel, given in piece.calls:
                        kernel(*given)
                    well = well and same(list(piece.run(*piece.takes)), piece.gives)
        for leaf, part in zip(self._sets[self._now], kept, strict=True):
            leaf.copy_(part)
        self.left.copy_(left)
        for piece in self._ways[0]:
            if piece.run is not None:
                piece.run.proved = well
        return well


def can_stay(program: Program) -> bool:
    """Whether the pieces of a program are kernels, and nothing else."""
    return all(cut.run is None or (isinstance(cut.run, Fused) and cut.run.recordable) for cut in program.cuts)


def _whole(leaf: Tensor) -> bool:
    """Whether it fills its memory."""
    return leaf.is_contiguous() and leaf.untyped_storage().nbytes() == leaf.numel() * leaf.itemsize


def _exchangeable(first: list[Tensor], second: list[Tensor], rest: list[Tensor]) -> bool:
    """Whether each tensor of the second set can take the first's place: of its kind, in memory of its own."""
    alike = all(a.shape == b.shape and a.dtype is b.dtype for a, b in zip(first, second, strict=True))
    every = [leaf for leaf in (*first, *_others(first, second)) if leaf.numel()]
    memory = {leaf.untyped_storage().data_ptr() for leaf in every}
    others = {leaf.untyped_storage().data_ptr() for leaf in rest}
    return alike and all(map(_whole, every)) and len(memory) == len(every) and not memory & others


def _others(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """The tensors of the second set that are not those of the first, as of what no step changes."""
    return [b for a, b in zip(first, second, strict=True) if a is not b]


def _the_other_way(piece: _Piece, first: list[Tensor], second: list[Tensor]) -> _Piece:
    """The piece with the two sets exchanged."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not b and a.numel()]
    instead = {a.untyped_storage().data_ptr(): b for pair in pairs for a, b in (pair, pair[::-1])}

    def other(value: Any) -> Any:
        place = instead.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None
        if place is None:
            return value
        return torch.as_strided(place, value.size(), value.stride(), value.storage_offset())

    calls = [(kernel, tuple(map(other, given))) for kernel, given in piece.calls]
    return piece._replace(calls=calls, takes=list(map(other, piece.takes)), gives=list(map(other, piece.gives)))

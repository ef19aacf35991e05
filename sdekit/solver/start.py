"""How a multistep method begins without losing its order.

A method of order 3 or more cannot begin with a step of order 1: that step's error alone would be of order 2. So its
first advances stay in place and evaluate inside of the first step, each from what is known so far; the memory then
holds nodes at shares of the step as if they were past ones. With h^k the error of a node's value:

    explicit, depth 3   0, 1/2                         0, h^2                      a step with error h^3
    explicit, depth 4   0, 1/3, 2/3, 1/3               0, h^2, h^3, h^3            a step with error h^4
    corrected, depth 3  0, 1/2, 1/2                    0, h^2, h^3                 a step with error h^4
    corrected, depth 4  0, 1/3, 2/3, 1/3, 2/3, 1/3     0, h^2, h^3, h^3, h^4, h^4  a step with error h^5

An explicit method evaluates the last of them in the advance that makes the step, where it would evaluate its start;
one with a corrector has an evaluation at the step's end besides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._numbers import at_least, at_most, cat, listed
from .._tensor import select
from .base import counters

# Shares of the first step that are evaluated before it is made, and at which place of the history each is put; a place
# that is taken is overwritten, else what is there moves on.
Start = tuple[tuple[float, int, bool], ...]
EXPLICIT: dict[int, Start] = {
    1: ((0.0, 0, False),),
    2: ((0.0, 0, False),),
    3: ((0.0, 0, False), (1 / 2, 0, False)),
    4: ((0.0, 0, False), (1 / 3, 0, False), (2 / 3, 0, False), (1 / 3, 1, True)),
}
CORRECTED: dict[int, Start] = {
    1: ((0.0, 0, False),),
    2: ((0.0, 0, False),),
    3: ((0.0, 0, False), (1 / 2, 0, False), (1 / 2, 0, True)),
    4: (*EXPLICIT[4], (2 / 3, 0, True), (1 / 3, 1, True)),
}


class History(NamedTuple):
    """Of each sample: evaluations so far (B,); half log SNR of the last predictions (B, K), newest first; these."""

    entered: Tensor
    nodes: Tensor
    past: tuple[Tensor, ...]


def empty(z: Tensor, depth: int) -> History:
    """A history without entries."""
    count = counters(z)
    return History(
        count, torch.zeros(len(z), depth, dtype=torch.float64, device=z.device), (torch.zeros_like(z),) * depth
    )


def shares(start: Start, entered: Tensor) -> Tensor:
    """(B,) the share of the step at which a sample evaluates next: 0 once it has started."""
    table = listed((*(share for share, _, _ in start), 0.0), torch.float64, entered)
    return table[at_most(entered, len(start))]


def filled(start: Start, entered: Tensor, depth: int) -> Tensor:
    """(B,) int64 how many places of a history of `depth` are filled after `entered` evaluations, from the front."""
    if len(start) == 1:  # as they come in
        return at_most(entered, depth)
    counts, count = [0], 0
    for _, _, overwrite in start:
        count += not overwrite
        counts.append(count)
    last, table = len(start), listed(tuple(counts), torch.int64, entered)
    return at_most(table[at_most(entered, last)] + at_least(entered - last, 0), depth)


def held(start: Start, entered: Tensor, depth: int) -> Tensor:
    """(B, depth) which places of the history are filled after `entered` evaluations."""
    return torch.arange(depth, device=entered.device) < filled(start, entered, depth)[:, None]


def enter(start: Start, history: History, node: Tensor, prediction: Tensor) -> History:
    """The history with one more prediction: in front, or at the place that the start gives it."""
    nodes = torch.cat((node[:, None], history.nodes[:, :-1]), 1)
    past = (prediction, *history.past[:-1])
    for turn, (_, place, overwrite) in enumerate(start):
        if overwrite:
            now = history.entered == turn
            nodes = select(now, instead(history.nodes, place, node), nodes)
            kept = tuple(prediction if k == place else old for k, old in enumerate(history.past))
            past = select(now, kept, past)
    return History(history.entered + 1, nodes, past)


def instead(stacked: Tensor, place: int, entry: Tensor) -> Tensor:
    """(B, K, ...) with `entry` (B, ...) at `place` of the second axis."""
    return cat((stacked[:, :place], entry[:, None], stacked[:, place + 1 :]), 1)

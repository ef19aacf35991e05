"""Weights of Newton's interpolation on unequal nodes, integrated over a step.

With nodes x_0, x_1, .. and f[x_0 .. x_o] the divided differences of f, the integral of Newton's sum over a step is

    sum_o I_o f[x_0 .. x_o],   I_o = integral of prod_{i<o} (x - x_i),   f[x_0 .. x_o] = sum_{j<=o} f_j / D_oj,
    D_oj = prod_{i<=o, i!=j} (x_j - x_i)

4-point Gauss is exact for I_o up to o = 7. A predictor sums over the past nodes, o < m; a corrector has the step's end
before them and sums to o = m; its last term is what the order of the formula is judged by.

Two ways to the same numbers, to rounding: stacked, few operations for whoever runs them one by one; and
column by column, hundreds of operations on (B,) tensors, which a compiler makes one loop that needs no memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._numbers import (
    arange,
    at_least,
    at_most,
    batch_first,
    beside,
    cat,
    listed,
    on_host,
    ones_like,
    picked,
    products,
    rows,
    total,
    where,
)
from .._tensor import may_stay, tree_map

_POINTS = (math.sqrt(3 / 7 - 2 / 7 * math.sqrt(6 / 5)), math.sqrt(3 / 7 + 2 / 7 * math.sqrt(6 / 5)))
_WEIGHTS = ((18 + math.sqrt(30)) / 72, (18 - math.sqrt(30)) / 72)  # of Gauss's rule on [0, 1]
_RULE = tuple(zip((-_POINTS[1], -_POINTS[0], _POINTS[0], _POINTS[1]), (*_WEIGHTS[::-1], *_WEIGHTS), strict=True))
_AT_ONCE = 256  # samples
MOST_NODES = 7  # 4-point Gauss is exact up to degree 7, Newton's last product here has degree 6


class Weights(NamedTuple):
    """What a step takes of each node's slope.

    Attributes:
        predict: (B, K) of the past nodes.
        correct: (B, 1 + N, K + 1) of the step's end, then of the past nodes; for the single terms asked for after it.
    """

    predict: Tensor
    correct: Tensor


class Formula(NamedTuple):
    """Which terms are summed, sample by sample.

    Attributes:
        known: (B,) int64: how many of the past nodes there are, the newest first.
        terms: (B,) int64 m, at most as many as are known.
        around: Whether three terms of the corrector's sum are asked for by themselves, m - 1, m and m + 1, or m only.
        begun: (B,) bool: whether the sample steps at all; else corrector and single terms are zero.
    """

    known: Tensor
    terms: Tensor
    around: bool
    begun: Tensor

    def single(self, depth: int) -> tuple[Tensor, ...]:
        """(B,) each: the terms that are asked for by themselves, of a formula of at most `depth` terms."""
        if not self.around:
            return (self.terms,)
        return at_least(self.terms - 1, 0), self.terms, at_most(self.terms + 1, depth)


class _Masks(NamedTuple):
    """Which terms count, in numbers 0 and 1, float64; by m, or by m (K + 1) + the nodes known.

    Attributes:
        upper: (K, K + 1, 1) of past node j and the corrector's term o: j < o.
        ahead: (K, K + 1) the predictor's terms, by m.
        behind: (K + 1, (K + 1)^2) the corrector's, by both.
        single: (N, (K + 1)^2) whether a single one counts, by both.
        which: (N, K + 1) int64, which those are, by m.
    """

    upper: Tensor
    ahead: Tensor
    behind: Tensor
    single: Tensor
    which: Tensor


_kept: dict[tuple[int, bool], _Masks] = {}


def _masks(depth: int, around: bool) -> _Masks:
    """The masks of formulas of at most `depth` terms, made once; anew in a trace, whose tensors have no contents."""
    if (depth, around) not in _kept:
        made = _made_masks(depth, around)
        if not may_stay(made.upper):
            return made
        _kept[depth, around] = made
    return _kept[depth, around]


def _made_masks(depth: int, around: bool) -> _Masks:
    order = torch.arange(depth + 1, device="cpu")
    which = torch.stack(Formula(order, order, around, order > 0).single(depth))
    terms, known = order.repeat_interleave(depth + 1), order.repeat(depth + 1)
    behind = (order[:, None] <= terms) & (order[:, None] <= known)
    upper = (order[:-1, None] < order)[:, :, None]
    single = which[:, terms] <= known
    return _Masks(upper.double(), (order[:-1, None] < order).double(), behind.double(), single.double(), which)


def stacked(past: Tensor, formula: Formula, s0: Tensor, s1: Tensor) -> Weights:
    """The weights of a step from s0 to s1 after the nodes `past` (B, K), by operations on stacked numbers.

    The batch is the last axis: rows of many numbers are what numpy is quick with, as long as they stay in the cache.
    """
    batch, depth = past.shape
    if on_host(past) and batch > _AT_ONCE:  # in this order: a trace leaves the batch open
        given = (past, formula, s0, s1)
        blocks = [tree_map(lambda part, k=k: part[k : k + _AT_ONCE], given) for k in range(0, batch, _AT_ONCE)]
        return Weights(*(cat(parts, 0) for parts in zip(*(stacked(*block) for block in blocks), strict=True)))
    masks = _masks(depth, formula.around)
    points, rule = (listed(part, torch.float64, past)[:, None] for part in zip(*_RULE, strict=True))
    nodes, half = rows(past), 0.5 * (s1 - s0)
    x = 0.5 * (s0 + s1) + half * points
    lower = products(x[:, None] - nodes, 2.0 * half * rule)[:, :-1]  # (4, K, B): over i < o, weighed
    led = cat((2.0 * half[None], total(lower * (x - s1)[:, None], 0)), 0)  # I'_o
    # Nodes coincide where they are not used. They are masked below, and must not make what is masked infinite.
    gaps, back = nodes[:, None] - nodes, s1 - nodes  # (j, i, B), (K, B)
    gaps, back = where(gaps == 0.0, 1.0, gaps), where(back == 0.0, 1.0, back)
    divisors = products(gaps, ones_like(nodes))  # (j, o, B): over i < o, i != j
    upper, integrals = beside(masks.upper, past), total(lower, 0) * picked(masks.ahead, formula.terms)
    predict = total(integrals / divisors[:, 1:] * upper[:, 1:], 1)
    first = led / products(back, ones_like(s0))
    terms = cat((first[None], led / (divisors * -back[:, None]) * upper), 0)  # (j, o, B), the step's end first
    at = formula.terms * (depth + 1) + formula.known
    summed = total(terms * (picked(masks.behind, at) * formula.begun), 1)
    single = terms[:, picked(masks.which, formula.terms), arange(batch, past)]  # (j, N, B)
    single = single * (picked(masks.single, at) * formula.begun)
    return Weights(batch_first(predict), batch_first(cat((summed[:, None], single), 1).swapaxes(0, 1)))


def by_columns(past: Tensor, formula: Formula, s0: Tensor, s1: Tensor) -> Weights:
    """What `stacked` returns, by operations on (B,) columns; past nodes must be known from the newest on, unequal."""
    depth, nodes = past.shape[1], past.unbind(1)
    count, asked = formula.known, formula.single(depth)
    middle, half = 0.5 * (s0 + s1), 0.5 * (s1 - s0)
    ones = torch.ones_like(s0)
    integrals = [torch.zeros_like(s0) for _ in range(depth)]  # of products over the past nodes
    led = [torch.zeros_like(s0) for _ in range(depth + 1)]  # and with the step's end before them
    led[0] = 2.0 * half
    for point, weight in _RULE:
        x = middle + half * point
        product = (2.0 * weight) * half
        for o in range(depth):
            integrals[o] = integrals[o] + product
            led[o + 1] = led[o + 1] + product * (x - s1)
            product = product * (x - nodes[o])
    # Row by row: the divisors of o from those of o - 1. What is not known divides by anything: it is masked.
    divisors: list[Tensor] = []
    ahead = ones  # prod (s1 - x_i), i < o
    predict = [torch.zeros_like(s0) for _ in range(depth)]
    correct = [torch.zeros_like(s0) for _ in range(depth + 1)]
    single = [[torch.zeros_like(s0) for _ in range(depth + 1)] for _ in asked]
    for o in range(depth + 1):
        row = [led[o] / ahead] + [led[o] / ((x - s1) * d) for x, d in zip(nodes, divisors, strict=False)]
        there = formula.begun & (count >= o)
        summed = there & (formula.terms >= o)
        chosen = [there & (which == o) for which in asked]
        for j, taken in enumerate(row):
            correct[j] = correct[j] + torch.where(summed, taken, 0.0)
            for kept, now in zip(single, chosen, strict=True):
                kept[j] = torch.where(now, taken, kept[j])
        if o == depth:
            break
        ahead = ahead * (s1 - nodes[o])
        own = ones
        for j in range(o):
            gap = nodes[j] - nodes[o]
            divisors[j] = divisors[j] * gap
            own = own * -gap
        divisors.append(own)
        for j, divisor in enumerate(divisors):
            predict[j] = predict[j] + torch.where(formula.terms > o, integrals[o] / divisor, 0.0)
    flat = torch.stack([*correct, *(weight for part in single for weight in part)], 1)
    return Weights(torch.stack(predict, 1), flat.reshape(-1, 1 + len(single), depth + 1))

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
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._numbers import at_least, at_most, batch_first, batch_last, beside, cat, listed, ones_like, products, where

_POINTS = (math.sqrt(3 / 7 - 2 / 7 * math.sqrt(6 / 5)), math.sqrt(3 / 7 + 2 / 7 * math.sqrt(6 / 5)))
_WEIGHTS = ((18 + math.sqrt(30)) / 72, (18 - math.sqrt(30)) / 72)  # of Gauss's rule on [0, 1]
_RULE = tuple(zip((-_POINTS[1], -_POINTS[0], _POINTS[0], _POINTS[1]), (*_WEIGHTS[::-1], *_WEIGHTS), strict=True))
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


@lru_cache(maxsize=16)
def _masks(depth: int, around: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Which terms count, in numbers 0 and 1, float64.

    Returns:
        (K, K, 1) of j and o: j <= o. (K + 1, K) of m and o: those of the predictor's sum. (K + 1, K + 1, 1 + N, K + 1)
        of m, the nodes known and o: those of the corrector's, then the single ones.
    """
    order = torch.arange(depth + 1, device="cpu")
    terms = order[:, None]
    single = Formula(terms, terms, around, terms > 0).single(depth)
    asked = torch.stack((order <= terms, *(order == which for which in single)), 1)
    summed = asked[:, None] & (order <= terms)[:, None]
    inner = order[:-1]
    return (inner[:, None] <= inner)[:, :, None].double(), (inner < terms).double(), summed.double()


def stacked(past: Tensor, formula: Formula, s0: Tensor, s1: Tensor) -> Weights:
    """The weights of a step from s0 to s1 after the nodes `past` (B, K), by operations on stacked numbers.

    The batch is the last axis: rows of many numbers are what numpy is quick with.
    """
    upper, ahead, behind = (beside(mask, past) for mask in _masks(past.shape[1], formula.around))
    nodes, half = past.T, 0.5 * (s1 - s0)
    points, rule = (listed(part, torch.float64, past)[:, None] for part in zip(*_RULE, strict=True))
    x = 0.5 * (s0 + s1) + half * points
    lower = products(x[:, None] - nodes, 2.0 * half * rule)[:, :-1]  # (4, K, B): over i < o, weighed
    integrals, led = lower.sum(0), (lower * (x - s1)[:, None]).sum(0)
    # Nodes coincide where they are not used. They are masked below, and must not make what is masked infinite.
    gaps, back = nodes[:, None] - nodes, s1 - nodes  # (j, i, B), (K, B)
    gaps, back = where(gaps == 0.0, 1.0, gaps), where(back == 0.0, 1.0, back)
    divisors = products(gaps, ones_like(nodes))[:, 1:]  # (j, o, B): over i <= o, i != j
    predict = (integrals * ahead[formula.terms].T / divisors * upper).sum(1)
    masks = batch_last(behind[formula.terms, formula.known]) * formula.begun  # (1 + N, o, B)
    newest = (cat((2.0 * half[None], led), 0) / products(back, ones_like(s0)) * masks).sum(1)
    others = (led / (divisors * -back[:, None]) * upper * masks[:, None, 1:]).sum(2)
    return Weights(batch_first(predict), batch_first(cat((newest[:, None], others), 1)))


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
        picked = [there & (which == o) for which in asked]
        for j, taken in enumerate(row):
            correct[j] = correct[j] + torch.where(summed, taken, 0.0)
            for kept, now in zip(single, picked, strict=True):
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

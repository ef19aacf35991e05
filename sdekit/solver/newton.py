"""Weights of Newton's interpolation on unequal nodes, integrated over a step.

With nodes x_0, x_1, .. and f[x_0 .. x_o] the divided differences of f, the integral of Newton's sum over a step is

    sum_o I_o f[x_0 .. x_o],   I_o = integral of prod_{i<o} (x - x_i),   f[x_0 .. x_o] = sum_{j<=o} f_j / D_oj,
    D_oj = prod_{i<=o, i!=j} (x_j - x_i)

4-point Gauss is exact for I_o up to o = 7. A predictor sums over the past nodes, o < m; a corrector has the step's end
before them and sums to o = m; its last term is what the order of the formula is judged by.

Two ways to the same numbers, to rounding: with stacked tensors, few operations for whoever runs them one by one; and
column by column, hundreds of operations on (B,) tensors, which a compiler makes one loop that needs no memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._tensor import constant

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
        known: (B, K) bool: which past nodes there are.
        terms: (B,) int64 m, at most as many as are known.
        single: int64 (B,) each: terms of the corrector's sum that are asked for one by one.
        begun: (B,) bool: whether the sample steps at all; else corrector and single terms are zero.
    """

    known: Tensor
    terms: Tensor
    single: tuple[Tensor, ...]
    begun: Tensor


def newton_weights(nodes: Tensor, valid: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """(B, K, K) weights W with integral over [start, end] of Newton's o-th term = sum_j W[o, j] f_j.

    Args:
        nodes: (B, K) float64, distinct where valid; the interpolation takes them in this order.
        valid: (B, K) bool; rows and columns of invalid nodes are meaningless but finite.
        start: (B,) float64 where the step begins.
        end: (B,) float64 where it ends.
    """
    count = nodes.shape[1]
    middle, half = 0.5 * (start + end), 0.5 * (end - start)
    points = constant([point for point, _ in _RULE], torch.float64, nodes.device)
    rule = constant([weight for _, weight in _RULE], torch.float64, nodes.device)
    x = middle[:, None] + half[:, None] * points
    factors = (x[:, :, None] - nodes[:, None, :]).cumprod(2)  # (B, 4, K): products over i <= o
    lower = torch.cat((torch.ones_like(factors[:, :, :1]), factors[:, :, :-1]), 2)
    integrals = 2.0 * half[:, None] * torch.einsum("g,bgo->bo", rule, lower)
    gaps = nodes[:, :, None] - nodes[:, None, :]  # (B, j, i)
    pairs = valid[:, :, None] & valid[:, None, :] & ~torch.eye(count, dtype=torch.bool, device=nodes.device)
    # Over i <= o, i != j. Equal nodes (a start in place) are not used, but must not make what is masked infinite.
    divisors = torch.where(pairs & (gaps != 0), gaps, 1.0).cumprod(2)
    used = torch.ones(count, count, dtype=torch.float64, device=nodes.device).triu()  # j <= o
    return (integrals[:, None, :] / divisors * used).transpose(1, 2)


def stacked(past: Tensor, formula: Formula, s0: Tensor, s1: Tensor) -> Weights:
    """The weights of a step from s0 to s1 after the nodes `past` (B, K), by operations on stacked tensors."""
    nodes = torch.cat((s1[:, None], past), 1)
    backward, forward = _both(past, nodes, formula.known, s0, s1)
    depth, begun = past.shape[1], formula.begun
    used = torch.arange(depth + 1, device=past.device) <= formula.terms[:, None]
    predict, known = backward * used[:, 1:, None], forward * used[:, :, None]
    # While it starts two nodes may coincide: what is not used must be zero, or a derivative meets its infinities.
    index = torch.stack(formula.single, 1)[:, :, None].expand(-1, -1, depth + 1)
    correct = torch.cat((known.sum(1, keepdim=True), forward.gather(1, index)), 1)
    return Weights(predict.sum(1), torch.where(begun[:, None, None], correct, 0.0))


def _both(past: Tensor, nodes: Tensor, valid: Tensor, s0: Tensor, s1: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's weights over the step: on the past nodes (B, K, K), and with the step's end before them (B, K+1, K+1).

    Both at once: the predictor's nodes are the corrector's moved up by one, its last one void.
    """
    batch, depth = valid.shape
    void = torch.zeros_like(valid[:, :1])
    usable, known = torch.cat((valid, void), 1), torch.cat((~void, valid), 1)
    both, shifted = torch.cat((usable, known)), torch.cat((past, s1[:, None]), 1)
    weights = newton_weights(torch.cat((shifted, nodes)), both, torch.cat((s0, s0)), torch.cat((s1, s1)))
    weights = weights * (both[:, :, None] & both[:, None, :])
    return weights[:batch, :depth, :depth], weights[batch:]


def by_columns(past: Tensor, formula: Formula, s0: Tensor, s1: Tensor) -> Weights:
    """What `stacked` returns, by operations on (B,) columns; past nodes must be known from the newest on, unequal."""
    depth, nodes = past.shape[1], past.unbind(1)
    count = formula.known.sum(1)
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
    single = [[torch.zeros_like(s0) for _ in range(depth + 1)] for _ in formula.single]
    for o in range(depth + 1):
        row = [led[o] / ahead] + [led[o] / ((x - s1) * d) for x, d in zip(nodes, divisors, strict=False)]
        there = formula.begun & (count >= o)
        summed = there & (formula.terms >= o)
        picked = [there & (which == o) for which in formula.single]
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

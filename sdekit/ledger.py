"""The standard error of fresh probes, from one probe.

A node's divergence enters log p with a total weight, the sum of its coefficients over the steps that used it. With v_j
and w_j = A_j' v_j of node j, D dimensions,

    Var[sum_j weight_j (v_j . w_j)] = sum_j weight_j^2 Var_j

    Rademacher   Var_j = 2 (|w - a v|^2 - d_j . d_{j +- 1}),   d = v * (w - a v),   a = mean of (v . w)/D at j +- 1
    Gaussian     Var_j = 2 |w|^2
    sphere       Var_j = 2 D/(D+2) (|w|^2 - (v . w)_j (v . w)_{j +- 1} / D)

j +- 1 stands for the mean over the neighbouring nodes, whose probes are independent: d_j . d_{j+1} is then unbiased
for the squared diagonal, which a probe cannot tell by itself. a takes out the multiple of the identity, which has no
variance but would ruin the estimate. For a nonsymmetric Jacobian |w|^2 is more than the variance needs: conservative.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._numbers import alike, at_least, cat, ones_like, real, square, where, zeros_like
from ._tensor import mean_over
from .divergence import Law


class Note(NamedTuple):
    """What is kept of the fresh probes of one node, K averaged: enough for the variance of v . w.

    Attributes:
        size: (B,) |w|^2.
        trace: (B,) (v . w) / D.
        mark: (B, D) v * w elementwise (Rademacher), an unbiased estimate of the Jacobian's diagonal.
    """

    size: Tensor
    trace: Tensor
    mark: Tensor


def note(probes: Tensor, products: Tensor) -> Note:
    """The `Note` of the value probes (K, B, D) and their products (B, K, D)."""
    marks = probes.transpose(0, 1) * products
    return Note(
        mean_over(products.square().sum(2, dtype=torch.float64), 1),
        mean_over(marks.sum(2, dtype=torch.float64), 1) / products.shape[2],
        mean_over(marks, 1),
    )


def lone_variance(entry: Note, law: Law, dim: int, probes: int) -> Tensor:
    """(B,) variance of the estimate of one node without neighbours, averaged over `probes` probes.

    (v . w)^2 is high by the variance asked for, so |w|^2 - (v . w)^2/D is low by that over D, which is made up for:
    exact on average for the sphere, a bound for Rademacher probes, whose squared diagonal nothing tells here.
    """
    if law == "gaussian":
        return 2.0 * entry.size / probes
    if dim == 1:  # a sign squared is 1: no variance
        return torch.zeros_like(entry.size)
    if law == "rademacher" and dim == 2:
        return 2.0 * entry.size / probes
    factor = 2.0 if law == "sphere" else 2.0 * dim / (dim - 2.0)
    return factor * (entry.size - dim * entry.trace.square()).clamp(min=0.0) / probes


class Ledger(NamedTuple):
    """The variance of sum_j weight_j (v_j . w_j), settled node by node as weights become final.

    Attributes (m open nodes, newest first):
        weight: (B, m) quadrature weight so far.
        size, trace: (B, m) of each open node's `Note`.
        link: (B, m) mark_j . mark_{j-1} with the node before it; 0 for the first node.
        mark: (B, D) of the newest node.
        last: (B,) trace of the node settled last.
        settled: (B,) how many nodes are settled.
        variance: (B,) of what is settled.
    """

    weight: Tensor
    size: Tensor
    trace: Tensor
    link: Tensor
    mark: Tensor
    last: Tensor
    settled: Tensor
    variance: Tensor


def open_ledger(batch: int, size: int, depth: int, dtype: torch.dtype, device: torch.device) -> Ledger:
    """An empty ledger for `batch` samples of `size` dimensions and `depth` open nodes."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    return Ledger(
        weight=zeros(batch, depth),
        size=zeros(batch, depth),
        trace=zeros(batch, depth),
        link=zeros(batch, depth),
        mark=torch.zeros(batch, size, dtype=dtype, device=device),
        last=zeros(batch),
        settled=torch.zeros(batch, dtype=torch.int64, device=device),
        variance=zeros(batch),
    )


class _Neighbour(NamedTuple):
    """The node before or after: present (0 or 1), its trace, its link with the node asked about; each (B,)."""

    present: Tensor
    trace: Tensor
    link: Tensor


def _node_variance(
    law: Law, dim: int, probes: int, size: Tensor, trace: Tensor, before: _Neighbour, after: _Neighbour
) -> Tensor:
    """Variance of one node's estimate from its own probe's size and trace, and its neighbours."""
    count = at_least(before.present + after.present, 1.0)
    around = (before.present * before.trace + after.present * after.trace) / count
    if law == "gaussian":
        variance = 2.0 * size
    elif dim == 1:  # a sign squared is 1, and so is the sphere's: no variance
        variance = zeros_like(size)
    elif law == "sphere":
        variance = 2.0 * dim / (dim + 2.0) * (size - dim * trace * around)
    else:
        # Without the multiple a of the identity, which has no variance, estimated by the neighbours alone.
        shift = dim * around * around
        length = size - 2.0 * dim * around * trace + shift
        diagonal = zeros_like(size)
        for near in (before, after):
            diagonal = diagonal + near.present * (near.link - dim * around * (trace + near.trace) + shift)
        variance = 2.0 * (length - diagonal / count)
    return variance / probes


def post(ledger: Ledger, entry: Note, weights: Tensor, count: Tensor, law: Law, probes: int) -> Ledger:
    """The ledger after a step: weights booked, the new node entered, the oldest node settled if m are open.

    Args:
        ledger: Before the step, with `count` (B,) nodes entered so far.
        entry: The new node's.
        weights: (B, m + 1) what this step adds to the weight of the new node, then of the open ones, newest first.
        count: (B,) int64.
        law: Of the probes.
        probes: How many a node's estimate averages.
    """
    depth, dim = ledger.weight.shape[1], ledger.mark.shape[1]
    link = alike((entry.mark * ledger.mark).sum(1, dtype=torch.float64), count) * (count > 0)
    weight = cat((weights[:, :1], ledger.weight + weights[:, 1:]), 1)
    size = cat((entry.size[:, None], ledger.size), 1)
    trace = cat((entry.trace[:, None], ledger.trace), 1)
    links = cat((link[:, None], ledger.link), 1)
    full = count >= depth
    before = _Neighbour(real(ledger.settled > 0), ledger.last, links[:, depth])
    after = _Neighbour(ones_like(link), trace[:, depth - 1], links[:, depth - 1])
    variance = _node_variance(law, dim, probes, size[:, depth], trace[:, depth], before, after)
    return Ledger(
        weight[:, :depth],
        size[:, :depth],
        trace[:, :depth],
        links[:, :depth],
        entry.mark,
        where(full, trace[:, depth], ledger.last),
        ledger.settled + full,
        ledger.variance + where(full, square(weight[:, depth]) * variance, 0.0),
    )


class Links(NamedTuple):
    """The newest node of many, open until the next one is known.

    Attributes:
        entry: Its `Note`, of leaves (B, ...).
        link: (B,) mark . mark of the node before it; 0 for the first node.
        before: (B,) trace of the node before it.
        many: Nodes so far.
    """

    entry: Note
    link: Tensor
    before: Tensor
    many: int


def settle_many(
    links: Links | None, entry: Note | None, weights: Tensor, law: Law, dim: int, probes: int
) -> tuple[Tensor, Links | None]:
    """The variances (n, B) of the nodes that became final, where all samples share weights known from the start.

    Args:
        links: The node left open before; None at the first call.
        entry: The nodes that follow, leaves (m, B, ...); None to close the last.
        weights: (m + 1,) of the open node, if there is one, and of those that follow.
        law: Of the probes.
        dim: D.
        probes: How many a node's estimate averages.
    """
    parts = [Note(*(part[None] for part in links.entry))] if links is not None else []
    parts += [entry] if entry is not None else []
    size, trace, mark = (torch.cat(part) for part in zip(*parts, strict=True))
    pairs = (mark[1:] * mark[:-1]).sum(2, dtype=torch.float64)
    none = torch.zeros_like(size[:1])
    link = torch.cat((none if links is None else links.link[None], pairs))
    elder = torch.cat((none if links is None else links.before[None], trace[:-1]))
    first, closing = 0 if links is None else links.many - 1, entry is None
    final = len(size) if closing else len(size) - 1
    there = torch.ones_like(size)
    before = _Neighbour(there if first else torch.cat((none, there[1:])), elder, link)
    after = _Neighbour(torch.cat((there[1:], none)), torch.cat((trace[1:], none)), torch.cat((link[1:], none)))
    variance = _node_variance(law, dim, probes, size, trace, before, after) * weights.square()[:, None]
    newest = Links(Note(size[-1], trace[-1], mark[-1]), link[-1], elder[-1], first + len(size))
    return variance[:final], None if closing else newest


def settle(ledger: Ledger, count: Tensor, law: Law, probes: int) -> Tensor:
    """(B,) the whole variance, the open nodes included, clamped at 0; `count` (B,) nodes were entered."""
    depth, dim = ledger.weight.shape[1], ledger.mark.shape[1]
    total, nothing = ledger.variance, torch.zeros_like(ledger.variance)
    for j in range(depth):
        elder = ledger.trace[:, j + 1] if j + 1 < depth else ledger.last
        before = _Neighbour((count > j + 1).double(), elder, ledger.link[:, j])
        newer = _Neighbour(torch.ones_like(nothing), ledger.trace[:, j - 1], ledger.link[:, j - 1])
        after = newer if j > 0 else _Neighbour(nothing, nothing, nothing)
        variance = _node_variance(law, dim, probes, ledger.size[:, j], ledger.trace[:, j], before, after)
        total = total + torch.where(count > j, ledger.weight[:, j].square() * variance, 0.0)
    return total.clamp(min=0.0)

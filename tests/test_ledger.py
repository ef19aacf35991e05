"""The standard error of fresh probes: settled node by node, as if the whole list were at hand, and honest."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import LAWS, draw, drawn, true_variance

import sdekit
from sdekit.ledger import Note, lone_variance, note, open_ledger, post, settle

NODES, DEPTH = 11, 4


def booked(law, probes, batch, jacobian_of, dim, seed=0, nodes=NODES):
    """A ledger after `nodes` nodes with fixed pseudo-random weights, and the list of all that went in."""
    weights = 0.3 * draw(99, nodes, DEPTH + 1)
    divergence = sdekit.Hutchinson(probes, law=law)
    ledger = open_ledger(batch, dim, DEPTH, torch.float64, torch.device("cpu"))
    entries, total = [], torch.zeros(nodes, dtype=torch.float64)
    for j in range(nodes):
        v = drawn(divergence, batch, dim, seed=seed, node=j)
        products = torch.einsum("ji,pbj->bpi", jacobian_of(j), v)
        given = weights[j].clone()
        given[1:][torch.arange(1, DEPTH + 1) > j] = 0.0  # weights of nodes that are not there
        for back in range(min(j, DEPTH) + 1):
            total[j - back] += given[back]
        entries.append((v, products))
        count = torch.full((batch,), j, dtype=torch.int64)
        ledger = post(ledger, note(v, products), given.expand(batch, -1), count, law, probes)
    return ledger, entries, total


def brute_force(law, probes, entries, total):
    """The module's formulas on the list of all nodes: weight^2 times each node's variance from its neighbours."""
    dim, nodes = entries[0][0].shape[2], len(entries)
    size = [products.square().sum(2).mean(1) for _, products in entries]
    mark = [(v.transpose(0, 1) * products).mean(1) for v, products in entries]
    trace = [m.sum(1) / dim for m in mark]
    variance = torch.zeros_like(size[0])
    for j in range(nodes):
        near = [i for i in (j - 1, j + 1) if 0 <= i < nodes]
        around = sum((trace[i] for i in near), torch.zeros_like(trace[j])) / max(1, len(near))
        if law == "gaussian":
            own = 2.0 * size[j]
        elif law == "sphere":
            own = 2.0 * dim / (dim + 2.0) * (size[j] - dim * trace[j] * around)
        else:
            # Take a v out of w, then subtract the squared diagonal as two probes see it.
            v, w = entries[j][0], entries[j][1].transpose(0, 1)
            length = (w - around[:, None] * v).square().sum(2)
            seen = [((mark[j] - around[:, None]) * (mark[i] - around[:, None])).sum(1) for i in near]
            own = 2.0 * (length.mean(0) - sum(seen, 0.0) / max(1, len(near)))
        variance = variance + total[j] ** 2 * own / probes
    return variance.clamp(min=0.0)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("nodes", [1, 2, 4, 5, 6, 11])
def test_settling_node_by_node_is_settling_the_list_of_all_nodes(law, probes, nodes):
    matrices = draw(5, nodes, 5, 5)
    ledger, entries, total = booked(law, probes, 6, lambda j: matrices[j], 5, nodes=nodes)
    count = torch.full((6,), nodes, dtype=torch.int64)
    found = settle(ledger, count, law, probes)
    torch.testing.assert_close(found, brute_force(law, probes, entries, total), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("probes", [1, 4])
def test_the_ledger_claims_what_the_probes_do(law, symmetric, probes):
    # A linear field: constant Jacobian, known weights. For a symmetric one the claim is unbiased (Rademacher: at most
    # 2/D of itself too large, from the multiple of the identity it takes out), for another it is that of |J|_F^2:
    # conservative. 20,000 draws, the mean claim beyond 5.5 standard errors: 4e-8 each.
    dim, batch = 8, 20_000
    a = draw(7, dim, dim) + 2.0 * torch.eye(dim, dtype=torch.float64)
    a = 0.5 * (a + a.T) if symmetric else a
    ledger, entries, total = booked(law, probes, batch, lambda j: a, dim)
    claimed = settle(ledger, torch.full((batch,), NODES, dtype=torch.int64), law, probes)
    error = 5.5 * float(claimed.std()) / math.sqrt(batch)
    weight = float(total.square().sum()) / probes
    true = weight * true_variance(law, a)
    excess = weight * 2.0 * (float(a.square().sum()) - float((0.5 * (a + a.T)).square().sum()))
    excess = excess * dim / (dim + 2.0) if law == "sphere" else excess
    slack = 2.0 * true / (dim * probes) if law == "rademacher" else 0.0
    assert true + excess - error < float(claimed.mean()) < true + excess + slack + error
    # And the sum itself has the variance that the weights say: sample variance within 6 of its standard errors.
    value = sum(w * (v.transpose(0, 1) * p).sum(2).mean(1) for w, (v, p) in zip(total, entries, strict=True))
    assert float(value.var()) == pytest.approx(true, rel=6.0 * math.sqrt(2.6 / batch))


def test_a_multiple_of_the_identity_has_no_variance_for_rademacher_and_sphere():
    for law in ("rademacher", "sphere"):
        ledger, _, _ = booked(law, 1, 50, lambda j: (1.0 + 0.0 * j) * torch.eye(6, dtype=torch.float64), 6)
        assert settle(ledger, torch.full((50,), NODES), law, 1).abs().max() < 1e-12


def test_a_note_keeps_size_trace_and_diagonal():
    v, a = drawn(sdekit.Hutchinson(2), 3, 4), draw(1, 4, 4)
    products = torch.einsum("ji,pbj->bpi", a, v)
    kept = note(v, products)
    assert isinstance(kept, Note)
    torch.testing.assert_close(kept.size, products.square().sum(2).mean(1))
    torch.testing.assert_close(4.0 * kept.trace, torch.einsum("pbi,ij,pbj->pb", v, a, v).mean(0))
    torch.testing.assert_close(kept.mark, (v.transpose(0, 1) * products).mean(1))


@pytest.mark.parametrize("law", LAWS)
def test_a_lone_node_bounds_its_own_variance(law):
    # 20,000 draws of one node: the mean claim beyond 5.5 standard errors, 4e-8. Gaussian: unbiased for a symmetric
    # Jacobian. The others take their own trace for the neighbours', E (v.w)^2/D = (tr^2 + Var)/D: low by 2/D at most.
    dim, batch = 8, 20_000
    a = draw(7, dim, dim) + torch.eye(dim, dtype=torch.float64)
    a = 0.5 * (a + a.T)
    v = drawn(sdekit.Hutchinson(law=law), batch, dim)
    claimed = lone_variance(note(v, torch.einsum("ji,pbj->bpi", a, v)), law, dim, 1)
    error, true = 5.5 * float(claimed.std()) / math.sqrt(batch), true_variance(law, a)
    if law == "gaussian":
        assert float(claimed.mean()) == pytest.approx(true, abs=error)
    else:
        assert float(claimed.mean()) > true * (1.0 - 2.0 / dim) - error

"""Runge-Kutta coefficients: every order condition, in exact arithmetic, up to the order claimed and no further."""

from __future__ import annotations

from fractions import Fraction as Q
from functools import cache
from math import prod

import pytest

from sdekit.solver import tableau as tables

TABLEAUS = {
    name: getattr(tables, name)
    for name in (
        *("EULER", "HEUN", "MIDPOINT", "RK4", "BOGACKI_SHAMPINE", "DORMAND_PRINCE_5"),
        *("TSITOURAS_5", "DORMAND_PRINCE_8"),
    )
}
every_tableau = pytest.mark.parametrize("tab", TABLEAUS.values(), ids=TABLEAUS.keys())


@cache
def forests(size, largest):
    """Multisets of rooted trees of `size` nodes in all, none above `largest` in the order of their making."""
    if size == 0:
        return [()]
    found = []
    for nodes in range(1, size + 1):
        for tree in trees(nodes):
            if (nodes, tree) <= largest:
                found += [(tree, *rest) for rest in forests(size - nodes, (nodes, tree))]
    return found


@cache
def trees(size):
    """Rooted trees of `size` nodes: a tree is the sorted tuple of the trees at its root."""
    if size == 1:
        return [()]
    ceiling = (size, ((((),),),) * size)
    return sorted({tuple(sorted(forest)) for forest in forests(size - 1, ceiling)})


@cache
def order(tree):
    return 1 + sum(order(child) for child in tree)


@cache
def density(tree):
    return order(tree) * prod(density(child) for child in tree)


def stage_weights(tab, tree, known):
    """Butcher's elementary weights of the stages: products over the children of sum_j a_ij weight_j(child)."""
    if tree not in known:
        inner = [stage_weights(tab, child, known) for child in tree]
        known[tree] = [
            prod((sum((Q(a) * w for a, w in zip(row, child, strict=False)), Q(0)) for child in inner), start=Q(1))
            for row in tab.a
        ]
    return known[tree]


def residuals(tab, weights, size):
    known = {}
    for tree in trees(size):
        phi = stage_weights(tab, tree, known)
        yield sum((Q(b) * p for b, p in zip(weights, phi, strict=True)), Q(0)) - Q(1, density(tree))


def allowed(tab):
    """Rational methods are exact; published decimals leave their rounding, times the size of the coefficients."""
    return 0 if all(isinstance(b, Q) for b in tab.b) else Q(1, 10**13)


def test_there_are_as_many_trees_as_there_should_be():
    assert [len(trees(size)) for size in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@every_tableau
def test_every_order_condition_holds_up_to_the_claimed_order(tab):
    for size in range(1, tab.order + 1):
        assert max(abs(residual) for residual in residuals(tab, tab.b, size)) <= allowed(tab)


@every_tableau
def test_the_order_is_not_higher_than_claimed(tab):
    assert max(abs(residual) for residual in residuals(tab, tab.b, tab.order + 1)) > Q(1, 10**6)


@every_tableau
def test_the_embedded_weights_have_the_order_of_the_error_estimate(tab):
    if tab.b_hat is None:
        assert tab.error_order is None
        return
    for size in range(1, tab.error_order + 1):
        assert max(abs(residual) for residual in residuals(tab, tab.b_hat, size)) <= allowed(tab)
    assert max(abs(residual) for residual in residuals(tab, tab.b_hat, tab.error_order + 1)) > Q(1, 10**6)
    assert tab.error_order < tab.order


@every_tableau
def test_rows_sum_to_their_stage_times(tab):
    assert len(tab.a) == len(tab.b) == len(tab.c) == tab.stages
    for i, (row, c) in enumerate(zip(tab.a, tab.c, strict=True)):
        assert len(row) == i
        total = sum((Q(a) for a in row), Q(0))
        assert total == c if isinstance(c, Q) else abs(total - Q(c)) < Q(1, 10**14)
        assert 0 <= c <= 1


def test_the_methods_that_reuse_their_last_stage_are_those_of_the_books():
    reuse = {name for name, tab in TABLEAUS.items() if tab.first_same_as_last}
    assert reuse == {"BOGACKI_SHAMPINE", "DORMAND_PRINCE_5", "TSITOURAS_5"}

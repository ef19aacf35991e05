"""Variable-step Adams predictor-corrector: one evaluation a step, each sample on its own nodes.

With the last nodes s_0, s_-1, .. (newest first), their slopes f, and Newton's divided differences on the true, unequal
nodes,

    predict   z_p = z + sum_{o<m}  I_o f[s_0 .. s_-o]          Adams-Bashforth of order m
    evaluate  f_n = F(s_1, z_p)
    correct   z_c = z + sum_{o<=m} I'_o f[s_1, s_0 .. s_-o+1]  Adams-Moulton of order m + 1
    error     e   = I'_m f[s_1, s_0 .. s_-m+1]                 its last term: the error of the order-m corrector

I_o is the integral over the step of prod_{i<o} (x - node_i) (newton.py). The slope kept is that at the
*predicted* point: evaluating again costs 60-70% more for nothing. m ramps 1, 2, .. up to the order as nodes come in.

Each node's slope enters the result with a total weight, the sum of its coefficients over the steps that used it; where
probes are fresh a ledger books these weights, and the standard error of the log determinant follows from one probe.

An adaptive method chooses m sample by sample (`Choice`): where the path is smooth Newton's terms shrink quickly, and
longer formulas take longer steps; next to a separatrix they do not shrink at all, since steps are bound by stability,
of which shorter formulas have more. Single terms are small by chance, so what decides is a running mean of the
logarithm of their ratio. Where stability binds the steps the slope at the predicted point, which is kept, is itself
the error, and no difference of such slopes sees it: there what the corrector changed is taken for a part of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._numbers import alike, at_least, between, cat, isnan, log, maximum, minimum, on_host, where, whole
from .._tensor import column, rounds_products, select, tensor, tree_map
from ..brownian import BrownianPath
from ..divergence import Hutchinson
from ..ledger import Ledger, open_ledger, post, settle
from ..likelihood_flow import LikelihoodFlow
from ..terms import Aux, Term
from .base import Proposal, Solver, batch_of, counters, refuse_noise
from .newton import MOST_NODES, Formula, by_columns, stacked
from .start import CORRECTED, Start, filled, instead, shares

_FIRST, _LEAST = 4, 2  # terms of an adaptive method: so many when it is settled, and at least
_KEPT = 0.8  # of a running mean, at each step
_MOST = 3.0  # of one step's log ratio
_ROUNDING = 1e-12  # what a term costs that is nothing but rounding, which depends on the size of the batch
_LONGER = -1.0  # the formula grows where the next term is smaller than its last by e^-1, and shrinks where it grows
_UNSEEN, _SHORT = 0.2, 3  # where formulas are so short, such a share of what the corrector changed is an error too
_ANEW = -2.0  # where the mean that may shorten it begins, after every change


class Choice(NamedTuple):
    """How many terms each sample's formula has: an adaptive method's running means, begun anew after a change.

    Attributes:
        terms: (B,) int64 m, of the predictor; the corrector has one more.
        last: (B,) float64 of log(I'_m / I'_m-1), what the terms cost: above 0 the formula is too long.
        following: (B,) float64 of log(I'_m+1 / I'_m): far below 0 it is too short.
    """

    terms: Tensor
    last: Tensor
    following: Tensor


def begin_choice(count: Tensor) -> Choice:
    """The choice before the first step."""
    none = torch.zeros_like(count, dtype=torch.float64)
    return Choice(torch.full_like(count, _FIRST), none + _ANEW, none)


def choose(choice: Choice, entered: Tensor, most: int, costs: Tensor) -> Choice:
    """The choice after a step.

    Args:
        choice: Of the step.
        entered: (B,) int64 nodes known before it.
        most: How many terms there are at most.
        costs: (B, 3) float64 >= 0, what the terms m - 1, m and m + 1 of Newton's sum cost; the last counts only where
            so many nodes are known.
    """
    sizes = log(at_least(costs, _ROUNDING))
    ratios = sizes[:, 1:] - sizes[:, :-1]
    ratios = between(where(isnan(ratios), _MOST, ratios), -_MOST, _MOST)
    last = _KEPT * choice.last + (1.0 - _KEPT) * ratios[:, 0]
    following = _KEPT * choice.following + (1.0 - _KEPT) * ratios[:, 1]
    settled = entered >= _FIRST
    shorter = settled & (choice.terms > _LEAST) & (last > 0.0)
    longer = settled & ~shorter & (choice.terms < most) & (entered > choice.terms) & (following < _LONGER)
    stays = settled & ~shorter & ~longer
    return Choice(
        choice.terms + whole(longer) - whole(shorter),
        where(stays, last, _ANEW),
        where(stays, following, where(longer, 0.0, 1.0)),
    )


class Memory(NamedTuple):
    """The history of each sample.

    Attributes:
        entered: (B,) int64 nodes entered so far.
        nodes: (B, m) float64 the last nodes, newest first.
        slopes: A tree like the state with leaves (B, m, ...): the slopes there.
        ledger: Of fresh probes, else None.
        choice: Of an adaptive method, else None.
    """

    entered: Tensor
    nodes: Tensor
    slopes: Any
    ledger: Ledger | None
    choice: Choice | None = None


@dataclass(frozen=True)
class Adams(Solver):
    """Adams-Moulton of order `order` correcting, Adams-Bashforth of one order less predicting, variable steps.

    Args:
        order: Of the solution, 2 to 7; it remembers order - 1 nodes. With 5 it is an "Adams 4(5)".
        start: "ramp": the order ramps up from 2 as nodes come in, without an evaluation more: for controlled steps,
            which begin short; on a fixed grid the whole is then of order 3 at most. "inside": orders 4 and 5 begin
            inside of the first step (2 and 5 evaluations more) and keep their order on a fixed grid; not with fresh
            probes.
        adaptive: Each sample chooses its order, 3 up to `order`, as it goes; `order` is then 5 at least. For controlled
            steps only. The likelihood's default has 7 for its highest, 5 with fresh probes.
        columns: The same numbers by many small operations, which a compiler fuses: what `runtime="compile"` chooses.
            Slow otherwise; not with start="inside".
    """

    order: int = 5
    start: Literal["ramp", "inside"] = "ramp"
    adaptive: bool = False
    columns: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.start not in ("ramp", "inside"):
            raise ValueError(f"start={self.start!r}; 'ramp' or 'inside' is needed.")
        if self.start == "inside" and self.order > max(CORRECTED) + 1:
            raise ValueError(f"order={self.order!r} with start='inside'; at most {max(CORRECTED) + 1} is possible.")
        if isinstance(self.order, bool) or not isinstance(self.order, int) or not 2 <= self.order <= MOST_NODES:
            raise ValueError(f"order={self.order!r}; an int from 2 to {MOST_NODES} is needed.")
        if self.adaptive and (self.start == "inside" or self.order <= _FIRST):
            raise ValueError(
                f"order={self.order!r}, start={self.start!r}, adaptive=True; an adaptive order ramps up, "
                f"and its highest is {_FIRST + 1} at least."
            )
        if self.columns and self.start == "inside":
            raise ValueError("columns=True with start='inside', whose nodes may coincide; leave columns out.")

    @property
    def linear(self) -> bool:
        return not self.adaptive

    @property
    def needs_control(self) -> bool:
        return self.adaptive

    @property
    def error_order(self) -> int:
        return self.order - 1

    @property
    def evaluations(self) -> int:
        return 1

    @property
    def weighs_nodes(self) -> bool:
        return True

    def for_compiler(self) -> Adams:
        return self if self.start == "inside" else replace(self, columns=True)

    def init(self, term: Term, z: Any) -> Memory:
        refuse_noise(self, term)
        leaf, count = batch_of(z), counters(z)
        nodes = torch.zeros(leaf.shape[0], self.error_order, dtype=torch.float64, device=leaf.device)
        slopes = tree_map(lambda part: part.new_zeros((part.shape[0], self.error_order, *part.shape[1:])), z)
        ledger = None
        if isinstance(term, LikelihoodFlow) and term.fresh:
            if self.start == "inside":
                raise ValueError("start='inside' with fresh probes; pass Hutchinson(fresh=False), or start='ramp'.")
            ledger = open_ledger(leaf.shape[0], leaf.shape[1], self.error_order, leaf.dtype, leaf.device)
        return Memory(count, nodes, slopes, ledger, begin_choice(count) if self.adaptive else None)

    def ready(self, memory: Memory) -> Tensor:
        return memory.entered >= len(self._beginning)

    @property
    def _beginning(self) -> Start:
        return CORRECTED[self.error_order if self.start == "inside" else 1]

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Any, memory: Memory, path: BrownianPath | None
    ) -> Proposal:
        start, depth = self._beginning, self.error_order
        begun = memory.entered >= len(start)
        s1 = where(begun, s1, s0 if len(start) == 1 else s0 + shares(start, memory.entered) * (s1 - s0))
        known = filled(start, memory.entered, depth)
        terms = known if memory.choice is None else minimum(known, memory.choice.terms)
        weigh = by_columns if self.columns else stacked
        formula = Formula(known, terms, memory.choice is not None, begun)
        predict, correct = weigh(memory.nodes, formula, s0, s1)
        summed = _by_columns if self.columns else _weighted
        predicted = tree_map(lambda state, past: state + summed(predict[:, None], past)[:, 0], z, memory.slopes)
        fresh, aux = term.evaluate(s1, predicted, memory.entered)
        nodes = cat((s1[:, None], memory.nodes), 1)
        slopes = tree_map(_entered, fresh, memory.slopes)
        sums = tree_map(lambda past: summed(correct, past), slopes)
        moved = select(begun, tree_map(lambda state, total: state + total[:, 0], z, sums), z)
        place = 1 if memory.choice is None else 2  # of term m
        error = tree_map(lambda total: total[:, place], sums)
        entered = tree_map(lambda past: past[:, :depth], (nodes, slopes))
        for turn, (_, at, overwrite) in enumerate(start):
            if overwrite:
                now = memory.entered == turn
                put = tree_map(lambda past, entry, k=at: instead(past, k, entry), memory.slopes, fresh)
                entered = select(now, (instead(memory.nodes, at, s1), put), entered)
        ledger, choice = self._book(term, memory, aux.note, correct[:, 0]), memory.choice
        if choice is None:
            kept = Memory(memory.entered + 1, *entered, ledger)
            return Proposal(moved, error, aux, kept, memory.entered >= depth)
        costs = _costs(term, tree_map(lambda total: total[:, 1:], sums), aux, s1)
        cost = None
        if term.has_density:
            corrected = term.nats(tree_map(lambda new, old: new - old, moved, predicted), aux)
            cost = maximum(costs[:, 1], _UNSEEN * corrected * (choice.terms <= _SHORT))
        kept = Memory(memory.entered + 1, *entered, ledger, choose(choice, memory.entered, depth, costs))
        return Proposal(moved, error, aux, kept, memory.entered >= _FIRST, at_least(terms, 1), cost)

    def _book(self, term: Term, memory: Memory, note: Any, weights: Tensor) -> Ledger | None:
        if memory.ledger is None or note is None or not isinstance(term, LikelihoodFlow):
            return memory.ledger
        assert isinstance(term.divergence, Hutchinson)  # only fresh probes have notes
        return post(memory.ledger, note, weights, memory.entered, term.divergence.law, term.divergence.probes)

    def probe_variance(self, term: LikelihoodFlow, memory: Memory) -> Tensor:
        """(B,) float64 variance of the value that the fresh probes of a finished solve left in the log determinant.

        Raises:
            ValueError: The probes were not fresh.
        """
        if memory.ledger is None or not isinstance(term.divergence, Hutchinson):
            raise ValueError("this solve had no fresh probes, so it kept no ledger of their variance.")
        return settle(memory.ledger, memory.entered, term.divergence.law, term.divergence.probes)


def _costs(term: Term, errors: Any, aux: Aux, like: Tensor) -> Tensor:
    """(B, K) what errors (B, K, ..) cost, in nats or in the state's norm; numbers as `like` are."""
    if term.has_density:
        return term.nats(errors, aux)
    rows = batch_of(errors).shape[:2]
    watched = term.watched(tree_map(lambda part: part.reshape(rows[0] * rows[1], *part.shape[2:]), errors))
    return alike(watched.square().sum(1, dtype=torch.float64).sqrt().reshape(rows), like)


def _entered(rate: Tensor, past: Tensor) -> Tensor:
    """The history (B, K, ...) with the newest slope before it."""
    return cat((rate[:, None] if on_host(rate) else rate.to(past.dtype)[:, None], past), 1)


def _weighted(weights: Tensor, past: Tensor) -> Tensor:
    """N sums over the history axis at once, in its dtype: weights (B, N, K), (B, K, ...) -> (B, N, ...).

    Up to K = 7, and there is no more, the bits of a batched product on a CPU depend on no other sample; from 8 on they
    do.
    """
    if on_host(past):
        return weights @ past
    if rounds_products(past):
        return _by_columns(weights, past)
    sums = torch.bmm(tensor(weights, past.dtype), past.flatten(2))
    return sums.reshape(*weights.shape[:2], *past.shape[2:])


def _by_columns(weights: Tensor, past: Tensor) -> Tensor:
    """What `_weighted` returns, as sums over columns."""
    rows = []
    for row in tensor(weights, past.dtype).unbind(1):
        total = torch.zeros_like(past[:, 0])
        for k, weight in enumerate(row.unbind(1)):
            total = total + column(weight, total) * past[:, k]
        rows.append(total)
    return torch.stack(rows, 1)

"""What is booked of a density on a fixed grid beside its path: traces, error estimates, rounding, probes' variance.

Nothing of it acts on the path (grid_density.py), so it is done for several nodes at once: for as many as make
operations large, so that it costs little for few samples and takes no more memory for many nodes. Costs, rounding and
variances are those of likelihood_flow.py and ledger.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._interrupt import finish_step
from ._tensor import added, flatten, mean_over, there
from .divergence import Hutchinson
from .errors import NetworkError
from .grid_behind import Behind, Shown
from .ledger import Links, Note, settle_many
from .likelihood_flow import FlowState, LikelihoodFlow
from .terms import Aux

_BLOCK = 1 << 16  # numbers that are booked at once


class Numbers(NamedTuple):
    """Coefficients at the n + 1 nodes, of lists by node, all float64; depth K.

    Attributes:
        labels: Of the network's calls.
        scale: What the network sees of u: seen = scale u.
        tilt: kept = out + tilt seen.
        gradient: (n + 1, 2) of the log density in u: of seen, and of kept.
        jacobian, shift: The divergence is jacobian times the network's trace in what it sees, plus shift.
        chain: (n + 1, K + 1) of kept_k-1-i in seen_k, beside scale_k / scale_k-1 times seen_k-1.
        move: (n + 1, K + 1) of kept_k-i in u_k, beside the predicted u_k.
        correct: (n + 1, K + 1) of node k-i in a step's gain.
        error: (n + 1, K + 1) of node k-i in its error.
        missed: (n + 1, K + 1) of kept_k-i in its error, in u.
        weight: (n + 1,) of node k in the gain of all steps.
    """

    labels: tuple[float, ...]
    scale: Tensor
    tilt: list[float]
    gradient: Tensor
    jacobian: Tensor
    shift: Tensor
    chain: list[list[float]]
    move: Tensor
    correct: Tensor
    error: Tensor
    missed: Tensor
    weight: Tensor


class Books:
    """What is booked beside the path, for blocks of nodes.

    Attributes:
        indicated: (B,) nats that the error estimates add up to.
    """

    def __init__(self, term: LikelihoodFlow, depth: int, numbers: Numbers, z: FlowState) -> None:
        self.term, self.depth, self.numbers, self.first = term, depth, numbers, z
        device = z.u.device
        self.by_node = [there(part, device) for part in (numbers.gradient, numbers.jacobian, numbers.shift)]
        sums = (numbers.move, numbers.missed, numbers.correct, numbers.error)
        self.by_step = [there(part, device) for part in sums]
        self.weight, self.scale = there(numbers.weight, device), there(numbers.scale, device)
        none = torch.zeros_like(z.log_det[:, :1])[:, 0]
        self.indicated, self.rounded, self.variance = none, none.new_zeros(len(none), 2), none
        self.log_det, self.product = z.log_det, z.product
        self.links: Links | None = None
        self.seen: list[Tensor] = []  # (B, *event) of the last node before the block
        self.kept: list[Tensor] = []  # of the depth + 1 nodes before the block, at most
        self.open: list[tuple[Tensor, Tensor, Tensor | Shown]] = []  # of the block: seen, kept, answers
        self.rates: Tensor | None = None  # (depth, B, C) divergences of the nodes before the block
        self.entered = 0
        self.block = max(1, _BLOCK // (z.u.numel() * max(1, term.channels)))
        self.drawn: list[Tensor] = []
        self.behind: Behind | None = None

    def ask_behind(self) -> None:
        """Has products asked for behind the path, for the nodes of a block at once."""
        self.behind = Behind(self.term, self.first.u.shape[0])
        self.block = min(self.block, self.behind.block)

    def probes(self, k: int) -> Tensor:
        """(P, B, D) the probes of node k; fresh ones are drawn for a block at a time."""
        divergence, keys, u = self.term.divergence, self.term.keys, self.first.u
        assert isinstance(divergence, Hutchinson)
        if not divergence.fresh:
            if not self.drawn:
                self.drawn = [divergence.draw(keys, torch.zeros_like(keys[:, 0]), u.shape[1], u.dtype)]
            return self.drawn[0]
        place = k - self.entered
        if place == len(self.drawn):
            many = min(self.block, len(self.numbers.labels) - k)
            number = torch.arange(k, k + many, device=keys.device).repeat_interleave(len(keys))
            drawn = divergence.draw(keys.repeat(many, 1), number, u.shape[1], u.dtype)
            self.drawn = [*self.drawn, *drawn.reshape(len(drawn), many, *u.shape).unbind(1)]
        return self.drawn[place]

    def enter(self, seen: Tensor, kept: Tensor, answer: Tensor | Shown) -> None:
        """One more node, with its answer or what is to be asked for it behind the path."""
        if isinstance(answer, Tensor) and self.block > 1:  # a backward pass may answer in the same buffer each time
            answer = answer.clone()
        self.open.append((seen, kept, answer))
        if len(self.open) >= self.block:
            self.settle()

    @property
    def last_of_block(self) -> bool:
        """Whether the next node fills the block, or is the last of all."""
        return len(self.open) + 1 >= self.block or self.count + 1 == len(self.numbers.labels)

    def settle(self) -> None:
        """Books the nodes that are open; an interrupt finds all of it or none.

        Raises:
            NetworkError: The network's, asked for what they wait for; the nodes before are booked, the others lost.
        """
        error = None
        with finish_step() as asked:
            if self.behind is not None:
                error = self._ask_waiting(self.behind)
            if self.open:
                self._book()
        if error is not None:
            raise error
        if asked():
            raise KeyboardInterrupt

    @property
    def count(self) -> int:
        """Nodes so far."""
        return self.entered + len(self.open)

    def close(self) -> tuple[FlowState, Tensor, Tensor | None]:
        """The state after the last node that was booked, rounding (B, 2) and the variance of fresh probes, if any."""
        u, last = self.first.u, self.entered - 1
        if last >= 0:
            u = flatten(self.seen[-1] * (1.0 / float(self.numbers.scale[last])))
            for weight, past in zip(self.numbers.move[last].tolist(), reversed(self.kept), strict=False):
                u.add_(flatten(past), alpha=weight)
        variance = None
        if self.term.fresh:
            assert isinstance(self.term.divergence, Hutchinson)
            law, probes = self.term.divergence.law, self.term.divergence.probes
            variance = self.variance
            if self.links is not None:
                weight = self.weight[last : last + 1]
                variance = added(variance, settle_many(self.links, None, weight, law, u.shape[1], probes)[0])
            variance = variance.clamp(min=0.0)  # as `settle` does
        return FlowState(u, self.log_det, self.product), self.rounded, variance

    def _book(self) -> None:
        """Books the nodes of the block."""
        first, last = self.entered, self.count
        seen, kept = [node[0] for node in self.open], [node[1] for node in self.open]
        answers = [node[2] for node in self.open if isinstance(node[2], Tensor)]  # all of them: none waits any more
        self.seen, self.kept = self.seen + seen, self.kept + kept
        traces = self._traced(answers, first, last)
        _, jacobian, shift = (part[first:last] for part in self.by_node)
        rates = traces * jacobian[:, None, None] + shift[:, None, None]  # (m, B, C)
        width = self.depth + 1
        before = rates.new_zeros(self.depth, *rates.shape[1:]) if self.rates is None else self.rates
        rates = torch.cat((before, rates))
        gained, off = (_sums(rates, part[first:last], width) for part in self.by_step[2:])
        self.log_det = added(self.log_det, gained)
        self._cost(first, last, gained, off)
        self.rates, self.entered = rates[-self.depth :], last
        self.seen, self.kept, self.open = self.seen[-1:], self.kept[-width:], []
        if self.term.fresh:
            self.drawn = []

    def _ask_waiting(self, behind: Behind) -> NetworkError | None:
        """Asks for what nodes of the block wait for; of those after an error nothing stays open."""
        ready = [node for node in self.open if isinstance(node[2], Tensor)]
        waiting = [node[2] for node in self.open[len(ready) :] if isinstance(node[2], Shown)]
        if not waiting:
            return None
        found, error = behind.answers(waiting)
        self.open = ready + [(node.seen, node.slope, answer) for node, answer in zip(waiting, found, strict=False)]
        return error

    def _traced(self, given: list[Tensor], first: int, last: int) -> Tensor:
        """(m, B, C) float64 traces in what the network sees; books products and the probes' variance."""
        divergence, count = self.term.divergence, last - first
        answers = torch.stack(given) if count > 1 else given[0][None]
        if not isinstance(divergence, Hutchinson):
            return answers
        products = answers.flatten(3)  # (m, P, B, D)
        probes = torch.stack(self.drawn[:count]) if divergence.fresh else self.drawn[0][None]
        marks = probes * products
        traces = marks.sum(3, dtype=torch.float64).transpose(1, 2)
        jacobian = self.by_node[1][first:last]
        if self.product is not None:
            weight = (self.numbers.weight * self.numbers.jacobian)[first:last].tolist()
            for each, part in zip(weight, products[:, 0], strict=True):
                self.product = torch.add(self.product, part, alpha=each)
        values = divergence.probes
        if divergence.fresh:
            self._link(products[:, :values], marks[:, :values], traces[..., :values], jacobian, first)
        if divergence.control:
            traces = torch.cat((traces[..., :values], mean_over(traces[..., values:], 2)[..., None]), 2)
        return traces

    def _link(self, products: Tensor, marks: Tensor, traces: Tensor, jacobian: Tensor, first: int) -> None:
        """Books the variance of the fresh probes of a block: (m, K, B, D) products, and marks; (m, B, K) traces."""
        divergence, count, size = self.term.divergence, len(products), products.shape[3]
        assert isinstance(divergence, Hutchinson)
        entry = Note(
            mean_over(products.square().sum(3, dtype=torch.float64), 1) * jacobian.square()[:, None],
            mean_over(traces, 2) * jacobian[:, None] / size,
            mean_over(marks, 1) * jacobian.to(marks.dtype)[:, None, None],
        )
        weight = self.weight[max(0, first - 1) : first + count]
        more, self.links = settle_many(self.links, entry, weight, divergence.law, size, divergence.probes)
        self.variance = added(self.variance, more)

    def _cost(self, first: int, last: int, gained: Tensor, off: Tensor) -> None:
        """Books the error estimates and the rounding of the steps that end at the nodes of a block."""
        skip = int(first == 0)  # the first node is evaluated in place
        if last - first == skip:
            return
        term, width = self.term, self.depth + 1
        steps = slice(first + skip, last)
        count, batch = last - first - skip, self.first.u.shape[0]
        seen = _rows(self.seen[-(count + 1) :])  # from the node before the first step's end on
        missing = count + width - len(self.kept)
        kept = _rows([torch.zeros_like(self.kept[0])] * missing + self.kept[-(count + width) :])
        gradient = self.by_node[0][steps].to(seen.dtype)
        steep = gradient[:, 0, None, None] * seen[1:] + gradient[:, 1, None, None] * kept[-count:]
        error = _sums(kept, self.by_step[1][steps], width)
        before = slice(first + skip - 1, last - 1)
        scale = (1.0 / self.scale[before]).to(seen.dtype)
        state = scale[:, None, None] * seen[:-1] + _sums(kept[:-1], self.by_step[0][before], width)[-count:]
        aux = Aux(steep.flatten(0, 1), None)
        cost = term.nats(FlowState(error.flatten(0, 1), off[skip:].flatten(0, 1), None), aux)
        settled = torch.arange(first + skip, last, device=cost.device) >= self.depth
        shares = torch.where(settled, 1.0, 0.1).double()
        self.indicated = added(self.indicated, cost.reshape(count, batch) * shares[:, None])
        moved = gained[skip:].flatten(0, 1)
        here = FlowState(state.flatten(0, 1), torch.zeros_like(moved), None)
        lost = term.rounding(torch.zeros_like(cost), here, here._replace(log_det=moved), aux)
        self.rounded = added(self.rounded, lost.reshape(count, batch, 2))


def _rows(parts: list[Tensor]) -> Tensor:
    """(m, B, D) tensors (B, *event) one over the other."""
    return torch.stack(parts).flatten(2) if len(parts) > 1 else flatten(parts[0])[None]


def _sums(past: Tensor, weights: Tensor, width: int) -> Tensor:
    """(m, ...) for each of the last m rows: sum_i weights[row, i] of the row i before it, in the dtype of `past`.

    Args:
        past: (m + width - 1 or more, ...) the rows and those before them.
        weights: (m, width).
        width: How many of them a sum takes.
    """
    count, weights = len(weights), weights.to(past.dtype)
    total: Tensor | None = None
    for i in range(width):
        end = len(past) - i
        rows = past[end - count : end]
        weight = weights[:, i].reshape(-1, *(1,) * (past.dim() - 1))
        total = rows * weight if total is None else torch.addcmul(total, rows, weight)
    assert total is not None
    return total

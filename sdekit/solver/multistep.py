"""Explicit multistep methods on the exact linear part: one evaluation a step, past predictions reused.

Each step evaluates the prediction where it starts and integrates the polynomial through the last `depth` of them. A
method of order 3 or 4 cannot begin with a step of order 1: that step's error alone would be of order 2. So its first
advances stay in place and evaluate inside of the first step, each from what is known so far; the memory then holds
nodes at shares of the step as if they were past ones:

    depth 3   0, 1/2                    errors of the nodes  0, h^2             then a step with error h^3
    depth 4   0, 1/3, 2/3, 1/3 again                          0, h^2, h^3, h^3   then a step with error h^4

(the last of them is evaluated by the advance that makes the step), one and three evaluations more in all.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._tensor import column
from ..brownian import BrownianPath
from ..terms import NO_AUX, ProbabilityFlow, ReverseSDE, Term
from .base import Proposal, Solver, counters
from .semilinear import Form, Linear, Variable, combine, level_of, linear, predict, variable_of, weights

# Shares of the first step that are evaluated before it is made, and at which place of the history each is put; a place
# that is taken is overwritten, else what is there moves on.
Start = tuple[tuple[float, int, bool], ...]
STARTS: dict[int, Start] = {
    1: ((0.0, 0, False),),
    2: ((0.0, 0, False),),
    3: ((0.0, 0, False), (1 / 2, 0, False)),
    4: ((0.0, 0, False), (1 / 3, 0, False), (2 / 3, 0, False), (1 / 3, 1, True)),
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
    table = torch.tensor([share for share, _, _ in start] + [0.0], dtype=torch.float64, device=entered.device)
    return table[entered.clamp(max=len(start))]


def held(start: Start, entered: Tensor, depth: int) -> Tensor:
    """(B, depth) which places of the history are filled after `entered` evaluations."""
    counts, count = [0], 0
    for _, _, overwrite in start:
        count += not overwrite
        counts.append(count)
    table = torch.tensor(counts, device=entered.device)
    last = len(start)
    filled = table[entered.clamp(max=last)] + (entered - last).clamp(min=0)
    return torch.arange(depth, device=entered.device) < filled[:, None]


def enter(start: Start, history: History, node: Tensor, prediction: Tensor) -> History:
    """The history with one more prediction: in front, or at the place that the start gives it."""
    nodes = torch.cat((node[:, None], history.nodes[:, :-1]), 1)
    past = (prediction, *history.past[:-1])
    for turn, (_, place, overwrite) in enumerate(start):
        if not overwrite:
            continue
        now = history.entered == turn
        kept = history.nodes.clone()
        kept[:, place] = node
        nodes = torch.where(now[:, None], kept, nodes)
        rows = column(now, prediction).bool() if prediction.dim() > 1 else now
        instead = tuple(prediction if k == place else old for k, old in enumerate(history.past))
        past = tuple(torch.where(rows, a, b) for a, b in zip(instead, past, strict=True))
    return History(history.entered + 1, nodes, past)


@dataclass(frozen=True)
class Multistep(Solver):
    """An explicit multistep method; subclasses state `form`, `variable` and `depth`."""

    @property
    @abstractmethod
    def form(self) -> Form:
        """Which prediction is integrated."""

    @property
    def variable(self) -> Variable:
        """In which variable the polynomial is one."""
        return "half_log_snr"

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many predictions it passes through."""

    @property
    def start(self) -> Start:
        """How the history is begun."""
        return STARTS[self.depth]

    @property
    def order(self) -> int:
        return self.depth

    @property
    def error_order(self) -> None:
        return None

    @property
    def evaluations(self) -> int:
        return 1

    def init(self, term: Term, z: Tensor) -> History:
        require_flow(self, term)
        return empty(z, self.depth)

    def ready(self, memory: History) -> Tensor | None:
        return None if len(self.start) == 1 else memory.entered >= len(self.start) - 1

    def weigh(self, term: Term, step: Linear, history: History, valid: Tensor) -> Tensor:
        """(B, K) weights of the predictions in a step."""
        return weights(step, history.nodes, valid, variable_of(term.model.sde, self.variable))

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: History, path: BrownianPath | None
    ) -> Proposal:
        sde, t0, t1 = term.model.sde, term.time(s0), term.time(s1)
        step = linear(sde, self.form, t0, t1, level_of(term, t0, t1))
        x, t, node = z, t0, step.start
        if len(self.start) > 1:
            share = shares(self.start, memory.entered)
            node = torch.where(share > 0, step.start + share * step.length, step.start)
            t = torch.where(share > 0, sde.clamp(sde.time_at(node)), t0)
            part = linear(sde, self.form, t0, t, torch.zeros_like(t0))
            known = held(self.start, memory.entered, self.depth)
            each = weights(part, memory.nodes, known, variable_of(sde, self.variable))
            x = combine(part.keep, z, torch.where(share[:, None] > 0, each, 0.0), memory.past)
        history = enter(self.start, memory, node, predict(term, self.form, x, t))
        valid = held(self.start, history.entered, self.depth)
        moved = combine(step.keep, z, self.weigh(term, step, history, valid), history.past)
        if isinstance(term, ReverseSDE):
            moved = moved + column(step.noise, z) * unit_noise(self, path, s0, s1, memory.entered, z)
        ready = self.ready(memory)
        if ready is not None:
            moved = torch.where(column(ready.double(), z) > 0, moved, z)
        return Proposal(moved, None, NO_AUX, history, torch.ones_like(s0, dtype=torch.bool))


def require_flow(solver: Solver, term: Term) -> None:
    """Raises TypeError unless the term is a ProbabilityFlow."""
    if not isinstance(term, ProbabilityFlow):
        hint = " (its noise would be dropped; eta=0 is the flow)" if isinstance(term, ReverseSDE) else ""
        raise TypeError(f"{type(solver).__name__} integrates a ProbabilityFlow, not a {type(term).__name__}{hint}.")


def require_reverse(solver: Solver, term: Term) -> None:
    """Raises TypeError unless the term is a ReverseSDE."""
    if not isinstance(term, ReverseSDE):
        raise TypeError(f"{type(solver).__name__} integrates a ReverseSDE, not a {type(term).__name__}.")


def unit_noise(
    solver: Solver, path: BrownianPath | None, s0: Tensor, s1: Tensor, step: Tensor, like: Tensor, lane: int = 0
) -> Tensor:
    """Standard normals like `like` from the path's increment over the step; 0 where the step has no length."""
    if path is None:
        raise ValueError(
            f"path=None; {type(solver).__name__} needs a Brownian path, e.g. sdekit.IndependentIncrements."
        )
    length = (s1 - s0).abs().sqrt()
    scale = torch.where(length > 0, 1.0 / torch.where(length > 0, length, 1.0), 0.0)
    return column(scale, like) * path.increment(s0, s1, step, like, lane)

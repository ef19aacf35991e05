"""Who decides how far the next step goes and whether it counts, sample by sample.

    start(term, s0, s_end) -> state
    target(s, s_end, state) -> s1                                   ends exactly on s_end
    judge(term, solver, proposal, before, s_end, state) -> Verdict

`Nats` spends a budget of log density; `PID` (pid.py) holds the error of the state below a tolerance; `FixedGrid`
accepts whatever its grid gives. No sample's verdict looks at another sample, and nothing branches on a tensor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import require_count, require_positive
from ._numbers import (
    at_least,
    at_most,
    between,
    entry,
    exp,
    exp2,
    floor,
    isfinite,
    log2,
    power,
    real,
    sqrt,
    where,
)
from .solver.base import Proposal, Solver, estimated_order
from .terms import Term, in_all


class Step(NamedTuple):
    """A step proposed: s0, s1 (B,), the state z before it, and whether all of the state after it is finite (B,)."""

    s0: Tensor
    s1: Tensor
    z: Any
    finite: Tensor


class Verdict(NamedTuple):
    """(B,) accept; the controller's next state; (B,) failed: no step however small can help."""

    accept: Tensor
    state: Any
    failed: Tensor


def on_lattice(length: Tensor) -> Tensor:
    """The largest 2^(k/64) not above each `length` > 0.

    An error estimate is a small difference of large numbers: its rounding, which depends on how a kernel sums a batch
    of this size, is amplified a million times and would go into the step. Lengths on a lattice do not see it, so a
    sample takes the same steps in every batch. Costs half a percent of step.
    """
    return exp2(floor(64.0 * log2(length)) / 64.0)


class Controller(ABC):
    """Decides step sizes and acceptance, per sample."""

    @property
    def needs_error(self) -> bool:
        """Whether the solver must estimate its error."""
        return True

    @abstractmethod
    def start(self, term: Term, s0: Tensor, s_end: Tensor) -> Any:
        """The state at the start, a NamedTuple of (B, ...) tensors."""

    @abstractmethod
    def target(self, s: Tensor, s_end: Tensor, state: Any) -> Tensor:
        """(B,) where the next step is to end."""

    @abstractmethod
    def judge(self, term: Term, solver: Solver, proposal: Proposal, step: Step, s_end: Tensor, state: Any) -> Verdict:
        """Whether the step counts, and what follows."""

    def spent(self, state: Any) -> tuple[Tensor, Tensor] | None:
        """(B,) float64 nats: accumulated error estimate, and that of rounding; None for a controller without."""
        return None


class GridState(NamedTuple):
    """(B, n + 1 or more) nodes in the coordinate; (B,) int64 nodes reached; nats indicated; (B, 2) `Term.rounding`."""

    nodes: Tensor
    place: Tensor
    indicated: Tensor
    rounded: Tensor


@dataclass(frozen=True, eq=False)
class FixedGrid(Controller):
    """Steps through given times, every step accepted unless it is not finite.

    Args:
        times: (n + 1,) float64, strictly monotone; the first and last are where the solve starts and ends.

    Raises:
        ValueError: Fewer than two times, or not strictly monotone.
    """

    times: Tensor

    _ALIKE = 64  # the end is repeated up to a multiple of it: grids of similar length are then compiled once

    def __post_init__(self) -> None:
        times = self.times
        if not isinstance(times, Tensor) or times.dim() != 1 or times.shape[0] < 2:
            raise ValueError(
                f"times={times!r}; a tensor of shape (n + 1,), n >= 1, is needed, e.g. sdekit.grid.karras(sde, n)."
            )
        steps = times.double().diff()
        if not bool((steps > 0).all() | (steps < 0).all()):
            raise ValueError("times must be strictly monotone, finite, without repeated values.")

    @property
    def needs_error(self) -> bool:
        return False

    @property
    def numbers(self) -> tuple[float, ...]:
        """The times as numbers, read once as long as nobody writes into them."""
        times = self.times
        version = -1 if times.is_inference() else times._version
        read = self.__dict__.get("_read")
        if read is None or read[0] != version or version < 0:
            read = self.__dict__["_read"] = version, tuple(times.tolist())
        numbers: tuple[float, ...] = read[1]
        return numbers

    def start(self, term: Term, s0: Tensor, s_end: Tensor) -> GridState:
        grid = term.coordinate(self.times.to(device=s0.device, dtype=torch.float64))
        # A solve that starts inside of the grid (`t` with `nodes` in log_likelihood) shrinks it to what remains.
        share = (grid[1:-1] - grid[0]) / (grid[-1] - grid[0])
        inner = s0[:, None] + share * (s_end - s0)[:, None]
        nodes = torch.cat((s0[:, None], inner, s_end[:, None].expand(-1, 1 + -len(grid) % self._ALIKE)), 1)
        return GridState(nodes, torch.zeros_like(s0, dtype=torch.int64), torch.zeros_like(s0), s0.new_zeros(len(s0), 2))

    def target(self, s: Tensor, s_end: Tensor, state: GridState) -> Tensor:
        return entry(state.nodes, state.place + 1)

    def judge(
        self, term: Term, solver: Solver, proposal: Proposal, step: Step, s_end: Tensor, state: GridState
    ) -> Verdict:
        accept, indicated, rounded = step.finite, state.indicated, state.rounded
        if term.has_density and proposal.error is None:  # nobody knows
            indicated, rounded = indicated + math.nan, rounded + math.nan
        elif term.has_density:
            cost = term.nats(proposal.error, proposal.aux) * where(proposal.settled, 1.0, 0.1)
            indicated = indicated + where(accept, cost, 0.0)
            lost = term.rounding(step.s1 - step.s0, step.z, proposal.z, proposal.aux)
            rounded = rounded + where(accept[:, None], lost, 0.0)
        index = where(accept, at_most(state.place + 1, state.nodes.shape[1] - 2), state.place)
        return Verdict(accept, GridState(state.nodes, index, indicated, rounded), ~accept)

    def spent(self, state: GridState) -> tuple[Tensor, Tensor]:
        return state.indicated, in_all(state.rounded)


class NatsState(NamedTuple):
    """(B,) next step length; nats spent; int64 evaluations, rejected, beyond the cap; (B, 2) `Term.rounding` so far."""

    step: Tensor
    spent: Tensor
    calls: Tensor
    rejected: Tensor
    over: Tensor
    rounded: Tensor


@dataclass(frozen=True)
class Nats(Controller):
    """Steps such that the errors of all of them together cost at most `tolerance` nats of log density.

    A local error (e_u, e_l) costs d nats (likelihood_flow.py), about |gradient . e_u| + |e_l|: the error of log p
    telescopes into the sum over steps of V(new) + dl - V(old), V the log density of the state. Each step may spend what
    is left of the tolerance, scaled as the square root of its share of the way.

    Args:
        tolerance: Nats per sample, > 0.
        cap: Evaluations after which the demand on a rough path (16 steps rejected: kinks, rounding) is relaxed, by 4
            every 64, so that every solve ends. Costs then count three times (coarse steps over kinks are worse than
            they look), which marks most such samples LOOSE. A smooth path, which no step size but the right one gets
            through, has 8 times the cap: points between components of a 64-D mixture needed up to 3,300 by order 5
            (by orders that adapt 576 and 773 in the mean, at 1e-1 and 1e-3 nats).
        growth: A step is at most this times the one before it: what was resolved says little of twice the distance.
        ceiling: Largest step, in s: coarse tolerances would miss structure without it.
        doubt: Costs count 1 + min(1.5, doubt * tolerance) times: on coarse steps the estimate is low, by up to 2.3 on
            a learned noise network at 0.1 nats.
    """

    tolerance: float = 1e-2
    cap: int = 512
    growth: float = 1.5
    ceiling: float = 1.0 / 20.0
    doubt: float = 20.0

    _FLOOR = 1e-5  # smallest step, in s
    _MOST_DOUBT = 1.5
    _ROUGH = 16  # rejected steps; no smooth path measured had more than 7, one over kinks has hundreds
    _PATIENCE = 8  # how many times the cap a smooth path has
    _RELAX_EVERY = 64  # evaluations, beyond the cap
    _STEPS = 40.0  # steps among which the tolerance is shared
    _RAMP = 0.01  # how much of the low-order estimate counts while a multistep method starts up ...
    _RAMP_SPENT = 0.1  # ... and how much of it is booked

    def __post_init__(self) -> None:
        for name in ("tolerance", "ceiling"):
            require_positive(name, getattr(self, name))
        require_count("cap", self.cap)
        if not (self.growth > 1 and self.doubt >= 0):
            raise ValueError(f"growth={self.growth!r}, doubt={self.doubt!r}; growth > 1 and doubt >= 0 are needed.")

    def start(self, term: Term, s0: Tensor, s_end: Tensor) -> NatsState:
        first = min(1.0, (self.tolerance / 0.1) ** 0.25) / 80.0
        none = torch.zeros_like(s0, dtype=torch.int64)
        return NatsState(torch.full_like(s0, first), torch.zeros_like(s0), none, none, none, s0.new_zeros(len(s0), 2))

    def target(self, s: Tensor, s_end: Tensor, state: NatsState) -> Tensor:
        rest = s_end - s
        step = where(state.step > 0.5 * rest, 0.5 * rest, state.step)
        return where(state.step >= rest, s_end, s + step)

    def judge(
        self, term: Term, solver: Solver, proposal: Proposal, step: Step, s_end: Tensor, state: NatsState
    ) -> Verdict:
        length = step.s1 - step.s0
        calls = state.calls + solver.evaluations
        beyond = calls > where(state.rejected >= self._ROUGH, self.cap, self._PATIENCE * self.cap)
        over = state.over + solver.evaluations * beyond
        found = term.nats(proposal.error, proposal.aux) if proposal.cost is None else proposal.cost
        cost = found * (1.0 + min(self._MOST_DOUBT, self.doubt * self.tolerance))
        allowed = at_least(self.tolerance - state.spent, 0.1 * self.tolerance)
        share = at_most(length / (s_end - step.s0), 1.0)
        ratio = cost / (allowed * sqrt(share / self._STEPS))
        relaxed = exp(-math.log(4.0) * real(over // self._RELAX_EVERY))
        ratio = ratio * relaxed * where(proposal.settled, 1.0, self._RAMP)
        finite = isfinite(ratio) & step.finite
        at_floor = length <= 1.001 * self._FLOOR  # of s1 - s0, which is rounded
        accept = finite & ((ratio <= 2.0) | at_floor)
        exponent = -1.0 / (estimated_order(solver, proposal) + 0.5)
        factor = where(finite, 0.8 * power(ratio, exponent), 0.0)
        factor = where(accept, between(factor, 0.3, self.growth), between(factor, 0.1, 0.7))
        following = between(on_lattice(length * factor), self._FLOOR, self.ceiling)
        booked = cost * where(proposal.settled, 1.0, self._RAMP_SPENT) * where(beyond, 3.0, 1.0)
        spent = where(accept, state.spent + booked, state.spent)
        lost = term.rounding(length, step.z, proposal.z, proposal.aux)
        rounded = state.rounded + where(accept[:, None], lost, 0.0)
        state = NatsState(following, spent, calls, state.rejected + ~accept, over, rounded)
        return Verdict(accept, state, ~finite & at_floor)

    def spent(self, state: NatsState) -> tuple[Tensor, Tensor]:
        return state.spent, in_all(state.rounded)

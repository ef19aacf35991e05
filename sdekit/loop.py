"""The one loop's step: advance(carry) -> carry.

`advance` is pure: tensors in, tensors out (numbers may be arrays: _numbers.py), fixed shapes, no `.item()`, no branch
on a tensor. It proposes a step for every sample, judges each on its own, and commits by mask. Whoever repeats it
(driver.py) asks between steps who is finished; results do not depend on when, nor on who else is in the batch. So the
same step runs eagerly, compiled or captured in a graph (runtime.py), on samples that come and go.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._numbers import where
from ._tensor import all_finite, column, select
from .brownian import BrownianPath
from .controller import Controller, Nats, Step
from .solution import Status
from .solver.base import Solver, batch_of
from .terms import Term

_RUNNING = int(Status.RUNNING)  # numpy takes its time over a member of an enumeration


class Stray(NamedTuple):
    """What the control in nats cannot see while it steps (see _method.py), each (B, D).

    Attributes:
        drift: Sizes of the steps' errors of the state, added up coordinate by coordinate.
        slope: Gradient of the log density by the score, at the last node.
    """

    drift: Tensor
    slope: Tensor


class Carry(NamedTuple):
    """Everything that evolves, (B, ...) tensors; `stray` where a density is controlled in nats, else None."""

    s: Tensor
    z: Any
    memory: Any
    control: Any
    status: Tensor
    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor
    stray: Stray | None = None


class Problem(NamedTuple):
    """What stays: the equation, the method, the judge, where to end, the noise, the budget."""

    term: Term
    solver: Solver
    controller: Controller
    s_end: Tensor
    path: BrownianPath | None
    max_evaluations: int

    def take(self, rows: Tensor) -> Problem:
        """The problem of the samples `rows` only."""
        path = None if self.path is None else self.path.take(rows)
        return self._replace(term=self.term.take(rows), s_end=self.s_end[rows], path=path)


def begin(problem: Problem, s0: Tensor, z0: Any) -> Carry:
    """The carry at the start; samples that are not finite have failed already, those at the end have arrived."""
    status = torch.where(all_finite(z0), int(Status.RUNNING), int(Status.NOT_FINITE))
    status = torch.where((status == Status.RUNNING) & (s0 == problem.s_end), int(Status.DONE), status)
    if problem.solver.evaluations > problem.max_evaluations:  # not even the first advance is within the budget
        status = torch.where(status == Status.RUNNING, int(Status.BUDGET), status)
    none = torch.zeros_like(status)
    memory = problem.solver.init(problem.term, z0)
    control = problem.controller.start(problem.term, s0, problem.s_end)
    stray = None
    if problem.term.has_density and isinstance(problem.controller, Nats):
        stray = Stray(torch.zeros_like(batch_of(z0)), torch.zeros_like(batch_of(z0)))
    return Carry(s0, z0, memory, control, status, none, none, none, stray)


def still_running(carry: Carry) -> Tensor:
    """How many samples still run, a number on their device."""
    return (carry.status == _RUNNING).sum()


def advance(problem: Problem, carry: Carry) -> Carry:
    """One step for every running sample: propose, judge, commit by mask."""
    term, solver, controller, s_end, path, budget = problem
    running = carry.status == _RUNNING
    ready = solver.ready(carry.memory)
    s1 = where(running, controller.target(carry.s, s_end, carry.control), carry.s)
    proposal = solver.propose(term, carry.s, s1, carry.z, carry.memory, path)
    finite = all_finite(proposal.z)
    verdict = controller.judge(term, solver, proposal, Step(carry.s, s1, carry.z, finite), s_end, carry.control)
    accept, failed, judged, reached = verdict.accept, verdict.failed, running, s1
    if ready is not None:  # a start in place is not a step: nothing to judge but whether it is finite
        accept, failed = where(ready, accept, finite), where(ready, failed, ~finite)
        judged, reached = running & ready, where(ready, s1, carry.s)
    accept, failed = accept & running, failed & running
    evaluations = carry.evaluations + running * solver.evaluations
    status = where(accept & (reached == s_end), int(Status.DONE), carry.status)
    failure = where(finite, int(Status.STEP_FLOOR), int(Status.NOT_FINITE))
    status = where(failed, failure, status)
    spent = (status == _RUNNING) & (evaluations + solver.evaluations > budget)
    stray = carry.stray
    if stray is not None and (slope := proposal.aux.gradient) is not None:
        went = batch_of(proposal.error).abs()
        went = went * column(where(proposal.settled, 1.0, 0.1), went)
        stray = select(accept & judged, Stray(stray.drift + went, slope), stray)
    return Carry(
        where(accept, reached, carry.s),
        select(accept, proposal.z, carry.z),
        select(accept, proposal.memory, carry.memory),
        select(judged, verdict.state, carry.control),
        where(spent, int(Status.BUDGET), status),
        evaluations,
        carry.accepted + (accept & judged),
        carry.rejected + (judged & ~accept),
        stray,
    )

"""The derivative of a solve of the likelihood on a fixed grid, in memory that does not grow with its steps.

An advance maps w, the state (u, log det) and the slopes that the solver remembers, to the next one. With theta the
network's weights and a_i the derivative of the result with respect to w_i,

    w_{i+1} = S_i(w_i, theta),      a_i = (dS_i/dw)' a_{i+1},      da/dtheta = sum_i (dS_i/dtheta)' a_{i+1}.

This differentiates the number that was computed, to rounding: no second equation is solved, so nothing has to agree.
S_i holds the Jacobian of the network already, so the network is differentiated twice.

Of n advances 16 states w are kept. Backwards, what lies between two of them is halved until it is one advance: the
state in the middle is computed again, log2(n/16)/2 network calls an advance in all and log2(n/16) states at a time.
Then that advance is made once more, with its graph, pulled back and dropped. w is kept without its log det, which
enters linearly: its value does not matter, and the calls in between need no trace. The probes are keyed by their node:
made again, they are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import require_deterministic
from ._products import require_twice
from .errors import NetworkError
from .ledger import Ledger
from .likelihood_flow import FlowState, LikelihoodFlow
from .solver.base import Solver

_KEPT = 16  # few beside a network's graph, enough that 64 nodes cost one call more each
# How torch says that a kernel has no second derivative.
_ONLY_ONCE = ("is not implemented", "differentiate twice", "double backward")


class Course(NamedTuple):
    """A solve on a fixed grid: the equation, the method, and the (B, n + 1) nodes in the equation's coordinate."""

    term: LikelihoodFlow
    solver: Solver
    nodes: Tensor


class Stand(NamedTuple):
    """Where a solve stands: its state, the solver's memory, and the number of steps made."""

    z: Any
    memory: Any
    steps: int


def follow(course: Course, u: Tensor) -> FlowState:
    """The state at the last node, differentiable once in `u`, the network's parameters and its bound tensors.

    Args:
        course: What to solve.
        u: (B, D) the state at the first node.

    Raises:
        NetworkError: The network cannot be used; in the backward pass, it cannot be differentiated twice.
    """
    if any(type(part).__name__ == "DTensor" for part in course.term.model.parameters()):
        raise NetworkError(
            "the network's weights are spread over devices (DTensor), which are gone when a solve is run back: gather "
            "them first, or use DistributedDataParallel."
        )
    end, log_det = _Solve.apply(course, u, *_weights(course.term))  # type: ignore[no-untyped-call]
    return FlowState(end, log_det, None)


def _weights(term: LikelihoodFlow) -> list[Tensor]:
    """What the network's output depends on besides its input, where it requires a gradient."""
    bound = (value for value in term.model.bound.values() if isinstance(value, Tensor))
    every = {id(value): value for value in (*term.model.parameters(), *bound)}
    return [value for value in every.values() if value.requires_grad]


def _advance(course: Course, at: Stand) -> Stand:
    """One advance of the solver; one that fills its memory makes no step."""
    ready = course.solver.ready(at.memory)
    s0, s1 = course.nodes[:, at.steps], course.nodes[:, at.steps + 1]
    proposal = course.solver.propose(course.term, s0, s1, at.z, at.memory, None)
    return Stand(proposal.z, proposal.memory, at.steps + int(ready is None or bool(ready.all())))


def _rebuilt(tree: Any, change: Callable[[FlowState], FlowState]) -> Any:
    """`tree` with every state in it changed, and without the ledger, on which no state depends."""
    if isinstance(tree, FlowState):
        return change(tree)
    if isinstance(tree, Ledger):
        return None
    if isinstance(tree, tuple):
        parts = [_rebuilt(part, change) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def _states(tree: Any) -> Iterator[FlowState]:
    """Every state in `tree`: that of the solve, and the slopes that a solver keeps as states."""
    if isinstance(tree, FlowState):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from _states(part)


def _leaves(at: Stand) -> list[Tensor]:
    return [part for state in _states((at.z, at.memory)) for part in (state.u, state.log_det)]


def _bare(at: Stand) -> Stand:
    """`at` with its path alone."""
    return _rebuilt(at, lambda state: FlowState(state.u, state.log_det.new_zeros((*state.u.shape[:-1], 0)), None))  # type: ignore[no-any-return]


def _laden(at: Stand, term: LikelihoodFlow) -> Stand:
    """`at` with room for log det again, all of it ready to be differentiated by."""

    def change(state: FlowState) -> FlowState:
        log_det = state.log_det.new_zeros((*state.u.shape[:-1], term.channels))
        product = torch.zeros_like(state.u) if term.keeps_product else None
        return FlowState(state.u.detach().requires_grad_(), log_det.requires_grad_(), product)

    return _rebuilt(at, change)  # type: ignore[no-any-return]


class _Autocast(NamedTuple):
    """The autocast of a place, to be had again elsewhere."""

    device: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def here(cls, device: str) -> _Autocast:
        return cls(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def again(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, self.enabled)


class _Solve(torch.autograd.Function):
    """The solve with the derivative of this module: (u, weights) -> (u, log det) at the last node."""

    @staticmethod
    def forward(ctx: Any, course: Course, u: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        term, steps = course.term, course.nodes.shape[1] - 1
        log_det = torch.zeros(u.shape[0], term.channels, dtype=torch.float64, device=u.device)
        z = FlowState(u.detach(), log_det, torch.zeros_like(u) if term.keeps_product else None)
        at = Stand(z, course.solver.init(term, z), 0)
        every = -(-steps // _KEPT)
        kept: list[tuple[Stand, int]] = []  # states, and how many advances follow on each
        while at.steps < steps:
            if not kept or kept[-1][1] == every:
                kept.append((_bare(at), 0))
            at = _advance(course, at)
            kept[-1] = (kept[-1][0], kept[-1][1] + 1)
        ctx.course, ctx.kept = course, kept
        ctx.autocast = _Autocast.here(u.device.type)
        ctx.weights = weights  # by themselves: what torch saves may come back as copies
        ctx.save_for_backward(*weights, *term.model.parameters(), *term.model.buffers())
        return at.z.u, at.z.log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_u: Tensor, of_log_det: Tensor) -> tuple[Tensor | None, ...]:
        course: Course = ctx.course
        weights: tuple[Tensor, ...] = ctx.weights
        _ = ctx.saved_tensors  # raises if a parameter was written into: the network is called again
        require_deterministic(course.term.model)
        bare_term = LikelihoodFlow(course.term.model, None, course.term.event, course.term.keys, course.term.mixed)
        bare = course._replace(term=bare_term)
        totals: list[Tensor | None] = [None] * len(weights)
        adjoint: list[Tensor | None] = [of_u, of_log_det]  # of what the solver remembers at the end: nothing
        rest = list(ctx.kept)
        with ctx.autocast.again():
            while rest:
                at, count = rest.pop()
                while count > 1:
                    half = count // 2
                    rest.append((at, half))
                    for _ in range(half):
                        at = _bare(_advance(bare, at))
                    count -= half
                adjoint, gains = _pull(course, at, adjoint, weights)
                for place, gain in enumerate(gains):
                    if gain is not None:
                        total = totals[place]
                        totals[place] = gain.clone() if total is None else total.add_(gain)
        return None, adjoint[0], *totals


def _pull(
    course: Course, at: Stand, adjoint: list[Tensor | None], weights: tuple[Tensor, ...]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The derivatives by the leaves of `at`, and by the weights, from those by the leaves after one advance."""
    with torch.enable_grad():
        before = _laden(at, course.term)
        after = _leaves(_advance(course, before))
    leaves = _leaves(before)
    for value in after:
        require_twice(value, leaves)
    pairs = [(value, given) for value, given in zip(after, adjoint, strict=False) if given is not None]
    try:
        found = torch.autograd.grad(
            *([value for value, _ in pairs], [*leaves, *weights], [given for _, given in pairs]), allow_unused=True
        )
    except RuntimeError as error:
        if not any(words in str(error) for words in _ONLY_ONCE):
            raise
        raise NetworkError(
            f"a kernel of the network cannot be differentiated twice, which a gradient of log p needs: {error}. "
            "Attention, for example, can be written out, or run under torch.nn.attention.sdpa_kernel(MATH)."
        ) from error
    return list(found[: len(leaves)]), list(found[len(leaves) :])

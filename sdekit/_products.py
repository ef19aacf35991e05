"""Products of vectors with the Jacobian of a field, behind one evaluation of it, and within the memory there is.

reverse mode   v -> A' v   from the graph of one forward pass, which is kept: any number of vectors
forward mode   v -> A v    along with the forward pass, nothing kept
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._memory import counted, ran_out, release
from .errors import NetworkError, SdekitWarning

Field = Callable[[Tensor], Tensor]
Result = TypeVar("Result")

_DETACHED = (
    "the network's output does not depend on its input by autograd (detached, or computed under no_grad), so its "
    "divergence is unknown: return the output without .detach() and outside of torch.no_grad()."
)

_DONATED = "donated buffers"  # how torch says that a compiled backward pass gives its memory away
_ONCE = (
    "the network was compiled by torch.compile, whose backward pass can be asked only once behind a forward pass, and "
    "a trace of several products asks more often: pass the network that was not compiled, ask for one probe "
    "(divergence=sdekit.Hutchinson()), or import torch._functorch.config and set donated_buffer = False there before "
    "the network is first called."
)


def require_traceable(field: Field, x: Tensor) -> None:
    """Raises NetworkError if the output of `field` at `x` does not depend on it by autograd.

    Forward mode cannot tell: there a detached output has a derivative of zero.
    """
    out, leaf = traced(field, x)
    vector_jacobian(out, leaf, torch.ones_like(out)[None], False, False)


def keeps_graph(x: Tensor) -> bool:
    """Whether what is computed from `x` is to be differentiated."""
    return torch.is_grad_enabled() and x.requires_grad


def traced(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """The field's value with its graph, and what it is to be differentiated by: `x` where that has a graph itself."""
    leaf = x if keeps_graph(x) else x.detach().requires_grad_()
    with torch.enable_grad():
        out = field(leaf)
    if not out.requires_grad:
        raise NetworkError(_DETACHED)
    return out, leaf


def vector_jacobian(out: Tensor, leaf: Tensor, vectors: Tensor, keep: bool, graph: bool = False) -> Tensor:
    """(P, B, *event) products of P vectors with the Jacobian, in one batched backward pass where kernels allow.

    Args:
        out: The field's value.
        leaf: What it is differentiated by.
        vectors: (P, B, *event).
        keep: Whether `out` is to be differentiated again.
        graph: Whether the products are.

    Raises:
        NetworkError: The output does not depend on `leaf`, the backward pass raised, or it has no second derivative.
    """
    if graph:
        require_twice(out, [leaf])
    try:
        found = _pulled(out, leaf, vectors, keep, graph)
    except Exception as error:
        what = (
            _ONCE if _DONATED in str(error) else f"the network's backward pass raised {type(error).__name__}: {error}"
        )
        raise NetworkError(what) from error
    if found is None:
        raise NetworkError(_DETACHED)
    return found


def _pulled(out: Tensor, leaf: Tensor, vectors: Tensor, keep: bool, graph: bool) -> Tensor | None:
    """The products; None where `out` does not depend on `leaf`."""

    def pulled(given: Tensor, again: bool, batched: bool = False) -> Tensor | None:
        rest = {"create_graph": graph, "is_grads_batched": batched, "allow_unused": True}
        return torch.autograd.grad(out, leaf, given, retain_graph=again or graph, **rest)[0]

    if vectors.shape[0] == 1:
        vector = vectors[0]
        usual = type(out) is Tensor and out.dtype is vector.dtype and out.shape == vector.shape
        if _BACKWARD is None or keep or graph or not usual:  # torch.autograd.grad says more of what is not
            alone = pulled(vector, keep)
        else:
            once = {"allow_unreachable": True, "accumulate_grad": False}
            alone = _BACKWARD((out,), (vector,), False, False, (leaf,), **once)[0]
        return alone if alone is None else alone[None]
    try:
        return pulled(vectors, True, True)
    except RuntimeError as error:
        if ran_out(error):
            raise
    # A kernel without a batching rule: one product after another gives the same numbers. A backward pass may answer in
    # the same buffer each time.
    rows = []
    for vector in vectors:
        row = pulled(vector, True)
        if row is None:
            return None
        rows.append(row.clone())
    return torch.stack(rows)


def _engine() -> Callable[..., Any] | None:
    """What torch.autograd.grad calls. What that does around it costs a small network at batch 1 a tenth of its time."""
    engine = getattr(getattr(torch.autograd, "Variable", None), "_execution_engine", None)
    return getattr(engine, "run_backward", None)


_BACKWARD = _engine()


def require_twice(out: Tensor, leaves: Sequence[Tensor]) -> None:
    """Raises NetworkError where what torch.compile made lies between `leaves` and `out`: it has no second derivative.

    Torch says so only where weights require a gradient; where they do not, a part of the derivative is missing.
    """
    ends = {leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None}
    names = {id(leaf) for leaf in leaves}

    def behind(first: Any) -> Iterator[Any]:
        seen, left = set(), [first]
        while left:
            node = left.pop()
            if node is not None and node not in seen:
                seen.add(node)
                yield node
                left += [before for before, _ in node.next_functions]

    def reaches(node: Any) -> bool:
        return any(one in ends or id(getattr(one, "variable", None)) in names for one in behind(node))

    compiled = [node for node in behind(out.grad_fn) if node.name().startswith("CompiledFunction")]
    if any(reaches(node) for node in compiled):
        raise NetworkError(
            "the network was compiled by torch.compile, which has no second derivative, and a gradient of log p "
            "needs one: pass the network that was not compiled."
        )


def reverse_mode(field: Field, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Value and (P, B, *event) vector-Jacobian products; they keep their graph where `x` has one."""
    graph = keeps_graph(x)
    out, leaf = traced(field, x)
    products = vector_jacobian(out, leaf, vectors, False, graph)
    return out if graph else out.detach(), products


def forward_mode(field: Field, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor] | None:
    """Value and (P, B, *event) Jacobian-vector products in forward mode; None where a kernel lacks it."""

    def push(vector: Tensor) -> tuple[Tensor, Tensor]:
        pushed = torch.func.jvp(field, (x,), (vector,))
        return pushed[0], pushed[1]

    try:
        if vectors.shape[0] == 1:
            value, tangent = push(vectors[0])
            return value.detach(), tangent.detach()[None]
        value, tangents = torch.func.vmap(push, out_dims=(None, 0))(vectors)  # type: ignore[arg-type]
        return value.detach(), tangents.detach()
    except (NetworkError, NotImplementedError, RuntimeError) as error:  # a ScoreModel wraps its kernels' errors
        if ran_out(error):
            raise
        warnings.warn(
            f"a kernel of the network has no forward mode ({str(error).splitlines()[0]}); using mode='vjp'.",
            SdekitWarning,
            stacklevel=2,
        )
        return None


def tried(
    call: Callable[[], Result], device: torch.device, count: bool = False, room: float = math.inf
) -> tuple[Result | None, int]:
    """What `call` returns, None where memory ran out; and the bytes of tensors it took, where they are counted.

    Args:
        call: Makes products.
        device: Where.
        count: Whether to count.
        room: Bytes; where more are counted, memory has run out.
    """
    try:
        return counted(call, room) if count else (call(), 0)
    except Exception as error:
        if not ran_out(error):
            raise
    release(device)  # outside of the handler, whose error holds the tensors of its frames
    return None, 0

"""Value and divergence of a vector field from one network evaluation, and what a probe's answer is worth.

For a field F with Jacobian A at x, and a probe v with E v v' = I,

    div F = tr A = E v' A v,      w = A' v (one vector-Jacobian product),      v' A v = v . w

    Rademacher   Var = 2 (|S|^2 - sum_i A_ii^2)              S the symmetric part of A, |.| Frobenius
    Gaussian     Var = 2 |S|^2
    sphere       Var = 2 D/(D+2) (|S|^2 - tr(A)^2 / D)       radius sqrt(D)

E |w|^2 = |A|^2 >= |S|^2 with equality for gradients, so one probe measures its own variance, up to sum_i A_ii^2, which
two independent probes of neighbouring nodes estimate without bias (`Ledger`).

As elsewhere in torch, value and traces can be differentiated where x requires a gradient, and are constants elsewhere.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _random
from ._checks import require_count
from ._random import Stream
from ._tensor import flatten
from .errors import NetworkError, SdekitWarning

Field = Callable[[Tensor], Tensor]
Law = Literal["rademacher", "gaussian", "sphere"]

_DRAWS = {"rademacher": _random.rademacher, "gaussian": _random.normal, "sphere": _random.sphere}
EXACT_UP_TO = 128  # dimensions for which the exact trace is the default
_EXACT_CONTROL = 4  # dimensions in which a control probe is replaced by the exact trace
_CHUNK_NUMBERS = 1 << 22  # of the D x B x D numbers of an exact trace, how many basis vectors are held at once
_DETACHED = (
    "the network's output does not depend on its input by autograd (detached, or computed under no_grad), so its "
    "divergence is unknown: return the output without .detach() and outside of torch.no_grad()."
)


class FieldValue(NamedTuple):
    """A field and its divergence at a batch of states.

    Attributes:
        value: (B, *event).
        traces: (B, C) float64, an estimate of the divergence from each probe; C = 1 and exact for `Exact`.
        products: (B, C, D) Jacobian-vector products w of the probes, or None for `Exact`.
    """

    value: Tensor
    traces: Tensor
    products: Tensor | None


@dataclass(frozen=True)
class Divergence(ABC):
    """How the divergence of a vector field is had.

    Attributes:
        probe_count: Probe vectors needed at each evaluation, the control counted as one.
    """

    @property
    @abstractmethod
    def probe_count(self) -> int: ...

    @abstractmethod
    def evaluate(self, field: Field, x: Tensor, probes: Tensor | None) -> FieldValue:
        """Value and divergence of `field` at `x` (B, *event), from one call of `field`.

        Args:
            field: Takes (B, *event), returns the same shape; no sample influences another.
            x: States. Where they require a gradient, value and traces keep their graph.
            probes: (P, B, D) from `draw`, or None where P = 0.

        Raises:
            NetworkError: The output does not depend on `x` by autograd.
        """


@dataclass(frozen=True)
class Exact(Divergence):
    """The exact trace: D vector-Jacobian products, batched in chunks, behind one forward pass.

    Args:
        chunk: Products at once; None: as many as fit 4 million numbers.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None:
            require_count("chunk", self.chunk)

    @property
    def probe_count(self) -> int:
        return 0

    def evaluate(self, field: Field, x: Tensor, probes: Tensor | None) -> FieldValue:
        batch, size = x.shape[0], flatten(x).shape[1]
        chunk = self.chunk or max(1, min(size, _CHUNK_NUMBERS // max(1, batch * size)))
        graph = _keeps_graph(x)
        out, leaf = _traced(field, x)
        trace = torch.zeros(batch, dtype=torch.float64, device=x.device)
        axes = torch.eye(size, dtype=x.dtype, device=x.device)
        for start in range(0, size, chunk):
            part = axes[start : start + chunk]
            vectors = part[:, None, :].expand(part.shape[0], batch, size).reshape(-1, *x.shape)
            rows = vector_jacobian(out, leaf, vectors, start + chunk < size, graph).flatten(2)
            trace = trace + torch.einsum("pbd,pd->b", rows.double(), part.double())
        return FieldValue(out if graph else out.detach(), trace[:, None], None)


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """Hutchinson's estimate of the trace, from probes that share one forward pass.

    Args:
        probes: Probes at each evaluation, >= 1.
        fresh: True: new probes at every accepted node, unbiased and on a trained digits network 4 to 5 times less
            noisy than one probe kept for the whole path; needs a solver that weighs its nodes (the default one).
            False: the same probes along the path: for a smooth integrand, or gradients of one draw.
        control: With fresh probes: one fixed probe more, for error control only. One more product an evaluation;
            `solver_error` then covers as it does with exact traces. In up to 4 dimensions, where one probe may hide
            most of an error, the control is the exact trace (D products).
        law: "rademacher" (the default: no variance from the diagonal), "gaussian" or "sphere".
        mode: "vjp", or "jvp" where memory decides; falls back to vjp where a kernel has no forward mode.
    """

    probes: int = 1
    fresh: bool = True
    control: bool = False
    law: Law = "rademacher"
    mode: Literal["vjp", "jvp"] = "vjp"

    def __post_init__(self) -> None:
        require_count("probes", self.probes)
        if self.law not in _DRAWS:
            raise ValueError(f"law={self.law!r}; one of {sorted(_DRAWS)} is needed.")
        if self.mode not in ("vjp", "jvp"):
            raise ValueError(f"mode={self.mode!r}; 'vjp' or 'jvp' is needed.")
        if self.control and not self.fresh:
            raise ValueError("control=True with fresh=False; fixed probes control the error themselves: drop control.")

    @property
    def probe_count(self) -> int:
        return self.probes + int(self.control)

    def evaluate(self, field: Field, x: Tensor, probes: Tensor | None) -> FieldValue:
        if probes is None:
            raise ValueError("probes=None; Hutchinson needs its probes.")
        value, pushed = self.push(field, x, probes.reshape(-1, *x.shape))
        products = pushed.flatten(2)
        return FieldValue(value, traces_of(probes, products), products.transpose(0, 1))

    def push(self, field: Field, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The field's value at `x` (B, *event), and the products (P, B, *event) of P vectors with its Jacobian."""
        graph = _keeps_graph(x)  # then by vjp: the forward rules of many kernels cannot be differentiated again
        if self.mode == "jvp" and not graph:
            result = _forward_mode(field, x, vectors)
            if result is not None:
                return result
        out, leaf = _traced(field, x)
        return out if graph else out.detach(), vector_jacobian(out, leaf, vectors, False, graph)

    @staticmethod
    def keys(seed: int, indices: Tensor) -> Tensor:
        """(B, 2) int64 keys of the value's probes and the control's, from the seed and the global sample numbers."""
        return torch.stack([_random.sample_keys(seed, use, indices) for use in (Stream.PROBE, Stream.CONTROL)], 1)

    def draw(self, keys: Tensor, node: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """(P, B, D) probes: those of the value first, the control's last (one, or D in up to 4 dimensions).

        Args:
            keys: (B, 2) from `keys`.
            node: (B,) int64 number of the accepted node; ignored for fixed probes.
            size: D.
            dtype: Of the states.
        """
        law, still = _DRAWS[self.law], torch.zeros_like(node)
        value = law(keys[:, 0], node if self.fresh else still, self.probes * size, dtype)
        drawn = value.reshape(-1, self.probes, size).transpose(0, 1)
        if self.law == "sphere" and self.probes > 1:  # drawn as one vector: each probe has a sphere of its own
            drawn = drawn * (size**0.5 / drawn.norm(dim=2, keepdim=True))
        if not self.control:
            return drawn
        if size <= _EXACT_CONTROL:  # axes of length sqrt(D): the mean of their v' A v is the trace
            axes = size**0.5 * torch.eye(size, dtype=dtype, device=drawn.device)
            return torch.cat((drawn, axes[:, None, :].expand(-1, drawn.shape[1], -1)))
        control = law(keys[:, 1], still, size, dtype)
        return torch.cat((drawn, control[None]))


def traces_of(probes: Tensor, products: Tensor) -> Tensor:
    """(B, P) float64 v . w of probes and products (P, B, D)."""
    return (probes * products).sum(2, dtype=torch.float64).T


def default_divergence(size: int, fresh: bool = True) -> Divergence:
    """The divergence where none is asked for: exact up to 128 dimensions, one probe beyond.

    Args:
        size: Dimensions of a sample.
        fresh: Whether the probes may be new at every node.
    """
    return Exact() if size <= EXACT_UP_TO else Hutchinson(fresh=fresh)


def require_traceable(field: Field, x: Tensor) -> None:
    """Raises NetworkError if the output of `field` at `x` does not depend on it by autograd.

    Forward mode cannot tell: there a detached output has a derivative of zero.
    """
    out, leaf = _traced(field, x)
    vector_jacobian(out, leaf, torch.ones_like(out)[None], False, False)


def _keeps_graph(x: Tensor) -> bool:
    """Whether what is computed from `x` is to be differentiated."""
    return torch.is_grad_enabled() and x.requires_grad


def _traced(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """The field's value with its graph, and what it is to be differentiated by: `x` where that has a graph itself."""
    leaf = x if _keeps_graph(x) else x.detach().requires_grad_()
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
    """
    if vectors.shape[0] == 1:
        rows = torch.autograd.grad(
            out, leaf, vectors[0], retain_graph=keep or graph, create_graph=graph, allow_unused=True
        )
        if rows[0] is None:
            raise NetworkError(_DETACHED)
        return rows[0][None]
    try:
        batched = torch.autograd.grad(
            *(out, leaf, vectors), retain_graph=True, create_graph=graph, is_grads_batched=True, allow_unused=True
        )[0]
    except RuntimeError:  # a kernel without a batching rule: one product after another gives the same numbers
        batched = torch.stack(
            [torch.autograd.grad(out, leaf, v, retain_graph=True, create_graph=graph)[0] for v in vectors]
        )
    if batched is None:
        raise NetworkError(_DETACHED)
    return batched


def _forward_mode(field: Field, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor] | None:
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
        warnings.warn(
            f"a kernel of the network has no forward mode ({str(error).splitlines()[0]}); using mode='vjp'.",
            SdekitWarning,
            stacklevel=2,
        )
        return None

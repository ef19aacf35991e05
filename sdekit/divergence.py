"""Value and divergence of a vector field from one network evaluation, and what a probe's answer is worth.

For a field F with Jacobian A at x, and a probe v with E v v' = I,

    div F = tr A = E v' A v,      w = A' v (one vector-Jacobian product),      v' A v = v . w

    Rademacher   Var = 2 (|S|^2 - sum_i A_ii^2)              S the symmetric part of A, |.| Frobenius
    Gaussian     Var = 2 |S|^2
    sphere       Var = 2 D/(D+2) (|S|^2 - tr(A)^2 / D)       radius sqrt(D)

E |w|^2 = |A|^2 >= |S|^2 with equality for gradients, so one probe measures its own variance, up to sum_i A_ii^2, which
two independent probes of neighbouring nodes estimate without bias (`Ledger`).
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
        probe_count: Probe vectors needed at each evaluation.
    """

    @property
    @abstractmethod
    def probe_count(self) -> int: ...

    @abstractmethod
    def evaluate(self, field: Field, x: Tensor, probes: Tensor | None) -> FieldValue:
        """Value and divergence of `field` at `x` (B, *event), from one call of `field`.

        Args:
            field: Takes (B, *event), returns the same shape; no sample influences another.
            x: States.
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
        out, leaf = _traced(field, x)
        trace = torch.zeros(batch, dtype=torch.float64, device=x.device)
        axes = torch.eye(size, dtype=x.dtype, device=x.device)
        for start in range(0, size, chunk):
            part = axes[start : start + chunk]
            vectors = part[:, None, :].expand(part.shape[0], batch, size).reshape(-1, *x.shape)
            rows = _vector_jacobian(out, leaf, vectors, keep=start + chunk < size).flatten(2)
            trace = trace + torch.einsum("pbd,pd->b", rows.double(), part.double())
        return FieldValue(out.detach(), trace[:, None], None)


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """Hutchinson's estimate of the trace, from probes that share one forward pass.

    Args:
        probes: Probes at each evaluation, >= 1.
        fresh: True: new probes at every accepted node, unbiased and on a trained digits network 4 to 5 times less
            noisy than one probe kept for the whole path; needs a solver that weighs its nodes (the default one).
            False: the same probes along the path: for a smooth integrand, or gradients of one draw.
        control: With fresh probes: one fixed probe more, for error control only. One more product an evaluation;
            `solver_error` then covers as it does with exact traces.
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
        vectors = probes.reshape(-1, *x.shape)
        result = _forward_mode(field, x, vectors) if self.mode == "jvp" else None
        if result is None:
            out, leaf = _traced(field, x)
            result = out.detach(), _vector_jacobian(out, leaf, vectors, keep=False)
        products = result[1].flatten(2)
        traces = (probes * products).sum(2, dtype=torch.float64).T
        return FieldValue(result[0], traces, products.transpose(0, 1))

    def draw(self, seed: int, indices: Tensor, node: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """(P, B, D) probes: those of the value first, the control's last.

        Args:
            seed: The caller's seed.
            indices: (B,) int64 global sample numbers.
            node: (B,) int64 number of the accepted node; ignored for fixed probes.
            size: D.
            dtype: Of the states.
        """
        law, still = _DRAWS[self.law], torch.zeros_like(node)
        keys = _random.sample_keys(seed, Stream.PROBE, indices)
        value = law(keys, node if self.fresh else still, self.probes * size, dtype)
        drawn = value.reshape(-1, self.probes, size).transpose(0, 1)
        if not self.control:
            return drawn
        control = law(_random.sample_keys(seed, Stream.CONTROL, indices), still, size, dtype)
        return torch.cat((drawn, control[None]))


def _traced(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """The field's value with its graph, and the leaf it is to be differentiated by."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = field(leaf)
    if not out.requires_grad:
        raise NetworkError(_DETACHED)
    return out, leaf


def _vector_jacobian(out: Tensor, leaf: Tensor, vectors: Tensor, keep: bool) -> Tensor:
    """(P, B, *event) products of P vectors with the Jacobian, in one batched backward pass where kernels allow."""
    if vectors.shape[0] == 1:
        rows = torch.autograd.grad(out, leaf, vectors[0], retain_graph=keep, allow_unused=True)
        if rows[0] is None:
            raise NetworkError(_DETACHED)
        return rows[0][None]
    try:
        batched = torch.autograd.grad(out, leaf, vectors, retain_graph=True, is_grads_batched=True, allow_unused=True)[
            0
        ]
    except RuntimeError:  # a kernel without a batching rule: one product after another gives the same numbers
        batched = torch.stack([torch.autograd.grad(out, leaf, v, retain_graph=True)[0] for v in vectors])
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
    except (NotImplementedError, RuntimeError) as error:
        warnings.warn(
            f"a kernel of the network has no forward mode ({str(error).splitlines()[0]}); using mode='vjp'.",
            SdekitWarning,
            stacklevel=2,
        )
        return None


class Note(NamedTuple):
    """What is kept of the fresh probes of one node, K averaged: enough for the variance of v . w.

    Attributes:
        size: (B,) |w|^2.
        trace: (B,) (v . w) / D.
        mark: (B, D) v * w elementwise (Rademacher), an unbiased estimate of the Jacobian's diagonal.
    """

    size: Tensor
    trace: Tensor
    mark: Tensor


def note(probes: Tensor, products: Tensor) -> Note:
    """The `Note` of the value probes (K, B, D) and their products (B, K, D)."""
    marks = probes.transpose(0, 1) * products
    return Note(
        products.square().sum(2, dtype=torch.float64).mean(1),
        marks.sum(2, dtype=torch.float64).mean(1) / products.shape[2],
        marks.mean(1),
    )


class Ledger(NamedTuple):
    """The variance of sum_j weight_j (v_j . w_j), settled node by node as weights become final.

    Attributes (m open nodes, newest first):
        weight: (B, m) quadrature weight so far.
        size, trace: (B, m) of each open node's `Note`.
        link: (B, m) mark_j . mark_{j-1} with the node before it; 0 for the first node.
        mark: (B, D) of the newest node.
        last: (B,) trace of the node settled last.
        settled: (B,) how many nodes are settled.
        variance: (B,) of what is settled.
    """

    weight: Tensor
    size: Tensor
    trace: Tensor
    link: Tensor
    mark: Tensor
    last: Tensor
    settled: Tensor
    variance: Tensor


def open_ledger(batch: int, size: int, depth: int, dtype: torch.dtype, device: torch.device) -> Ledger:
    """An empty ledger for `batch` samples of `size` dimensions and `depth` open nodes."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    return Ledger(
        weight=zeros(batch, depth),
        size=zeros(batch, depth),
        trace=zeros(batch, depth),
        link=zeros(batch, depth),
        mark=torch.zeros(batch, size, dtype=dtype, device=device),
        last=zeros(batch),
        settled=torch.zeros(batch, dtype=torch.int64, device=device),
        variance=zeros(batch),
    )


class _Neighbour(NamedTuple):
    """The node before or after: present (0 or 1), its trace, its link with the node asked about; each (B,)."""

    present: Tensor
    trace: Tensor
    link: Tensor


def _node_variance(
    law: Law, dim: int, probes: int, size: Tensor, trace: Tensor, before: _Neighbour, after: _Neighbour
) -> Tensor:
    """Variance of one node's estimate from its own probe's size and trace, and its neighbours."""
    count = (before.present + after.present).clamp(min=1.0)
    around = (before.present * before.trace + after.present * after.trace) / count
    if law == "gaussian":
        variance = 2.0 * size
    elif law == "sphere":
        variance = 2.0 * dim / (dim + 2.0) * (size - dim * trace * around)
    else:
        # Without the multiple a of the identity, which has no variance, estimated by the neighbours alone.
        shift = dim * around * around
        length = size - 2.0 * dim * around * trace + shift
        diagonal = torch.zeros_like(size)
        for near in (before, after):
            diagonal = diagonal + near.present * (near.link - dim * around * (trace + near.trace) + shift)
        variance = 2.0 * (length - diagonal / count)
    return variance / probes


def post(ledger: Ledger, entry: Note, weights: Tensor, count: Tensor, law: Law, probes: int) -> Ledger:
    """The ledger after a step: weights booked, the new node entered, the oldest node settled if m are open.

    Args:
        ledger: Before the step, with `count` (B,) nodes entered so far.
        entry: The new node's.
        weights: (B, m + 1) what this step adds to the weight of the new node, then of the open ones, newest first.
        count: (B,) int64.
        law: Of the probes.
        probes: How many a node's estimate averages.
    """
    depth, dim = ledger.weight.shape[1], ledger.mark.shape[1]
    link = (entry.mark * ledger.mark).sum(1, dtype=torch.float64) * (count > 0)
    weight = torch.cat((weights[:, :1], ledger.weight + weights[:, 1:]), 1)
    size = torch.cat((entry.size[:, None], ledger.size), 1)
    trace = torch.cat((entry.trace[:, None], ledger.trace), 1)
    links = torch.cat((link[:, None], ledger.link), 1)
    full = count >= depth
    before = _Neighbour((ledger.settled > 0).double(), ledger.last, links[:, depth])
    after = _Neighbour(torch.ones_like(link), trace[:, depth - 1], links[:, depth - 1])
    variance = _node_variance(law, dim, probes, size[:, depth], trace[:, depth], before, after)
    return Ledger(
        weight[:, :depth],
        size[:, :depth],
        trace[:, :depth],
        links[:, :depth],
        entry.mark,
        torch.where(full, trace[:, depth], ledger.last),
        ledger.settled + full,
        ledger.variance + torch.where(full, weight[:, depth].square() * variance, 0.0),
    )


def settle(ledger: Ledger, count: Tensor, law: Law, probes: int) -> Tensor:
    """(B,) the whole variance, the open nodes included, clamped at 0; `count` (B,) nodes were entered."""
    depth, dim = ledger.weight.shape[1], ledger.mark.shape[1]
    total, nothing = ledger.variance, torch.zeros_like(ledger.variance)
    for j in range(depth):
        elder = ledger.trace[:, j + 1] if j + 1 < depth else ledger.last
        before = _Neighbour((count > j + 1).double(), elder, ledger.link[:, j])
        newer = _Neighbour(torch.ones_like(nothing), ledger.trace[:, j - 1], ledger.link[:, j - 1])
        after = newer if j > 0 else _Neighbour(nothing, nothing, nothing)
        variance = _node_variance(law, dim, probes, ledger.size[:, j], ledger.trace[:, j], before, after)
        total = total + torch.where(count > j, ledger.weight[:, j].square() * variance, 0.0)
    return total.clamp(min=0.0)

"""Value and divergence of a vector field from one network evaluation, and what a probe's answer is worth.

For a field F with Jacobian A at x, and a probe v with E v v' = I,

    div F = tr A = E v' A v,      w = A' v (one vector-Jacobian product),      v' A v = v . w

    Rademacher   Var = 2 (|S|^2 - sum_i A_ii^2)              S the symmetric part of A, |.| Frobenius
    Gaussian     Var = 2 |S|^2
    sphere       Var = 2 D/(D+2) (|S|^2 - tr(A)^2 / D)       radius sqrt(D)

E |w|^2 = |A|^2 >= |S|^2 with equality for gradients, so one probe measures its own variance, up to sum_i A_ii^2, which
two independent probes of neighbouring nodes estimate without bias (`Ledger`).

As elsewhere in torch, value and traces can be differentiated where x requires a gradient, and are constants elsewhere.

Products take memory. How much is counted the first time that a shape is met, from the tensors that are made, and how
many are made at once is chosen by it; where memory runs out all the same, there are fewer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _random
from ._checks import require_count
from ._memory import free_bytes
from ._products import Field, forward_mode, keeps_graph, reverse_mode, traced, tried, vector_jacobian
from ._random import Stream
from ._tensor import flatten

Law = Literal["rademacher", "gaussian", "sphere"]

_DRAWS = {"rademacher": _random.rademacher, "gaussian": _random.normal, "sphere": _random.sphere}
EXACT_UP_TO = 128  # dimensions for which the exact trace is the default
_EXACT_CONTROL = 4  # dimensions in which a control probe is replaced by the exact trace
# Bytes that the products of an exact trace may take at once on the CPU: from 8 to 32 million they are fastest, for
# MLPs, the digits network and U-Nets in batches of 1 to 4096; with 100 million they take 1.2 to 1.9 times as long.
_CACHED = 16_000_000
_SHARE = 0.25  # of the free memory of any other device
_MEASURED = 2  # products counted: a single one takes another way through the kernels, and less
_FEW = 1 << 12  # of so few numbers all products are made at once, unseen
_ROOM = 0.75  # of the free memory that a vector-Jacobian product may take before forward mode is better


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


_Shape = tuple[torch.Size, torch.dtype, torch.device]


def _shape(x: Tensor) -> _Shape:
    return x.shape, x.dtype, x.device


@dataclass(frozen=True)
class Exact(Divergence):
    """The exact trace: D vector-Jacobian products, batched in chunks, behind one forward pass.

    Args:
        chunk: Products at once, at most. None: as many as take 16 MB on the CPU, elsewhere a quarter of the memory
            that is free. Halved where memory runs out.
    """

    chunk: int | None = None
    # What was found out: the bytes of a product by the event's shape, the products that fit by the batch's.
    _bytes: dict[_Shape, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    _fit: dict[_Shape, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.chunk is not None:
            require_count("chunk", self.chunk)

    @property
    def probe_count(self) -> int:
        return 0

    def evaluate(self, field: Field, x: Tensor, probes: Tensor | None) -> FieldValue:
        size, graph = flatten(x).shape[1], keeps_graph(x)
        out, leaf = traced(field, x)
        entries: list[Tensor] = []
        start, chunk = 0, self._chunk(x, size)
        while start < size:
            count = min(chunk or _MEASURED, size - start)
            part, taken = _tried_entries(out, leaf, start, count, graph, chunk)
            if part is None:
                self._fit[_shape(x)] = chunk = max(1, count // 2)
                continue
            if chunk is None:
                self._bytes[x.shape[1:], x.dtype, x.device] = taken / (count * x.shape[0])
                chunk = self._chunk(x, size)
            entries.append(part)
            start += count
        # All in one sum, so that its bits do not depend on the chunks, which depend on the batch.
        diagonal = torch.cat(entries, 1) if len(entries) > 1 else entries[0].contiguous()
        return FieldValue(out if graph else out.detach(), diagonal.sum(1, dtype=torch.float64)[:, None], None)

    def _chunk(self, x: Tensor, size: int) -> int | None:
        """Products at once, at least 1; None where what one takes is to be measured."""
        fit = self._fit.get(_shape(x), self.chunk)
        if fit is not None or x.shape[0] * size**2 <= _FEW:
            return fit or max(1, size)
        taken = self._bytes.get((x.shape[1:], x.dtype, x.device))
        if taken is None:
            return None
        room = _CACHED if x.device.type == "cpu" else _SHARE * free_bytes(x.device)
        return self._fit.setdefault(_shape(x), max(1, int(room / max(taken * x.shape[0], 1.0))))


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
        mode: "vjp"; "jvp", which keeps no graph, so takes less memory in deep networks only, and about twice the time
            (docs/decisions), and falls back to vjp where a kernel has no forward mode; or "auto": vjp unless it takes
            more than three quarters of the memory that is free when a shape is first met, or all, and jvp does not.
    """

    probes: int = 1
    fresh: bool = True
    control: bool = False
    law: Law = "rademacher"
    mode: Literal["vjp", "jvp", "auto"] = "vjp"
    # What "auto" found to fit, by the shape of the vectors.
    _modes: dict[_Shape, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_count("probes", self.probes)
        if self.law not in _DRAWS:
            raise ValueError(f"law={self.law!r}; one of {sorted(_DRAWS)} is needed.")
        if self.mode not in ("vjp", "jvp", "auto"):
            raise ValueError(f"mode={self.mode!r}; 'vjp', 'jvp' or 'auto' is needed.")
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
        graph = keeps_graph(x)  # then by vjp: the forward rules of many kernels cannot be differentiated again
        if self.mode == "auto" and not graph:
            return self._fitting(field, x, vectors)
        pushed = forward_mode(field, x, vectors) if self.mode == "jvp" and not graph else None
        return reverse_mode(field, x, vectors) if pushed is None else pushed

    def _fitting(self, field: Field, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Value and products in reverse mode where that fits, else in forward mode where that does."""
        seen = _shape(vectors)
        known = self._modes.get(seen)
        room = math.inf if known else _ROOM * free_bytes(x.device)
        result, mode = None, "vjp"
        if known != "jvp":
            result, _ = tried(lambda: reverse_mode(field, x, vectors), x.device, known is None, room)
        if result is None:
            result, _ = tried(lambda: forward_mode(field, x, vectors), x.device, known is None, room)
            mode = "vjp" if result is None else "jvp"
        self._modes[seen] = mode
        return reverse_mode(field, x, vectors) if result is None else result

    @staticmethod
    def keys(seed: int, indices: Tensor, streams: tuple[Stream, Stream] = (Stream.PROBE, Stream.CONTROL)) -> Tensor:
        """(B, 2) int64 keys of the value's probes and the control's, from the seed and the global sample numbers."""
        return torch.stack([_random.sample_keys(seed, use, indices) for use in streams], 1)

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


def _tried_entries(
    out: Tensor, leaf: Tensor, start: int, count: int, graph: bool, chunk: int | None
) -> tuple[Tensor | None, int]:
    """(B, count) diagonal entries from `start` on, and the bytes that they took, counted without a `chunk`.

    None instead where memory ran out and fewer at once are possible.
    """

    def diagonal() -> Tensor:
        vectors = torch.zeros(count, *out.shape, dtype=out.dtype, device=out.device)
        vectors.flatten(2).diagonal(start, 0, 2).fill_(1.0)
        return vector_jacobian(out, leaf, vectors, True, graph).flatten(2).diagonal(start, 0, 2).clone()

    return (diagonal(), 0) if chunk == 1 else tried(diagonal, out.device, chunk is None)


def default_divergence(size: int, fresh: bool = True) -> Divergence:
    """The divergence where none is asked for: exact up to 128 dimensions, one probe beyond.

    Args:
        size: Dimensions of a sample.
        fresh: Whether the probes may be new at every node.
    """
    return Exact() if size <= EXACT_UP_TO else Hutchinson(fresh=fresh)

"""The probability flow in the mixed variable, with its log determinant.

s is the mixed variable of grid.py; with q = log rho, rho = sigma/alpha, y = x/alpha, c = sqrt(sd^2 + rho^2), u = y/c,

    du/dq = k (sd^2 eps - rho x0) / c^2,   k = rho/c,     dl/dq = div_u (du/dq)
    log p_s(x) = log q_T(x_T) + D log(alpha_T c_T / (alpha c)) + l
    gradient of the log density in u:  -eps / k

A local error (e_u, e_l) moves log p by gradient . e_u + e_l. Both are of size D, and for any field e the expectation of
gradient . e + div e is zero (Stein's identity), so in many dimensions they cancel but for about sqrt(D): a step costs

    d = max(|gradient . e_u + e_l|, k (|gradient . e_u| + |e_l|)) nats,    k = max(1/4, min(1, 8/sqrt(D))),

the second part because in few dimensions, and near separatrices, they cancel at single steps by chance.

Everything but the network's own Jacobian is linear in u and has its trace exactly: no probe noise, no cancellation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import is_own
from ._numbers import alike, cat, exp, hypot, maximum, mean, sqrt, square, stack, zeros_like
from ._tensor import column, dot, flatten, tensor
from .divergence import Divergence, FieldValue, Hutchinson
from .grid import MixedTime, mixed_time
from .ledger import Note, note
from .model.parameterization import Mix, conversion
from .model.score_model import ScoreModel
from .sde.base import as_time
from .terms import Aux, Evaluation, Term

Ask = Callable[[Tensor, Tensor, Tensor | None], FieldValue]

_ROUNDING = 2.0  # units in the last place that a step of the solve is off by: python -m benchmarks.budget
_COARSER = 1.5  # of its own, by which the output of a network of less precision is off, alike at neighbouring nodes
# Of |gradient . e_u| + |e_l| at least this share counts: the constant over sqrt(D), but a quarter. With 4, points near
# separatrices of 16-D mixtures came out above their estimate, and by norms points of 64-D did (docs/decisions).
_CANCELS, _LEAST = 8.0, 0.25


class FlowState(NamedTuple):
    """The state of a LikelihoodFlow.

    Attributes:
        u: (B, D) x / (alpha c), in the dtype of x.
        log_det: (B, C) float64 accumulated divergence, one channel a probe; C = 0 without a divergence.
        product: (B, D) accumulated Jacobian product of one fixed probe, else None.
    """

    u: Tensor
    log_det: Tensor
    product: Tensor | None


class Node(NamedTuple):
    """What the field is made of at some s.

    Attributes:
        t: (B,) float64, the time.
        scale: (B,) float64, alpha c: x = scale u.
        of_x: (2, B) float64: x, and ..
        of_output: (2, B) float64: .. the network's output, in du/ds and in the gradient of the log density in u.
    """

    t: Tensor
    scale: Tensor
    of_x: Tensor
    of_output: Tensor


class LikelihoodFlow(Term):
    """The probability flow in the mixed variable, with its log determinant.

    Args:
        model: The score model.
        divergence: How the trace is had; None for the flow alone (`encode`, `decode`, `sample`).
        event: The event's shape.
        keys: (B, 2) int64 from `Hutchinson.keys`, of the probes.
        mixed: The variable of integration; None: that of the model's SDE and data_std.
        ask: What answers for the network's value and divergence, of (x (B, D), t (B,), probes); None: the network.
    """

    def __init__(
        self,
        model: ScoreModel,
        divergence: Divergence | None,
        event: torch.Size,
        keys: Tensor,
        mixed: MixedTime | None = None,
        ask: Ask | None = None,
    ) -> None:
        self.model = model
        self.divergence = divergence
        self.event = event
        self.keys = keys
        self.mixed = mixed_time(model.sde, model.data_std) if mixed is None else mixed
        self._ask = self._asked if ask is None else ask
        self._variance = model.data_std**2
        self._fixed: Tensor | None = None
        self._redraws = False
        self._dtypes: tuple[torch.dtype, torch.dtype] | None = None  # of a state, and of the network for it
        meaning = model.parameterization  # what users wrote is given tensors
        self._own = type(model) is ScoreModel and all(map(is_own, (model.sde, meaning, meaning.label)))

    @property
    def has_density(self) -> bool:
        return self.divergence is not None

    @property
    def asks_network(self) -> bool:
        """Whether the network itself answers, and nothing in its place."""
        return self._ask == self._asked

    @property
    def fresh(self) -> bool:
        """Whether the probes of the value are new at every node."""
        return isinstance(self.divergence, Hutchinson) and self.divergence.fresh

    @property
    def channels(self) -> int:
        """How many log determinants the state carries: 1 exact, else one a probe, and one more for a control."""
        if not isinstance(self.divergence, Hutchinson):
            return 0 if self.divergence is None else 1
        return self.divergence.probe_count

    @property
    def values(self) -> int:
        """How many of them estimate the value: all but the control."""
        return self.channels - int(isinstance(self.divergence, Hutchinson) and self.divergence.control)

    @property
    def keeps_product(self) -> bool:
        """Whether one fixed probe's product is carried along, for its standard error."""
        return isinstance(self.divergence, Hutchinson) and not self.fresh and self.divergence.probes == 1

    def take(self, rows: Tensor) -> LikelihoodFlow:
        return LikelihoodFlow(self.model.take(rows), self.divergence, self.event, self.keys[rows], self.mixed)

    def parts(self) -> tuple[Tensor, ...]:
        return (self.keys,)

    def around(self, model: ScoreModel, parts: tuple[Tensor, ...], ask: Ask | None = None) -> LikelihoodFlow:
        other = LikelihoodFlow(model, self.divergence, self.event, parts[0], self.mixed, ask)
        other._redraws = True  # the keys may be written to: other samples will take the place of these
        return other

    def coordinate(self, t: Tensor) -> Tensor:
        return self.mixed.coordinate(t)

    def time(self, s: Tensor) -> Tensor:
        return self.mixed.time(s)

    def log_scale(self, t: Tensor) -> Tensor:
        """log(alpha c) at time t (B,), float64: x = alpha c u."""
        sde = self.model.sde
        return sde.log_alpha(t) + hypot(torch.exp(-sde.half_log_snr(t)), as_time(self.model.data_std)).log()

    def enter(self, x: Tensor, s: Tensor) -> FlowState:
        self._dtypes = None  # since the solve before, the network may have been cast
        u = flatten(x)
        u = u * column(torch.exp(-self.log_scale(self.time(s))), u)
        log_det = torch.zeros(x.shape[0], self.channels, dtype=torch.float64, device=x.device)
        return FlowState(u, log_det, torch.zeros_like(u) if self.keeps_product else None)

    def leave(self, z: FlowState, s: Tensor) -> Tensor:
        return self.scaled(z, self.log_scale(self.time(s)))

    def scaled(self, z: FlowState, log_scale: Tensor) -> Tensor:
        """x (B, *event) of a state where `log_scale` (B,) is log(alpha c)."""
        return (z.u * column(torch.exp(log_scale), z.u)).reshape(z.u.shape[0], *self.event)

    def node(self, s: Tensor) -> Node:
        """What the field is made of at `s` (B,)."""
        q, rate = self.mixed.log_ratio(s)
        sde, rho = self.model.sde, exp(q)
        t = sde.clamp(sde.time_at(-q if self._own else tensor(-q)))
        alpha = alike(sde.alpha(t), s)
        c2 = self._variance + square(rho)
        c = sqrt(c2)
        k = rho / c
        mine = Mix(*(alike(weight, s) for weight in self.model.parameterization.mix(sde, t)))
        pull = rate * k / c2
        target = Mix(stack((-rho * pull, zeros_like(k)), 0), stack((self._variance * pull, -1.0 / k), 0))
        return Node(t, alpha * c, *conversion(alpha, rho * alpha, mine, target))

    def evaluate(self, s: Tensor, z: FlowState, node: Tensor) -> Evaluation:
        t, scale, of_x, of_output = self.node(s)
        x = z.u * column(scale, z.u)
        out, traces, product, notes = self._network(x, t, node, of_output[0] * scale)
        du, gradient = tensor(of_x, x.dtype)[:, :, None] * x + tensor(of_output, x.dtype)[:, :, None] * out
        log_det = traces + (of_x[0] * scale * x.shape[1])[:, None]
        coarse = None
        if self.has_density and (network := self._coarsest(x)) > torch.finfo(x.dtype).eps:
            own = gradient * column(of_output[0], out) * out
            coarse = _COARSER * network * sqrt(alike(dot(own, own), s) + square(traces[:, 0]))
        # J' v of the whole field is the network's plus a multiple of v, which has no variance: left out of `product`.
        return Evaluation(FlowState(du, log_det, product), Aux(gradient, notes, coarse))

    def _network(
        self, x: Tensor, t: Tensor, node: Tensor, jacobian: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Note | None]:
        """Output (B, D), traces (B, C) and fixed-probe product of `jacobian` (B,) times the network's Jacobian."""
        if self.divergence is None:
            return self._field(x, t), jacobian[:, None][:, :0], None, None
        probes = self._probes(x, node)
        out, traces, products = self._ask(x, t, probes)
        traces = alike(traces, jacobian) * jacobian[:, None]
        if probes is None or products is None or not isinstance(self.divergence, Hutchinson):
            return out, traces, None, None
        products = products * column(jacobian, products)
        if self.fresh:
            count = self.divergence.probes
            if self.divergence.control:
                traces = cat((traces[:, :count], traces[:, count:].mean(1)[:, None]), 1)
            kept = note(probes[:count], products[:, :count])
            return out, traces, None, Note(alike(kept.size, traces), alike(kept.trace, traces), kept.mark)
        return out, traces, products[:, 0] if self.keeps_product else None, None

    def _probes(self, x: Tensor, node: Tensor) -> Tensor | None:
        """(P, B, D) the probes of this node; those that stay are drawn once."""
        if not isinstance(self.divergence, Hutchinson):
            return None
        if self._fixed is None or self._fixed.dtype != x.dtype:
            drawn = self.divergence.draw(self.keys, tensor(node), x.shape[1], x.dtype)
            if self.fresh or self._redraws:
                return drawn
            self._fixed = drawn
        return self._fixed

    def _network_dtype(self, x: Tensor) -> torch.dtype:
        """What the network computes in, looked up once a solve: a network's parameters are a long way down."""
        if self._dtypes is None or self._dtypes[0] is not x.dtype:
            self._dtypes = x.dtype, self.model.network_dtype(x)
        return self._dtypes[1]

    def _coarsest(self, x: Tensor) -> float:
        """The relative precision of the network's answers."""
        return torch.finfo(self.model.precision(x, self._network_dtype(x))).eps

    def _field(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, D) the network's own output at x (B, D)."""
        seen = x.reshape(x.shape[0], *self.event)
        return flatten(self.model.output(seen, t, self._network_dtype(x)) if self._own else self.model.output(seen, t))

    def _asked(self, x: Tensor, t: Tensor, probes: Tensor | None) -> FieldValue:
        assert self.divergence is not None  # else nothing is asked but the field
        return self.divergence.evaluate(lambda state: self._field(state, t), x, probes)

    def watched(self, z: FlowState) -> Tensor:
        return z.u if self.fresh else torch.cat((z.u.double(), tensor(z.log_det)), 1)

    def nats(self, error: FlowState, aux: Aux) -> Tensor:
        gradient = aux.gradient
        if gradient is None or self.divergence is None:
            raise TypeError("a LikelihoodFlow without a divergence carries no density; control it in the state's norm.")
        least = max(_LEAST, min(1.0, _CANCELS / math.sqrt(gradient.shape[1])))
        gradient = gradient if error.u.dim() == 2 else gradient[:, None]
        if self.fresh and self.channels == self.values:
            # Fresh noise must not steer the path: without a control probe only the norms are at hand.
            steep, large = (part.square().sum(-1, dtype=torch.float64).sqrt() for part in (gradient, error.u))
            return alike(least * steep * large, error.log_det)
        in_u = alike((gradient * error.u).sum(-1, dtype=torch.float64), error.log_det)
        in_l = error.log_det[..., -1] if self.fresh else mean(error.log_det)
        return maximum(abs(in_u + in_l), least * (abs(in_u) + abs(in_l)))

    def rounding(self, length: Tensor, before: FlowState, after: FlowState, aux: Aux) -> Tensor:
        gradient = aux.gradient
        if gradient is None:
            raise TypeError("a LikelihoodFlow without a divergence carries no density; its rounding costs no nats.")
        # Each coordinate is rounded by itself; the trace is a sum of D numbers.
        in_u = alike(dot(gradient * before.u, gradient * before.u), length)
        gained = square((after.log_det - before.log_det)[:, 0])
        apart = (_ROUNDING * torch.finfo(before.u.dtype).eps) ** 2 * (in_u + gained)
        together = zeros_like(apart) if aux.coarse is None else abs(length) * aux.coarse
        return stack((apart, together), 1)

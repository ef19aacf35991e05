"""The equations to integrate, each in its own coordinates.

A term maps times and states into coordinates (s, z) and back, and gives dz/ds there. The sign of time lives here and
nowhere else.

    ProbabilityFlow   s = t,  z = x:                  dx/dt = f x - g^2/2 score
    ReverseSDE        s = -t, z = x:                  dx = -[f x - (1 + eta^2)/2 g^2 score] ds + eta g dw
    LikelihoodFlow    s mixed (grid.py), q = log rho, rho = sigma/alpha, y = x/alpha, c = sqrt(sd^2 + rho^2), u = y/c:

        du/dq = k (sd^2 eps - rho x0) / c^2,  k = rho/c,      dl/dq = div_u (du/dq)
        log p_s(x) = log q_T(x_T) + D log(alpha_T c_T / (alpha c)) + l
        gradient of log density in u:  -eps / k

Everything but the network's own Jacobian is linear in u and has its trace exactly: no probe noise, no cancellation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._tensor import column, dot, flatten
from .divergence import Divergence, Hutchinson, Note, note
from .grid import MixedTime
from .model.parameterization import Mix, conversion
from .model.score_model import ScoreModel
from .sde.base import as_time


class Aux(NamedTuple):
    """What an evaluation gives besides the slope.

    Attributes:
        gradient: (B, D) gradient of the log density in the term's own coordinates, or None.
        note: What is kept of fresh probes, or None.
    """

    gradient: Tensor | None
    note: Note | None


class Evaluation(NamedTuple):
    """dz/ds (a tree shaped like the state) and what came with it."""

    slope: Any
    aux: Aux


NO_AUX = Aux(None, None)


class Term(ABC):
    """An equation in its own coordinates (s, z).

    To write one: `coordinate` and `time` are inverse and monotone; `enter` and `leave` are inverse; `evaluate` gives
    dz/ds of every sample on its own; `take` keeps the samples named. z is a tensor or a NamedTuple of tensors whose
    first axis is the batch.
    """

    model: ScoreModel

    @abstractmethod
    def coordinate(self, t: Tensor) -> Tensor:
        """s at time t, float64, the shape of `t`."""

    @abstractmethod
    def time(self, s: Tensor) -> Tensor:
        """t at s, float64, within [t_min, t_max], the shape of `s`."""

    @abstractmethod
    def enter(self, x: Tensor, s: Tensor) -> Any:
        """The state z of `x` (B, *event) at s (B,)."""

    @abstractmethod
    def leave(self, z: Any, s: Tensor) -> Tensor:
        """x (B, *event) of the state z at s (B,)."""

    @abstractmethod
    def evaluate(self, s: Tensor, z: Any, node: Tensor) -> Evaluation:
        """dz/ds at (s, z); `node` (B,) counts the accepted nodes of each sample and keys what is random."""

    @abstractmethod
    def take(self, rows: Tensor) -> Term:
        """This term for the samples `rows` only."""

    @property
    def has_density(self) -> bool:
        """Whether the term carries a log density, so that errors can be had in nats."""
        return False

    def watched(self, z: Any) -> Tensor:
        """(B, M) the part of a state (or of an error) that error control in the state's norm looks at."""
        return flatten(z)

    def nats(self, error: Any, aux: Aux) -> Tensor:
        """(B,) float64 what a local error costs in log density; defined for a LikelihoodFlow only.

        Raises:
            TypeError: This term carries no density.
        """
        raise TypeError(f"{type(self).__name__} carries no density; control in nats needs a LikelihoodFlow.")


class ProbabilityFlow(Term):
    """The probability-flow ODE in (t, x); callable as `flow(t, x)`, as torchdiffeq.odeint takes it.

    Args:
        model: The score model.
    """

    def __init__(self, model: ScoreModel) -> None:
        self.model = model

    def __call__(self, t: Tensor | float, x: Tensor) -> Tensor:
        """dx/dt at (t, x), the shape and dtype of `x` (B, *event); `t`, a number or (B,), is clamped."""
        return self.model.velocity(x, self.model.sde.clamp(as_time(t)))

    def coordinate(self, t: Tensor) -> Tensor:
        return t

    def time(self, s: Tensor) -> Tensor:
        return self.model.sde.clamp(s)

    def enter(self, x: Tensor, s: Tensor) -> Tensor:
        return x

    def leave(self, z: Tensor, s: Tensor) -> Tensor:
        return z

    def evaluate(self, s: Tensor, z: Tensor, node: Tensor) -> Evaluation:
        return Evaluation(self.model.velocity(z, self.time(s)), NO_AUX)

    def take(self, rows: Tensor) -> ProbabilityFlow:
        return ProbabilityFlow(self.model.take(rows))


class ReverseSDE(Term):
    """The reverse-time SDE of noise level eta in s = -t; as it is for torchsde.sdeint over `span`.

    Args:
        model: The score model.
        eta: Noise level, >= 0, or a function of t (B,) that returns it; 0 is the probability flow, 1 Anderson's SDE.
    """

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, model: ScoreModel, eta: float | Callable[[Tensor], Tensor] = 1.0) -> None:
        if not callable(eta) and not eta >= 0:
            raise ValueError(f"eta={eta!r}; eta >= 0 is needed.")
        self.model = model
        self.eta = eta

    @property
    def span(self) -> tuple[float, float]:
        """(-t_max, -t_min): where s starts and ends, increasing, for torchsde."""
        return -self.model.sde.t_max, -self.model.sde.t_min

    def _level(self, t: Tensor) -> Tensor:
        return as_time(self.eta(t)) if callable(self.eta) else torch.full_like(t, self.eta)

    def drift(self, s: Tensor, x: Tensor) -> Tensor:
        """dx/ds without the noise at s (B,), the shape and dtype of `x`."""
        t, sde = self.time(s), self.model.sde
        # f x - (1 + eta^2)/2 g^2 score as a x0 + b eps; score = -eps/sigma and x = alpha x0 + sigma eps.
        rate, alpha, sigma = sde.dlog_alpha(t), sde.alpha(t), sde.sigma(t)
        pull = 0.5 * (1.0 + self._level(t).square()) * -2.0 * sde.dhalf_log_snr(t) * sigma
        mix = Mix(rate * alpha, rate * sigma + pull)
        return -self.model.as_mix(x, t, self.model.output(x, t), mix)

    def noise_scale(self, s: Tensor) -> Tensor:
        """(B,) float64 eta g, what multiplies dw at s (B,)."""
        t = self.time(s)
        return self._level(t) * self.model.sde.diffusion(t)

    def f(self, s: Tensor | float, x: Tensor) -> Tensor:
        """The drift at s (a number), as torchsde asks for it; `x` is (B, D)."""
        return self.drift(as_time(s).to(x.device).expand(x.shape[0]), x)

    def g(self, s: Tensor | float, x: Tensor) -> Tensor:
        """The diagonal diffusion at s (a number), the shape of `x` (B, D), as torchsde asks for it."""
        return column(self.noise_scale(as_time(s).to(x.device).expand(x.shape[0])), x).expand_as(x)

    def coordinate(self, t: Tensor) -> Tensor:
        return -t

    def time(self, s: Tensor) -> Tensor:
        return self.model.sde.clamp(-s)

    def enter(self, x: Tensor, s: Tensor) -> Tensor:
        return x

    def leave(self, z: Tensor, s: Tensor) -> Tensor:
        return z

    def evaluate(self, s: Tensor, z: Tensor, node: Tensor) -> Evaluation:
        return Evaluation(self.drift(s, z), NO_AUX)

    def take(self, rows: Tensor) -> ReverseSDE:
        return ReverseSDE(self.model.take(rows), self.eta)


class FlowState(NamedTuple):
    """The state of a LikelihoodFlow.

    Attributes:
        u: (B, D) x / (alpha c), in the dtype of x.
        log_det: (B, C) float64 accumulated divergence, one channel a probe; C = 0 without a divergence.
        product: (B, D) accumulated Jacobian product of one fixed probe, else (B, 0).
    """

    u: Tensor
    log_det: Tensor
    product: Tensor


class LikelihoodFlow(Term):
    """The probability flow in the mixed variable, with its log determinant.

    Args:
        model: The score model.
        divergence: How the trace is had; None for the flow alone (`encode`, `decode`, `sample`).
        event: The event's shape.
        seed: Of the probes.
        indices: (B,) int64 global sample numbers, which key the probes.
        mixed: The variable of integration; None: that of the model's SDE and data_std.
    """

    def __init__(
        self,
        model: ScoreModel,
        divergence: Divergence | None,
        event: torch.Size,
        seed: int,
        indices: Tensor,
        mixed: MixedTime | None = None,
    ) -> None:
        self.model = model
        self.divergence = divergence
        self.event = event
        self.seed = seed
        self.indices = indices
        self.mixed = MixedTime(model.sde, model.data_std) if mixed is None else mixed

    @property
    def has_density(self) -> bool:
        return self.divergence is not None

    @property
    def fresh(self) -> bool:
        """Whether the probes of the value are new at every node."""
        return isinstance(self.divergence, Hutchinson) and self.divergence.fresh

    @property
    def channels(self) -> int:
        """How many log determinants the state carries: 1 exact or fresh, one a fixed probe, one more for a control."""
        if not isinstance(self.divergence, Hutchinson):
            return 0 if self.divergence is None else 1
        return 1 + int(self.divergence.control) if self.fresh else self.divergence.probes

    @property
    def keeps_product(self) -> bool:
        """Whether one fixed probe's product is carried along, for its standard error."""
        return isinstance(self.divergence, Hutchinson) and not self.fresh and self.divergence.probes == 1

    def take(self, rows: Tensor) -> LikelihoodFlow:
        model, indices = self.model.take(rows), self.indices[rows]
        return LikelihoodFlow(model, self.divergence, self.event, self.seed, indices, self.mixed)

    def coordinate(self, t: Tensor) -> Tensor:
        return self.mixed.coordinate(t)

    def time(self, s: Tensor) -> Tensor:
        return self.mixed.time(s)

    def log_scale(self, t: Tensor) -> Tensor:
        """log(alpha c) at time t (B,), float64: x = alpha c u."""
        sde = self.model.sde
        return sde.log_alpha(t) + torch.hypot(torch.exp(-sde.half_log_snr(t)), as_time(self.model.data_std)).log()

    def enter(self, x: Tensor, s: Tensor) -> FlowState:
        u = flatten(x)
        u = u * column(torch.exp(-self.log_scale(self.time(s))), u)
        log_det = torch.zeros(x.shape[0], self.channels, dtype=torch.float64, device=x.device)
        return FlowState(u, log_det, torch.zeros_like(u) if self.keeps_product else u.new_zeros(x.shape[0], 0))

    def leave(self, z: FlowState, s: Tensor) -> Tensor:
        return (z.u * column(torch.exp(self.log_scale(self.time(s))), z.u)).reshape(-1, *self.event)

    def evaluate(self, s: Tensor, z: FlowState, node: Tensor) -> Evaluation:
        q, rate = self.mixed.log_ratio(s)
        sde, rho = self.model.sde, q.exp()
        t = sde.clamp(sde.time_at(-q))
        alpha = sde.alpha(t)
        c2 = self.model.data_std**2 + rho.square()
        k = rho / c2.sqrt()
        scale = alpha * c2.sqrt()
        mine = self.model.parameterization.mix(sde, t)
        flow = conversion(alpha, rho * alpha, mine, Mix(-rate * k * rho / c2, rate * k * self.model.data_std**2 / c2))
        slope = conversion(alpha, rho * alpha, mine, Mix(torch.zeros_like(k), -1.0 / k))
        x = z.u * column(scale, z.u)
        out, traces, product, notes = self._network(x, t, node, flow.output * scale)
        du = column(flow.x, x) * x + column(flow.output, x) * out
        gradient = column(slope.x, x) * x + column(slope.output, x) * out
        log_det = traces + (flow.x * scale * x.shape[1])[:, None]
        if product is not None:
            # w = J' v of the whole field is the network's plus a multiple of v, which has no variance: left out.
            return Evaluation(FlowState(du, log_det, product), Aux(gradient, notes))
        return Evaluation(FlowState(du, log_det, z.product), Aux(gradient, notes))

    def _network(
        self, x: Tensor, t: Tensor, node: Tensor, jacobian: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Note | None]:
        """Output (B, D), traces (B, C) and fixed-probe product of `jacobian` (B,) times the network's Jacobian."""

        def field(state: Tensor) -> Tensor:
            return flatten(self.model.output(state.reshape(-1, *self.event), t))

        if self.divergence is None:
            with torch.no_grad():
                out = field(x)
            return out, torch.zeros(x.shape[0], 0, dtype=torch.float64, device=x.device), None, None
        probes = None
        if isinstance(self.divergence, Hutchinson):
            probes = self.divergence.draw(self.seed, self.indices, node, x.shape[1], x.dtype)
        out, traces, products = self.divergence.evaluate(field, x, probes)
        traces = traces * jacobian[:, None]
        if probes is None or products is None or not isinstance(self.divergence, Hutchinson):
            return out, traces, None, None
        products = products * column(jacobian, products)
        if self.fresh:
            count = self.divergence.probes
            merged = torch.cat((traces[:, :count].mean(1, keepdim=True), traces[:, count:]), 1)
            return out, merged, None, note(probes[:count], products[:, :count])
        return out, traces, products[:, 0] if self.keeps_product else None, None

    def watched(self, z: FlowState) -> Tensor:
        return z.u if self.fresh else torch.cat((z.u.double(), z.log_det), 1)

    def nats(self, error: FlowState, aux: Aux) -> Tensor:
        gradient = aux.gradient
        if gradient is None or self.divergence is None:
            raise TypeError("a LikelihoodFlow without a divergence carries no density; control it in the state's norm.")
        if not self.fresh:
            return dot(gradient, error.u).abs() + error.log_det.mean(1).abs()
        if self.channels > 1:
            return dot(gradient, error.u).abs() + error.log_det[:, 1].abs()
        # Fresh noise must not steer the path: without a control probe only the norms are at hand.
        return dot(gradient, gradient).sqrt() * dot(error.u, error.u).sqrt()

"""Multistep methods of the literature: DDIM, DPM-Solver++ and DEIS.

All integrate the probability flow (DDIM with eta > 0 the reverse SDE) with one evaluation a step; they differ in which
prediction they integrate, in which variable, over how many past ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._tensor import column
from ..brownian import BrownianPath
from ..terms import NO_AUX, ReverseSDE, Term
from .base import Equation, Proposal, require_flow, require_reverse
from .multistep import Multistep, unit_noise
from .semilinear import Form, Linear, Variable, psi
from .singlestep import propose_single
from .start import EXPLICIT, History, Start, empty


@dataclass(frozen=True)
class DDIM(Multistep):
    """DDIM: exact for a constant prediction, order 1; with `eta` > 0 its stochastic form.

    Args:
        eta: 0 integrates a ProbabilityFlow. Above 0, up to 1, a ReverseSDE of the same eta, with the noise variance
            eta^2 sigma_1^2 (1 - e^{-2h}) of the published method; at 1 that is the exact posterior step. Both eta agree
            as steps shrink; weak order 1.

    Source: Song, Meng and Ermon 2021, denoising diffusion implicit models.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta={self.eta!r}; 0 <= eta <= 1 is needed (a ReverseSDE takes more by other solvers).")

    @property
    def remembers(self) -> bool:
        return False

    @property
    def equation(self) -> Equation:
        return "flow" if self.eta == 0 else "reverse"

    @property
    def form(self) -> Form:
        return "data"

    @property
    def depth(self) -> int:
        return 1

    def init(self, term: Term, z: Tensor) -> History:
        if self.eta == 0:
            require_flow(self, term)
        else:
            require_reverse(self, term)
            assert isinstance(term, ReverseSDE)
            if term.eta != self.eta:
                raise ValueError(f"DDIM(eta={self.eta!r}) on ReverseSDE(eta={term.eta!r}); they must agree.")
        return empty(z, 1)

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: History, path: BrownianPath | None
    ) -> Proposal:
        if self.eta == 0:
            return super().propose(term, s0, s1, z, memory, path)
        sde, t0, t1 = term.model.sde, term.time(s0), term.time(s1)
        h = sde.half_log_snr(t1) - sde.half_log_snr(t0)
        data = term.model.data(z, t0)
        fresh = -torch.expm1(-2.0 * h)
        kept = (1.0 - self.eta**2 * fresh).sqrt()  # of sigma_1, what stays on the old noise
        pull = torch.exp(sde.log_sigma(t1) - sde.log_sigma(t0)) * kept
        moved = column(pull, z) * z + column(sde.alpha(t1) - pull * sde.alpha(t0), z) * data
        noise = sde.sigma(t1) * self.eta * fresh.clamp(min=0.0).sqrt()
        moved = moved + column(noise, z) * unit_noise(self, path, s0, s1, memory.entered, z)
        kept_memory = History(memory.entered + 1, memory.nodes, memory.past)
        return Proposal(moved, None, NO_AUX, kept_memory, torch.ones_like(s0, dtype=torch.bool))


@dataclass(frozen=True)
class DPMSolverPP(Multistep):
    """DPM-Solver++: in the data prediction.

    Args:
        order: 1, 2 or 3.
        multistep: True: one evaluation a step (2M, 3M; order 3 takes one more in all). False: `order` evaluations a
            step and no memory (2S, 3S).
        compat: With `multistep`: the published coefficients, to reproduce published samples. These are the "midpoint"
            one in the second order, and in the third a second difference that lacks its factor 2 and a start of order
            1, which leave it of order 2. (k-diffusion's 3M takes the exact coefficient in its second step.)

    Source: Lu et al. 2022, DPM-Solver++.
    """

    order: int = 2
    multistep: bool = True
    compat: bool = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order!r}; 1, 2 or 3 is needed.")
        if self.compat and not self.multistep:
            raise ValueError("compat=True with multistep=False; the single-step methods have no other coefficients.")

    @property
    def form(self) -> Form:
        return "data"

    @property
    def depth(self) -> int:
        return self.order if self.multistep else 1

    @property
    def start(self) -> Start:
        return EXPLICIT[1] if self.compat else super().start

    @property
    def evaluations(self) -> int:
        return 1 if self.multistep else self.order

    def weigh(self, term: Term, step: Linear, history: History, valid: Tensor) -> Tensor:
        if not self.compat or self.order == 1:
            return super().weigh(term, step, history, valid)
        return published(step, history.nodes, valid)

    def propose(
        self, term: Term, s0: Tensor, s1: Tensor, z: Tensor, memory: History, path: BrownianPath | None
    ) -> Proposal:
        if self.multistep:
            return super().propose(term, s0, s1, z, memory, path)
        return propose_single(term, self.form, self.order, s0, s1, z, memory)


def published(step: Linear, nodes: Tensor, valid: Tensor) -> Tensor:
    """(B, K) weights of DPM-Solver++(2M), K = 2, or (3M), K = 3, as published; lower orders where nodes lack.

    Of two equal nodes there is no difference to take. K = 2 is for the reverse SDE too.
    """
    h, z = step.length, step.exponent * step.length
    safe = torch.where(h == 0, 1.0, h)
    apart = nodes[:, :-1] - nodes[:, 1:]
    usable = valid[:, 1:] & (apart != 0)
    gaps = torch.where(usable, apart, 1.0) / safe[:, None]
    there = usable.double()
    whole, middle = -torch.expm1(z), -0.5 * torch.expm1(z)
    # Differences as combinations of the predictions: d0 = (m0 - m1)/r0, d1 = (m1 - m2)/r1.
    count = nodes.shape[1]
    unit = torch.eye(count, dtype=torch.float64, device=nodes.device)
    d0 = (there[:, 0] / gaps[:, 0])[:, None] * (unit[0] - unit[1])
    second = whole[:, None] * unit[0] + middle[:, None] * d0
    if count == 2:
        return step.gain[:, None] * second
    d1 = (there[:, 1] / gaps[:, 1])[:, None] * (unit[1] - unit[2])
    r0, r1 = gaps[:, :1], gaps[:, 1:]
    first = d0 + r0 / (r0 + r1) * (d0 - d1)
    curve = (d0 - d1) / (r0 + r1)
    p2 = h * psi(2, z)
    p3 = h.square() * psi(3, z) / safe
    third = whole[:, None] * unit[0] + p2[:, None] * first + p3[:, None] * curve
    return step.gain[:, None] * torch.where(valid[:, 2:], third, second)


@dataclass(frozen=True)
class DEIS(Multistep):
    """DEIS: in the noise prediction, polynomial in time or in rho = sigma/alpha.

    Args:
        order: 1 to 4 (tAB-0 to tAB-3); orders 3 and 4 take one and three evaluations more in all.
        variable: "t" (tAB), "rho" (rhoAB) or "half_log_snr".

    Source: Zhang and Chen 2022, fast sampling of diffusion models with exponential integrator.
    """

    order: int = 3
    variable: Variable = "t"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"order={self.order!r}; 1, 2, 3 or 4 is needed.")
        if self.variable not in ("t", "rho", "half_log_snr"):
            raise ValueError(f"variable={self.variable!r}; 't', 'rho' or 'half_log_snr' is needed.")

    @property
    def form(self) -> Form:
        return "noise"

    @property
    def depth(self) -> int:
        return self.order

"""Densities that are not smooth, diffused exactly: a product of one law in every coordinate.

With x_t = alpha x_0 + sigma eps, one coordinate of x_0 being

    uniform on [-w, w]   p_t = (Phi(z+) - Phi(z-)) / (2 alpha w),   z+- = (+-alpha w - x) / sigma
    Laplace(b)           p_t = e^{r^2/2} (e^{L+} + e^{L-}) / (2 alpha b),   r = sigma / (alpha b),
                         L+- = -+x / (alpha b) + log Phi(+-x / sigma - r),   score = -tanh((L+ - L-) / 2) / (alpha b)
    Student-t(nu)        p_t = E N(x; 0, sigma^2 + alpha^2 / g),   g ~ Gamma(nu/2, rate nu/2), by the trapezoid rule in
                         log g: it converges exponentially, 1e-13 with 150 nodes out to |x| = 1e4

The first has edges, the second a kink in the middle, the third tails that no Gaussian prior covers. Everything is
float64 and kept in logarithms where densities underflow; scores can be differentiated, which gives the exact trace.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

import sdekit
from sdekit._tensor import column, flatten
from sdekit.model.parameterization import time_of_label

_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)


class Law(ABC):
    """A law on the line whose diffusion is known; alpha and sigma broadcast against x, all float64.

    Attributes:
        name: As tables have it.
        std: Standard deviation.
        corners: Where the density or its slope jumps.
    """

    name: str
    std: float
    corners: tuple[float, ...]

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p_0, elementwise."""

    @abstractmethod
    def diffused(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log p_t and its slope in x, elementwise."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Independent samples."""


class Uniform(Law):
    """Uniform on [-width, width]."""

    def __init__(self, width: float = 1.0) -> None:
        self.name, self.width = "uniform", width
        self.std, self.corners = width / math.sqrt(3.0), (-width, width)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.where(x.abs() <= self.width, -math.log(2.0 * self.width), -math.inf)

    def diffused(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        # At |x|, so that the larger of two tiny numbers comes first and nothing cancels.
        side = torch.where(x < 0, -1.0, 1.0)
        y, half = side * x, alpha * self.width
        near, far = torch.special.log_ndtr((half - y) / sigma), torch.special.log_ndtr((-half - y) / sigma)
        mass = near + (-torch.expm1(far - near)).log()
        peak = -0.5 * ((half - y) / sigma).square() - _LOG_ROOT  # log phi(z+)
        slope = (peak - mass).exp() / sigma * torch.expm1(-2.0 * half * y / sigma.square())
        return mass - (2.0 * half).log(), side * slope

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self.width * (2.0 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1.0)


class Laplace(Law):
    """Laplace with scale b: density exp(-|x|/b) / 2b."""

    def __init__(self, scale: float = 1.0) -> None:
        self.name, self.scale = "Laplace", scale
        self.std, self.corners = math.sqrt(2.0) * scale, (0.0,)

    def log_prob(self, x: Tensor) -> Tensor:
        return -x.abs() / self.scale - math.log(2.0 * self.scale)

    def diffused(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        scale = alpha * self.scale
        r = sigma / scale
        right = -x / scale + torch.special.log_ndtr(x / sigma - r)
        left = x / scale + torch.special.log_ndtr(-x / sigma - r)
        log_prob = 0.5 * r.square() - (2.0 * scale).log() + torch.logaddexp(right, left)
        return log_prob, -(0.5 * (right - left)).tanh() / scale

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        u = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
        return -self.scale * torch.sign(u) * torch.log1p(-2.0 * u.abs())


class StudentT(Law):
    """Student's t with an integer number `freedom` > 2 of degrees of freedom."""

    _LOW, _HIGH, _NODES = -34.0, 4.5, 150  # of log g

    def __init__(self, freedom: int = 3) -> None:
        self.name, self.freedom = f"Student-t({freedom})", freedom
        self.std, self.corners = math.sqrt(freedom / (freedom - 2.0)), ()
        half, v = 0.5 * freedom, torch.linspace(self._LOW, self._HIGH, self._NODES, dtype=torch.float64)
        self._log_weights = torch.log_softmax(half * v - half * v.exp(), 0)
        self._spreads = torch.exp(-v)

    def log_prob(self, x: Tensor) -> Tensor:
        nu = float(self.freedom)
        front = math.lgamma(0.5 * (nu + 1.0)) - math.lgamma(0.5 * nu) - 0.5 * math.log(nu * math.pi)
        return front - 0.5 * (nu + 1.0) * torch.log1p(x.square() / nu)

    def diffused(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        spread = (sigma.square()[..., None] + alpha.square()[..., None] * self._spreads).expand(*x.shape, -1)
        joint = self._log_weights - 0.5 * spread.log() - 0.5 * x.square()[..., None] / spread
        slope = -x * (joint.softmax(-1) / spread).sum(-1)
        return joint.logsumexp(-1) - _LOG_ROOT, slope

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        normal = torch.randn((*shape, self.freedom + 1), generator=generator, dtype=torch.float64)
        return normal[..., 0] / (normal[..., 1:].square().mean(-1)).sqrt()


LAWS: tuple[Law, ...] = (StudentT(3), Laplace(1.0), Uniform(1.0))


class RoughNet(nn.Module):
    """The exact noise prediction of a product law, as a network of (x, t)."""

    def __init__(self, law: Law, sde: sdekit.SDE) -> None:
        super().__init__()
        self.law, self.sde = law, sde

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        t = time_of_label(sdekit.noise().label, self.sde, label)
        sigma = column(self.sde.sigma(t), x)
        return -sigma * self.law.diffused(x, column(self.sde.alpha(t), x), sigma)[1]


def rough_model(law: Law, sde: sdekit.SDE) -> sdekit.ScoreModel:
    """The exact score model of the product of `law` over the coordinates of a state."""
    return sdekit.ScoreModel(RoughNet(law, sde), sde, data_std=law.std)


def marginal_log_prob(law: Law, sde: sdekit.SDE, x: Tensor, t: float) -> Tensor:
    """(B,) exact log p_t of the product law at `x` (B, *event)."""
    time = torch.tensor(t, dtype=torch.float64)
    return flatten(law.diffused(x, sde.alpha(time), sde.sigma(time))[0]).sum(1)


def _levels() -> list[tuple[Tensor, Tensor]]:
    """(alpha, sigma) from the data's end of a VP process to the noise's."""
    pairs = ((1.0, 3e-3), (0.99, 0.14), (0.5, 0.87), (6.6e-3, 1.0))
    return [(torch.tensor([a], dtype=torch.float64), torch.tensor([s], dtype=torch.float64)) for a, s in pairs]


def _points(sigma: Tensor) -> Tensor:
    """Far and wide, and close to where the laws have corners."""
    wide = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)
    close = torch.linspace(-6.0, 6.0, 301, dtype=torch.float64) * sigma
    return torch.cat((wide, close, 1.0 + close, close - 1.0))


def slope_error(law: Law) -> float:
    """Largest relative difference of the score and the derivative of log p_t by autograd."""
    worst = 0.0
    for alpha, sigma in _levels():
        x = _points(sigma).requires_grad_()
        log_prob, slope = law.diffused(x, alpha, sigma)
        derived = torch.autograd.grad(log_prob.sum(), x)[0]
        worst = max(worst, float(((slope - derived).abs() / (1.0 + derived.abs())).detach().max()))
    return worst


def mass_error(law: Law) -> float:
    """Largest |integral of p_t - 1|, by the trapezoid rule in asinh(x / scale)."""
    worst = 0.0
    for alpha, sigma in _levels():
        scale = float(sigma.clamp(min=0.02))
        u = torch.linspace(-1.0, 1.0, 40_001, dtype=torch.float64) * math.asinh(3e6 / scale)
        density = law.diffused(scale * u.sinh(), alpha, sigma)[0].exp() * scale * u.cosh()
        worst = max(worst, abs(float(torch.trapezoid(density, u)) - 1.0))
    return worst


def start_error(law: Law) -> float:
    """Largest |log p_t - log p_0| away from corners at sigma = 1e-3, in units of sigma^2: first order in sigma^2."""
    alpha, sigma = torch.ones(1, dtype=torch.float64), torch.full((1,), 1e-3, dtype=torch.float64)
    x = _points(sigma)
    far = torch.isfinite(law.log_prob(x))
    for corner in law.corners:
        far = far & ((x - corner).abs() > 8e-3)
    return float((law.diffused(x[far], alpha, sigma)[0] - law.log_prob(x[far])).abs().max()) / 1e-6

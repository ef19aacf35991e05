"""Gaussian components kept by their eigenvectors, and what they say of a noised state.

V = alpha^2 C + sigma^2 I has the eigenvectors of C at every time, so its inverse, logarithm and trace cost one addition
per eigenvalue. Directions outside of the kept eigenvectors share one variance (a low-rank covariance).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._tensor import there

_LOG_2PI = math.log(2.0 * math.pi)


class Pull(NamedTuple):
    """What K Gaussian components say of states x at times t."""

    log_prob: Tensor  # (B, K) nats
    precise: Tensor  # (B, K, D) V^-1 (x - alpha mu)
    data: Tensor  # (B, K, D) posterior mean of x_0
    trace: Tensor  # (B, K) trace of V^-1


@dataclass(frozen=True, eq=False)
class Components:
    """K Gaussians: means (K, D), eigenvalues (K, R), eigenvectors (K, D, R) or None for the axes, and the variance
    (K,) of the D - R directions outside of the eigenvectors, or None where R = D.
    """

    means: Tensor
    values: Tensor
    basis: Tensor | None = None
    residual: Tensor | None = None

    def to(self, device: torch.device) -> Components:
        if self.means.device == device:
            return self
        moved = [None if part is None else there(part, device) for part in (self.basis, self.residual)]
        return Components(there(self.means, device), there(self.values, device), *moved)

    def coordinates(self, offset: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, K, R) coordinates of (B, K, D) offsets along the eigenvectors, and what lies outside of them."""
        if self.basis is None:
            return offset, None
        along = torch.einsum("bkd,kdr->bkr", offset, self.basis)
        return along, None if self.residual is None else offset - self.embed(along)

    def embed(self, along: Tensor) -> Tensor:
        return along if self.basis is None else torch.einsum("bkr,kdr->bkd", along, self.basis)

    def pull(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Pull:
        """What the components say of `x` (B, D) at levels alpha, sigma (B,)."""
        a, s2 = alpha[:, None, None], sigma.square()[:, None, None]
        offset = x[:, None, :] - a * self.means
        along, rest = self.coordinates(offset)
        variance = a.square() * self.values + s2
        scaled = along / variance
        precise, shrunk = self.embed(scaled), self.embed(self.values * scaled)
        quadratic, log_det = (along * scaled).sum(2), variance.log().sum(2)
        trace = variance.reciprocal().sum(2)
        if rest is not None and self.residual is not None:
            outside = self.residual[:, None]
            spare = self.means.shape[1] - self.values.shape[1]
            wide = a.square() * outside + s2
            precise, shrunk = precise + rest / wide, shrunk + rest * (outside / wide)
            quadratic = quadratic + (rest.square() / wide).sum(2)
            log_det, trace = log_det + spare * wide[..., 0].log(), trace + spare / wide[..., 0]
        log_prob = -0.5 * (quadratic + log_det + self.means.shape[1] * _LOG_2PI)
        return Pull(log_prob, precise, self.means + a * shrunk, trace)

    def draw(self, component: Tensor, generator: torch.Generator) -> Tensor:
        """(n, D) draws, one of each component (n,) named."""
        count, dim = component.shape[0], self.means.shape[1]
        noise = torch.randn(count, dim, generator=generator, dtype=torch.float64, device=self.means.device)
        if self.basis is None:
            return self.means[component] + self.values[component].sqrt() * noise
        basis = self.basis[component]
        along = torch.einsum("nd,ndr->nr", noise, basis)
        x = torch.einsum("nr,ndr->nd", along * self.values[component].sqrt(), basis)
        if self.residual is not None:
            rest = noise - torch.einsum("nr,ndr->nd", along, basis)
            x = x + rest * self.residual[component].sqrt()[:, None]
        return self.means[component] + x

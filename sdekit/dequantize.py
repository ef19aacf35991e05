"""Dequantisers: continuous states for data that are integers.

At noise level t, with its alpha and sigma, level k has the cell alpha times its bin: centre alpha c_k, width alpha w.
Given k, a dequantiser draws a state x from a law q(x | k), each dimension by itself, and

    log P(k) >= E_q[ log p_t(x) + log P(k | x) - log q(x | k) ]          the average bound
    log P(k) >= E_q[ log (1/K) sum_i p_t(x_i) P(k | x_i) / q(x_i | k) ]  the importance-weighted bound, K draws

    uniform            x = alpha (low + w (k + u)),  u ~ U[0, 1)     -log q = log(alpha w)
    truncated normal   x = alpha c_k + sigma e,  |e| <= tau          -log q = (e^2 + log 2 pi sigma^2)/2 + log Z
    variational        x = alpha c_k + sigma e,  e ~ N(0, 1)         the same with Z = 1

with tau = alpha w/(2 sigma), half a cell in units of the noise, and Z = erf(tau/sqrt 2). What is bounded differs:

    cells     P(k) = integral of p_t over the cell of k: the first two, which stay in it, so that P(k | x) = 1
    decoder   P(k) = integral of p_t(x) P(k | x) dx,  P(k | x) = softmax over j of -(x - alpha c_j)^2/(2 sigma^2)

The average bound is too low by the divergence of q from p_t within the cell. Uniform is the best q for a density that
is flat there, as of a model trained on uniformly dequantised data; the truncated normal of tau = 3 loses 0.39 nats a
dimension more. A model trained on the integers, at their bins' centres, has p_t = sum_k P(k) N(alpha c_k, sigma^2), of
which the truncated normal is a term: it loses next to nothing, and the uniform law 0.60 nats a dimension.

Source: Zheng et al. 2023 (i-DODE), truncated normal; Kingma et al. 2021 (VDM), variational.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import _random
from ._checks import require_positive
from .sde.base import SDE
from .units import Levels

_TAU = 3.0  # of a state that leaves its cell in 0.3% of the dimensions; 3.02 in i-DODE and VDM


class Drawn(NamedTuple):
    """States drawn for levels, float64.

    Attributes:
        x: (B, D) states at the noise level.
        decoder: (B,) log P(k | x), nats; 0 where cells are disjoint.
        surprise: (B,) -log q(x | k), nats.
        entropy: (B,) its mean over x in closed form, nats.
    """

    x: Tensor
    decoder: Tensor
    surprise: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Dequantizer(ABC):
    """How states are drawn for levels."""

    @abstractmethod
    def time(self, sde: SDE, levels: Levels) -> float:
        """The noise level that states are drawn at where none is asked for.

        Raises:
            ValueError: It lies outside of [t_min, t_max].
        """

    @abstractmethod
    def draw(self, sde: SDE, t: Tensor, k: Tensor, levels: Levels, keys: Tensor, number: Tensor) -> Drawn:
        """One state for each sample.

        Args:
            sde: The forward process.
            t: (B,) float64 noise levels.
            k: (B, D) int64 levels.
            levels: What they stand for.
            keys: (B,) from `_random.sample_keys`.
            number: (B,) int64 number of the draw, which with the key makes it.
        """


@dataclass(frozen=True)
class UniformDequantizer(Dequantizer):
    """Uniform within the cell, at t_min by default: what most reported bits/dim use."""

    def time(self, sde: SDE, levels: Levels) -> float:
        return sde.t_min

    def draw(self, sde: SDE, t: Tensor, k: Tensor, levels: Levels, keys: Tensor, number: Tensor) -> Drawn:
        u = 1.0 - _random.uniforms(keys, number, k.shape[1])  # in [0, 1)
        log_volume = k.shape[1] * (sde.log_alpha(t) + math.log(levels.width))
        return Drawn(sde.alpha(t)[:, None] * levels.place(k, u), torch.zeros_like(t), log_volume, log_volume)


@dataclass(frozen=True)
class TruncatedNormalDequantizer(Dequantizer):
    """The forward process's own noise about the cell's centre, cut off at the cell's edges.

    Args:
        tau: Half a cell in units of the noise, > 0, where no noise level is asked for: that level follows from it.
    """

    tau: float = _TAU

    def __post_init__(self) -> None:
        require_positive("tau", self.tau)

    def time(self, sde: SDE, levels: Levels) -> float:
        return _time_of(sde, levels, self.tau)

    def draw(self, sde: SDE, t: Tensor, k: Tensor, levels: Levels, keys: Tensor, number: Tensor) -> Drawn:
        size, tau = k.shape[1], _half_cell(sde, t, levels)
        mass = torch.special.erf(tau * math.sqrt(0.5))
        v = 2.0 * _random.uniforms(keys, number, size) - 1.0  # in (-1, 1]
        e = math.sqrt(2.0) * torch.special.erfinv(mass[:, None] * v)
        e = torch.clamp(e, -tau[:, None], tau[:, None])  # rounding, and erfinv(1) where Z rounds to 1
        log_norm = sde.log_sigma(t) + 0.5 * math.log(2.0 * math.pi) + mass.log()
        # E e^2 / 2: half the variance of a normal that is cut off at tau
        spread = 0.5 - tau * torch.exp(-0.5 * tau.square()) / (math.sqrt(2.0 * math.pi) * mass)
        surprise = size * log_norm + 0.5 * e.square().sum(1)
        return Drawn(_about(sde, t, k, levels, e), torch.zeros_like(t), surprise, size * (log_norm + spread))


@dataclass(frozen=True)
class VariationalDequantizer(Dequantizer):
    """The forward process's own noise about the cell's centre, with a decoder for what leaves the cell.

    Args:
        tau: Half a cell in units of the noise, > 0, where no noise level is asked for: that level follows from it.
    """

    tau: float = _TAU

    def __post_init__(self) -> None:
        require_positive("tau", self.tau)

    def time(self, sde: SDE, levels: Levels) -> float:
        return _time_of(sde, levels, self.tau)

    def draw(self, sde: SDE, t: Tensor, k: Tensor, levels: Levels, keys: Tensor, number: Tensor) -> Drawn:
        size = k.shape[1]
        e = _random.normal(keys, number, size, torch.float64)
        log_norm = sde.log_sigma(t) + 0.5 * math.log(2.0 * math.pi)
        surprise = size * log_norm + 0.5 * e.square().sum(1)
        decoder = _log_decoder(k, e, _half_cell(sde, t, levels)[:, None], levels.count)
        return Drawn(_about(sde, t, k, levels, e), decoder, surprise, size * (log_norm + 0.5))


def _time_of(sde: SDE, levels: Levels, tau: float) -> float:
    """The noise level at which half a cell is `tau` of the noise."""
    wanted = math.log(2.0 * tau / levels.width)
    first, last = (float(sde.half_log_snr(t)) for t in (sde.t_min, sde.t_max))
    if not last <= wanted <= first:
        fits = 0.5 * levels.width * math.exp(first)
        raise ValueError(
            f"tau={tau:g} with levels {levels.width:.3g} apart needs half_log_snr={wanted:.3f}, and this process has "
            f"{first:.3f} at t_min={sde.t_min:g} to {last:.3f} at t_max={sde.t_max:g}: pass t= for another noise level "
            f"(tau is {fits:.3g} at t_min), or use UniformDequantizer()."
        )
    return float(sde.clamp(sde.time_at(wanted)))


def _half_cell(sde: SDE, t: Tensor, levels: Levels) -> Tensor:
    """(B,) half a cell in units of the noise at `t` (B,)."""
    return 0.5 * levels.width * sde.half_log_snr(t).exp()


def _about(sde: SDE, t: Tensor, k: Tensor, levels: Levels, e: Tensor) -> Tensor:
    """(B, D) states `e` (B, D) standard deviations away from their cells' centres."""
    return sde.alpha(t)[:, None] * levels.place(k.double()) + sde.sigma(t)[:, None] * e


def _log_decoder(k: Tensor, e: Tensor, tau: Tensor, count: int) -> Tensor:
    """(B,) log P(k | x) of states `e` (B, D) standard deviations from their cells' centres.

    Cell j is m = j - k cells away, at 2 tau m standard deviations, and its weight relative to the own cell's is
    exp(2 tau m (e - tau m)) <= exp(e^2/2): no overflow, and log1p keeps what is far below 1.
    """
    others = torch.zeros_like(e)
    for level in range(count):
        away = level - k
        others = others + torch.where(away == 0, 0.0, torch.exp(2.0 * tau * away * (e - tau * away)))
    return -torch.log1p(others).sum(1)

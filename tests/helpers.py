"""Problems with known answers, and networks that watch or misbehave: shared by the tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import sdekit
from sdekit import targets
from sdekit.terms import Aux, Evaluation
from sdekit.units import Levels

SDES: dict[str, sdekit.SDE] = {
    "vp": sdekit.VPSDE(),
    "sub-vp": sdekit.SubVPSDE(),
    "cosine": sdekit.CosineVPSDE(),
    "table": sdekit.TableVPSDE.linear(1000),
    "ve": sdekit.VESDE(),
    "karras": sdekit.KarrasSDE(),
    "flow": sdekit.RectifiedFlow(),
}

PARAMETERIZATIONS: dict[str, sdekit.Parameterization] = {
    "noise": sdekit.noise(),
    "score": sdekit.score(),
    "data": sdekit.data(),
    "velocity": sdekit.velocity(),
    "v": sdekit.v(),
    "edm": sdekit.edm(0.5),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normals in float64."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def spread_times(sde: sdekit.SDE, count: int) -> Tensor:
    """Times all over [t_min, t_max]: half of them equally spaced, half of them equally spaced in log t."""
    even = torch.linspace(sde.t_min, sde.t_max, count - count // 2, dtype=torch.float64)
    logs = torch.linspace(math.log(sde.t_min), math.log(sde.t_max), count // 2, dtype=torch.float64).exp()
    t = torch.cat((even, logs)).clamp(sde.t_min, sde.t_max).sort().values
    return t[torch.cat((torch.tensor([True]), t.diff() > 1e-9 * t[1:]))]


def gaussian(dim: int = 3, seed: int = 0, scale: float = 1.0) -> targets.Gaussian:
    """A Gaussian with a mean and a full, far from isotropic covariance."""
    basis = torch.linalg.qr(draw(seed, dim, dim)).Q
    values = torch.linspace(0.05, 0.9, dim, dtype=torch.float64) * scale**2
    return targets.Gaussian(0.4 * scale * draw(seed + 1, dim), (basis * values) @ basis.mT)


def mixture(dim: int, seed: int, count: int = 4, scale: float = 1.0) -> targets.GaussianMixture:
    """A mixture with diagonal covariances, its components apart but not without overlap."""
    source = seeded(seed)
    means = torch.randn(count, dim, generator=source, dtype=torch.float64) * (1.5 / math.sqrt(dim) + 0.3)
    stds = 0.15 + 0.5 * torch.rand(count, dim, generator=source, dtype=torch.float64)
    weights = 0.3 + torch.rand(count, generator=source, dtype=torch.float64)
    return targets.GaussianMixture(weights, scale * means, scale * stds)


def moments(target: targets.GaussianMixture) -> targets.Gaussian:
    """The Gaussian of a mixture's own mean and covariance, from its components."""
    parts, weights = target._components, target.weights
    mean = weights @ parts.means
    apart = parts.means - mean
    covariance = torch.diag(weights @ parts.values) + torch.einsum("k,ki,kj->ij", weights, apart, apart)
    return targets.Gaussian(mean, covariance)


class Watch(nn.Module):
    """A network that counts its calls and remembers its labels; `act` may answer in its stead.

    `act(call, x, label, answer)` gets the number of the call, from 1, and a function that returns the inner answer.
    """

    def __init__(self, net: nn.Module, act: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.net = net
        self.act = act
        self.calls = 0
        self.rows = 0
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, label: Tensor, **condition: object) -> Tensor:
        self.calls += 1
        self.rows += x.shape[0]
        self.labels.append(label.detach().clone())
        if self.act is None:
            return self.net(x, label, **condition)
        return self.act(self.calls, x, label, lambda: self.net(x, label, **condition))


def watched(model: sdekit.ScoreModel, act: Callable[..., Tensor] | None = None) -> tuple[sdekit.ScoreModel, Watch]:
    """`model` with its network under watch, and the watch."""
    watch = Watch(model.net, act)
    return sdekit.ScoreModel(watch, model.sde, model.parameterization, model.data_std, model.bound), watch


class Function(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, label: Tensor, **condition: object) -> Tensor:
        return self.function(x, label, **condition)


def perceptron(dim: int, seed: int, activation: type[nn.Module] = nn.Tanh, width: int = 32) -> nn.Module:
    """A small random network of (x, label), in float64, as smooth as its activation."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(dim + 1, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, dim)
            )

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return self.layers(torch.cat((x, label[:, None].to(x.dtype)), 1))

    net = Net().double()
    source = seeded(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=torch.float64) * 0.4)
    return net


def reference_flow(target: targets._Target, sde: sdekit.SDE, x: Tensor, t0: float, t1: float) -> Tensor:
    """The probability flow of `x` from t0 to t1 by scipy's DOP853 on f x - g^2/2 score, sample by sample."""

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat.copy())[None]
        now = times(t)
        rate = sde.drift_rate(now) * state - 0.5 * sde.diffusion(now) ** 2 * target.score(sde, state, now)
        return rate[0].numpy()

    ends = [
        solve_ivp(slope, (t0, t1), row.numpy(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1] for row in x.double()
    ]
    return torch.from_numpy(np.stack(ends))


def observed_order(errors: list[float]) -> list[float]:
    """log2 of the ratio of successive errors, the step halved each time."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def uneven_times(first: float, last: float, n: int) -> Tensor:
    """(n + 1,) times from `first` to `last`, graded, and jittered with period 3: doubling n halves steps."""
    u = torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
    jitter = torch.tensor([0.0, 0.22, -0.18], dtype=torch.float64).repeat(n // 3 + 1)[: n + 1] / n
    jitter[0] = jitter[-1] = 0.0
    u = u + jitter
    graded = u + 0.5 * u * (u - 1.0)
    grid = first + (last - first) * graded
    grid[0], grid[-1] = first, last
    return grid


LAWS = ["rademacher", "gaussian", "sphere"]


def true_variance(law: str, a: Tensor) -> float:
    """The variance of a probe's estimate of the trace of `a` (D, D) in closed form."""
    symmetric, dim = 0.5 * (a + a.T), a.shape[0]
    size = float(symmetric.square().sum())
    if law == "rademacher":
        return 2.0 * (size - float(a.diagonal().square().sum()))
    if law == "gaussian":
        return 2.0 * size
    return 2.0 * dim / (dim + 2.0) * (size - float(a.trace()) ** 2 / dim)


def drawn(
    divergence: sdekit.Hutchinson,
    count: int,
    size: int,
    seed: int = 0,
    node: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """(P, B, D) probes of the samples 0..count-1 at one node."""
    keys = divergence.keys(seed, torch.arange(count))
    return divergence.draw(keys, torch.full((count,), node, dtype=torch.int64), size, dtype)


class Given(sdekit.Term):
    """dz/ds = slope(s) (or slope(s, z)), with nothing of a model: what a solver sees, and how often it asks."""

    def __init__(self, slope: Callable[..., Tensor]) -> None:
        self.slope = slope
        self.asked: list[Tensor] = []

    def coordinate(self, t: Tensor) -> Tensor:
        return t

    def time(self, s: Tensor) -> Tensor:
        return s

    def enter(self, x: Tensor, s: Tensor) -> Tensor:
        return x

    def leave(self, z: Tensor, s: Tensor) -> Tensor:
        return z

    def evaluate(self, s: Tensor, z: Tensor, node: Tensor) -> Evaluation:
        self.asked.append(s)
        return Evaluation(self.slope(s, z), Aux(None, None))

    def take(self, rows: Tensor) -> Given:
        return self


def cell_log_prob(target: targets._Target, k: Tensor, levels: Levels, sde: sdekit.SDE, t: float) -> float:
    """Exact log-probability of the cell of `k` (D,) at `t`, for Gaussians of diagonal covariance and their mixtures."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    parts = target._components
    std = (alpha**2 * parts.values + sigma**2).sqrt()
    lower = (alpha * (levels.low + levels.width * k.double()) - alpha * parts.means) / std
    upper = lower + alpha * levels.width / std
    mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    return float(torch.logsumexp(target.weights.log() + mass.log().sum(1), 0))

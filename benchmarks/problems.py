"""The problems: fresh random mixtures with exact scores, small networks trained here, and the digits network.

Mixtures have 3 to 8 components with means N(0, 1) per coordinate, standard deviations uniform in [0.05, 1] along axes
or along random directions, and uneven weights; every seed draws others. Besides samples of the mixture there are points
near the separatrices of the flow, where a path decides between two components: the midpoint of two means, or the point
between them where both are equally likely, moved by 1e-2 to 1e-6 of the distance in a random direction.

Networks are trained on the ring of 8 Gaussians and used in float64, so that rounding plays no part.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

import sdekit
from sdekit.loss import EDMWeight, LogNormalSigma
from sdekit.model.nets import MLP
from sdekit.targets import Gaussian, GaussianMixture
from sdekit.training import Batch, Recipe, train
from sdekit.zoo import digits as zoo

from .common import CACHE, digest

RING_RADIUS = 2.0


class Mixture(NamedTuple):
    """A mixture by its parts: (K,), (K, D), (K, D, D)."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def scaled(self, scale: float) -> Mixture:
        """The law of `scale` times a sample."""
        return Mixture(self.weights, scale * self.means, scale**2 * self.covariances)

    def target(self) -> GaussianMixture:
        return GaussianMixture(self.weights, self.means, self.covariances)

    def moments(self) -> Gaussian:
        """The Gaussian of the mixture's own mean and covariance, in closed form."""
        mean = self.weights @ self.means
        offset = self.means - mean
        spread = torch.einsum("k,kij->ij", self.weights, self.covariances)
        return Gaussian(mean, spread + torch.einsum("k,ki,kj->ij", self.weights, offset, offset))


def ring() -> Mixture:
    """Eight Gaussians on a circle of radius 2, standard deviations 0.1 to 0.2."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = RING_RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    variances = torch.linspace(0.1, 0.2, 8, dtype=torch.float64).square()
    return Mixture(
        torch.full((8,), 1 / 8, dtype=torch.float64), means, variances[:, None, None] * torch.eye(2).double()
    )


def random_mixture(dim: int, kind: str, generator: torch.Generator) -> Mixture:
    """A mixture drawn afresh.

    Args:
        dim: Dimensions.
        kind: "diagonal" or "full": whether the components' axes are those of the space or random.
        generator: Source of the draws.
    """
    count = int(torch.randint(3, 9, (), generator=generator))
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.2
    means = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    stds = 0.05 + 0.95 * torch.rand(count, dim, generator=generator, dtype=torch.float64)
    covariances = torch.diag_embed(stds.square())
    if kind == "full":
        turn = torch.linalg.qr(torch.randn(count, dim, dim, generator=generator, dtype=torch.float64)).Q
        covariances = turn @ covariances @ turn.mT
        covariances = 0.5 * (covariances + covariances.mT)
    return Mixture(weights / weights.sum(), means, covariances)


def near_separatrix(mixture: Mixture, count: int, generator: torch.Generator) -> Tensor:
    """(count, D) points between two components; see the module."""
    parts, dim = mixture.means.shape
    if count == 0:  # MultivariateNormal takes no empty batch
        return mixture.means.new_zeros(0, dim)
    first = torch.randint(0, parts, (count,), generator=generator)
    second = (first + torch.randint(1, parts, (count,), generator=generator)) % parts
    a, b = mixture.means[first], mixture.means[second]

    def lead(share: Tensor) -> Tensor:
        """By how much, in nats, the first component is likelier at the point `share` of the way to the second."""
        x = a + share[:, None] * (b - a)
        laws = [
            torch.distributions.MultivariateNormal(mixture.means[k], mixture.covariances[k]) for k in (first, second)
        ]
        return laws[0].log_prob(x) + mixture.weights[first].log() - laws[1].log_prob(x) - mixture.weights[second].log()

    low, high = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    crosses = (lead(low) > 0) & (lead(high) < 0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        ahead = lead(middle) > 0
        low, high = torch.where(ahead, middle, low), torch.where(ahead, high, middle)
    balanced = crosses & (torch.rand(count, generator=generator) < 0.5)
    share = torch.where(balanced, low, 0.5)
    size = 10.0 ** (-2.0 - 4.0 * torch.rand(count, generator=generator, dtype=torch.float64))
    direction = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    direction = direction / direction.norm(dim=1, keepdim=True)
    return a + share[:, None] * (b - a) + (size * (b - a).norm(dim=1))[:, None] * direction


class ExactProblem(NamedTuple):
    """Samples of a mixture and points near its separatrices, diffused by one SDE, with the exact score."""

    name: str
    mixture: Mixture
    target: GaussianMixture
    moments: Gaussian
    model: sdekit.ScoreModel
    x: Tensor
    near: Tensor  # (n,) bool: drawn near a separatrix


def exact_problem(name: str, mixture: Mixture, sde: sdekit.SDE, samples: int, near: int, seed: int) -> ExactProblem:
    """The problem of `mixture` under `sde` with `samples` samples and `near` points near separatrices."""
    generator = torch.Generator().manual_seed(seed)
    target = mixture.target()
    x = torch.cat((target.sample(samples, generator=generator), near_separatrix(mixture, near, generator)))
    mark = torch.arange(samples + near) >= samples
    return ExactProblem(name, mixture, target, mixture.moments(), target.score_model(sde), x, mark)


SDES: dict[str, sdekit.SDE] = {"VP": sdekit.VPSDE(), "VE": sdekit.VESDE()}


Sizes = dict[int, tuple[int, int, int]]  # dimensions: draws a kind, samples, near points; 2 dimensions are needed


def exact_problems(
    seed: int, quick: bool, scale: float = 1.0, names: tuple[str, ...] = ("VP", "VE"), sizes: Sizes | None = None
) -> list[ExactProblem]:
    """The problems with exact scores: the ring, and mixtures in 2, 16 and 64 dimensions, data times `scale`."""
    if sizes is None:
        sizes = {2: (1, 64, 16), 16: (1, 32, 8)} if quick else {2: (3, 192, 48), 16: (1, 128, 24), 64: (1, 24, 4)}
    laws = [("ring", ring(), *sizes[2][1:])]
    for dim, (draws, samples, near) in sizes.items():
        for kind in ("diagonal", "full"):
            for draw in range(draws):
                generator = torch.Generator().manual_seed(1_000_003 * seed + 1009 * dim + 17 * draw + (kind == "full"))
                laws.append((f"{dim}-D {kind} {draw}", random_mixture(dim, kind, generator), samples, near))
    return [
        exact_problem(f"{sde_name} {name}", law.scaled(scale), SDES[sde_name], samples, near, 7919 * seed + number)
        for sde_name in names
        for number, (name, law, samples, near) in enumerate(laws)
    ]


class _ReLUNet(nn.Module):
    """An MLP with ReLU on the state and features of the label: its divergence is piecewise constant in x."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 2),
        )  # fmt: skip
        self.register_buffer("frequencies", 2.0 * math.pi / 4.0 * torch.arange(1, 9))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        phase = label[:, None] * self.frequencies.to(label.dtype)
        return self.layers(torch.cat((x, phase.sin(), phase.cos()), 1))


NETWORKS = ("noise", "edm", "relu")


def _untrained(kind: str, sde: sdekit.SDE) -> sdekit.ScoreModel:
    label, std = sdekit.LogSigmaLabel(0.25), ring().target().std
    torch.manual_seed(0)  # of the initial weights
    net: nn.Module = _ReLUNet() if kind == "relu" else MLP((2,), 128, 3, period=4.0)
    meaning = sdekit.edm(std, label) if kind == "edm" else sdekit.noise(label)
    return sdekit.ScoreModel(net, sde, meaning, data_std=std)


def learned(kind: str, seed: int, quick: bool, sde: sdekit.SDE | None = None) -> sdekit.ScoreModel:
    """A network trained on the ring, in float64: cached, since no solver has a part in it.

    Args:
        kind: "noise" (SiLU, predicts the noise), "edm" (SiLU, preconditioned) or "relu" (predicts the noise).
        seed: Of the training.
        quick: Train a little only.
        sde: What to use it with; default the VP process it is trained with. Only "edm" knows nothing of the SDE.
    """
    steps = 600 if quick else 6000
    model = _untrained(kind, SDES["VP"])
    path = CACHE / f"net-{kind}-{seed}-{digest(steps, repr(model.net))}.safetensors"
    if not path.exists():
        target = ring().target()

        def batches(generator: torch.Generator) -> Batch:
            return Batch(target.sample(512, generator=generator).float(), {})

        recipe = Recipe(steps, learning_rate=2e-3, seed=seed)
        if kind == "edm":
            recipe = Recipe(
                steps, 2e-3, weight=EDMWeight(target.std), times=LogNormalSigma(mean=1.6, std=1.2), seed=seed
            )
        trained = train(model, batches, recipe).model
        path.parent.mkdir(parents=True, exist_ok=True)
        trained.save(path)
    model = sdekit.ScoreModel.load(path, model.net)
    if sde is not None:
        model = sdekit.ScoreModel(model.net, sde, model.parameterization, model.data_std)
    return model.double().eval()


class Digits(NamedTuple):
    """The digits network and held-out images, dequantised."""

    model: sdekit.ScoreModel
    x: Tensor


def digits(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Digits:
    """The shipped digits network with `count` held-out images.

    Args:
        count: Images, at most 360.
        seed: Of the choice of images and of the dequantisation.
        dtype: Of network and images.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = zoo.load_split().test
    chosen = held_out[torch.randperm(held_out.shape[0], generator=generator)[:count]]
    return Digits(zoo.load().to(dtype).eval(), zoo.dequantise(chosen, generator).to(dtype))

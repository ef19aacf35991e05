"""Distributions whose diffusion is known in closed form, at every time and under every SDE.

A Gaussian component N(mu, C) stays one: with x_t = alpha x_0 + sigma eps,

    x_t ~ N(alpha mu, V),   V = alpha^2 C + sigma^2 I,   P = V^-1 (x - alpha mu),
    eps = sigma P,          x_0 = mu + alpha C P,        score = -P,

and a mixture averages these with its responsibilities r_k. C is kept by its eigenvectors Q and eigenvalues, so V costs
one addition at any time. Everything is float64; results of exact score models are cast to the state's dtype.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ._checks import require_batch, require_count
from ._components import Components, Pull
from ._tensor import column, flatten, there
from .model.parameterization import Noise, Parameterization, time_of_label
from .model.score_model import ScoreModel
from .sde.base import SDE, as_time


class _Target:
    """A mixture of Gaussians; the two public targets differ in what they are made of only."""

    def __init__(self, weights: Tensor, components: Components, event_shape: torch.Size) -> None:
        self.weights = weights
        self.event_shape = event_shape
        self._components = components
        self._log_weights = weights.log()

    @property
    def dim(self) -> int:
        """The number D of dimensions."""
        return int(self._components.means.shape[1])

    @property
    def std(self) -> float:
        """The root of the mean variance over the dimensions: what `ScoreModel.data_std` stands for."""
        parts, means = self._components, self._components.means
        spread = parts.values.sum(1)
        if parts.residual is not None:
            spread = spread + parts.residual * (means.shape[1] - parts.values.shape[1])
        center = self.weights @ means
        total = self.weights @ (spread + (means - center).square().sum(1))
        return math.sqrt(float(total) / self.dim)

    def _pull(self, sde: SDE, x: Tensor, t: Tensor | float) -> tuple[Pull, Tensor, Tensor]:
        require_batch("x", x)
        if x.shape[1:].numel() != self.dim:
            raise ValueError(f"x.shape={tuple(x.shape)}; (B, *event) with {self.dim} numbers a sample is needed.")
        time = as_time(t).to(x.device).expand(x.shape[0])
        sigma = sde.sigma(time)
        pull = self._components.to(x.device).pull(flatten(x).double(), sde.alpha(time), sigma)
        return pull, there(self._log_weights, x.device) + pull.log_prob, sigma

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) float64 exact log density of the data at `x` (B, *event), nats."""
        require_batch("x", x)
        ones = torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
        pull = self._components.to(x.device).pull(flatten(x).double(), ones, 0.0 * ones)
        return torch.logsumexp(there(self._log_weights, x.device) + pull.log_prob, 1)

    def marginal_log_prob(self, sde: SDE, x: Tensor, t: Tensor | float) -> Tensor:
        """(B,) float64 exact log p_t at `x` (B, *event), nats; `t` is (B,) or a number."""
        return torch.logsumexp(self._pull(sde, x, t)[1], 1)

    def score(self, sde: SDE, x: Tensor, t: Tensor | float) -> Tensor:
        """The exact score grad log p_t at `x`, float64, the shape of `x`."""
        pull, joint, _ = self._pull(sde, x, t)
        return -torch.einsum("bk,bkd->bd", joint.softmax(1), pull.precise).reshape(x.shape)

    def divergence(self, sde: SDE, x: Tensor, t: Tensor | float) -> Tensor:
        """(B,) float64 exact divergence of the score at `x` (B, *event)."""
        pull, joint, _ = self._pull(sde, x, t)
        share = joint.softmax(1)
        score = torch.einsum("bk,bkd->bd", share, pull.precise)
        return (share * (pull.precise.square().sum(2) - pull.trace)).sum(1) - score.square().sum(1)

    def predict(self, sde: SDE, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The exact denoised data and noise at `x` (B, *event), float64, each the shape of `x`."""
        pull, joint, sigma = self._pull(sde, x, t)
        share = joint.softmax(1)
        data = torch.einsum("bk,bkd->bd", share, pull.data)
        noise = sigma[:, None] * torch.einsum("bk,bkd->bd", share, pull.precise)
        return data.reshape(x.shape), noise.reshape(x.shape)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(n, *event) float64 draws.

        Args:
            n: How many, >= 0.
            generator: Source of the draws. None: a fresh one seeded with 0, so that *every call returns the same*.
        """
        require_count("n", n, 0)
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        parts = self._components.to(source.device)
        weights = self.weights.to(source.device)
        if n == 0:
            return parts.means.new_zeros((0, *self.event_shape))
        component = torch.multinomial(weights, n, replacement=True, generator=source)
        return parts.draw(component, source).reshape(n, *self.event_shape)

    def score_model(self, sde: SDE, parameterization: Parameterization | None = None) -> ScoreModel:
        """An exact ScoreModel of this target: its network is the closed form, in any parameterization."""
        chosen = Noise() if parameterization is None else parameterization
        return ScoreModel(_ExactNet(self, sde, chosen), sde, chosen, data_std=self.std)


class _ExactNet(nn.Module):
    """The closed form as a network: what a perfectly trained one would return for its input and label."""

    def __init__(self, target: _Target, sde: SDE, parameterization: Parameterization) -> None:
        super().__init__()
        self.target = target
        self.sde = sde
        self.parameterization = parameterization

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        t = time_of_label(self.parameterization.label, self.sde, label)
        scale = self.parameterization.input_scale(self.sde, t)
        data, noise = self.target.predict(self.sde, x if scale is None else x / column(scale, x), t)
        mix = self.parameterization.mix(self.sde, t)
        return column(mix.data, data) * data + column(mix.noise, noise) * noise


def _eigen(covariance: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric positive definite matrices (..., D, D)."""
    if not torch.allclose(covariance, covariance.mT, rtol=1e-8, atol=1e-12):
        raise ValueError(f"{name} is not symmetric; a symmetric positive definite matrix is needed.")
    values, vectors = torch.linalg.eigh(covariance)
    if bool((values <= 0).any()):
        raise ValueError(f"{name} has the eigenvalue {float(values.min()):.3g}; all must be above 0.")
    return values, vectors


class Gaussian(_Target):
    """The normal distribution N(mean, covariance), its diffusion exact under every SDE.

    Args:
        mean: (D,), or the event's own shape.
        covariance: (D, D), symmetric positive definite; or variances of the shape of `mean`.

    Raises:
        ValueError: Shapes that do not fit, or a covariance that is not positive definite.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        center = torch.as_tensor(mean, dtype=torch.float64)
        spread = torch.as_tensor(covariance, dtype=torch.float64)
        dim = center.numel()
        if center.dim() == 0:
            raise ValueError("mean is a number; a tensor of shape (D,) or the event's own shape is needed.")
        if spread.shape == (dim, dim) and spread.shape != center.shape:
            values, vectors = _eigen(spread, "covariance")
            parts = Components(center.reshape(1, dim), values[None], vectors[None])
        elif spread.shape == center.shape:
            if bool((spread <= 0).any()):
                raise ValueError(f"covariance holds the variance {float(spread.min()):.3g}; all must be above 0.")
            parts = Components(center.reshape(1, dim), spread.reshape(1, dim))
        else:
            raise ValueError(
                f"covariance.shape={tuple(spread.shape)} with mean.shape={tuple(center.shape)}; "
                f"({dim}, {dim}) or variances of shape {tuple(center.shape)} are needed."
            )
        super().__init__(torch.ones(1, dtype=torch.float64, device=center.device), parts, center.shape)

    @classmethod
    def fit(
        cls,
        data: Tensor,
        covariance: Literal["full", "diagonal", "low_rank"] = "full",
        rank: int | None = None,
    ) -> Gaussian:
        """The Gaussian of the data's own mean and covariance.

        Args:
            data: (N, *event), N >= 2; more samples than dimensions for "full".
            covariance: "full"; "diagonal"; or "low_rank": the `rank` leading eigenvectors, the rest isotropic.
            rank: For "low_rank": 1 <= rank < min(N - 1, D); default min(64, ...).

        Raises:
            ValueError: Too few samples, or a direction without variance.
        """
        x = flatten(require_batch("data", data)).double()
        count, dim = x.shape
        if count < 2:
            raise ValueError(f"data has {count} samples; at least 2 are needed.")
        mean, event = x.mean(0), data.shape[1:]
        offset = x - mean
        if covariance == "diagonal":
            return cls(mean.reshape(event), offset.square().mean(0).reshape(event))
        if covariance == "full":
            if count <= dim:
                raise ValueError(
                    f"{count} samples of {dim} dimensions give a singular covariance; pass more than {dim} samples, "
                    'or covariance="low_rank" or "diagonal".'
                )
            gaussian = cls(mean, offset.mT @ offset / count)
            gaussian.event_shape = event
            return gaussian
        if covariance != "low_rank":
            raise ValueError(f"covariance={covariance!r}; 'full', 'diagonal' or 'low_rank' is needed.")
        most = min(count - 1, dim) - 1  # without their mean, N samples span N - 1 dimensions
        chosen = min(64, most) if rank is None else rank
        require_count("rank", chosen)
        if chosen > most:
            raise ValueError(f"rank={chosen}; at most min(N - 1, D) - 1 = {most} for data of shape ({count}, {dim}).")
        _, singular, right = torch.linalg.svd(offset, full_matrices=False)
        spectrum = singular.square() / count
        residual = spectrum[chosen:].sum() / (dim - chosen)
        if not float(residual) > 1e-14 * float(spectrum.sum()):  # less is rounding
            raise ValueError(f"rank={chosen} leaves no variance outside; choose a smaller rank.")
        gaussian = cls(mean.reshape(event), torch.ones_like(mean).reshape(event))
        gaussian._components = Components(
            mean[None], spectrum[None, :chosen], right[None, :chosen].mT.contiguous(), residual[None]
        )
        return gaussian

    def flow_map(self, sde: SDE, x: Tensor, t0: Tensor | float, t1: Tensor | float) -> Tensor:
        """Where the probability flow carries `x` from time t0 to t1, exactly; the shape and dtype of `x`.

        Args:
            sde: The forward process.
            x: States at t0, (B, *event).
            t0: Start, (B,) or a number.
            t1: End, before or after t0.
        """
        require_batch("x", x)
        begin, end = (as_time(t).to(x.device).expand(x.shape[0]) for t in (t0, t1))
        parts = self._components.to(x.device)

        def scale(t: Tensor, variance: Tensor) -> Tensor:
            return (sde.alpha(t)[:, None, None].square() * variance + sde.sigma(t)[:, None, None].square()).sqrt()

        offset = (flatten(x).double() - sde.alpha(begin)[:, None] * parts.means)[:, None, :]
        along, rest = parts.coordinates(offset)
        moved = parts.embed(along * scale(end, parts.values) / scale(begin, parts.values))
        if rest is not None and parts.residual is not None:
            moved = moved + rest * scale(end, parts.residual[:, None]) / scale(begin, parts.residual[:, None])
        return (moved[:, 0] + sde.alpha(end)[:, None] * parts.means).reshape(x.shape).to(x.dtype)


class GaussianMixture(_Target):
    """The mixture sum_k w_k N(mean_k, C_k), its diffusion exact under every SDE.

    Args:
        weights: (K,), positive; normalised to sum 1.
        means: (K, D), or (K, *event).
        covariances: (K, D, D) matrices; or (K, D) standard deviations along the axes; or (K,) standard deviations.

    Raises:
        ValueError: Shapes that do not fit, weights or standard deviations not positive, matrices not positive definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        share = torch.as_tensor(weights, dtype=torch.float64)
        centers = torch.as_tensor(means, dtype=torch.float64)
        spread = torch.as_tensor(covariances, dtype=torch.float64)
        if share.dim() != 1 or centers.dim() < 2 or centers.shape[0] != share.shape[0]:
            raise ValueError(
                f"weights.shape={tuple(share.shape)}, means.shape={tuple(centers.shape)}; (K,) and (K, D) are needed."
            )
        if not bool((share > 0).all()):
            raise ValueError("weights must all be above 0: leave a component of weight 0 out.")
        count, flat = share.shape[0], flatten(centers)
        dim = flat.shape[1]
        if spread.dim() == 3 and spread.shape == (count, dim, dim):
            parts = Components(flat, *_eigen(spread, "covariances"))
        elif spread.shape == (count,) or flatten(spread).shape == flat.shape:
            if bool((spread <= 0).any()):
                raise ValueError(
                    f"covariances holds the standard deviation {float(spread.min()):.3g}; it must be above 0."
                )
            parts = Components(flat, spread.reshape(count, -1).square().expand(count, dim).contiguous())
        else:
            raise ValueError(
                f"covariances.shape={tuple(spread.shape)}; ({count}, {dim}, {dim}) matrices, ({count}, {dim}) or "
                f"({count},) standard deviations are needed."
            )
        super().__init__(share / share.sum(), parts, centers.shape[1:])

"""What simple models of quantised images reach, in bits per dimension: the figures a network has to beat.

    uniform      log2 K
    histogram    -mean log2 q_i(k_i), one histogram a pixel
    mixture      -log2 sum_m w_m prod_i q_mi(k_i): pixels independent given one of M classes, fitted by EM

They are fitted on the training images and evaluated on others; all are smoothed, or one unseen level costs infinity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_ROUNDS = 60


class Baselines(NamedTuple):
    """Bits per dimension of held-out images.

    Attributes:
        uniform: All levels equally likely.
        histogram: One histogram a pixel.
        mixture: Mixture of categoricals.
    """

    uniform: float
    histogram: float
    mixture: float


class Mixture(NamedTuple):
    """A mixture of categoricals.

    Attributes:
        log_weight: (M,) float64.
        log_probability: (M, D, K) float64, of each level at each pixel.
    """

    log_weight: Tensor
    log_probability: Tensor

    def log_prob(self, levels: Tensor) -> Tensor:
        """(B,) float64 log-probabilities, nats, of images (B, D) of levels."""
        return torch.logsumexp(self.joint(one_hot(levels, self.log_probability.shape[2])), 1)

    def joint(self, hot: Tensor) -> Tensor:
        """(B, M) float64 log-probability of image and class, from one-hot images (B, D, K)."""
        return hot.flatten(1) @ self.log_probability.flatten(1).T + self.log_weight


def one_hot(levels: Tensor, count: int) -> Tensor:
    """(B, D, K) float64 indicators of levels (B, *event)."""
    return F.one_hot(levels.flatten(1), count).double()


def fit_mixture(levels: Tensor, count: int, classes: int, *, smoothing: float, seed: int = 0) -> Mixture:
    """The mixture of categoricals that 60 rounds of EM reach from random responsibilities.

    Args:
        levels: (N, *event) integers 0..count-1.
        count: K.
        classes: M.
        smoothing: Weight, in images, of the prior: half the histogram of all images, half uniform.
        seed: Of the responsibilities.
    """
    hot = one_hot(levels, count)
    prior = smoothing * 0.5 * (hot.mean(0) + 1.0 / count)
    generator = torch.Generator().manual_seed(seed)
    share = torch.softmax(torch.randn(len(hot), classes, generator=generator, dtype=torch.float64), 1)
    mixture = Mixture(torch.zeros(0), torch.zeros(0))
    for _ in range(_ROUNDS):
        counts = (share.T @ hot.flatten(1)).reshape(classes, *hot.shape[1:]) + prior
        weight = share.sum(0) + 1.0
        mixture = Mixture((weight / weight.sum()).log(), (counts / counts.sum(2, keepdim=True)).log())
        share = torch.softmax(mixture.joint(hot), 1)
    return mixture


def fit_baselines(train: Tensor, test: Tensor, levels: int = 17, classes: int = 10, restarts: int = 3) -> Baselines:
    """The baselines' bits per dimension of `test`, fitted on `train`.

    Args:
        train: (N, *event) integers 0..levels-1.
        test: (M, *event), likewise.
        levels: Number of levels.
        classes: Components of the mixture.
        restarts: Fits of the mixture; the one most likely on `train` counts.
    """
    scale = -1.0 / (train[0].numel() * math.log(2.0))
    single = fit_mixture(train, levels, 1, smoothing=2.0)
    fits = [fit_mixture(train, levels, classes, smoothing=4.0, seed=seed) for seed in range(restarts)]
    best = max(fits, key=lambda fit: float(fit.log_prob(train).mean()))
    held_out = (float(scale * fit.log_prob(test).mean()) for fit in (single, best))
    return Baselines(math.log2(levels), *held_out)

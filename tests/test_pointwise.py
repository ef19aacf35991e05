"""The two identities behind the estimates, at single points and single levels, by quadrature in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import SDES, mixture

from sdekit.pointwise import i_mmse, path_integral
from sdekit.targets import Gaussian

TARGETS = {
    "gaussian": Gaussian(torch.tensor([0.3]), torch.tensor([0.2])),
    "mixture": mixture(1, seed=5),
}
NODES, WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(120))
SHARE = WEIGHTS / WEIGHTS.sum()  # expectations over a standard normal
STEP = 1e-4  # of central differences in half_log_snr
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
every_process = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


def states(sde, x, t, start=None):
    """x_t on the nodes, given x at the data, or at the time `start`."""
    scale, variance = sde.alpha(t), sde.sigma(t).square()
    if start is not None:
        scale = scale / sde.alpha(start)
        variance = variance - (scale * sde.sigma(start)).square()
    return (scale * x + variance.sqrt() * NODES)[:, None]


@every_target
@every_process
def test_the_divergence_of_noised_point_from_noised_data_grows_by_the_denoisers_error(sde, target):
    """d/d lambda KL(q(x_t | x) || p_t) = E|z - eps|^2, at every x and level: no mean over x is needed."""
    for x in (-1.2, 0.1, 0.8):
        for level in (-2.0, -0.5, 1.0):

            def divergence(at):
                t = sde.time_at(at)
                entropy = 0.5 * math.log(2 * math.pi * math.e) + sde.log_sigma(t)
                return -entropy - SHARE @ target.marginal_log_prob(sde, states(sde, x, t), t)

            middle = torch.tensor(level, dtype=torch.float64)
            slope = (divergence(middle + STEP) - divergence(middle - STEP)) / (2 * STEP)
            t = sde.time_at(middle)
            at = states(sde, x, t)
            noise = target.predict(sde, at, t.expand(at.shape[0]))[1]
            error = SHARE @ (NODES[:, None] - noise).square().sum(1)
            assert float(slope) == pytest.approx(float(error), rel=1e-4, abs=1e-6)


@every_target
@every_process
def test_the_mean_log_density_along_the_forward_process_changes_as_the_path_integral_says(sde, target):
    """d/dt E[log p_t(x_t)] = E[-f D + g^2 div s + g^2/2 |s|^2], and E div s = E[z . s]/b, given x at an early time."""
    start = sde.time_at(torch.tensor(2.0, dtype=torch.float64))
    for x in (-1.2, 0.1, 0.8):
        for level in (-2.0, -0.5, 1.0):

            def mean(at):
                t = sde.time_at(at)
                return SHARE @ target.marginal_log_prob(sde, states(sde, x, t, start), t)

            middle = torch.tensor(level, dtype=torch.float64)
            slope = (mean(middle + STEP) - mean(middle - STEP)) / (2 * STEP)
            t = sde.time_at(middle)
            at = states(sde, x, t, start)
            score, trace = target.score(sde, at, t)[:, 0], target.divergence(sde, at, t)
            g2 = sde.diffusion(t).square()
            rate = -sde.drift_rate(t) + g2 * (SHARE @ (trace + 0.5 * score.square()))
            assert float(slope) == pytest.approx(float(rate / sde.dhalf_log_snr(t)), rel=1e-4, abs=1e-6)
            spread = float(at[:, 0].var(correction=0) / NODES.var(correction=0)) ** 0.5
            assert float(SHARE @ trace) == pytest.approx(float(SHARE @ (NODES * score)) / spread, rel=1e-3)


@every_target
def test_at_single_points_both_tend_to_the_log_density(target):
    """With 2^14 draws: within 4.5 standard errors (false alarm 7e-6), which are below 0.04."""
    sde = SDES["vp"]
    x = torch.tensor([[-1.2], [0.1], [0.8]], dtype=torch.float64)
    model = target.score_model(sde)
    wide = Gaussian(torch.zeros(1), torch.ones(1))  # its p_T is the prior
    for estimate, truth in (
        (i_mmse, target.log_prob(x)),
        (path_integral, target.marginal_log_prob(sde, x, sde.t_min)),
    ):
        found = estimate(model, x, draws=2**14, data_moments=wide, batch=2**14)
        assert found.std_error.max() < 0.04
        # The prior stands for p_T: off by (alpha(t_max) |x|)^2 and alpha(t_max) |mean|, 0.005 at most.
        assert ((found.value - truth).abs() < 4.5 * found.std_error + 0.005).all()

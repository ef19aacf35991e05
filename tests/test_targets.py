"""Exact targets against quadrature, autograd, sampling and a solver that knows nothing of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import PARAMETERIZATIONS, SDES, draw, gaussian, mixture, seeded, spread_times, times
from scipy.integrate import solve_ivp
from scipy.special import ndtr

import sdekit
from sdekit import targets


def full_mixture(dim, seed, count=3):
    factor = 0.5 * draw(seed, count, dim, dim)
    covariances = factor @ factor.mT + 0.05 * torch.eye(dim, dtype=torch.float64)
    return targets.GaussianMixture(times(*range(1, count + 1)), draw(seed + 1, count, dim), covariances)


def low_rank(dim=6, rank=2):
    return targets.Gaussian.fit(draw(3, 40, dim) * torch.linspace(0.2, 2.0, dim) + 1.0, "low_rank", rank)


TARGETS = {
    "gaussian": gaussian(4),
    "variances": targets.Gaussian(draw(1, 4), 0.1 + draw(2, 4) ** 2),
    "low rank": low_rank(),
    "full mixture": full_mixture(3, 5),
    "diagonal mixture": mixture(4, 6),
    "isotropic mixture": targets.GaussianMixture(times(1, 2, 1), draw(8, 3, 5), times(0.3, 0.7, 0.2)),
    "one dimension": targets.GaussianMixture(times(0.3, 0.7), times(-1.0, 1.5)[:, None], times(0.2, 0.5)),
}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


def noised(target, sde, seed=11, count=24):
    t = spread_times(sde, count)
    return sde.perturb(target.sample(t.shape[0], generator=seeded(seed)), t, draw(seed, t.shape[0], target.dim)), t


def covariance_of(target):
    """(K, D, D) by the definition of the components."""
    parts = target._components
    basis = torch.eye(parts.means.shape[1], dtype=torch.float64).expand(parts.means.shape[0], -1, -1)
    if parts.basis is not None:
        basis = parts.basis
    full = torch.einsum("kdr,kr,ker->kde", basis, parts.values, basis)
    if parts.residual is not None:
        outside = torch.eye(parts.means.shape[1]) - torch.einsum("kdr,ker->kde", basis, basis)
        full = full + parts.residual[:, None, None] * outside
    return full


@every_target
@every_sde
def test_the_marginal_is_torchs_own_mixture_of_noised_components(target, sde):
    x, t = noised(target, sde)
    covariance, means = covariance_of(target), target._components.means
    for row in range(0, t.shape[0], 5):
        alpha, sigma = float(sde.alpha(t[row])), float(sde.sigma(t[row]))
        law = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(target.weights),
            torch.distributions.MultivariateNormal(
                alpha * means, alpha**2 * covariance + sigma**2 * torch.eye(target.dim, dtype=torch.float64)
            ),
        )
        found = target.marginal_log_prob(sde, x[row : row + 1], t[row : row + 1])
        torch.testing.assert_close(found, law.log_prob(x[row : row + 1]), rtol=1e-9, atol=1e-8)


@every_target
def test_log_prob_is_the_law_that_the_parameters_name(target):
    x = target.sample(20, generator=seeded(1))
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(target.weights),
        torch.distributions.MultivariateNormal(target._components.means, covariance_of(target)),
    )
    torch.testing.assert_close(target.log_prob(x), law.log_prob(x), rtol=1e-9, atol=1e-8)


def test_the_three_kinds_of_covariance_mean_what_they_say():
    means, stds = draw(1, 2, 3), 0.2 + draw(2, 2, 3).abs()
    x, weights = draw(3, 9, 3), times(1.0, 3.0)
    diagonal = targets.GaussianMixture(weights, means, stds).log_prob(x)
    matrices = targets.GaussianMixture(weights, means, torch.diag_embed(stds**2)).log_prob(x)
    torch.testing.assert_close(diagonal, matrices, rtol=1e-12, atol=1e-12)
    isotropic = targets.GaussianMixture(weights, means, stds[:, 0]).log_prob(x)
    same = targets.GaussianMixture(weights, means, stds[:, :1].expand(-1, 3)).log_prob(x)
    torch.testing.assert_close(isotropic, same, rtol=1e-12, atol=1e-12)
    plain = sum(
        w * torch.exp(torch.distributions.Normal(m, s).log_prob(x).sum(1))
        for w, m, s in zip((0.25, 0.75), means, stds, strict=True)
    )
    torch.testing.assert_close(diagonal, plain.log(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_the_marginal_is_the_data_convolved_with_the_kernel(name):
    sde, target = SDES[name], TARGETS["one dimension"]
    grid = torch.linspace(-6.0, 8.0, 20_001, dtype=torch.float64)
    density = target.log_prob(grid[:, None]).exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-12)
    for share in (0.2, 0.5, 0.9):
        t = sde.t_min + share * (sde.t_max - sde.t_min)
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        x = alpha * times(-1.2, 0.1, 2.0) + sigma * times(0.3, -1.0, 0.5)
        kernel = torch.distributions.Normal(alpha * grid, sigma).log_prob(x[:, None]).exp()
        expected = torch.trapezoid(density * kernel, grid, dim=1)
        found = target.marginal_log_prob(sde, x[:, None], t).exp()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-300)


@every_target
@every_sde
def test_score_and_divergence_are_derivatives_of_the_log_density(target, sde):
    x, t = noised(target, sde, count=10)
    leaf = x.clone().requires_grad_()
    score = torch.autograd.grad(target.marginal_log_prob(sde, leaf, t).sum(), leaf)[0]
    scale = sde.sigma(t)[:, None]
    torch.testing.assert_close(scale * target.score(sde, x, t), scale * score, rtol=1e-8, atol=1e-7)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row, now: target.score(sde, row[None], now[None])[0]))(x, t)
    trace = torch.einsum("bii->b", jacobian)
    size = 1.0 / sde.sigma(t) ** 2
    torch.testing.assert_close(target.divergence(sde, x, t) / size, trace / size, rtol=1e-7, atol=1e-6)


@every_target
@every_sde
def test_the_prediction_is_tweedies(target, sde):
    x, t = noised(target, sde)
    data, noise = target.predict(sde, x, t)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    torch.testing.assert_close(alpha * data + sigma * noise, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(noise, -sigma * target.score(sde, x, t), rtol=1e-9, atol=1e-9)


@every_target
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_perturbed_samples_follow_the_marginal(target, name):
    # Kolmogorov-Smirnov on a random direction against the exact distribution function, 20,000 draws at two times:
    # false alarm 1e-7 each.
    sde, n = SDES[name], 20_000
    direction = torch.nn.functional.normalize(draw(31, target.dim), dim=0)
    x0 = target.sample(n, generator=seeded(32))
    covariance = torch.einsum("d,kde,e->k", direction, covariance_of(target), direction)
    for share in (0.0, 0.4):
        t = sde.t_min + share * (sde.t_max - sde.t_min)
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        seen = (sde.perturb(x0, t, draw(33, n, target.dim)) @ direction).sort().values
        middles, stds = alpha * (target._components.means @ direction), (alpha**2 * covariance + sigma**2).sqrt()
        exact = (torch.from_numpy(ndtr(((seen[:, None] - middles) / stds).numpy())) * target.weights).sum(1)
        steps = torch.arange(n + 1, dtype=torch.float64) / n
        distance = max(float((exact - steps[:-1]).max()), float((steps[1:] - exact).max()))
        assert distance < math.sqrt(-0.5 * math.log(0.5e-7) / n)


def independent_flow(target, sde, x, first, last):
    """scipy's DOP853 on dx/dt = f x + g^2/2 V^-1 (x - alpha mu), in numpy."""
    mean, covariance = target._components.means[0].numpy(), covariance_of(target)[0].numpy()

    def slope(t, state):
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        variance = alpha**2 * covariance + sigma**2 * np.eye(len(mean))
        pull = np.linalg.solve(variance, state - alpha * mean)
        return float(sde.drift_rate(t)) * state + 0.5 * float(sde.diffusion(t)) ** 2 * pull

    state, stops = x.numpy(), [first, last]
    if isinstance(sde, sdekit.TableVPSDE):  # the slope jumps at the knots: go from one to the next
        steps = len(sde.betas)
        stops[1:1] = [i / steps for i in range(1, steps) if first < i / steps < last]
    for begin, end in itertools.pairwise(stops):
        inside = 1e-12 * (end - begin)  # the last stage must not see the next piece
        solved = solve_ivp(slope, (begin, end - inside), state, method="DOP853", rtol=1e-10, atol=1e-11)
        state = solved.y[:, -1]
    return torch.from_numpy(state)


COARSE = sdekit.TableVPSDE([0.05 + 0.01 * i for i in range(20)])
FLOWS = [("gaussian", name) for name in SDES] + [("variances", "vp"), ("low rank", "vp")]


@pytest.mark.parametrize(("name", "process"), FLOWS)
def test_the_flow_map_is_the_probability_flow(name, process):
    target, sde = TARGETS[name], COARSE if process == "table" else SDES[process]
    first, last = (sde.t_min + share * (sde.t_max - sde.t_min) for share in (0.15, 0.7))
    x = sde.perturb(draw(3, 1, target.dim), first, draw(4, 1, target.dim))
    forward = target.flow_map(sde, x, first, last)
    torch.testing.assert_close(forward[0], independent_flow(target, sde, x[0], first, last), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(target.flow_map(sde, forward, last, first), x, rtol=1e-11, atol=1e-11)


def test_the_flow_map_moves_the_log_density_by_its_log_determinant():
    for sde in SDES.values():
        target = TARGETS["gaussian"]
        x = target.sample(3, generator=seeded(5))
        jacobian = torch.func.vmap(
            torch.func.jacrev(lambda row, sde=sde: target.flow_map(sde, row[None], sde.t_min, sde.t_max)[0])
        )(x)
        end = target.marginal_log_prob(sde, target.flow_map(sde, x, sde.t_min, sde.t_max), sde.t_max)
        start = target.marginal_log_prob(sde, x, sde.t_min)
        torch.testing.assert_close(start, end + torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-10, atol=1e-9)


@every_target
def test_samples_have_the_mean_and_covariance_of_the_law(target):
    # n = 40,000; each of D + D^2 <= 42 statistics beyond 6 standard errors: false alarm 1e-7.
    n, parts = 40_000, target._components
    x = target.sample(n, generator=seeded(9))
    mean = target.weights @ parts.means
    apart = parts.means - mean
    covariance = torch.einsum("k,kde->de", target.weights, covariance_of(target) + apart[:, :, None] * apart[:, None])
    offset = x - mean
    assert (offset.mean(0).abs() < 6.0 * (covariance.diagonal() / n).sqrt()).all()
    products = offset[:, :, None] * offset[:, None, :]
    assert ((products.mean(0) - covariance).abs() < 6.0 * products.std(0) / math.sqrt(n)).all()
    assert target.std == pytest.approx(math.sqrt(float(covariance.diagonal().mean())), rel=1e-10)


def test_samples_follow_their_generator_only():
    target = TARGETS["diagonal mixture"]
    before = torch.random.get_rng_state()
    assert torch.equal(target.sample(5, generator=seeded(1)), target.sample(5, generator=seeded(1)))
    assert not torch.equal(target.sample(5, generator=seeded(1)), target.sample(5, generator=seeded(2)))
    assert torch.equal(target.sample(5), target.sample(5))
    assert torch.equal(before, torch.random.get_rng_state())
    assert target.sample(0).shape == (0, 4)


def test_a_fit_has_the_datas_own_moments():
    data = draw(1, 300, 2, 3) * times(0.2, 1.0, 3.0) + draw(2, 2, 3)
    flat = data.flatten(1).numpy()
    covariance = np.cov(flat.T, bias=True)
    mean = torch.from_numpy(flat.mean(0))
    x = draw(3, 7, 2, 3)
    full = targets.Gaussian.fit(data)
    law = torch.distributions.MultivariateNormal(mean, torch.from_numpy(covariance))
    torch.testing.assert_close(full.log_prob(x), law.log_prob(x.flatten(1)), rtol=1e-10, atol=1e-10)
    assert full.sample(4).shape == (4, 2, 3)
    diagonal = targets.Gaussian.fit(data, "diagonal")
    plain = torch.distributions.Normal(mean, torch.from_numpy(np.sqrt(np.diag(covariance))))
    torch.testing.assert_close(diagonal.log_prob(x), plain.log_prob(x.flatten(1)).sum(1), rtol=1e-10, atol=1e-10)
    assert diagonal.sample(4).shape == (4, 2, 3)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_low_rank_fit_keeps_the_leading_directions_and_the_total_variance(rank):
    data = draw(1, 200, 6) @ draw(2, 6, 6)
    values, vectors = np.linalg.eigh(np.cov(data.numpy().T, bias=True))
    kept = vectors[:, -rank:] * values[-rank:] @ vectors[:, -rank:].T
    outside = np.eye(6) - vectors[:, -rank:] @ vectors[:, -rank:].T
    covariance = torch.from_numpy(kept + values[:-rank].mean() * outside)
    fit = targets.Gaussian.fit(data, "low_rank", rank)
    law = torch.distributions.MultivariateNormal(data.mean(0), covariance)
    x = draw(3, 7, 6)
    torch.testing.assert_close(fit.log_prob(x), law.log_prob(x), rtol=1e-10, atol=1e-9)
    assert float(covariance.trace()) == pytest.approx(values.sum(), rel=1e-12)


def test_a_low_rank_fit_of_few_images_is_a_law():
    data = draw(1, 20, 3, 8, 8)
    fit = targets.Gaussian.fit(data, "low_rank")
    assert torch.isfinite(fit.log_prob(data)).all()
    assert fit.sample(2).shape == (2, 3, 8, 8)
    variance = (data - data.mean(0)).square().sum() / 20  # of which the law loses nothing
    assert float(fit._components.values.sum() + 174 * fit._components.residual) == pytest.approx(float(variance))
    assert float(fit._components.residual) > 1e-3


@pytest.mark.parametrize("target", [TARGETS["low rank"], TARGETS["full mixture"]], ids=["low rank", "full mixture"])
@pytest.mark.parametrize("kind", PARAMETERIZATIONS.values(), ids=PARAMETERIZATIONS.keys())
@every_sde
def test_the_exact_model_is_exact_in_every_parameterization(target, kind, sde):
    x, t = noised(target, sde, count=12)
    model = target.score_model(sde, kind)
    sigma = sde.sigma(t)[:, None]
    # Rounding of the time in a label or of x in a data prediction is amplified by alpha/sigma; 1e-7 is far above it.
    torch.testing.assert_close(sigma * model.score(x, t), sigma * target.score(sde, x, t), rtol=1e-7, atol=1e-7)
    assert model.data_std == pytest.approx(target.std) or isinstance(kind, sdekit.edm().__class__)


def test_the_exact_model_undoes_affine_labels():
    target, sde = TARGETS["diagonal mixture"], SDES["vp"]
    x, t = noised(target, sde)
    for kind in (sdekit.noise(sdekit.TimeLabel(999.0)), sdekit.v(sdekit.table_label(1000)), sdekit.edm(0.7)):
        model = target.score_model(sde, kind)
        torch.testing.assert_close(
            model.noise(x, t), target.predict(sde, x, t)[1], rtol=1e-7, atol=1e-7, msg=lambda m, k=kind: f"{k}: {m}"
        )


def test_an_event_of_any_shape_is_flattened_the_same_way():
    target = targets.Gaussian(draw(1, 2, 3), 0.1 + draw(2, 2, 3) ** 2)
    flat = targets.Gaussian(draw(1, 2, 3).flatten(), 0.1 + draw(2, 2, 3).flatten() ** 2)
    x = target.sample(4)
    assert x.shape == (4, 2, 3)
    torch.testing.assert_close(target.log_prob(x), flat.log_prob(x.flatten(1)))
    assert target.score(SDES["vp"], x, 0.3).shape == x.shape
    assert target.flow_map(SDES["vp"], x.float(), 0.1, 0.3).dtype == torch.float32


BAD = {
    "not symmetric": lambda: targets.Gaussian(torch.zeros(2), times(1.0, 0.5, 0.0, 1.0).reshape(2, 2)),
    "not positive": lambda: targets.Gaussian(torch.zeros(2), times(1.0, 2.0, 2.0, 1.0).reshape(2, 2)),
    "no variance": lambda: targets.Gaussian(torch.zeros(2), times(1.0, 0.0)),
    "other shape": lambda: targets.Gaussian(torch.zeros(2), torch.ones(3)),
    "a number": lambda: targets.Gaussian(torch.zeros(()), torch.ones(())),
    "weight zero": lambda: targets.GaussianMixture(times(1.0, 0.0), torch.zeros(2, 2), torch.ones(2)),
    "weights and means": lambda: targets.GaussianMixture(times(1.0), torch.zeros(2, 2), torch.ones(2)),
    "std zero": lambda: targets.GaussianMixture(times(1.0, 1.0), torch.zeros(2, 2), times(1.0, 0.0)),
    "few samples": lambda: targets.Gaussian.fit(draw(1, 3, 4)),
    "one sample": lambda: targets.Gaussian.fit(draw(1, 1, 4), "diagonal"),
    "rank": lambda: targets.Gaussian.fit(draw(1, 9, 4), "low_rank", 4),
    "other kind": lambda: targets.Gaussian.fit(draw(1, 9, 2), "diag"),
    "other dimension": lambda: gaussian(3).score(SDES["vp"], draw(1, 2, 4), 0.5),
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_laws_that_are_none_are_refused(make):
    with pytest.raises(ValueError, match=r"\w{3,}"):
        make()


def test_a_low_rank_fit_that_leaves_only_rounding_outside_is_refused():
    flat = draw(1, 50, 3) @ draw(2, 3, 8)  # on a subspace of 3 dimensions
    with pytest.raises(ValueError, match="rank=3 leaves no variance"):
        targets.Gaussian.fit(flat, "low_rank", rank=3)
    assert torch.isfinite(targets.Gaussian.fit(flat, "low_rank", rank=2).log_prob(flat)).all()

"""The digits network: its head against quadrature, its data, its recipe, and what the shipped weights reach."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sdekit.sde.vp import VPSDE
from sdekit.zoo import digits
from sdekit.zoo._baselines import fit_mixture, one_hot
from sdekit.zoo._cells import CellHead, Cells, cell_noise

# torch's own forward mode scripts a few decompositions on first use, which its newer versions deprecate.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
TIMES = [1e-5, 1e-3, 0.02, 0.1, 0.4, 1.0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def split():
    return digits.load_split()


@pytest.fixture(scope="module")
def shipped():
    return digits.load()


def cells(size: int = 3) -> Cells:
    net = digits.CellNet(width=8, depth=1)
    return Cells(net.edges, torch.randn(17, size, generator=generator(), dtype=torch.float64), net.features)


def states(t: float, batch: int = 6, size: int = 3):
    """x_t of points spread over the cells, coefficients, alpha, sigma."""
    sde, source = VPSDE(), generator(1)
    alpha, sigma = (value.expand(batch) for value in (sde.alpha(t), sde.sigma(t)))
    x0 = 2.0 * torch.rand(batch, size, generator=source, dtype=torch.float64) - 1.0
    x = alpha[:, None] * x0 + sigma[:, None] * torch.randn(batch, size, generator=source, dtype=torch.float64)
    return x, torch.randn(batch, 6, size, generator=source, dtype=torch.float64), alpha, sigma


def by_quadrature(x, coefficients, alpha, sigma, known):
    """The posterior mean of the noise, cell by cell with 40 Gauss-Legendre nodes where the integrand lives."""
    log_p = known.log_probability + torch.einsum("ck,bcd->bkd", known.features, coefficients)
    weight = torch.softmax(log_p, 1) * (1.0 - 1e-5)
    roots, gauss = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(40))
    a, s = alpha[:, None], sigma[:, None]
    total, first = torch.zeros_like(x), torch.zeros_like(x)
    for k in range(17):
        # Only where |eps| <= 12: outside of it the Gaussian is below 1e-31.
        low = torch.maximum(known.edges[k], (x - 12 * s) / a)
        high = torch.maximum(torch.minimum(known.edges[k + 1], (x + 12 * s) / a), low)
        for part in range(8):
            start, end = low + (high - low) * part / 8, low + (high - low) * (part + 1) / 8
            node = 0.5 * (start + end)[..., None] + 0.5 * (end - start)[..., None] * roots
            eps = (x[..., None] - a[..., None] * node) / s[..., None]
            density = torch.exp(-0.5 * eps.square()) / (math.sqrt(2 * math.pi) * s[..., None]) * 8.5
            piece = weight[:, k, :, None] * density * gauss * 0.5 * (end - start)[..., None]
            total, first = total + piece.sum(-1), first + (piece * eps).sum(-1)
    variance = a * a + s * s
    floor = 1e-5 * torch.exp(-0.5 * x * x / variance) / torch.sqrt(2 * math.pi * variance)
    return (first + floor * s * x / variance) / (total + floor)


@pytest.mark.parametrize("t", TIMES)
def test_the_head_is_the_posterior_mean_of_the_noise(t):
    at, known = states(t), cells()
    torch.testing.assert_close(cell_noise(*at, known).noise, by_quadrature(*at, known), rtol=1e-9, atol=1e-11)


@forward_mode
@pytest.mark.filterwarnings("ignore:Please use .torch.vmap.")  # torch 2.6's, of its own check
@pytest.mark.parametrize("t", TIMES)
def test_the_heads_derivatives_of_both_orders_and_modes_are_those_of_differences(t):
    x, coefficients, alpha, sigma = states(t, batch=2)
    known = cells()

    def head(x, coefficients):
        return CellHead.apply(x, coefficients, alpha, sigma, *known)[0]

    inputs = (x.requires_grad_(), coefficients.requires_grad_())
    step = 1e-4 * float(sigma[0])
    assert torch.autograd.gradcheck(
        head, inputs, eps=step, atol=1e-5 / step * 1e-4, rtol=1e-4, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(head, inputs, eps=step, atol=1e-3 / float(sigma[0]) ** 2 * 1e-3, rtol=1e-3)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("size", [1.0, 5.0, 30.0, 1e3, 1e6])
def test_nothing_is_infinite_however_far_the_state(t, size):
    sde = VPSDE()
    x = torch.linspace(-size, size, 101)[:, None].repeat(1, 3).requires_grad_()
    coefficients = (20.0 * torch.randn(101, 6, 3, generator=generator())).requires_grad_()
    alpha, sigma = sde.alpha(t).expand(101), sde.sigma(t).expand(101)
    noise = CellHead.apply(x, coefficients, alpha, sigma, *cells())[0]
    first = torch.autograd.grad(noise.sum(), (x, coefficients), create_graph=True)
    second = torch.autograd.grad(first[0].sum() + first[1].sum(), (x, coefficients))
    assert all(bool(value.isfinite().all()) for value in (noise, *first, *second))


@forward_mode
def test_jacobians_by_torch_func_are_the_batched_ones(split):
    net = digits.build(digits.histogram(split.train)).net.double()
    randomise(net)
    x = digits.dequantise(split.test[:1], generator()).double()
    t = torch.tensor([0.05], dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    eye = torch.eye(64, dtype=torch.float64).reshape(64, 1, 1, 8, 8)
    (batched,) = torch.autograd.grad(net(leaf, t), leaf, eye, is_grads_batched=True)
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        full = transform(lambda z: net(z, t))(x).reshape(64, 64)
        torch.testing.assert_close(batched.reshape(64, 64), full, rtol=1e-9, atol=1e-9)


def randomise(net):
    """Moves the weights that start at zero, so that the network has an influence."""
    source = generator(7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=source, dtype=torch.float64).to(parameter))


def test_the_network_predicts_the_same_with_and_without_a_graph(split):
    net = digits.build(digits.histogram(split.train)).net
    randomise(net)
    x, t = digits.dequantise(split.test[:9], generator()), torch.linspace(1e-5, 1.0, 9)
    with torch.no_grad():
        free = net(x, t)
    assert torch.equal(free, net(x, t).detach())


def test_samples_do_not_influence_one_another(split):
    net = digits.build(digits.histogram(split.train)).net.double()
    randomise(net)
    x = digits.dequantise(split.test[:5], generator()).double()
    t = torch.linspace(1e-5, 0.9, 5, dtype=torch.float64)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(net(x, t), alone, rtol=1e-10, atol=1e-10)


def test_the_untrained_model_is_the_exact_one_of_the_histogram(split):
    log_p = digits.histogram(split.train)
    model = digits.build(log_p)
    bits = digits.bits_per_dim(model, split.test[:2])
    hot = F.one_hot(split.test[:2].flatten(1), 17).double()
    exact = -(hot * log_p.T).sum((1, 2)) / 64 / math.log(2)
    # log p at t_min = 1e-5 sees the cells' edges blurred by 1e-3 of a width of 0.12: up to a per cent of the pixels.
    torch.testing.assert_close(bits, exact, rtol=0, atol=0.05)


def test_train_and_test_images_are_disjoint_and_complete(split):
    assert split.train.shape == (1437, 1, 8, 8)
    assert split.test.shape == (360, 1, 8, 8)
    from sklearn.datasets import load_digits

    everything = torch.as_tensor(load_digits().data).long()
    parts = torch.cat((split.train, split.test)).flatten(1)
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, parts.tolist()))
    assert not set(map(tuple, split.train.flatten(1).tolist())) & set(map(tuple, split.test.flatten(1).tolist()))
    counts = torch.bincount(split.test_labels)
    assert int(counts.max() - counts.min()) <= 3
    other = digits.load_split(1)
    assert not torch.equal(other.test, split.test)


def test_dequantised_images_quantise_back():
    levels = torch.randint(0, 17, (50, 1, 8, 8), generator=generator())
    x = digits.dequantise(levels, generator(1))
    assert torch.equal(((x.double() + 1.0) * 8.5).floor().long(), levels)
    u = ((x.double() + 1.0) * 8.5 - levels).flatten().sort().values
    # Kolmogorov-Smirnov, 3200 points: beyond 2.5/sqrt(n) with probability 7e-6.
    assert float((u - (torch.arange(3200) + 0.5) / 3200).abs().max()) < 2.5 / math.sqrt(3200)
    with pytest.raises(ValueError, match="integers from 0 to 16"):
        digits.dequantise(torch.full((1, 1, 8, 8), 17), generator())
    with pytest.raises(ValueError, match="integers from 0 to 16"):
        digits.dequantise(torch.zeros(1, 1, 8, 8), generator())


def test_shifting_moves_the_image_and_back_moves_it_back():
    levels = F.pad(torch.randint(1, 17, (9, 1, 6, 6), generator=generator()), (1, 1, 1, 1))
    by = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
    moved = digits.shift(levels, by)
    for image, (down, right), result in zip(levels, by.tolist(), moved, strict=True):
        assert torch.equal(result, torch.roll(image, (down, right), (1, 2)))
    assert torch.equal(digits.shift(moved, -by), levels)


def test_a_mixture_of_one_is_the_histogram_and_probabilities_sum_to_one():
    levels = torch.randint(0, 3, (200, 2), generator=generator())
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    for classes in (1, 4):
        fit = fit_mixture(levels, 3, classes, smoothing=1e-9)
        torch.testing.assert_close(fit.log_prob(every).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    single = fit_mixture(levels, 3, 1, smoothing=1e-12)
    torch.testing.assert_close(single.log_probability[0].exp(), one_hot(levels, 3).mean(0))


def test_em_finds_two_classes_that_share_nothing():
    zeros, twos = torch.zeros(30, 5, dtype=torch.int64), torch.full((10, 5), 2)
    fit = fit_mixture(torch.cat((zeros, twos)), 3, 2, smoothing=1e-3)
    # -mean log p is the entropy of the classes; one image of weight on each of them is the prior.
    weight = torch.tensor([31.0, 11.0], dtype=torch.float64) / 42
    expected = torch.stack((weight[0].log(), weight[1].log()))
    found = fit.log_prob(torch.stack((zeros[0], twos[0])))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


def test_the_baselines_are_the_known_figures(split):
    simple = digits.baselines(split)
    assert simple.uniform == pytest.approx(math.log2(17))
    assert simple.histogram == pytest.approx(2.433, abs=5e-3)
    assert simple.mixture == pytest.approx(2.22, abs=0.03)


def test_the_shipped_network_beats_the_strongest_baseline_on_images_it_never_saw(split, shipped):
    bits = digits.bits_per_dim(shipped, split.test[::12])
    assert bits.shape == (30,)
    assert float(bits.mean()) < 1.9


def test_the_shipped_weights_are_small_and_remember_their_sde(shipped):
    assert digits.WEIGHTS.stat().st_size < 2_000_000
    assert shipped.sde == VPSDE(0.1, 20.0, 1e-5, 1.0)
    assert not shipped.net.training


def test_a_few_steps_of_the_recipe_lower_the_loss_and_repeat_to_the_bit(split):
    from sdekit.loss import denoising_loss

    levels = split.train[:64]
    first, second = (digits.train(levels, steps=25, width=16, progress=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    x0 = digits.dequantise(levels.repeat(8, 1, 1, 1), generator(2))
    before, after = (
        float(denoising_loss(model, x0, generator=generator(3)).mean().detach())
        for model in (digits.build(digits.histogram(levels), width=16), first)
    )
    assert after < before


def test_a_checkpoint_of_other_images_is_refused(split, tmp_path):
    file, levels = tmp_path / "run.safetensors", split.train[:64]
    digits.train(levels, steps=2, width=16, checkpoint=file, progress=False)
    with pytest.raises(ValueError, match=r"data is int64 \(64, 1, 8, 8\) \w+ there and int64 \(64, 1, 8, 8\)"):
        digits.train(levels.flip(0), steps=2, width=16, checkpoint=file, progress=False)

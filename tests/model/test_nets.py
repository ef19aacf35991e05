"""The reference networks: every sample by itself, the condition seen, derivatives of every kind."""

from __future__ import annotations

import math

import pytest
import torch

from sdekit.model.nets import MLP, LabelFeatures, UNet

# torch's own forward mode scripts a few decompositions on first use, which its newer versions deprecate.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")


def seeded(make):
    """A network whose every weight is random: a zero somewhere would hide a path."""
    source = torch.Generator().manual_seed(0)
    net = make().double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            spread = 1.0 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    return net


NETS = {
    "mlp": (lambda: MLP((3,), 16, 2, classes=4), (3,)),
    "residual mlp": (lambda: MLP((2, 3), 16, 3, residual=True, classes=4, dropout=0.5), (2, 3)),
    "unet": (lambda: UNet(2, 8, 2, classes=4), (2, 4, 8)),
    "deep unet with attention": (lambda: UNet(1, 4, 3, attention=True, classes=4, dropout=0.5), (1, 8, 4)),
}


@pytest.fixture(params=list(NETS), ids=list(NETS))
def case(request):
    make, event = NETS[request.param]
    source = torch.Generator().manual_seed(1)
    x = torch.randn(5, *event, generator=source, dtype=torch.float64)
    label = torch.rand(5, generator=source, dtype=torch.float64)
    return seeded(make), x, label, torch.tensor([0, 1, 2, 3, 0])


def test_a_sample_alone_gets_what_it_gets_in_a_batch(case):
    net, x, label, y = case
    together = net(x, label, y)
    alone = torch.cat([net(x[i : i + 1], label[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-12)


def test_an_empty_batch_comes_back_empty(case):
    net, x, label, y = case
    assert net(x[:0], label[:0], y[:0]).shape == (0, *x.shape[1:])


def test_permuting_the_batch_permutes_the_output(case):
    net, x, label, y = case
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(net(x[order], label[order], y[order]), net(x, label, y)[order], rtol=1e-11, atol=1e-12)


def test_state_time_and_class_all_matter_and_no_class_is_a_class_of_its_own(case):
    net, x, label, y = case
    base = net(x, label, y)
    for other in (net(x + 0.1, label, y), net(x, label + 0.1, y), net(x, label, (y + 1) % 4), net(x, label)):
        assert float((other - base).detach().abs().flatten(1).amax(1).min()) > 1e-6


@forward_mode
def test_reverse_forward_and_batched_derivatives_agree(case):
    net, x, label, y = case
    x, label, y = x[:1], label[:1], y[:1]
    size = x.numel()

    def flat(z):
        return net(z.reshape(x.shape), label, y).reshape(-1)

    forward = torch.func.jacfwd(flat)(x.reshape(-1))
    leaf = x.reshape(-1).clone().requires_grad_()
    (reverse,) = torch.autograd.grad(flat(leaf), leaf, torch.eye(size, dtype=torch.float64), is_grads_batched=True)
    torch.testing.assert_close(reverse, forward, rtol=1e-9, atol=1e-11)
    step = 1e-6
    direction = torch.linspace(-1.0, 1.0, size, dtype=torch.float64)
    difference = (flat(leaf.detach() + step * direction) - flat(leaf.detach() - step * direction)) / (2 * step)
    torch.testing.assert_close(forward @ direction, difference.detach(), rtol=1e-6, atol=1e-8)


def test_an_mlp_sees_only_the_flattened_event():
    wide, flat = MLP((2, 3), 8, 2).double(), MLP((6,), 8, 2).double()
    flat.load_state_dict(wide.state_dict())
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.linspace(0, 1, 4, dtype=torch.float64)
    assert torch.equal(wide(x, label).flatten(1), flat(x.flatten(1), label))


def test_a_residual_mlp_with_silent_layers_is_affine_in_front_of_its_last_activation():
    net = seeded(lambda: MLP((3,), 16, 3, residual=True))
    with torch.no_grad():
        for layer in net.hidden:
            layer.weight.zero_()
            layer.bias.zero_()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.full((4,), 0.3, dtype=torch.float64)
    inner = net.enter(x) + net.conditioning(label, None)
    torch.testing.assert_close(net(x, label), net.leave(torch.nn.functional.silu(inner)))


def test_label_features_are_orthonormal_over_a_period():
    features = LabelFeatures(4, period=3.0).double()
    t = 3.0 * torch.arange(64, dtype=torch.float64) / 64
    values = features(t)
    # The frequencies are stored in float32.
    torch.testing.assert_close(values.T @ values / 32, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)


def test_wrong_shapes_and_classes_are_named_at_the_door():
    label = torch.zeros(2)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 4\); \(B, 3\) is needed"):
        MLP((3,))(torch.zeros(2, 4), label)
    with pytest.raises(ValueError, match="multiples of 4"):
        UNet(1, 8, 3)(torch.zeros(2, 1, 8, 6), label)
    with pytest.raises(ValueError, match="no classes"):
        MLP((3,))(torch.zeros(2, 3), label, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="depth=0"):
        MLP((3,), 8, 0)

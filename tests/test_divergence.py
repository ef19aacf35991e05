"""The trace: exact in any chunk, unbiased from any probe, with the variance that the formulas promise."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import LAWS, draw, drawn, perceptron, true_variance
from torch import nn

import sdekit

# torch's own forward mode still uses torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def field_of(net, t=0.4):
    return lambda x: net(x, torch.full((x.shape[0],), t, dtype=x.dtype))


def jacobians(field, x):
    """(B, D, D) by autograd, sample by sample."""
    rows = [torch.autograd.functional.jacobian(lambda one: field(one[None])[0], row) for row in x]
    return torch.stack([jacobian.reshape(row.numel(), row.numel()) for jacobian, row in zip(rows, x, strict=True)])


def linear(matrix):
    return lambda x: x @ matrix.T


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 5, 6, 100])
def test_the_exact_trace_is_the_trace_of_the_jacobian_in_any_chunk(chunk):
    net, x = perceptron(6, 1), draw(2, 5, 6)
    result = sdekit.Exact(chunk).evaluate(field_of(net), x, None)
    expected = torch.einsum("bii->b", jacobians(field_of(net), x))
    torch.testing.assert_close(result.traces[:, 0], expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(result.value, field_of(net)(x).detach(), rtol=0, atol=0)
    assert result.products is None
    assert not result.value.requires_grad


def test_the_exact_trace_of_images_is_that_of_their_flat_jacobian():
    net = nn.Conv2d(2, 2, 3, padding=1).double()
    x = draw(1, 3, 2, 4, 4)
    result = sdekit.Exact(7).evaluate(lambda s: torch.tanh(net(s)), x, None)
    expected = torch.einsum("bii->b", jacobians(lambda s: torch.tanh(net(s)), x))
    torch.testing.assert_close(result.traces[:, 0], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "divergence", [sdekit.Exact(), sdekit.Exact(2), sdekit.Hutchinson(3), sdekit.Hutchinson(3, mode="jvp")]
)
def test_value_and_divergence_cost_one_call(divergence):
    calls, net, x = [], perceptron(6, 1), draw(2, 4, 6)

    def field(state):
        calls.append(1)
        return field_of(net)(state)

    probes = drawn(divergence, 4, 6) if divergence.probe_count else None
    divergence.evaluate(field, x, probes)
    assert len(calls) == 1


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("probes", [1, 3])
def test_an_estimate_is_the_quadratic_form_of_its_probe(mode, probes):
    net, x = perceptron(5, 1), draw(2, 4, 5)
    divergence = sdekit.Hutchinson(probes, mode=mode)
    v = drawn(divergence, 4, 5)
    assert v.shape == (probes, 4, 5)
    result = divergence.evaluate(field_of(net), x, v)
    a = jacobians(field_of(net), x)
    torch.testing.assert_close(result.traces, torch.einsum("pbi,bij,pbj->bp", v, a, v), rtol=1e-11, atol=1e-12)
    turned = a if mode == "jvp" else a.mT
    torch.testing.assert_close(result.products, torch.einsum("bij,pbj->bpi", turned, v), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(result.value, field_of(net)(x).detach(), rtol=1e-14, atol=0)


def test_forward_and_reverse_mode_give_the_same_number():
    net, x = perceptron(5, 1), draw(2, 4, 5)
    v = drawn(sdekit.Hutchinson(2), 4, 5)
    reverse = sdekit.Hutchinson(2).evaluate(field_of(net), x, v).traces
    torch.testing.assert_close(
        sdekit.Hutchinson(2, mode="jvp").evaluate(field_of(net), x, v).traces, reverse, rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_law_is_unbiased_with_its_own_variance(law, symmetric):
    # 200,000 probes: the mean beyond 5.5 standard errors has probability 4e-8. The variance of a quadratic form's
    # sample variance is at most (kurtosis - 1)/n; the kurtosis is below 9 + 12 = 15 in 6 dimensions: 5.5 sigma is 4.6%.
    a, n = draw(3, 6, 6) + torch.diag(torch.arange(6.0, dtype=torch.float64)), 200_000
    a = 0.5 * (a + a.T) if symmetric else a
    divergence = sdekit.Hutchinson(law=law)
    traces = divergence.evaluate(linear(a), torch.zeros(n, 6, dtype=torch.float64), drawn(divergence, n, 6)).traces[
        :, 0
    ]
    variance = true_variance(law, a)
    assert abs(float(traces.mean() - a.trace())) < 5.5 * math.sqrt(variance / n)
    assert float(traces.var()) == pytest.approx(variance, rel=0.046)


@pytest.mark.parametrize("law", LAWS)
def test_more_probes_average_and_never_add_up(law):
    # 40,000 samples; means beyond 5.5 standard errors, 4e-8 each; variances within 5.5 sigma as above.
    a, n = draw(3, 4, 4), 40_000
    for count in (1, 2, 5):
        model = sdekit.ScoreModel(Linear(a), sdekit.KarrasSDE(0.1, 10.0))
        flow = sdekit.LikelihoodFlow(
            model, sdekit.Hutchinson(count, law=law), torch.Size([4]), sdekit.Hutchinson.keys(1, torch.arange(n))
        )
        s = torch.full((n,), 0.5, dtype=torch.float64)
        z = flow.enter(torch.zeros(n, 4, dtype=torch.float64), s)
        estimate = flow.evaluate(s, z, torch.zeros(n, dtype=torch.int64)).slope.log_det
        exact = sdekit.LikelihoodFlow(model, sdekit.Exact(), torch.Size([4]), flow.keys)
        truth = float(
            exact.evaluate(s[:1], exact.enter(torch.zeros(1, 4, dtype=torch.float64), s[:1]), None).slope.log_det
        )
        assert estimate.shape == (n, count)  # each probe's own
        estimate = estimate.mean(1)
        assert abs(float(estimate.mean()) - truth) < 5.5 * float(estimate.std()) / math.sqrt(n)
        if count == 1:
            single = float(estimate.var())
        assert float(estimate.var()) == pytest.approx(single / count, rel=0.15)


class Linear(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x, label):
        return x @ self.matrix.T


def test_fixed_probes_stay_and_fresh_probes_change_with_the_node():
    still, fresh = sdekit.Hutchinson(2, fresh=False), sdekit.Hutchinson(2)
    assert torch.equal(drawn(still, 5, 7, node=0), drawn(still, 5, 7, node=9))
    assert torch.equal(drawn(still, 5, 7), drawn(fresh, 5, 7, node=0))
    assert not torch.equal(drawn(fresh, 5, 7, node=0), drawn(fresh, 5, 7, node=1))


def test_the_control_probe_is_one_more_fixed_and_independent():
    controlled = sdekit.Hutchinson(2, control=True)
    assert controlled.probe_count == 3
    first, second = drawn(controlled, 400, 64, node=0), drawn(controlled, 400, 64, node=1)
    assert torch.equal(first[2], second[2])
    assert torch.equal(first[:2], drawn(sdekit.Hutchinson(2), 400, 64, node=0))
    for value in (first[0], first[1], second[0]):  # |z| < 6: false alarm 6e-9
        assert abs(float((value * first[2]).mean())) * math.sqrt(400 * 64) < 6.0


@pytest.mark.parametrize("size", [1, 2, 4])
def test_in_few_dimensions_the_control_is_the_exact_trace(size):
    matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    divergence = sdekit.Hutchinson(2, control=True)
    found = divergence.evaluate(lambda x: x @ matrix.T, torch.ones(3, size).double(), drawn(divergence, 3, size))
    assert found.traces.shape == (3, 2 + size)
    torch.testing.assert_close(found.traces[:, 2:].mean(1), matrix.trace().expand(3))


class NoForwardMode(torch.autograd.Function):
    """x^3 / 3 with a hand-written backward and nothing for forward mode or batching."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3 / 3.0

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy((grad * x**2).numpy())


def cube(matrix):
    return lambda x: NoForwardMode.apply(x) @ matrix.T


@pytest.mark.parametrize("probes", [1, 3])
def test_a_kernel_without_forward_mode_is_told_of_and_answered_in_reverse(probes):
    a, x = draw(1, 4, 4), draw(2, 3, 4)
    v = drawn(sdekit.Hutchinson(probes), 3, 4)
    with pytest.warns(sdekit.SdekitWarning, match=r"no forward mode.*using mode='vjp'"):
        found = sdekit.Hutchinson(probes, mode="jvp").evaluate(cube(a), x, v)
    expected = torch.einsum("pbi,ij,bj,pbj->bp", v, a, x**2, v)
    torch.testing.assert_close(found.traces, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_a_kernel_without_a_batching_rule_gives_the_same_trace(chunk):
    a, x = draw(1, 4, 4), draw(2, 3, 4)
    found = sdekit.Exact(chunk).evaluate(cube(a), x, None).traces[:, 0]
    torch.testing.assert_close(found, (x**2) @ a.diagonal(), rtol=1e-12, atol=1e-13)


DETACHED = {
    "detached output": lambda net: lambda x: field_of(net)(x).detach(),
    "detached input": lambda net: lambda x: field_of(net)(x.detach()),
    "no_grad": lambda net: lambda x: torch.no_grad()(field_of(net))(x),
    "constant": lambda net: lambda x: torch.ones_like(x),
}


@pytest.mark.parametrize("make", DETACHED.values(), ids=DETACHED.keys())
@pytest.mark.parametrize("divergence", [sdekit.Exact(), sdekit.Exact(1), sdekit.Hutchinson(), sdekit.Hutchinson(3)])
def test_a_detached_network_is_an_error_and_not_a_zero(make, divergence):
    probes = drawn(divergence, 2, 4) if divergence.probe_count else None
    with pytest.raises(sdekit.NetworkError, match="does not depend on its input"):
        divergence.evaluate(make(perceptron(4, 1)), draw(1, 2, 4), probes)


def test_what_cannot_be_meant_is_refused():
    for make in (
        lambda: sdekit.Hutchinson(0),
        lambda: sdekit.Hutchinson(law="normal"),
        lambda: sdekit.Hutchinson(mode="forward"),
        lambda: sdekit.Hutchinson(fresh=False, control=True),
        lambda: sdekit.Exact(0),
    ):
        with pytest.raises(ValueError, match=r"needed|drop control"):
            make()
    with pytest.raises(ValueError, match="probes=None"):
        sdekit.Hutchinson().evaluate(linear(torch.eye(2)), torch.zeros(1, 2), None)

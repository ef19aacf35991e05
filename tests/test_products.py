"""Products within the memory there is: how many at once, fewer where it runs out, forward mode where that is less."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import Function, draw, drawn
from torch import nn

import sdekit
from sdekit import _products, divergence
from sdekit._memory import counted
from sdekit._products import tried
from sdekit.divergence import Exact, Hutchinson

# torch's own forward mode still uses torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def deep(dim, width=64, depth=8):
    """A field through many layers: its graph is large beside what one layer takes."""
    torch.manual_seed(0)
    sizes = [dim, *[width] * depth]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, dim)).double()


class Watched:
    """Stands for `vector_jacobian`; keeps how many products were asked for, and fails beyond some number."""

    def __init__(self, most=math.inf, error=torch.OutOfMemoryError):
        self.asked, self.most, self.error = [], most, error

    def __call__(self, out, leaf, vectors, keep, graph=False):
        self.asked.append(vectors.shape[0])
        if vectors.shape[0] > self.most:
            raise self.error("CUDA out of memory")
        return _products.vector_jacobian(out, leaf, vectors, keep, graph)


@pytest.fixture
def watch(monkeypatch):
    def start(*args):
        watched = Watched(*args)
        monkeypatch.setattr(divergence, "vector_jacobian", watched)
        return watched

    return start


@pytest.mark.parametrize("room", [40_000, 300_000, 2_000_000])
@pytest.mark.parametrize("batch", [3, 20])
def test_as_many_products_are_made_as_fit_the_room(room, batch, watch, monkeypatch):
    """Two are counted; then the products at once stay within the room and use half of it, or all are made at once."""
    monkeypatch.setattr(divergence, "_CACHED", room)
    watched, net, x, size = watch(), deep(40), draw(1, batch, 40), 40
    exact = Exact()
    first = exact.evaluate(net, x, None)
    assert watched.asked[0] == 2
    assert sum(watched.asked) == size
    second = exact.evaluate(net, x, None)
    torch.testing.assert_close(first.traces, second.traces, rtol=1e-12, atol=1e-13)
    chunk = watched.asked[len(watched.asked) - watched.asked[::-1].index(watched.asked[1]) - 1]
    out = net(x.requires_grad_())
    vectors = torch.zeros(chunk, *x.shape, dtype=torch.float64)
    taken = counted(lambda: _products.vector_jacobian(out, x, vectors, True))[1] + vectors.nbytes
    assert taken <= room or chunk == 1
    assert taken * (chunk + 1) / chunk > 0.5 * room or chunk >= size - 2


def test_a_shape_is_measured_once_and_so_are_the_smaller_batches_that_a_solve_leaves(watch):
    watched, net, exact = watch(), deep(40), Exact()
    for batch in (30, 30, 20, 7):
        exact.evaluate(net, draw(1, batch, 40), None)
    assert watched.asked == [2, 38, 40, 40, 40]


def test_of_few_numbers_all_products_are_made_at_once(watch):
    watched = watch()
    Exact().evaluate(deep(16), draw(1, 16, 16), None)  # 16 x 16 x 16 = 2^12
    assert watched.asked == [16]


@pytest.mark.parametrize(
    ("most", "chunk", "error"),
    [
        (1, None, torch.OutOfMemoryError),
        (5, None, MemoryError),
        (5, 24, RuntimeError),
        (1, 40, torch.OutOfMemoryError),
    ],
)
def test_where_memory_runs_out_fewer_products_give_the_same_trace(most, chunk, error, watch):
    net, x = deep(40), draw(1, 30, 40)
    expected = Exact().evaluate(net, x, None).traces
    watched, exact = watch(most, error), Exact(chunk)
    torch.testing.assert_close(exact.evaluate(net, x, None).traces, expected, rtol=1e-12, atol=1e-13)
    before = len(watched.asked)
    torch.testing.assert_close(exact.evaluate(net, x, None).traces, expected, rtol=1e-12, atol=1e-13)
    assert max(watched.asked[before:]) <= most  # what fits is known by then


def test_where_not_even_one_product_fits_the_error_is_that_of_memory(watch):
    watch(0)
    with pytest.raises(torch.OutOfMemoryError):
        Exact().evaluate(deep(40), draw(1, 30, 40), None)


def test_gradients_go_through_traces_of_fewer_products(watch):
    net, x = deep(20), draw(1, 12, 20).requires_grad_()
    expected = torch.autograd.grad(Exact().evaluate(net, x, None).traces.sum(), x)[0]
    watch(3)
    found = torch.autograd.grad(Exact().evaluate(net, x, None).traces.sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def fail():
        raise RuntimeError("a kernel failed")

    with pytest.raises(RuntimeError, match="a kernel failed"):
        tried(fail, torch.device("cpu"))


class Counting:
    """A field that keeps how often it was called."""

    def __init__(self, field):
        self.field, self.calls = field, 0

    def __call__(self, x):
        self.calls += 1
        return self.field(x)


def room_of(monkeypatch, room):
    monkeypatch.setattr(divergence, "free_bytes", lambda device: room / divergence._ROOM)


@pytest.mark.parametrize("probes", [1, 3])
def test_auto_is_reverse_mode_where_that_fits_and_forward_mode_where_it_does_not(probes, monkeypatch):
    """The products tell them apart: A' v and A v of a Jacobian that is not symmetric."""
    net, x = deep(10, depth=20), draw(1, 200, 10)
    v = drawn(Hutchinson(probes), 200, 10)
    reverse, forward = (Hutchinson(probes, mode=mode).evaluate(net, x, v) for mode in ("vjp", "jvp"))
    assert not torch.allclose(reverse.products, forward.products)
    with torch.no_grad():  # as in a solve: forward mode keeps no graph
        large = counted(lambda: Hutchinson(probes).evaluate(net, x, v))[1]
        small = counted(lambda: Hutchinson(probes, mode="jvp").evaluate(net, x, v))[1]
        assert small < 0.7 * large
        for room, expected in ((1.01 * large, reverse), (0.99 * large, forward)):
            room_of(monkeypatch, room)
            field, auto = Counting(net), Hutchinson(probes, mode="auto")
            found, peak = counted(lambda auto=auto, field=field: auto.evaluate(field, x, v))
            torch.testing.assert_close(found.products, expected.products, rtol=1e-12, atol=1e-13)
            assert peak < 1.1 * room  # it is stopped by the tensor that does not fit
            before = field.calls
            again = auto.evaluate(field, x, v)
            torch.testing.assert_close(again.products, expected.products, rtol=1e-12, atol=1e-13)
            assert field.calls == before + 1


def test_auto_turns_to_forward_mode_where_memory_runs_out_later(monkeypatch):
    net, x, v = deep(10), draw(1, 5, 10), drawn(Hutchinson(), 5, 10)
    auto = Hutchinson(mode="auto")
    auto.evaluate(net, x, v)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(divergence, "reverse_mode", fail)
    expected = Hutchinson(mode="jvp").evaluate(net, x, v).products
    for _ in range(2):
        torch.testing.assert_close(auto.evaluate(net, x, v).products, expected)
    with pytest.raises(torch.OutOfMemoryError):
        Hutchinson().evaluate(net, x, v)


def test_what_is_to_be_differentiated_stays_in_reverse_mode(monkeypatch):
    room_of(monkeypatch, 1.0)
    net, v = deep(10), drawn(Hutchinson(), 5, 10)
    x = draw(1, 5, 10).requires_grad_()
    found = Hutchinson(mode="auto").evaluate(net, x, v)
    torch.testing.assert_close(found.products, Hutchinson().evaluate(net, x, v).products, rtol=1e-12, atol=0)
    assert found.traces.requires_grad


def test_forward_mode_that_runs_out_of_memory_is_not_taken_for_a_missing_rule():
    def field(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Hutchinson(mode="jvp").evaluate(field, draw(1, 2, 3), drawn(Hutchinson(), 2, 3))


def test_where_neither_fits_it_is_tried_in_reverse_mode(monkeypatch):
    room_of(monkeypatch, 1.0)
    net, x, v = deep(10), draw(1, 5, 10), drawn(Hutchinson(), 5, 10)
    field, auto = Counting(net), Hutchinson(mode="auto")
    for most in (3, 1):  # what was found out is kept
        before = field.calls
        found = auto.evaluate(field, x, v)
        torch.testing.assert_close(found.products, Hutchinson().evaluate(net, x, v).products, rtol=1e-12, atol=0)
        assert field.calls - before <= most


def test_a_likelihood_in_little_room_is_that_of_forward_mode(monkeypatch):
    net, x, v = deep(6, depth=20), draw(1, 50, 6), drawn(Hutchinson(), 50, 6)
    model = sdekit.ScoreModel(Function(lambda state, label: net(state)), sdekit.VPSDE())
    with torch.no_grad():
        peaks = [counted(lambda m=m: Hutchinson(mode=m).evaluate(net, x, v))[1] for m in ("vjp", "jvp")]
    expected = sdekit.log_likelihood(model, x, nodes=12, divergence=Hutchinson(mode="jvp"))
    room_of(monkeypatch, sum(peaks) / 2)
    found = sdekit.log_likelihood(model, x, nodes=12, divergence=Hutchinson(mode="auto"))
    assert torch.equal(found.log_prob, expected.log_prob)
    assert torch.equal(found.std_error, expected.std_error)
    assert not torch.equal(
        found.std_error, sdekit.log_likelihood(model, x, nodes=12, divergence=Hutchinson()).std_error
    )


def test_what_was_found_out_is_no_part_of_what_was_asked_for():
    used = Exact(), Hutchinson(mode="auto")
    for one in used:
        one.evaluate(deep(40), draw(1, 30, 40), drawn(one, 30, 40) if one.probe_count else None)
    assert used == (Exact(), Hutchinson(mode="auto"))
    assert hash(used[0]) == hash(Exact())
    assert repr(used[0]) == "Exact(chunk=None)"

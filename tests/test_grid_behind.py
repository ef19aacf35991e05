"""On a grid, few rows of a perceptron have their products asked for many nodes at once: what comes out is the same."""

from __future__ import annotations

import signal
import warnings

import pytest
import torch
from helpers import SDES, draw, perceptron
from torch import nn

import sdekit
from sdekit import Exact, Hutchinson, Status, grid_behind, grid_books

NODES = 20
DIVERGENCES = [
    Exact(),
    Hutchinson(1, fresh=False),
    Hutchinson(3, fresh=False),
    Hutchinson(1),
    Hutchinson(1, control=True),
    Hutchinson(2, law="gaussian"),
]
FIELDS = ("log_prob", "log_det", "std_error", "solver_error", "rounding", "latent", "t")


class Moved(nn.Module):
    """A perceptron with conditions, whose calls are counted by their rows."""

    def __init__(self, act=None):
        super().__init__()
        self.net, self.act, self.rows = perceptron(3, 2), act, []

    def forward(self, x, label, shift=None):
        self.rows.append(len(x))
        if self.act is not None:
            label = self.act(self, x, label)
        seen = x if shift is None else x + shift
        return self.net(seen, label)


def model_of(act=None, sde="vp"):
    return sdekit.ScoreModel(Moved(act), SDES[sde], sdekit.noise(), data_std=1.0)


@pytest.fixture
def each(monkeypatch):
    """A density with every node asked by itself."""

    def solve(model, x, **options):
        with monkeypatch.context() as patch:
            patch.setattr(grid_behind, "_FEW", 0)
            return sdekit.log_likelihood(model, x, **options)

    return solve


def agree(ours, theirs, tol=1e-9):
    for name in FIELDS:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=tol, atol=1e-3 * tol, msg=name)
    assert torch.equal(ours.status, theirs.status)
    assert torch.equal(ours.stats.evaluations, theirs.stats.evaluations)
    assert torch.equal(ours.stats.accepted, theirs.stats.accepted)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("sde", ["vp", "karras", "flow"])
def test_products_are_those_of_every_node_by_itself(sde, divergence, each):
    model, x = model_of(sde=sde), draw(1, 1, 3)
    ours, theirs = (
        solve(model, x, nodes=NODES, divergence=divergence, seed=4) for solve in (sdekit.log_likelihood, each)
    )
    agree(ours, theirs)
    assert ours.stats.evaluations.tolist() == [NODES]
    assert (ours.stats.calls, ours.stats.paid) == (NODES + 1, 2 * NODES - 1)
    assert ours.stats.useful == NODES / (2 * NODES - 1)
    assert (theirs.stats.calls, theirs.stats.paid) == (NODES, NODES)


def test_single_precision_agrees_to_its_rounding(each):
    model, x = model_of(), draw(2, 4, 3).float()
    model.net.float()
    ours, theirs = (solve(model, x, nodes=NODES, divergence=Hutchinson(1)) for solve in (sdekit.log_likelihood, each))
    assert ours.stats.calls == NODES + 2  # 16 nodes of 4 samples make 64 rows
    torch.testing.assert_close(ours.log_prob, theirs.log_prob, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours.std_error, theirs.std_error, rtol=1e-4, atol=0.0)


def test_conditions_follow_their_samples_and_no_sample_influences_another(each):
    model, x = model_of().condition(shift=draw(3, 9, 3)), draw(2, 9, 3)
    whole = sdekit.log_likelihood(model, x, nodes=NODES, divergence=Hutchinson(1))
    assert whole.stats.calls == NODES
    for rows in (torch.tensor([7]), torch.tensor([2, 0, 5])):
        options = {"nodes": NODES, "divergence": Hutchinson(1), "indices": rows}
        part = sdekit.log_likelihood(model.take(rows), x[rows], **options)
        assert part.stats.calls == NODES + 1
        agree(part, each(model.take(rows), x[rows], **options))
        torch.testing.assert_close(part.log_prob, whole.log_prob[rows], rtol=0.0, atol=1e-11)
        torch.testing.assert_close(part.std_error, whole.std_error[rows], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(("rows", "most"), [(1, 2), (7, 6), (64, 2 * (NODES - 1))])
def test_however_many_rows_a_call_has(rows, most, each, monkeypatch):
    monkeypatch.setattr(grid_behind, "_AT_ONCE", rows)
    monkeypatch.setattr(grid_behind, "_NODES", 1)
    model, x = model_of(), draw(1, 2, 3)
    agree(*(solve(model, x, nodes=NODES, divergence=Hutchinson(2)) for solve in (sdekit.log_likelihood, each)))
    assert max(model.net.rows) == most  # the first node is asked by itself


def first_label(net, x, label):
    return label[:1].expand_as(label)


def own_size(net, x, label):
    if len(x) > 2:
        raise RuntimeError("a batch of 2 is wanted")
    return label


@pytest.mark.parametrize(("act", "said"), [(first_label, "something else"), (own_size, "a batch of 2 is wanted")])
def test_networks_that_cannot_be_asked_for_several_nodes_are_asked_for_each(act, said, each):
    model, x = model_of(act), draw(1, 2, 3)
    with pytest.warns(sdekit.SdekitWarning, match=said):
        first = sdekit.log_likelihood(model, x, nodes=NODES, divergence=Hutchinson(1))
    agree(first, each(model, x, nodes=NODES, divergence=Hutchinson(1)))
    with warnings.catch_warnings():  # known from now on
        warnings.simplefilter("error")
        agree(sdekit.log_likelihood(model, x, nodes=NODES, divergence=Hutchinson(1)), first)
    assert model.net.rows[-NODES:] == [2] * NODES


@pytest.mark.parametrize(("mean", "nodes"), [(10.0, 1000), (100.0, 300)])
@pytest.mark.parametrize("divergence", [Hutchinson(1), Exact()], ids=repr)
def test_answers_that_hardly_differ_while_products_do_are_told_apart(mean, nodes, divergence, each):
    class Denoiser(nn.Module):  # of Gaussian data far from zero, by the first label for all: right where all share it
        def forward(self, x, label):
            t = label[:1].expand(len(x))
            alpha, sigma = SDES["vp"].alpha(t)[:, None], SDES["vp"].sigma(t)[:, None]
            return mean + alpha * 0.01 / (alpha**2 * 0.01 + sigma**2) * (x - alpha * mean)

    model = sdekit.ScoreModel(Denoiser(), SDES["vp"], sdekit.data(), data_std=0.1)
    x = mean + 0.1 * draw(1, 1, 3)
    with pytest.warns(sdekit.SdekitWarning, match="something else"):
        ours = sdekit.log_likelihood(model, x, nodes=nodes, divergence=divergence)
    agree(ours, each(model, x, nodes=nodes, divergence=divergence))


@pytest.mark.parametrize("count", [1, 8])
def test_a_backward_pass_that_answers_in_the_same_buffer_is_copied(count):
    class Buffered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, buffer):
            ctx.save_for_backward(x, weight, buffer)
            return torch.tanh(x @ weight)

        @staticmethod
        def backward(ctx, grad):
            x, weight, buffer = ctx.saved_tensors
            product = (grad * (1.0 - torch.tanh(x @ weight) ** 2)) @ weight.T
            return buffer[: len(x)].copy_(product), None, None

    class Net(nn.Module):
        def __init__(self, buffered):
            super().__init__()
            self.buffer = torch.empty(64, 3, dtype=torch.float64) if buffered else None

        def forward(self, x, label):
            weight = draw(3, 3, 3)
            return torch.tanh(x @ weight) if self.buffer is None else Buffered.apply(x, weight, self.buffer)

    found = [
        sdekit.log_likelihood(
            sdekit.ScoreModel(Net(buffered), SDES["vp"]), draw(5, count, 3), nodes=40, divergence=Hutchinson(1)
        )
        for buffered in (True, False)
    ]
    agree(*found)


def test_where_memory_runs_out_each_is_asked_by_itself_and_nothing_is_said(each):
    def large(net, x, label):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return label

    model, x = model_of(large), draw(1, 2, 3)
    for _ in range(2):  # another solve tries again
        model.net.rows.clear()
        ours = sdekit.log_likelihood(model, x, nodes=NODES, divergence=Hutchinson(1))
        assert max(model.net.rows) > 2
        agree(ours, each(model, x, nodes=NODES, divergence=Hutchinson(1)))


def test_only_perceptrons_and_few_rows_are_asked_twice():
    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x, label):
            return torch.tanh(self.layer(x))

    def twice(net, x, divergence):
        model = sdekit.ScoreModel(net, sdekit.VPSDE())
        stats = sdekit.log_likelihood(model, x, nodes=NODES, divergence=divergence).stats
        return stats.paid > stats.evaluations.sum()

    plain = perceptron(3, 2)
    assert twice(plain, draw(1, 4, 3), Hutchinson(1))
    assert not twice(plain, draw(1, 5, 3), Hutchinson(1))
    assert not twice(plain, draw(1, 2, 3), Hutchinson(3))
    assert not twice(plain, draw(1, 2, 3), Exact())
    assert not twice(plain, draw(1, 1, 3), Hutchinson(1, mode="jvp"))
    assert not twice(Image(), draw(1, 16, 1).reshape(1, 1, 4, 4).float(), Hutchinson(1))


def test_what_was_found_before_an_error_is_kept():
    def late(net, x, label):
        if torch.is_grad_enabled() and bool((label > 0.3).any()):
            raise RuntimeError("no products here")
        return label

    with pytest.raises(sdekit.SolveError, match="no products here") as caught:
        sdekit.log_likelihood(model_of(late), draw(1, 1, 3), nodes=NODES, divergence=Hutchinson(1))
    found = caught.value.solution
    assert 1 < int(found.stats.evaluations) < NODES
    assert bool(found.latent.isfinite().all())
    assert 0.0 < float(found.t) <= 0.3


@pytest.mark.parametrize("late", [0, 1, 7])
def test_whoever_stops_it_finds_the_nodes_before(late, each):
    def interrupted(net, x, label):
        if len(net.rows) == late + 1:
            raise KeyboardInterrupt
        return label

    def stopped(solve):
        with pytest.warns(sdekit.PartialResultWarning):
            return solve(model_of(interrupted), draw(1, 1, 3), nodes=NODES, divergence=Hutchinson(1))

    ours, theirs = stopped(sdekit.log_likelihood), stopped(each)
    assert ours.stats.evaluations.tolist() == theirs.stats.evaluations.tolist() == [late]
    torch.testing.assert_close(ours.t, theirs.t)
    torch.testing.assert_close(ours.latent, theirs.latent, rtol=1e-10, atol=1e-12)


def test_an_interrupt_within_the_products_loses_nothing(each):
    def interrupted(net, x, label):
        if len(net.rows) == NODES + 1:
            signal.raise_signal(signal.SIGINT)
        return label

    options = {"nodes": NODES, "divergence": Hutchinson(1)}
    ours = sdekit.log_likelihood(model_of(interrupted), draw(1, 1, 3), **options)
    agree(ours, each(model_of(), draw(1, 1, 3), **options))
    assert ours.stats.calls == NODES + 1


def test_what_is_not_finite_is_of_its_own_sample(each):
    def spoilt(net, x, label):
        return torch.where(x[:, 0] > 5.0, torch.nan, label)

    x = torch.cat((draw(1, 2, 3), torch.full((1, 3), 9.0, dtype=torch.float64)))
    ours, theirs = (
        solve(model_of(spoilt), x, nodes=NODES, divergence=Hutchinson(1), throw=False)
        for solve in (sdekit.log_likelihood, each)
    )
    assert ours.status.tolist() == theirs.status.tolist() == [Status.DONE, Status.DONE, Status.NOT_FINITE]
    torch.testing.assert_close(ours.log_prob, theirs.log_prob, rtol=1e-9, atol=0.0, equal_nan=True)


def test_memory_does_not_grow_with_the_nodes(monkeypatch):
    model, x = model_of(), draw(1, 2, 3)
    asked = []
    book = grid_books.Books.settle

    def settle(books):
        asked.append(len(books.open))
        book(books)

    monkeypatch.setattr(grid_books.Books, "settle", settle)
    sdekit.log_likelihood(model, x, nodes=200, divergence=Hutchinson(1))
    assert max(asked) == 32
    assert max(model.net.rows) == 64

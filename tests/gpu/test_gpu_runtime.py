"""On CUDA: nothing waits within a step, and captured and compiled steps give the eager numbers."""

from __future__ import annotations

import contextvars
import gc
import random
import warnings
import weakref

import pytest
import torch
from helpers import SDES, mixture, perceptron

import sdekit
from sdekit import _memory, capture, captured
from sdekit.loop import Problem, advance, begin

pytestmark = pytest.mark.gpu

SDE = SDES["vp"]
TARGET = mixture(4, 6, count=5)
MODELS = {
    "exact": TARGET.score_model(SDE),
    "network": sdekit.ScoreModel(perceptron(4, 2), SDES["karras"], sdekit.edm(0.7)),
}
DIVERGENCES = [sdekit.Exact(), sdekit.Hutchinson(control=True)]


def data(count=40):
    return TARGET.sample(count, generator=torch.Generator().manual_seed(3)).cuda()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_no_step_waits_for_the_device(name, divergence):
    model, x = MODELS[name].cuda(), data()
    term = sdekit.likelihood_flow.LikelihoodFlow(
        model, divergence, x.shape[1:], sdekit.Hutchinson.keys(0, torch.arange(len(x), device="cuda"))
    )
    with torch.no_grad():
        s0 = term.coordinate(torch.full((len(x),), model.sde.t_min, dtype=torch.float64, device="cuda"))
        problem = Problem(term, sdekit.Adams(5), sdekit.controller.Nats(1e-2), torch.ones_like(s0), None, 1000)
        carry = advance(problem, begin(problem, s0, term.enter(x, s0)))  # small tables are made once
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(6):
                carry = advance(problem, carry)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("name", "divergence", "runtime", "slots"),
    [
        *[(name, each, "graph", slots) for name in MODELS for each in DIVERGENCES for slots in (None, 16)],
        *[("exact", DIVERGENCES[0], how, None) for how in ("compile", "compiled-graph")],
        *[("network", DIVERGENCES[1], how, 6) for how in ("compile", "compiled-graph")],
    ],
)
def test_densities_are_the_eager_ones(name, divergence, runtime, slots):
    model, x = MODELS[name].cuda(), data(40 if runtime == "graph" else 12)
    eager = sdekit.log_likelihood(model, x, divergence=divergence, runtime="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = sdekit.log_likelihood(model, x, divergence=divergence, runtime=runtime, slots=slots)
    torch.testing.assert_close(fast.log_prob, eager.log_prob, rtol=0.0, atol=1e-8)
    torch.testing.assert_close(fast.std_error, eager.std_error, rtol=1e-6, atol=1e-9)
    assert torch.equal(fast.stats.evaluations, eager.stats.evaluations)
    assert torch.equal(fast.status, eager.status)


def test_flows_and_noise_are_captured_too():
    model, x = MODELS["exact"].cuda(), data(12)
    for solver, term, path in (
        (sdekit.Heun(), sdekit.ProbabilityFlow(model), None),
        (
            sdekit.EulerMaruyama(),
            sdekit.ReverseSDE(model),
            sdekit.IndependentIncrements(1, torch.arange(12, device="cuda")),
        ),
    ):
        grid = sdekit.FixedGrid(sdekit.grid.likelihood(SDE, 12, model.data_std))
        eager, fast = (
            sdekit.integrate(term, solver, grid, x, SDE.t_max, SDE.t_min, path, runtime=how)
            for how in ("eager", "graph")
        )
        torch.testing.assert_close(fast.x, eager.x, rtol=1e-9, atol=1e-10)


def test_paths_of_another_depth_and_grids_of_another_shape_are_their_own():
    model, x, rows = MODELS["exact"].cuda(), data(5), torch.arange(5, device="cuda")
    for depth, first in ((3, 0.1), (14, 0.1), (14, 0.2)):
        grid = sdekit.FixedGrid(torch.linspace(1.0, first, 8, dtype=torch.float64))
        eager, fast = (
            sdekit.integrate(
                *(sdekit.ReverseSDE(model), sdekit.EulerMaruyama(), grid, x, 1.0, first),
                sdekit.BrownianMotion(1, rows, -1.0, -first, depth=depth),
                runtime=how,
            )
            for how in ("eager", "graph")
        )
        torch.testing.assert_close(fast.x, eager.x, rtol=1e-9, atol=1e-10)


class Asks(torch.nn.Module):
    """A network that waits for the device in its call."""

    def forward(self, x, label):
        return -x if float(x.detach().sum()) < 1e9 else x


def test_a_network_that_asks_the_host_is_not_captured_and_says_why():
    model, x = sdekit.ScoreModel(Asks(), SDE, sdekit.score()), data(8)
    eager = sdekit.log_likelihood(model, x, runtime="eager")
    with sdekit.keep_graphs():
        for tries in (1, 0):  # what was refused is not tried again
            with pytest.warns(sdekit.errors.SdekitWarning, match="captured: it waits for the device"):
                fast, made = captures(lambda: sdekit.log_likelihood(model, x, runtime="graph"))
            assert made == tries
            torch.testing.assert_close(fast.log_prob, eager.log_prob, rtol=0.0, atol=1e-9)


class Sends(torch.nn.Module):
    """A network that copies a table of the host's to the device in each call."""

    table = torch.ones(4, dtype=torch.float64)

    def forward(self, x, label):
        return -x * self.table.to(x.device)


def test_a_network_that_copies_from_the_host_is_not_captured_and_says_why():
    model, x = sdekit.ScoreModel(Sends(), SDE, sdekit.score()), data(8)
    with pytest.warns(sdekit.errors.SdekitWarning, match="something of the host's"):
        found = sdekit.log_likelihood(model, x, runtime="graph", nodes=6)
    torch.testing.assert_close(found.log_prob, sdekit.log_likelihood(model, x, nodes=6).log_prob, rtol=0.0, atol=1e-8)


class Changes(torch.nn.Module):
    """A network that answers otherwise when it is asked again."""

    def __init__(self, how):
        super().__init__()
        self.calls, self.how = 0, how

    def forward(self, x, label):
        self.calls += 1
        size = {
            "counts": lambda: 1.0 + 0.02 * self.calls,
            "drops, rarely": lambda: float(random.random() < 0.999),
            "draws": lambda: torch.rand_like(x),
        }
        return -x * size[self.how]()


@pytest.mark.parametrize(
    ("how", "reason"), [("counts", "answer the same"), ("drops, rarely", "random"), ("draws", "random|answer")]
)
def test_a_network_that_answers_otherwise_each_time_is_not_captured(how, reason):
    model, x = sdekit.ScoreModel(Changes(how), SDE, sdekit.score()), data(4)
    for options in ({"nodes": 8}, {"solver": sdekit.Heun(), "controller": sdekit.PID(1e-6, 1e-6)}):
        with pytest.warns(sdekit.errors.SdekitWarning, match=reason):
            sdekit.log_likelihood(model, x, runtime="graph", throw=False, max_evaluations=40, **options)


def solve(model, x, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sdekit.log_likelihood(model, x, **{"runtime": "graph", "nodes": 6, **options}).log_prob


def captures(call):
    """What a call returns, and how many graphs were captured for it."""
    made, real = [], captured.captured
    captured.captured = lambda *given: made.append(1) or real(*given)
    try:
        return call(), len(made)
    finally:
        captured.captured = real


class Bent(torch.nn.Module):
    """A network whose output depends on things besides its weights."""

    def __init__(self):
        super().__init__()
        self.body = perceptron(4, 2)
        self.factor = 1.0
        self.register_buffer("shift", torch.zeros(4, dtype=torch.float64))
        self.drop = torch.nn.Dropout(0.0)

    def forward(self, x, label, by=0.0):
        return self.drop(self.body(x, label)) * self.factor + self.shift + by


def halved(net):
    return torch.nn.Parameter(0.5 * net.body.layers[0].weight.detach())


CHANGES = {
    "weights in place": (lambda net: [p.data.mul_(0.5) for p in net.parameters()], 0),
    "a buffer in place": (lambda net: net.shift.add_(1.0), 0),
    "weights elsewhere": (lambda net: setattr(net, "shift", net.shift + 1.0), 1),
    "a weight in the place of another": (lambda net: setattr(net.body.layers[0], "weight", halved(net)), 1),
    "a mode": (lambda net: net.drop.train(), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kept_graph_serves_the_next_solve_unless_modes_or_places_have_changed(change):
    act, expected = CHANGES[change]
    net, x = Bent().cuda().eval(), data(12)
    model = sdekit.ScoreModel(net, SDE)
    with sdekit.keep_graphs():
        _, first = captures(lambda: solve(model, x))
        assert first >= 1
        again, none = captures(lambda: solve(model, x + 0.1, seed=3))
        assert none == 0
        torch.testing.assert_close(
            again, sdekit.log_likelihood(model, x + 0.1, seed=3, nodes=6).log_prob, rtol=0.0, atol=1e-8
        )
        with torch.no_grad():
            act(net)
        eager = sdekit.log_likelihood(model, x, nodes=6).log_prob
        found, made = captures(lambda: solve(model, x))
    assert bool(made) == bool(expected)
    torch.testing.assert_close(found, eager, rtol=0.0, atol=1e-8)


def test_without_a_word_no_graph_outlives_its_solve():
    net, x = Bent().cuda().eval(), data(12)
    model = sdekit.ScoreModel(net, SDE)
    for factor in (1.0, 0.5, 0.25):
        net.factor = factor
        found, made = captures(lambda: solve(model, x))
        assert made >= 1
        torch.testing.assert_close(found, sdekit.log_likelihood(model, x, nodes=6).log_prob, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("divergence", [sdekit.Hutchinson(4, fresh=False), sdekit.Hutchinson(control=True)], ids=repr)
def test_another_solves_probes_are_its_own(divergence):
    model, x = MODELS["network"].cuda(), data(6)
    with sdekit.keep_graphs():
        for seed, expected in ((0, 1), (1, 0), (2, 0)):
            options = {"divergence": divergence, "seed": seed, "indices": torch.arange(6) + 10 * seed, "nodes": 6}
            found, made = captures(lambda options=options: solve(model, x, **options))
            assert bool(made) == bool(expected)
            torch.testing.assert_close(found, sdekit.log_likelihood(model, x, **options).log_prob, rtol=0.0, atol=1e-8)


def test_operations_and_pieces_have_graphs_of_their_own():
    model, x = MODELS["network"].cuda(), data(6)
    with sdekit.keep_graphs():
        for runtime, expected in (("graph", 1), ("compiled-graph", 1), ("graph", 0), ("compiled-graph", 0)):
            found, made = captures(lambda runtime=runtime: solve(model, x, runtime=runtime))
            assert bool(made) == bool(expected)
            torch.testing.assert_close(found, sdekit.log_likelihood(model, x, nodes=6).log_prob, rtol=0.0, atol=1e-8)


def test_what_is_bound_enters_the_graph_and_what_is_no_tensor_makes_another():
    net, x = Bent().cuda().eval(), data(6)
    model = sdekit.ScoreModel(net, SDE)
    with sdekit.keep_graphs():
        for by, expected in ((torch.ones(6, 4), 1), (torch.rand(6, 4), 0), (0.5, 1), (0.25, 1), (0.5, 0)):
            other = model.condition(by=by.double().cuda() if isinstance(by, torch.Tensor) else by)
            found, made = captures(lambda other=other: solve(other, x))
            assert bool(made) == bool(expected)
            torch.testing.assert_close(found, sdekit.log_likelihood(other, x, nodes=6).log_prob, rtol=0.0, atol=1e-8)


def test_graphs_are_let_go_by_count_where_memory_runs_out_and_with_their_block():
    x, bent = data(4), Bent().cuda().eval()
    model, net = sdekit.ScoreModel(bent, SDE), weakref.ref(bent)
    with sdekit.keep_graphs():
        graphs = captured._kept.get()
        for count in range(1, captured._KEPT + 3):
            solve(model, x[:1].expand(count, 4) + 0.0)
        assert len(graphs.idle) == captured._KEPT
        _memory.release(torch.device("cuda"))
        assert not graphs.idle
        solve(model, x)
        with sdekit.keep_graphs():  # part of the block around it
            solve(model, x)
        assert len(graphs.idle) == 1
    assert not graphs.idle
    assert captured._kept.get() is None
    del model, bent
    gc.collect()
    assert net() is None


def test_a_solve_that_was_stopped_gives_its_graph_back():
    model, x = sdekit.ScoreModel(Bent().cuda().eval(), SDE), data(5)
    with sdekit.keep_graphs():
        sdekit.log_likelihood(model, x, runtime="graph", nodes=6, max_evaluations=3, throw=False)
        assert len(captured._kept.get().idle) == 1
        _, made = captures(lambda: solve(model, x, max_evaluations=3, throw=False))
        assert made == 0


class Keeps(torch.nn.Module):
    """A network that keeps a table for the last batch size only."""

    def __init__(self):
        super().__init__()
        self.table = {}

    def forward(self, x, label):
        if x.shape not in self.table:
            self.table = {x.shape: torch.full_like(x, 0.5)}
        return -x * self.table[x.shape]


def test_what_a_graph_reads_lives_as_long_as_it():
    model, x = sdekit.ScoreModel(Keeps(), SDE, sdekit.score()), data(6)
    with sdekit.keep_graphs():
        solve(model, x)
        table = weakref.ref(next(iter(model.net.table.values())))
        held = captured._kept.get().idle
        assert any(part is table() or part.data_ptr() == table().data_ptr() for part in _read(held))
        solve(model, x[:3])
        assert next(iter(model.net.table)) == x[:3].shape
        torch.full_like(x, 7.0)  # would take the place of what was let go
        found, made = captures(lambda: solve(model, x))
        assert made == 0
        torch.testing.assert_close(found, sdekit.log_likelihood(model, x, nodes=6).log_prob, rtol=0.0, atol=1e-8)


def _read(held):
    """The tensors that graphs keep alive."""
    return [part for one in held.values() for part in one.reads if isinstance(part, torch.Tensor)]


def test_a_network_that_solves_within_its_call_is_not_captured():
    inner = MODELS["exact"].cuda()

    class Solves(torch.nn.Module):
        def forward(self, x, label):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return -sdekit.decode(inner, x.detach(), steps=2, runtime="graph").x * 0.0 - x

    model, x = sdekit.ScoreModel(Solves(), SDE, sdekit.score()), data(4)
    with pytest.warns(sdekit.errors.SdekitWarning, match="captured"):
        found = sdekit.log_likelihood(model, x, nodes=6, runtime="graph")
    torch.testing.assert_close(found.log_prob, sdekit.log_likelihood(model, x, nodes=6).log_prob, rtol=0.0, atol=1e-8)


def test_a_capture_that_runs_out_of_memory_lets_others_go_and_tries_again():
    model, x = sdekit.ScoreModel(Bent().cuda().eval(), SDE), data(6)
    real, tries = captured.captured, []

    def short(*given):
        tries.append(len(captured._kept.get().idle))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    with sdekit.keep_graphs():
        solve(model, x[:2])
        captured.captured = short
        try:
            solve(model, x)
        finally:
            captured.captured = real
    assert tries == [1, 0]


def test_a_step_that_cannot_be_compiled_is_captured_as_it_is(monkeypatch):
    def refuse(problem, carry):
        raise capture.CannotCompileError("no compiler here")

    monkeypatch.setattr(capture, "compiled", refuse)
    model, x = MODELS["network"].cuda(), data(6)
    with pytest.warns(sdekit.errors.SdekitWarning, match="no compiler here"):
        found = sdekit.log_likelihood(model, x, nodes=6, runtime="compiled-graph")
    torch.testing.assert_close(found.log_prob, sdekit.log_likelihood(model, x, nodes=6).log_prob, rtol=0.0, atol=1e-8)


@pytest.mark.gpu(emulated=False)
@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_network_is_captured_compiled(whole):
    net, x = perceptron(4, 2).float().cuda().eval().requires_grad_(False), data(12).float()
    eager = sdekit.log_likelihood(sdekit.ScoreModel(net, SDE), x, nodes=6)
    model = sdekit.ScoreModel(torch.compile(net, fullgraph=whole), SDE)
    found = solve(model, x)
    torch.testing.assert_close(found, eager.log_prob, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sdekit.log_likelihood(model, x, nodes=6).log_prob, eager.log_prob, rtol=1e-4, atol=1e-4)


def test_a_block_that_is_left_from_elsewhere_is_closed_and_keeps_nothing():
    model, x = sdekit.ScoreModel(Bent().cuda().eval(), SDE), data(6)
    block, inner = sdekit.keep_graphs(), contextvars.copy_context()
    inner.run(block.__enter__)
    graphs = inner.run(captured._kept.get)
    inner.run(solve, model, x)
    assert len(graphs.idle) == 1
    block.__exit__(None, None, None)  # not in its context
    assert not graphs.idle
    inner.run(solve, model, x)
    assert not graphs.idle


def test_a_step_that_fails_gives_its_graph_back(monkeypatch):
    model, x = sdekit.ScoreModel(Bent().cuda().eval(), SDE), data(6)

    def fails(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with sdekit.keep_graphs():
        monkeypatch.setattr(captured.Captured, "carry", fails)
        with pytest.raises(torch.OutOfMemoryError):
            solve(model, x)
        assert len(captured._kept.get().idle) == 1


class Thinned(torch.nn.Module):
    """A network with sparse weights."""

    def __init__(self):
        super().__init__()
        self.weight = torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64)).to_sparse()

    def forward(self, x, label):
        return -torch.sparse.mm(self.weight.to(x.device), x.T).T


def test_sparse_weights_are_read_as_others_are():
    net, x, read = Thinned(), TARGET.sample(3, generator=torch.Generator().manual_seed(3)), capture._Read()
    with read:
        net(x, None)
    assert any(part.layout == torch.sparse_coo for part in read.found)

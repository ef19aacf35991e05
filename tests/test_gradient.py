"""Gradients of log p: of the number computed to rounding, and of the density to the solver's order."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from helpers import SDES, Function, draw, gaussian, mixture, perceptron, seeded, watched
from torch import nn
from torch.nn import functional as F

import sdekit
from sdekit import adjoint
from sdekit.gradient import log_prob
from sdekit.likelihood_flow import LikelihoodFlow
from sdekit.model.nets import MLP
from sdekit.training import Batch, Recipe, train
from sdekit.zoo import digits as zoo

VP = sdekit.VPSDE()
SHORT = sdekit.VPSDE(t_min=1e-3)
DIVERGENCES = {
    "exact": sdekit.Exact(),
    "exact, one at a time": sdekit.Exact(chunk=1),
    "fresh": sdekit.Hutchinson(),
    "fresh, many, control": sdekit.Hutchinson(3, control=True, law="gaussian"),
    "fixed": sdekit.Hutchinson(fresh=False),
    "fixed, two, sphere": sdekit.Hutchinson(2, fresh=False, law="sphere"),
    "forward mode": sdekit.Hutchinson(2, mode="jvp"),
}
SOLVERS = [sdekit.Adams(4), sdekit.Adams(5, start="inside"), sdekit.RK4(), sdekit.Tsit5(), sdekit.Euler()]


@pytest.fixture(scope="module")
def learned():
    """A small network trained on a mixture in two dimensions, in float64."""
    target = mixture(2, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(seeded(0).get_state())
        net = MLP((2,), 24, 2, period=16.0)
    model = sdekit.ScoreModel(net, SHORT, data_std=target.std)
    recipe = Recipe(300, learning_rate=3e-3, ema=0.99)
    trained = train(model, lambda g: Batch(target.sample(128, generator=g).float(), {}), recipe, progress=False)
    return trained.model.double(), target.sample(5, generator=seeded(7))


def by_differences(function, tensor, direction, h=1e-4):
    """The derivative of `function` along a direction of `tensor`, written in place, by differences of order 4."""
    kept, values = tensor.detach().clone(), []
    with torch.no_grad():
        for k in (-2, -1, 1, 2):
            tensor.copy_(kept + k * h * direction)
            values.append(function())
        tensor.copy_(kept)
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)


def gradients(model, x, **options):
    """log p and the derivatives of its sum by x and by the network's parameters."""
    leaf = x.detach().requires_grad_()
    value = log_prob(model, leaf, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), [leaf, *model.net.parameters()])


def assert_close(found, wanted, rtol=1e-10):
    """Each tensor to `rtol` of its largest number: single ones may be zero but for rounding."""
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rtol * max(1.0, float(theirs.abs().max())))


def plainly(model, x, solver, divergence, nodes, seed):
    """The same solve written out with everything kept, to be differentiated by torch."""
    term = LikelihoodFlow(model, divergence, x.shape[1:], sdekit.Hutchinson.keys(seed, torch.arange(len(x))))
    times = sdekit.grid.likelihood(model.sde, nodes - 1, model.data_std).flip(0)
    s = term.coordinate(times)[:, None].expand(-1, len(x))
    z, step = term.enter(x, s[0]), 0
    memory = solver.init(term, z)
    while step < nodes - 1:
        ready = solver.ready(memory)
        proposal = solver.propose(term, s[step], s[step + 1], z, memory, None)
        z, memory, step = proposal.z, proposal.memory, step + int(ready is None or bool(ready.all()))
    scales = term.log_scale(times[-1:]) - term.log_scale(times[:1])
    log_det = z.log_det[:, : term.values]
    return model.sde.prior_log_prob(term.leave(z, s[-1])) + log_det.mean(1) + x.shape[1] * scales


class TestTheNumberComputed:
    @pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
    def test_the_value_is_that_of_log_likelihood(self, learned, divergence):
        model, x = learned
        found = log_prob(model, x, nodes=12, divergence=divergence, seed=5)
        wanted = sdekit.log_likelihood(model, x, nodes=12, divergence=divergence, seed=5).log_prob
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__}-{s.order}")
    def test_another_solver_has_the_value_of_its_own_grid(self, learned, solver):
        model, x = learned
        times = sdekit.grid.likelihood(model.sde, 11, model.data_std).flip(0)
        wanted = sdekit.log_likelihood(model, x, solver=solver, controller=sdekit.FixedGrid(times)).log_prob
        torch.testing.assert_close(log_prob(model, x, nodes=12, solver=solver), wanted, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__}-{s.order}")
    def test_the_gradient_is_that_of_the_whole_solve_kept(self, learned, solver):
        model, x = learned
        for divergence in (sdekit.Exact(), sdekit.Hutchinson(2, fresh=solver == SOLVERS[0])):
            leaf = x.detach().requires_grad_()
            whole = plainly(model, leaf, solver, divergence, 12, 3)
            wanted = torch.autograd.grad(whole.sum(), [leaf, *model.net.parameters()])
            found = gradients(model, x, nodes=12, solver=solver, divergence=divergence, seed=3)
            assert_close(found, [whole.detach(), *wanted])

    @pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
    def test_the_gradient_is_that_of_differences(self, learned, divergence):
        model, x = learned
        options = {"nodes": 10, "divergence": divergence, "seed": 1}
        _, by_x, *by_weights = gradients(model, x, **options)
        moved, weight = x.clone(), next(iter(model.net.hidden)).weight
        along, turn = draw(1, *x.shape), draw(2, *weight.shape)
        wanted = by_differences(lambda: log_prob(model, moved, **options), moved, along)
        torch.testing.assert_close((by_x * along).sum(1), wanted, rtol=1e-6, atol=1e-6)
        wanted = by_differences(lambda: log_prob(model, x, **options).sum(), weight, turn)
        place = [id(p) for p in model.net.parameters()].index(id(weight))
        torch.testing.assert_close((by_weights[place] * turn).sum(), wanted, rtol=1e-6, atol=1e-6)

    def test_torchs_own_check_passes_for_states_and_weights(self):
        net = perceptron(2, 0, width=4)
        model = sdekit.ScoreModel(net, sdekit.VPSDE(t_min=0.1))
        names, weights = zip(*net.named_parameters(), strict=True)

        def function(x, *values):
            return log_prob(model, x, nodes=4)

        # gradcheck moves its inputs in place: those are the parameters themselves.
        assert torch.autograd.gradcheck(function, (draw(0, 2, 2).requires_grad_(), *weights), atol=1e-6)
        assert len(names) == 6

    def test_the_shipped_network_in_float32(self):
        model = zoo.load().eval()
        x = (2 * torch.rand(2, 1, 8, 8, generator=seeded(0)) - 1).requires_grad_()
        options = {"nodes": 12, "divergence": sdekit.Hutchinson(), "seed": 4}
        value = log_prob(model, x, **options)
        wanted = sdekit.log_likelihood(model, x.detach(), **options).log_prob
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-4)
        assert value.dtype == torch.float64
        (found,) = torch.autograd.grad(value.sum(), x)
        exact, point = zoo.load().double().eval(), x.detach().double()
        along = draw(1, *x.shape)
        wanted = by_differences(lambda: log_prob(exact, point, **options), point, along)
        assert found.dtype == torch.float32
        torch.testing.assert_close((found * along).flatten(1).sum(1), wanted, rtol=1e-3, atol=1e-2)


class TestTheDensity:
    @pytest.mark.parametrize("sde", [SDES[name] for name in ("sub-vp", "table", "ve", "flow")], ids=repr)
    def test_a_gaussian_has_its_score_under_every_process(self, sde):
        target = gaussian(3)
        x = target.sample(4, generator=seeded(1)).requires_grad_()
        value = log_prob(target.score_model(sde), x, nodes=17, solver=sdekit.Dopri8(), data_moments=target)
        (found,) = torch.autograd.grad(value.sum(), x)
        torch.testing.assert_close(found, target.score(sde, x.detach(), sde.t_min), rtol=0, atol=1e-6)

    def test_a_mixture_has_its_score_at_any_noise_level(self):
        target = mixture(2, seed=6)
        t = torch.tensor([1e-3, 0.05, 0.3, 0.8, 1.0], dtype=torch.float64)
        x = SHORT.perturb(target.sample(5, generator=seeded(0)), t, draw(1, 5, 2)).requires_grad_()
        value = log_prob(target.score_model(SHORT), x, t=t, nodes=17, solver=sdekit.Dopri8())
        (found,) = torch.autograd.grad(value.sum(), x)
        # The prior's is not p_T's score: off by 1e-2 of the size of x at t_max, carried back.
        torch.testing.assert_close(found[:4], target.score(SHORT, x.detach(), t)[:4], rtol=0, atol=2e-2)
        torch.testing.assert_close(found[4], -x.detach()[4], rtol=0, atol=1e-12)

    def test_the_default_comes_to_the_score_by_its_order(self):
        target = gaussian(3)
        x = target.sample(8, generator=seeded(2))
        model, score = target.score_model(SHORT), target.score(SHORT, x, SHORT.t_min)
        error = []
        for nodes in (32, 64):
            leaf = x.clone().requires_grad_()
            log_prob(model, leaf, nodes=nodes, data_moments=target).sum().backward()
            error.append(float((leaf.grad - score).abs().max()))
        assert error[0] < 0.1
        assert 2.5 < math.log2(error[0] / error[1]) < 4.5

    def test_the_gradient_of_fresh_probes_is_unbiased(self, learned):
        # 400 draws, five numbers compared: |z| < 4.5 has a false-alarm probability of 4e-5.
        model, x = learned
        weight, count = model.net.leave.bias, 400
        copies = x[:1].expand(count, 2).detach().requires_grad_()
        options = {"nodes": 8, "divergence": sdekit.Hutchinson(law="gaussian")}
        draws = torch.autograd.grad(log_prob(model, copies, **options).sum(), copies)[0]
        single = x[:1].detach().requires_grad_()
        exact = torch.autograd.grad(log_prob(model, single, nodes=8, divergence=sdekit.Exact()).sum(), single)[0]
        z = (draws.mean(0) - exact[0]) / (draws.std(0) / math.sqrt(count))
        assert (draws.std(0) > 0.01 * exact[0].abs()).all()  # else there is nothing to test
        assert (z.abs() < 4.5).all()
        parts = [
            torch.autograd.grad(log_prob(model, x[:1], **options, indices=torch.tensor([k])).sum(), weight)[0]
            for k in range(25)
        ]
        whole = torch.autograd.grad(log_prob(model, x[:1].expand(25, 2), **options).sum(), weight)[0]
        torch.testing.assert_close(sum(parts), whole)

    def test_torchdiffeqs_adjoint_agrees_on_a_learned_network(self, learned):
        torchdiffeq = pytest.importorskip("torchdiffeq")
        model, x = learned
        flow = sdekit.ProbabilityFlow(model)

        class Augmented(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, t, state):
                leaf = state[0] if torch.is_grad_enabled() else state[0].detach().requires_grad_()
                with torch.enable_grad():
                    rate = flow(t, leaf)
                    rows = [torch.autograd.grad(rate[:, i].sum(), leaf, create_graph=True)[0][:, i] for i in (0, 1)]
                return rate, rows[0] + rows[1]

        leaf = x.detach().requires_grad_()
        ends = torch.tensor([model.sde.t_min, model.sde.t_max], dtype=torch.float64)
        options = {"rtol": 1e-5, "atol": 1e-6, "method": "dopri8"}
        latent, gained = torchdiffeq.odeint_adjoint(Augmented(), (leaf, leaf.new_zeros(5)), ends, **options)
        theirs = model.sde.prior_log_prob(latent[-1]) + gained[-1]
        wanted = torch.autograd.grad(theirs.sum(), [leaf, *model.net.parameters()])
        found = gradients(model, x, nodes=17, solver=sdekit.Dopri8())
        assert_close(found, [theirs.detach(), *wanted], rtol=1e-4)


class TestWhatGradientsReach:
    def test_parameters_accumulate_and_frozen_ones_are_left_alone(self, learned):
        model, x = learned
        frozen = model.net.enter.weight
        wanted = gradients(model, x, nodes=6)[2:]
        try:
            frozen.requires_grad_(False)
            for _ in range(2):
                log_prob(model, x, nodes=6).sum().backward()
            found = [(p.grad, g) for p, g in zip(model.net.parameters(), wanted, strict=True) if p is not frozen]
            assert_close([grad for grad, _ in found], [2 * g for _, g in found])
            assert frozen.grad is None
        finally:
            frozen.requires_grad_()
            model.zero_grad()

    def test_the_condition_and_what_it_was_made_from(self):
        table = draw(4, 6, 2).requires_grad_()
        net = Function(lambda x, label, y, k: torch.tanh(x + y) * torch.cos(label[:, None]) + 0.1 * k[:, None] * x)
        rows, count = torch.tensor([1, 4, 1]), torch.tensor([0, 1, 2])
        x = draw(0, 3, 2)

        def function():
            return log_prob(sdekit.ScoreModel(net, SHORT).condition(y=table[rows], k=count), x, nodes=8).sum()

        (found,) = torch.autograd.grad(function(), table)
        along = draw(5, 6, 2)
        wanted = by_differences(function, table, along)
        torch.testing.assert_close((found * along).sum(), wanted, rtol=1e-6, atol=1e-6)
        assert (found[[0, 2, 3, 5]] == 0).all()
        assert (found[[1, 4]] != 0).all()

    def test_units_scale_the_gradient(self, learned):
        model, x = learned
        wanted = gradients(model, x, nodes=8)[1]
        found = gradients(model, (x - 1.0) / 2.0, nodes=8, transform=sdekit.Affine(2.0, 1.0))[1]
        torch.testing.assert_close(found, 2.0 * wanted)

    def test_half_precision_comes_back_as_such(self, learned):
        model, x = learned
        leaf = x.bfloat16().requires_grad_()
        log_prob(model, leaf, nodes=6).sum().backward()
        wanted = gradients(model, leaf.detach().float(), nodes=6)[1]
        assert leaf.grad.dtype == torch.bfloat16
        torch.testing.assert_close(leaf.grad.float(), wanted.float(), rtol=1e-2, atol=1e-2)

    def test_autocast_is_that_of_the_forward_pass(self, learned):
        model, x = learned
        model, x = copy.deepcopy(model).float(), x.float()
        with torch.autocast("cpu", torch.bfloat16):
            outside = log_prob(model, x, nodes=6).sum()
            inside = gradients(model, x, nodes=6)[2:]
        assert_close(torch.autograd.grad(outside, list(model.parameters())), inside, rtol=0)
        plain = gradients(model, x, nodes=6)[2:]
        assert any(not torch.equal(a, b) for a, b in zip(plain, inside, strict=True))

    def test_what_torch_saves_may_be_moved_away(self, learned):
        model, x = learned
        with torch.autograd.graph.save_on_cpu():
            found = gradients(model, x, nodes=6)
        assert_close(found, gradients(model, x, nodes=6))

    def test_samples_are_alone_in_any_batch(self, learned):
        model, x = learned
        options = {"nodes": 8, "divergence": sdekit.Hutchinson()}
        together = gradients(model, x, **options)[1]
        order = torch.tensor([3, 0, 4])
        part = gradients(model, x[order], indices=order, **options)[1]
        torch.testing.assert_close(part, together[order], rtol=1e-10, atol=1e-10)

    def test_an_empty_batch_asks_nothing_of_the_network(self, learned):
        model, _ = learned
        x = torch.zeros(0, 2, dtype=torch.float64, requires_grad=True)
        model.zero_grad()
        value = log_prob(model, x, nodes=4)
        value.sum().backward()
        assert value.shape == (0,)
        assert x.grad.shape == (0, 2)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_there_is_the_value(self, learned, guard):
        model, x = learned
        with guard():
            value = log_prob(model, x + 0.0, nodes=6)
        assert not value.requires_grad
        torch.testing.assert_close(value.clone(), log_prob(model, x, nodes=6).detach(), rtol=0, atol=0)


class Held:
    """The most bytes alive at once in the tensors that it is shown."""

    def __init__(self):
        self.alive, self.now, self.most = set(), 0, 0

    def show(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, size)
        return tensor

    def _gone(self, key, size):
        self.alive.discard(key)
        self.now -= size


def test_memory_does_not_grow_with_the_nodes(learned, monkeypatch):
    # Everything that autograd saves, and every state that the adjoint keeps.
    model, x = learned
    bare, most = adjoint._bare, []

    def shown(at):
        made = bare(at)
        for state in adjoint._states((made.z, made.memory)):
            held.show(state.u)
        held.show(made.memory.nodes)
        return made

    monkeypatch.setattr(adjoint, "_bare", shown)
    for nodes in (64, 256):
        held = Held()
        with torch.autograd.graph.saved_tensors_hooks(held.show, lambda tensor: tensor):
            log_prob(model, x.repeat(4, 1), nodes=nodes, divergence=sdekit.Hutchinson()).sum().backward()
        most.append(held.most)
    model.zero_grad()
    assert max(most) < 1.1 * min(most)


class TestWhatIsRefused:
    def test_second_derivatives(self, learned):
        model, x = learned
        leaf = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(log_prob(model, leaf, nodes=4).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()

    def test_parameters_written_into_before_the_backward_pass(self, learned):
        model, x = learned
        value = log_prob(model, x, nodes=4).sum()
        with torch.no_grad():
            model.net.leave.bias.add_(0.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()

    def test_random_networks_before_and_after(self):
        net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.SiLU(), nn.Linear(8, 2)).double()
        inner = Function(lambda x, label: net(x))
        inner.layers = net
        model = sdekit.ScoreModel(inner, SHORT)
        with pytest.raises(ValueError, match="dropout"):
            log_prob(model, draw(0, 2, 2))
        model.eval()
        value = log_prob(model, draw(0, 2, 2), nodes=4).sum()
        model.train()
        with pytest.raises(ValueError, match="dropout"):
            value.backward()

    def test_a_network_that_cannot_be_differentiated_twice(self):
        def fused(x, label):
            h = x.reshape(-1, 1, 4, 2).float()
            return F.scaled_dot_product_attention(h, h, h).reshape(x.shape).to(x.dtype)

        model = sdekit.ScoreModel(Function(fused), SHORT)
        value = log_prob(model, draw(0, 2, 8).requires_grad_(), nodes=4, divergence=sdekit.Hutchinson())
        with pytest.raises(sdekit.NetworkError, match="differentiated twice"):
            value.sum().backward()

    def test_samples_without_a_density_are_named(self, learned):
        model, x = learned
        spoilt = x.clone()
        spoilt[3] = math.nan
        with pytest.raises(sdekit.SolveError, match=r"1 of 5 samples is not finite, the first of them \[3\]"):
            log_prob(model, spoilt, nodes=4)

    @pytest.mark.parametrize(
        ("change", "kind"),
        [
            ({"nodes": 1}, ValueError),
            ({"nodes": 4.0}, TypeError),
            ({"seed": -1}, ValueError),
            ({"t": 2.0}, ValueError),
            ({"divergence": "exact"}, TypeError),
            ({"solver": sdekit.RK4(), "divergence": sdekit.Hutchinson()}, ValueError),
            ({"solver": sdekit.DPMSolverPP(2)}, TypeError),
            ({"solver": sdekit.EulerMaruyama()}, ValueError),
            ({"data_moments": gaussian(3)}, ValueError),
            ({"indices": torch.zeros(2, dtype=torch.int64)}, ValueError),
            ({"transform": sdekit.Affine(torch.ones(2).requires_grad_())}, ValueError),
        ],
        ids=lambda part: next(iter(part)) if isinstance(part, dict) else part.__name__,
    )
    def test_arguments_that_do_not_fit(self, learned, change, kind):
        model, x = learned
        with pytest.raises(kind):
            log_prob(model, x, **change)
        with pytest.raises(TypeError):
            log_prob(model, torch.ones(2, 2, dtype=torch.int64))


def test_a_divergence_has_a_graph_only_where_its_state_requires_one():
    def field(x):
        return torch.sin(x) * x.sum(1, keepdim=True)

    x = draw(0, 3, 2)
    keys, node = sdekit.Hutchinson.keys(0, torch.arange(3)), torch.arange(3)
    for divergence in (sdekit.Exact(), sdekit.Hutchinson(2)):
        probes = divergence.draw(keys, node, 2, x.dtype) if divergence.probe_count else None
        plain = divergence.evaluate(field, x, probes)
        kept = divergence.evaluate(field, x.clone().requires_grad_(), probes)
        assert not plain.value.requires_grad
        assert not plain.traces.requires_grad
        assert kept.value.requires_grad
        assert kept.traces.requires_grad
        torch.testing.assert_close(plain.traces, kept.traces.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("nodes", [2, 7, 65])
def test_it_asks_the_network_once_a_node_forward_and_twice_back(nodes, learned):
    model, watch = watched(learned[0])
    x = draw(1, 3, 2).requires_grad_()
    value = log_prob(model, x, nodes=nodes)
    assert watch.calls == nodes
    value.sum().backward()
    assert nodes < watch.calls <= 3 * nodes
    expected = sdekit.log_likelihood(model, x.detach(), nodes=nodes, throw=False).log_prob
    torch.testing.assert_close(value.detach(), expected, rtol=0.0, atol=1e-9)

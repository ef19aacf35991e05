"""Numbers on the host are the numbers of tensors: function by function, schedule by schedule, solve by solve."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import SDES, Function, draw, mixture, perceptron, seeded, spread_times
from torch import Tensor

import sdekit
from sdekit import _numbers as numbers
from sdekit import runtime
from sdekit._tensor import all_finite, column, select, tensor, tree_map
from sdekit.loop import Problem, begin

ULPS = 4 * 2.0**-53  # what numpy's functions and torch's may differ by, relative

ONE = [
    "exp",
    "expm1",
    "exp2",
    "log",
    "log1p",
    "log2",
    "sin",
    "tan",
    "atan",
    "asinh",
    "sigmoid",
    "sign",
    "floor",
    "sqrt",
]
ONE += ["square", "isfinite", "isnan", "zeros_like", "ones_like", "real", "whole"]
TWO = ["power", "maximum", "minimum", "hypot", "logaddexp", "at_least", "at_most"]


def agree(ours, theirs, relative=ULPS, absolute=1e-300):
    ours, theirs = tensor(ours), tensor(theirs)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=relative, atol=absolute, equal_nan=True)


class TestFunctions:
    @pytest.mark.parametrize("name", ONE)
    def test_of_one(self, name):
        values = torch.cat((torch.linspace(1e-3, 30.0, 200, dtype=torch.float64), torch.tensor([1e-12, 1.0])))
        function = getattr(numbers, name)
        agree(function(values.numpy()), function(values), 32 * ULPS if name == "exp2" else ULPS)

    @pytest.mark.parametrize("name", TWO)
    def test_of_two(self, name):
        a, b = 0.01 + 3.0 * torch.rand(2, 100, generator=seeded(1), dtype=torch.float64)
        function = getattr(numbers, name)
        if name.startswith("at_"):
            agree(function(a.numpy(), 1.5), function(a, 1.5))
        else:
            agree(function(a.numpy(), b.numpy()), function(a, b), 4 * ULPS if name == "power" else ULPS)

    @pytest.mark.parametrize("name", [*ONE, *TWO])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_a_number_has_the_same_bits_anywhere_in_a_row(self, name, dtype):
        a, b = 0.01 + 3.0 * torch.rand(2, 1003, generator=seeded(2), dtype=torch.float64).to(dtype)
        function = getattr(numbers, name)
        given = (a,) if name in ONE else (a, 1.5) if name.startswith("at_") else (a, b)
        for made in (lambda part: part, lambda part: part.numpy() if isinstance(part, Tensor) else part):
            row = tensor(function(*map(made, given)))
            cut = [part[k : k + 1] for k in range(1003) for part in given if isinstance(part, Tensor)]
            alone = [cut[k : k + len(cut) // 1003] for k in range(0, len(cut), len(cut) // 1003)]
            alone = [[*parts, *(part for part in given if not isinstance(part, Tensor))] for parts in alone]
            assert torch.equal(row, torch.cat([tensor(function(*map(made, parts))) for parts in alone]))

    def test_what_comes_of_extreme_numbers(self):
        wide = torch.tensor([-1e4, -800.0, -40.0, 0.0, 40.0, 800.0, 1e4], dtype=torch.float64, requires_grad=True)
        for values in (wide, wide.detach().float().requires_grad_()):
            ours, theirs = numbers.sigmoid(values), torch.sigmoid(values)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-34)
            slope = torch.autograd.grad(ours.sum(), values)[0]
            torch.testing.assert_close(slope, theirs * torch.sigmoid(-values), rtol=1e-6, atol=1e-34)
        both = numbers.logaddexp(torch.zeros_like(wide), wide)
        agree(both.detach(), torch.logaddexp(torch.zeros_like(wide), wide).detach())
        assert numbers.power(torch.zeros(1, dtype=torch.float64), -0.2).tolist() == [math.inf]

    def test_what_is_not_a_number_stays_so(self):
        bad = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=torch.float64)
        for function in (lambda v: numbers.between(v, -2.0, 2.0), lambda v: numbers.at_least(v, 0.0), numbers.isnan):
            agree(function(bad.numpy()), function(bad))

    def test_a_choice_of_two_floats_is_in_double_precision(self):
        mask = torch.tensor([True, False])
        for chosen in (numbers.where(mask.numpy(), 1.0, 0.1), numbers.where(mask, 1.0, 0.1)):
            assert chosen.tolist() == [1.0, 0.1]

    @pytest.mark.parametrize("batch", [1, 5, 80])  # beyond some size products go row by row
    def test_of_many(self, batch):
        factors, first = draw(batch, 3, 4, batch).double(), draw(batch + 1, 3, batch).double()
        agree(numbers.products(factors.numpy(), first.numpy()), numbers.products(factors, first))
        expected = torch.stack([first * factors[:, :k].prod(1) for k in range(5)], 1)
        torch.testing.assert_close(numbers.products(factors, first), expected, rtol=1e-14, atol=0.0)
        table, index = draw(1, 6, 9).double(), torch.arange(batch) % 9
        agree(numbers.picked(table, index.numpy()), table[:, index])
        agree(numbers.rows(factors[0].numpy().T), factors[0])
        agree(numbers.batch_first(factors.numpy()), factors.movedim(-1, 0))
        for axis in (0, 1):
            agree(numbers.stack((first[0].numpy(), first[1].numpy()), axis), torch.stack((first[0], first[1]), axis))
            parts = (factors[0].numpy(), factors[0].numpy())
            agree(numbers.cat(parts, axis), torch.cat((factors[0], factors[0]), axis))
        torch.testing.assert_close(tensor(numbers.mean(first.numpy())), first.mean(-1), rtol=0.0, atol=1e-15)
        agree(numbers.arange(batch, first.numpy()), torch.arange(batch))
        knots = torch.linspace(-2.0, 2.0, 7, dtype=torch.float64)
        assert numbers.searchsorted(knots.numpy(), first[0].numpy()).tolist() == (
            torch.searchsorted(knots, first[0]).tolist()
        )

    def test_trees_may_hold_both(self):
        state = (draw(1, 3, 2), draw(2, 3).double().numpy())
        other = tree_map(lambda leaf: leaf + 1.0, state)
        mask = np.array([True, False, True])
        for ours, old, new in zip(select(mask, other, state), state, other, strict=True):
            assert type(ours) is type(old)
            assert torch.equal(tensor(ours)[[0, 2]], tensor(new)[[0, 2]])
            assert torch.equal(tensor(ours)[1], tensor(old)[1])
        assert select(np.ones(3, bool), other, state) is other
        for bad in (0, 1):
            broken = list(tree_map(lambda leaf: leaf + 0.0, state))
            broken[bad][1] = math.nan
            assert all_finite(tuple(broken)).tolist() == [True, False, True]
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            agree(column(state[1], state[0].to(dtype)), tensor(state[1]).to(dtype)[:, None], 0.0)


@pytest.mark.parametrize("name", sorted(SDES))
def test_schedules_take_numbers_on_the_host(name):
    sde = SDES[name]
    t = spread_times(sde, 50)
    for function in (
        "log_alpha",
        "log_sigma",
        "dlog_alpha",
        "dlog_sigma",
        "alpha",
        "sigma",
        "half_log_snr",
        "diffusion",
    ):
        found = getattr(sde, function)(t.numpy())
        assert isinstance(found, np.ndarray)
        near_1 = function == "log_sigma"  # its logarithm is as good as that of what is next to 1
        agree(found, getattr(sde, function)(t), 1e-13, 2.0**-52 if near_1 else 1e-300)
    snr = sde.half_log_snr(t)
    agree(sde.clamp(sde.time_at(snr.numpy())), sde.clamp(sde.time_at(snr)), 1e-13)
    for meaning in (sdekit.noise(), sdekit.score(), sdekit.data(), sdekit.velocity(), sdekit.v(), sdekit.edm(0.7)):
        for ours, theirs in zip(meaning.mix(sde, t.numpy()), meaning.mix(sde, t), strict=True):
            agree(ours, theirs, 1e-12)


def test_doors_make_tensors_of_arrays():
    t, x = np.array([0.1, 0.2]), draw(1, 2, 3).double()
    model = MODELS["exact"].double()
    for call in (model.score, model.velocity, lambda x, t: model.sde.perturb(x, t, x)):
        assert torch.equal(call(x, t), call(x, torch.from_numpy(t)))
    assert torch.equal(
        sdekit.log_likelihood(model, x, t=t).log_prob, sdekit.log_likelihood(model, x, t=tensor(t)).log_prob
    )
    assert isinstance(model.sde.sigma(np.array(0.5)), Tensor)  # a number, however it is written


TARGET = mixture(3, 5)
MODELS = {
    "exact": TARGET.score_model(SDES["vp"]),
    "learned": sdekit.ScoreModel(perceptron(3, 2), SDES["karras"], sdekit.edm(0.7)),
    "table": sdekit.ScoreModel(
        perceptron(3, 1), sdekit.TableVPSDE.linear(), sdekit.v(sdekit.table_label(1000)), data_std=0.7
    ),
}
DIVERGENCES = {
    "exact": sdekit.Exact(),
    "fixed": sdekit.Hutchinson(fresh=False),
    "many": sdekit.Hutchinson(3, fresh=False),
    "fresh": sdekit.Hutchinson(2),
    "control": sdekit.Hutchinson(control=True, law="sphere"),
}


def on_tensors(monkeypatch):
    monkeypatch.setattr(runtime, "hosted", lambda problem, carry: (problem, carry))


class TestSolves:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
    @pytest.mark.parametrize("model", sorted(MODELS))
    def test_densities_are_those_of_a_step_on_tensors(self, model, divergence, dtype, monkeypatch):
        chosen = MODELS[model].double() if dtype == torch.float64 else MODELS[model].float()
        x = TARGET.sample(9, generator=seeded(3)).to(dtype)
        # Not in single precision: an error estimate is a small difference, and rounding moves the step.
        tolerance = 1e-3 if dtype == torch.float64 else 1e-1
        host = sdekit.log_likelihood(chosen, x, divergence=DIVERGENCES[divergence], tolerance=tolerance)
        on_tensors(monkeypatch)
        plain = sdekit.log_likelihood(chosen, x, divergence=DIVERGENCES[divergence], tolerance=tolerance)
        close = {"rtol": 0.0, "atol": 1e-9 if dtype == torch.float64 else 2e-4}
        torch.testing.assert_close(host.log_prob, plain.log_prob, **close)
        torch.testing.assert_close(host.std_error, plain.std_error, **close)
        torch.testing.assert_close(host.solver_error, plain.solver_error, rtol=1e-3, atol=close["atol"])
        torch.testing.assert_close(host.rounding, plain.rounding, rtol=1e-3, atol=0.0)
        assert torch.equal(host.stats.evaluations, plain.stats.evaluations)
        assert torch.equal(host.status, plain.status)

    def test_in_blocks_too(self, monkeypatch):
        model = sdekit.ScoreModel(Function(lambda x, t: torch.tanh(x) * t[:, None]), SDES["vp"])
        x, every = draw(8, 600, 3).double(), torch.arange(600)
        for divergence in (sdekit.Exact(), sdekit.Hutchinson(9, fresh=False)):
            options = {"tolerance": 0.1, "divergence": divergence}
            whole = sdekit.log_likelihood(model, x, **options)
            for rows in (slice(0, 1), slice(1, 258)):
                part = sdekit.log_likelihood(model, x[rows], indices=every[rows], **options)
                for name in ("log_prob", "std_error", "solver_error", "rounding"):
                    assert torch.equal(getattr(whole, name)[rows], getattr(part, name)), name

    def test_flows_are_too(self, monkeypatch):
        noise = draw(4, 6, 3).double()
        model = MODELS["exact"].double()
        options = {"controller": sdekit.PID(1e-6, 1e-6), "solver": sdekit.Adams(5)}
        host = sdekit.decode(model, noise, **options)
        on_tensors(monkeypatch)
        plain = sdekit.decode(model, noise, **options)
        torch.testing.assert_close(host.x, plain.x, rtol=0.0, atol=1e-10)
        assert torch.equal(host.stats.accepted, plain.stats.accepted)

    @pytest.mark.parametrize("controller", ["nats", "pid", "grid"])
    @pytest.mark.parametrize("solver", [sdekit.Dopri5(), sdekit.BogackiShampine(), sdekit.Adams(4, "inside")], ids=repr)
    def test_other_methods_are_too(self, solver, controller, monkeypatch):
        model = MODELS["learned"].double()
        judges = {
            "nats": sdekit.Nats(0.5),
            "pid": sdekit.PID(1e-4, 1e-4),
            "grid": sdekit.FixedGrid(sdekit.grid.likelihood(model.sde, 12).flip(0)),
        }
        x, options = draw(1, 5, 3).double(), {"divergence": sdekit.Hutchinson(fresh=False), "solver": solver}
        host = sdekit.log_likelihood(model, x, controller=judges[controller], throw=False, **options)
        on_tensors(monkeypatch)
        plain = sdekit.log_likelihood(model, x, controller=judges[controller], throw=False, **options)
        torch.testing.assert_close(host.log_prob, plain.log_prob, rtol=1e-10, atol=1e-9)
        torch.testing.assert_close(host.solver_error, plain.solver_error, rtol=1e-4, atol=1e-9, equal_nan=True)
        assert torch.equal(host.stats.evaluations, plain.stats.evaluations)

    def test_who_wrote_a_schedule_is_given_tensors(self):
        @dataclass(frozen=True)
        class Mine(sdekit.VPSDE):
            def log_alpha(self, t: Tensor | float) -> Tensor:
                assert not isinstance(t, np.ndarray)
                return super().log_alpha(t)

        @dataclass(frozen=True)
        class Label:
            def __call__(self, sde: sdekit.SDE, t: Tensor) -> Tensor:
                return t.sqrt()  # arrays have no such method

        net = Function(lambda x, t: 0.3 * x * t[:, None])
        x = draw(2, 4, 3)
        for sde, label in ((Mine(), sdekit.noise()), (sdekit.VPSDE(), sdekit.noise(Label()))):
            model = sdekit.ScoreModel(net, sde, label)
            assert torch.isfinite(sdekit.log_likelihood(model, x).log_prob).all()

    def test_a_network_may_be_cast_between_solves(self):
        term = sdekit.LikelihoodFlow(
            MODELS["learned"].float(), sdekit.Exact(), torch.Size([3]), torch.zeros(2, 2, dtype=torch.int64)
        )
        for cast in (torch.float32, torch.float64):
            MODELS["learned"].to(cast)
            x = draw(1, 2, 3).to(cast)
            found = sdekit.integrate(term, sdekit.Adams(5), sdekit.PID(1e-3, 1e-3), x, term.model.sde.t_min, 1.0)
            assert found.x.dtype == cast

    def test_what_is_not_finite_is_recorded_without_a_warning_of_numpy(self):
        def broken(x, t):
            return torch.where((x[:, :1] > 0) & (t[:, None] > 0.5), math.nan, 0.1 * x)

        model = sdekit.ScoreModel(Function(broken), SDES["vp"])
        x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        found = sdekit.log_likelihood(model, x, throw=False)
        assert found.status.tolist() == [sdekit.Status.NOT_FINITE, sdekit.Status.DONE]

    def test_whose_parts_are_not_all_known_stays_on_tensors(self):
        class Other(sdekit.Nats):
            pass

        for controller, known in ((sdekit.Nats(), True), (Other(), False)):
            term = sdekit.likelihood_flow.LikelihoodFlow(
                MODELS["exact"], sdekit.Exact(), torch.Size([3]), torch.zeros(2, 2, dtype=torch.int64)
            )
            s0 = torch.zeros(2, dtype=torch.float64)
            problem = Problem(term, sdekit.Adams(), controller, torch.ones_like(s0), None, 99)
            carry = begin(problem, s0, term.enter(draw(1, 2, 3), s0))
            with torch.no_grad():
                assert numbers.on_host(runtime.hosted(problem, carry)[1].s) is known
            with torch.enable_grad():  # arrays keep no graph
                assert not numbers.on_host(runtime.hosted(problem, carry)[1].s)

"""The density a finite-step sampler draws from: closed forms, differences, orders, and that it integrates to one."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import PARAMETERIZATIONS, SDES, Function, draw, gaussian, mixture, observed_order, times, watched
from torch import nn

import sdekit
from sdekit.sampler_density import sampler_log_density
from sdekit.zoo import digits

VP = sdekit.VPSDE()
ONE_STEP = [sdekit.Euler(), sdekit.Heun(), sdekit.RK4(), sdekit.DDIM(), sdekit.DPMSolver(2), sdekit.DPMSolver(3)]
REMEMBER = [
    sdekit.Dopri5(),
    sdekit.Adams(4),
    sdekit.Adams(5, "inside"),
    sdekit.DPMSolverPP(2),
    sdekit.DPMSolverPP(3),
    sdekit.DEIS(3),
    sdekit.UniPC(3),
]


class TestTheJacobian:
    @pytest.mark.parametrize("sde", [VP, sdekit.VESDE(), sdekit.RectifiedFlow()], ids=["vp", "ve", "flow"])
    def test_ddim_on_a_gaussian_is_a_product_of_factors(self, sde):
        target, grid = gaussian(3), sdekit.grid.karras(sde, 7)
        out = sampler_log_density(
            target.score_model(sde), (5, 3), solver=sdekit.DDIM(), times=grid, dtype=torch.float64
        )
        wanted = 0.0
        for t0, t1 in itertools.pairwise(grid):
            variance = sde.alpha(t0) ** 2 * target._components.values[0] + sde.sigma(t0) ** 2
            h = sde.half_log_snr(t1) - sde.half_log_snr(t0)
            factor = sde.alpha(t1) / sde.alpha(t0) - sde.sigma(t1) * torch.expm1(h) * sde.sigma(t0) / variance
            wanted = wanted + factor.log().sum()
        torch.testing.assert_close(out.log_det, wanted.expand(5), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.log_prob, sde.prior_log_prob(out.latent) - wanted, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("solver", ONE_STEP + REMEMBER, ids=repr)
    def test_of_an_affine_map_it_is_that_of_its_columns(self, solver):
        """On a Gaussian every scheme is affine in z: `decode` of the axes gives its matrix without a derivative."""
        target = gaussian(3)
        model = target.score_model(VP, PARAMETERIZATIONS["v"])
        out = sampler_log_density(model, (4, 3), solver=solver, steps=6, dtype=torch.float64)
        points = torch.cat((torch.zeros(1, 3), torch.eye(3))).double()
        images = sdekit.decode(model, points, solver=solver, steps=6).x
        wanted = torch.linalg.slogdet(images[1:] - images[0])[1]
        torch.testing.assert_close(out.log_det, wanted.expand(4), rtol=0, atol=1e-7)

    @pytest.mark.parametrize(
        "solver", [sdekit.Heun(), sdekit.DDIM(), sdekit.Dopri5(), sdekit.DPMSolverPP(3), sdekit.Adams(3)]
    )
    def test_of_a_mixture_it_is_that_of_differences(self, solver):
        model, z = mixture(2, 1).score_model(VP), draw(5, 6, 2)
        out = sampler_log_density(model, z, solver=solver, steps=9)
        h, columns = 1e-5, []
        for axis in torch.eye(2, dtype=torch.float64):
            ahead, behind = (sdekit.decode(model, z + k * h * axis, solver=solver, steps=9).x for k in (1, -1))
            columns.append((ahead - behind) / (2 * h))
        wanted = torch.linalg.slogdet(torch.stack(columns, 2))[1]
        torch.testing.assert_close(out.log_det, wanted, rtol=0, atol=1e-5)

    def test_a_chain_of_maps_is_the_map_of_the_chain(self):
        """RK4 composed step by step, and as one that remembers: the same numbers by another way."""

        class Whole(sdekit.RungeKutta):
            remembers = True

        model = mixture(3, 1).score_model(VP)
        by_step = sampler_log_density(model, (5, 3), solver=sdekit.RK4(), steps=8, dtype=torch.float64)
        whole = sampler_log_density(model, (5, 3), solver=Whole(sdekit.RK4().tableau), steps=8, dtype=torch.float64)
        torch.testing.assert_close(by_step.log_prob, whole.log_prob, rtol=0, atol=1e-9)
        torch.testing.assert_close(by_step.x, whole.x, rtol=1e-9, atol=1e-9)


class TestTheLaw:
    @pytest.mark.parametrize("denoise", [False, True])
    @pytest.mark.parametrize("solver", [sdekit.RK4(), sdekit.DDIM(), sdekit.UniPC(2), None], ids=repr)
    def test_the_samples_are_those_of_sample(self, solver, denoise):
        model, options = mixture(2, 1).score_model(VP), {"solver": solver, "seed": 4, "dtype": torch.float64}
        indices = torch.tensor([3, 9, 1])
        out = sampler_log_density(model, (3, 2), steps=10, denoise=denoise, indices=indices, **options)
        plain = sdekit.sample(model, (3, 2), steps=10, denoise=denoise, indices=indices, **options)
        torch.testing.assert_close(out.x, plain.x, rtol=1e-7, atol=1e-8)
        assert torch.equal(out.stats.evaluations, plain.stats.evaluations) or isinstance(solver, sdekit.UniPC)

    @pytest.mark.parametrize("denoise", [False, True])
    @pytest.mark.parametrize("solver", [sdekit.DDIM(), sdekit.Heun(), sdekit.DPMSolverPP(2)])
    def test_in_one_dimension_it_integrates_to_one(self, solver, denoise):
        target = sdekit.targets.GaussianMixture(
            torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.5]]), torch.tensor([0.3, 0.2])
        )
        z = torch.linspace(-7, 7, 3001, dtype=torch.float64)[:, None]
        out = sampler_log_density(target.score_model(VP), z, solver=solver, steps=5, denoise=denoise)
        x = out.x[:, 0]
        assert (x.diff() > 0).all()
        assert float(torch.trapezoid(out.log_prob.exp(), x)) == pytest.approx(1.0, abs=5e-4)
        flow = sdekit.log_likelihood(target.score_model(VP), out.x[::300])  # five steps: not the law of the flow
        assert (flow.log_prob - out.log_prob[::300]).abs().max() > 0.1

    def test_in_two_dimensions_it_integrates_to_one(self):
        axis = torch.linspace(-6, 6, 161, dtype=torch.float64)
        z = torch.cartesian_prod(axis, axis)
        out = sampler_log_density(mixture(2, 1).score_model(VP), z, solver=sdekit.DDIM(), steps=4)
        x, density = out.x.reshape(161, 161, 2), out.log_prob.exp().reshape(161, 161)
        a, b = x[1:, 1:] - x[:-1, :-1], x[:-1, 1:] - x[1:, :-1]  # diagonals of the images of the cells
        area = 0.5 * (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).abs()
        mean = (density[1:, 1:] + density[:-1, :-1] + density[1:, :-1] + density[:-1, 1:]) / 4
        assert float((area * mean).sum()) == pytest.approx(1.0, abs=2e-3)

    @pytest.mark.parametrize(
        ("solver", "order"), [(sdekit.DDIM(), 1), (sdekit.Heun(), 2), (sdekit.DPMSolverPP(2), 2), (sdekit.RK4(), 4)]
    )
    def test_it_tends_to_the_density_of_the_flow_at_the_order_of_the_scheme(self, solver, order):
        model = mixture(2, 1, scale=0.8).score_model(sdekit.KarrasSDE(0.05, 20.0))
        z, errors = 20.0 * draw(3, 6, 2), []
        for steps in (16, 32):
            out = sampler_log_density(model, z, solver=solver, steps=steps)
            flow = sdekit.log_likelihood(model, out.x, tolerance=1e-6 if order > 2 else 1e-4)
            errors.append(float((out.log_prob - flow.log_prob).abs().mean()))
        assert observed_order(errors)[-1] == pytest.approx(order, abs=0.2)

    def test_of_the_shipped_network_fewer_steps_are_farther_from_the_flow(self):
        model = digits.load()
        gaps = []
        for steps in (8, 32):
            out = sampler_log_density(model, (4, 1, 8, 8), solver=sdekit.DPMSolver(2), steps=steps)
            assert out.x.shape == (4, 1, 8, 8)
            flow = sdekit.log_likelihood(model, out.x, nodes=64)
            gaps.append(float((out.log_prob - flow.log_prob).abs().mean()))
        assert gaps[1] < 0.5 * gaps[0]


class TestFolds:
    def folding(self):
        """A network whose first-order step from t_max turns the line around."""
        return sdekit.ScoreModel(Function(lambda x, label: 40.0 * x), VP)

    def test_a_step_that_turns_space_around_is_counted_and_warned_of(self):
        with pytest.warns(sdekit.SdekitWarning, match=r"3 of 3 samples passed a map whose determinant is not positive"):
            out = sampler_log_density(self.folding(), (3, 1), solver=sdekit.DDIM(), times=times(1.0, 0.9, 1e-5))
        assert (out.folds >= 1).all()
        assert out.log_prob.isfinite().all()

    def test_a_scheme_that_remembers_sees_the_sign_of_the_whole(self):
        with pytest.warns(sdekit.SdekitWarning, match=r"\(of 1\)"):
            out = sampler_log_density(self.folding(), (3, 1), solver=sdekit.DPMSolverPP(1), times=times(1.0, 1e-5))
        assert (out.folds == 1).all()

    def test_enough_steps_do_not_fold(self):
        out = sampler_log_density(mixture(2, 1).score_model(VP), (50, 2), solver=sdekit.DDIM(), steps=16)
        assert (out.folds == 0).all()


class TestTheRest:
    @pytest.mark.parametrize("solver", [sdekit.DDIM(), sdekit.Adams(4)])
    def test_a_sample_is_the_same_alone_and_in_any_batch(self, solver):
        model, options = mixture(3, 1).score_model(VP), {"solver": solver, "steps": 8, "dtype": torch.float64}
        rows = torch.tensor([8, 3])
        whole = sampler_log_density(model, (9, 3), **options)
        part = sampler_log_density(model, (2, 3), indices=rows, **options)
        torch.testing.assert_close(part.log_prob, whole.log_prob[rows], rtol=0, atol=1e-9)
        torch.testing.assert_close(part.x, whole.x[rows], rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
    def test_every_process_has_it(self, sde):
        target = gaussian(2)
        out = sampler_log_density(target.score_model(sde), (6, 2), steps=40, dtype=torch.float64)
        flow = sdekit.log_likelihood(target.score_model(sde), out.x, nodes=64)
        torch.testing.assert_close(out.log_prob, flow.log_prob, rtol=0, atol=2e-2)

    def test_gradients_are_left_as_they_were(self):
        net = nn.Linear(3, 3)
        model = sdekit.ScoreModel(Function(lambda x, label: torch.tanh(net(x))), VP)
        model.net.inner = net
        with torch.no_grad():
            out = sampler_log_density(model, (2, 3), steps=3)
        assert net.weight.grad is None
        assert not out.log_prob.requires_grad
        assert not out.x.requires_grad

    def test_a_failed_sample_is_named_and_the_others_are_kept(self):
        def spoil(call, x, label, answer):
            return torch.where((torch.arange(len(x)) == 1)[:, None], torch.nan, answer()) if len(x) > 1 else answer()

        model, _ = watched(mixture(2, 1).score_model(VP), spoil)
        for solver in (sdekit.DDIM(), sdekit.Adams(3)):
            with pytest.raises(sdekit.SolveError, match="sample 1 at t=1") as caught:
                sampler_log_density(model, (3, 2), solver=solver, steps=4)
            kept = caught.value.solution
            assert kept.log_prob.isnan().tolist() == [False, True, False]

    def test_an_interrupt_returns_what_there_is(self):
        def stop(call, x, label, answer):
            if call == 6:
                raise KeyboardInterrupt
            return answer()

        model, _ = watched(mixture(2, 1).score_model(VP), stop)
        with pytest.warns(sdekit.PartialResultWarning, match="interrupted"):
            out = sampler_log_density(model, (3, 2), solver=sdekit.DDIM(), steps=9)
        assert out.log_prob.isnan().all()
        assert (out.t > VP.t_min).all()
        assert (out.t < VP.t_max).all()

    def test_an_empty_batch_is_empty(self):
        out = sampler_log_density(mixture(2, 1).score_model(VP), (0, 2), denoise=True)
        assert out.x.shape == (0, 2)
        assert out.log_prob.shape == (0,)

    @pytest.mark.parametrize(
        ("start", "options", "error", "message"),
        [
            ((2, 2), {"solver": sdekit.EulerMaruyama()}, ValueError, "without noise"),
            ((2, 2), {"solver": sdekit.DDIM(0.5)}, ValueError, "without noise"),
            ((2, 2), {"steps": 3, "times": torch.tensor([1.0, 0.0])}, ValueError, "one or the other"),
            ((2, 2), {"times": torch.tensor([0.5, 1e-5])}, ValueError, "agree exactly"),
            ((2, 130), {}, ValueError, "at most 128"),
            ((2,), {}, ValueError, "event axis"),
            (torch.zeros(2, 2, dtype=torch.int64), {}, TypeError, "start.dtype"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, start, options, error, message):
        with pytest.raises(error, match=message):
            sampler_log_density(mixture(2, 1).score_model(VP), start, **options)

    def test_a_network_that_hides_its_derivative_is_refused(self):
        model = sdekit.ScoreModel(Function(lambda x, label: x.detach()), VP)
        with pytest.raises(sdekit.NetworkError, match="does not depend on its input"):
            sampler_log_density(model, (2, 2), steps=3)

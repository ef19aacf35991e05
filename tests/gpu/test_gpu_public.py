"""All that is public gives the CPU's numbers on CUDA, to rounding, and leaves no tensor behind on the CPU."""

from __future__ import annotations

from fractions import Fraction as Q
from functools import partial
from itertools import repeat

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import PARAMETERIZATIONS, SDES, Function, draw, gaussian, mixture, perceptron, times
from torch.utils._pytree import tree_leaves

import sdekit
from sdekit import accuracy, grid, loss, plot
from sdekit.cli import main
from sdekit.interop.scipy import right_hand_side
from sdekit.model.nets import MLP, UNet
from sdekit.training import Batch, Recipe, train
from sdekit.units import Levels
from sdekit.zoo import digits

pytestmark = pytest.mark.gpu
VP = SDES["vp"]
TARGET = mixture(3, 3)
X = TARGET.sample(4)


def network(device, sde=VP, kind=None, width=8):
    return sdekit.ScoreModel(perceptron(3, 1, width=width), sde, kind, data_std=0.5).to(device).eval()


def agree(call, rtol=1e-8, atol=1e-8):
    """Whether all tensors of `call(device)` are on it and the same on both; returns those on CUDA."""
    ours, theirs = call("cpu"), call("cuda")
    pairs = zip(tree_leaves(ours), tree_leaves(theirs), strict=True)
    pairs = [(one, other) for one, other in pairs if isinstance(one, torch.Tensor)]
    assert pairs
    for one, other in pairs:
        assert other.device.type == "cuda"
        torch.testing.assert_close(other.detach().cpu(), one.detach(), rtol=rtol, atol=atol, equal_nan=True)
    return theirs


@pytest.mark.parametrize(("name", "kind"), [*zip(SDES, repeat("noise")), *zip(repeat("vp"), PARAMETERIZATIONS)])
def test_what_a_network_means(name, kind):
    sde = SDES[name]
    t = torch.linspace(sde.t_min, sde.t_max, 4, dtype=torch.float64)

    def call(device):
        model, x = network(device, sde, PARAMETERIZATIONS[kind]), X.to(device)
        there = t.to(device)
        said = [ask(x, at) for ask in (model.score, model.noise, model.data, model.velocity) for at in (t[1], there)]
        said += [model(x, there), sde.perturb(x, t, x), sde.prior_log_prob(x), sdekit.ProbabilityFlow(model)(t[2], x)]
        reverse = sdekit.ReverseSDE(model, lambda t: 0.5 + 0.0 * t)
        return [*said, reverse.f(-float(t[2]), x), reverse.g(-t[2], x)]

    agree(call, 1e-8, 1e-9)


LABELS = [
    sdekit.noise(sdekit.SigmaLabel()),
    sdekit.noise(sdekit.LogSigmaLabel()),
    sdekit.noise(sdekit.TimeLabel(999.0)),
    sdekit.noise(sdekit.table_label(1000)),
]


@pytest.mark.parametrize("kind", LABELS, ids=repr)
def test_labels_and_guidance_by_scales_of_the_noise_level(kind):
    def call(device):
        one, other = network(device, SDES["table"], kind), network(device, SDES["table"], sdekit.data())
        model = sdekit.guided(one, other, sdekit.GuidanceInterval(2.0, -1.0, 2.0))
        pushed = sdekit.classifier_guided(
            one, lambda x, t, y: -(x - y).square().sum(1), lambda level: torch.sigmoid(level), y=X.to(device)
        )
        t = times(0.1, 0.2, 0.5, 0.9).to(device)
        return model.score(X.to(device), t), pushed.score(X.to(device), t)

    agree(call)


GAUSSIANS = {
    "full": gaussian(3),
    "diagonal": sdekit.targets.Gaussian.fit(TARGET.sample(64), covariance="diagonal"),
    "low rank": sdekit.targets.Gaussian.fit(TARGET.sample(64), covariance="low_rank", rank=1),
}


@pytest.mark.parametrize("name", [*GAUSSIANS, "mixture"])
def test_targets(name):
    target = GAUSSIANS.get(name, TARGET)

    def call(device):
        x, t = X.to(device), times(0.1, 0.2, 0.5, 0.9).to(device)
        said = [target.log_prob(x), target.score(VP, x, 0.3), target.divergence(VP, x, t), *target.predict(VP, x, t)]
        moved = [target.flow_map(VP, x, 0.1, t)] if name in GAUSSIANS else []
        return [*said, *moved, target.marginal_log_prob(VP, x, 0.1)]

    agree(call)


def test_targets_made_on_the_device():
    def call(device):
        data = TARGET.sample(64).to(device)
        fits = [sdekit.targets.Gaussian.fit(data, covariance=kind) for kind in ("full", "diagonal")]
        fits.append(sdekit.targets.Gaussian.fit(data, covariance="low_rank", rank=1))
        fits.append(sdekit.targets.GaussianMixture(torch.ones(4, device=device), data[:4], 0.5 + data[:4].abs()))
        models = [fit.score_model(VP) for fit in fits]
        x = X.to(device)
        return [
            *(fit.log_prob(x) for fit in fits),
            *(model.score(x, 0.3) for model in models),
            sdekit.log_likelihood(models[0], x, nodes=6, data_moments=fits[0]),
        ]

    agree(call, 1e-7, 1e-7)
    target = sdekit.targets.Gaussian(times(1.0, 2.0).cuda(), times(1.0, 2.0).cuda())
    assert target.sample(3).device.type == "cpu"


def test_draws_of_generators_on_the_device():
    source = torch.Generator("cuda").manual_seed(1)
    drawn = TARGET.sample(4096, generator=source)
    assert drawn.device.type == "cuda"
    torch.testing.assert_close(drawn.mean(0).cpu(), TARGET.sample(4096).mean(0), rtol=0.0, atol=0.1)
    for prior in (VP.sample_prior((4096, 3), generator=source), VP.sample_prior((4096, 3), device="cuda")):
        assert prior.device.type == "cuda"
        assert abs(float(prior.std()) - 1.0) < 0.05
    levels = Levels(5)
    again = (levels.dequantise(torch.arange(5, device="cuda"), source) + 1.0) / levels.width
    torch.testing.assert_close(again.floor().long().cpu(), torch.arange(5))


FLOW = [
    *(sdekit.Euler(), sdekit.Heun(), sdekit.Midpoint(), sdekit.RK4(), sdekit.BogackiShampine()),
    *(sdekit.Dopri5(), sdekit.Tsit5(), sdekit.Dopri8(), sdekit.Adams(2), sdekit.Adams(4, start="inside")),
    *(sdekit.Adams(3, "ramp"), sdekit.DDIM(), sdekit.DPMSolver(1), sdekit.DPMSolver(2), sdekit.DPMSolver(3)),
    *(sdekit.DPMSolverPP(2, multistep=False), sdekit.DPMSolverPP(3, multistep=False)),
    *(sdekit.DPMSolverPP(2), sdekit.DPMSolverPP(3), sdekit.DPMSolverPP(3, compat=True)),
    *(sdekit.DEIS(2), sdekit.DEIS(3), sdekit.DEIS(3, variable="rho"), sdekit.UniPC(1), sdekit.UniPC(2)),
    sdekit.RungeKutta(sdekit.Tableau("Ralston", 2, 1, (0, Q(2, 3)), ((), (Q(2, 3),)), (Q(1, 4), Q(3, 4)), (1, 0), "")),
]
NOISY = [
    *(sdekit.EulerMaruyama(), sdekit.Ancestral(), sdekit.Ancestral("large"), sdekit.ReverseDiffusion()),
    *(sdekit.DDIM(0.7), sdekit.SDEDPMSolver(), sdekit.SDEDPMSolverPP(1), sdekit.SDEDPMSolverPP(2)),
    *(sdekit.SDEDPMSolverPP(2, compat=True), sdekit.SEEDS(1), sdekit.SEEDS(2), sdekit.StochasticHeun()),
    *(sdekit.SRA2(), sdekit.SRA3(), sdekit.EDMChurn(), sdekit.SASolver(), sdekit.SASolver(3, 3)),
]
CORRECTORS = [
    *(sdekit.Langevin(0.1, 2), sdekit.AnnealedLangevin(), sdekit.SNRLangevin(), sdekit.BatchSNRLangevin()),
    *(sdekit.Underdamped(moves=2), sdekit.MALA(0.5, partial(TARGET.marginal_log_prob, VP), 2)),
]
CORRECTED = [sdekit.PredictorCorrector(sdekit.EulerMaruyama(), corrector) for corrector in CORRECTORS]
CORRECTED += [sdekit.PredictorCorrector(sdekit.DDIM(), sdekit.Langevin(), corrector_first=True)]


@pytest.mark.parametrize("solver", [*FLOW, *NOISY, *CORRECTED], ids=lambda one: repr(one).split(" object at ")[0])
def test_every_solver_samples(solver):
    def call(device):
        found = sdekit.sample(
            network(device), (3, 3), solver=solver, steps=4, dtype=torch.float64, device=device, return_path=True
        )
        return found.x, found.path, found.t, found.status, found.stats.evaluations, found.report

    agree(call)


@pytest.mark.parametrize("name", SDES)
def test_every_process_samples_with_noise_of_a_given_level(name):
    options = {"eta": lambda t: 0.5 + 0.0 * t, "steps": 4, "dtype": torch.float64, "seed": 2}
    agree(lambda device: sdekit.sample(network(device, SDES[name]), (3, 3), **options).x)


ADAPTIVE = [
    (sdekit.Adams(5, adaptive=True), sdekit.PID(0.1, 0.1), 0.0),
    (sdekit.StochasticHeun(), sdekit.PID(0.5, 0.5), None),
]


@pytest.mark.parametrize(("solver", "controller", "eta"), ADAPTIVE, ids=repr)
def test_controlled_samples(solver, controller, eta):
    options = {"solver": solver, "controller": controller, "eta": eta, "slots": 2, "dtype": torch.float64}

    def call(device):
        found = sdekit.sample(TARGET.score_model(VP), (3, 3), device=device, **options)
        return found.x, found.stats.evaluations, found.stats.rejected, found.t

    agree(call, 1e-6, 1e-6)


def test_encoding_on_grids_and_ways_back():
    def call(device):
        model, x = network(device), X.to(device)
        latent = sdekit.encode(model, x, steps=6, slots=2).x
        back = sdekit.decode(model, latent, controller=sdekit.FixedGrid(grid.karras(VP, 6).to(device)))
        other = sdekit.encode(model, x, solver=sdekit.UniPC(2), steps=5).x
        return latent, back.x, other, sdekit.encode(model, x, solver=sdekit.Dopri5(), controller=sdekit.PID(0.1, 0.1)).x

    agree(call, 1e-6, 1e-6)


def test_integrate_takes_paths_and_says_how_it_went():
    term, counts = partial(sdekit.ReverseSDE, eta=0.5), (VP.t_max, 0.1)

    def call(device):
        model, x, rows = network(device), X.to(device), torch.arange(4, device=device)
        paths = (
            sdekit.BrownianMotion(3, rows, -1.0, -0.05 * torch.ones(4, device=device), depth=12),
            sdekit.IndependentIncrements(3, rows),
        )
        steps = sdekit.FixedGrid(torch.linspace(*counts, 6, dtype=torch.float64))
        return [
            sdekit.integrate(term(model), sdekit.SRA1(), steps, x, *counts, path, return_path=True).path
            for path in paths
        ]

    agree(call)


DIVERGENCES = [
    *(sdekit.Hutchinson(2, law="gaussian"), sdekit.Hutchinson(2, law="sphere"), sdekit.Exact(1), sdekit.Exact(2)),
    *(sdekit.Hutchinson(3, mode="jvp"), sdekit.Hutchinson(mode="auto"), sdekit.Hutchinson(law="sphere", control=True)),
    sdekit.Hutchinson(law="gaussian", fresh=False),
]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_traces(divergence):
    def call(device):
        model, x = network(device), X.to(device)
        found = sdekit.log_likelihood(model, x, divergence=divergence, nodes=4)
        return found.log_prob, found.std_error, found.stats.evaluations

    agree(call, 1e-6, 1e-7)


TABLES = sdekit.Affine(times(0.5, 1.0, 2.0), times(0.1, 0.2, 0.3))
LIKELIHOODS = {
    "extrapolated": {"end": "extrapolate", "data_moments": GAUSSIANS["full"], "budget": True, "nodes": 8},
    "heat": {"end": "heat", "budget": True, "nodes": 8, "divergence": sdekit.Hutchinson(2)},
    "moments of low rank": {"data_moments": GAUSSIANS["low rank"], "budget": True, "nodes": 8},
    "units": {"transform": TABLES, "nodes": 8},
    "times": {"t": times(0.01, 0.1, 0.2, 0.5), "slots": 2, "tolerance": 3.0},
    "in nats": {"solver": sdekit.BogackiShampine(), "controller": sdekit.Nats(30.0), "t": 0.2},
    "grid": {"solver": sdekit.RK4(), "controller": sdekit.FixedGrid(grid.likelihood(VP, 6).flip(0))},
}


@pytest.mark.filterwarnings("ignore::sdekit.SmoothnessWarning")
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods(name):
    def call(device):
        found = sdekit.log_likelihood(TARGET.score_model(VP), X.to(device), **LIKELIHOODS[name])
        lines = [line.nats for line in found.budget().lines if line.nats is not None]
        assert "solver" in str(found.budget())
        return found._replace(stats=found.stats.evaluations), lines, found.budget().total(), found.bits_per_dim(7)

    agree(call, 1e-6, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_states(dtype):
    def call(device):
        net = perceptron(3, 1, width=8).float()
        model, x = sdekit.ScoreModel(net, VP, data_std=0.5).to(device).eval(), X.to(device, dtype)
        return (
            sdekit.log_likelihood(model, x, nodes=8).log_prob,
            sdekit.encode(model, x, steps=4).x.float(),
            sdekit.sample(model, (3, 3), steps=4, dtype=dtype).x.float(),
            sdekit.sample(model, (3, 3), steps=4, eta=1.0, dtype=dtype).x.float(),
        )

    rounding = 1e-4 if dtype is torch.float32 else 3e-2
    agree(call, rounding, rounding)


class Conditioned(torch.nn.Module):
    """A network of x, its label and two conditions."""

    def __init__(self):
        super().__init__()
        self.body = perceptron(3, 1, width=8)

    def forward(self, x, label, y, by):
        return self.body(x + by * y, label)


def test_conditions_follow_their_samples_and_move_with_the_model():
    def call(device):
        model = sdekit.ScoreModel(Conditioned(), VP).eval().condition(y=draw(5, 4, 3), by=0.5).to(device)
        x = X.to(device)
        chosen = sdekit.chunked(
            lambda part, rows: sdekit.log_likelihood(model.take(rows), part, indices=rows, nodes=6), x, chunk=3
        )
        grown = sdekit.chunked(lambda part, rows: {"x": model.take(rows).noise(part, 0.3), "calls": 1}, x)
        drawn = sdekit.sample(model, (4, 3), controller=sdekit.PID(0.1, 0.1), slots=2, dtype=torch.float64)
        ratio = sdekit.log_ratio(model, model.condition(y=-x), x, divergence=sdekit.Hutchinson(2), nodes=6)
        return chosen.log_prob, grown, drawn.x, ratio.mean(), ratio.value, ratio.bits_per_dim()

    agree(call, 1e-6, 1e-6)


BOUNDS = {
    "as it is": {},
    "moments": {"data_moments": GAUSSIANS["full"], "times": loss.UniformHalfLogSNR(), "batch": 7},
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name):
    def call(device):
        found = sdekit.sandwich(network(device), X.to(device), draws=4, tolerance=30.0, seed=2, **BOUNDS[name])
        assert "4 samples" in found.table()
        return found._replace(flow=found.flow.log_prob)

    agree(call, 1e-6, 1e-7)


def test_samples_with_their_densities():
    net = partial(sdekit.sample_log_prob, shape=(3, 3), dtype=torch.float64, transform=TABLES)

    def call(device):
        model = network(device)
        options = {"tolerance": 30.0, "slots": 2}
        found = [net(model, nodes=6), net(model, **options)]
        ito = sdekit.ito_log_density(model, (3, 3), steps=5, batch=2, dtype=torch.float64)
        made = sdekit.sampler_log_density(
            model, (3, 3), solver=sdekit.DPMSolverPP(2), times=grid.karras(VP, 5).to(device), dtype=torch.float64
        )
        return [each._replace(stats=each.stats.evaluations) for each in found], ito, made.log_prob, made.x

    agree(call, 1e-6, 1e-6)


K = torch.randint(0, 5, (3, 3), generator=torch.Generator().manual_seed(0))
DISCRETE = [
    {"samples": 2, "draws_at_once": 2},
    {"dequantizer": sdekit.TruncatedNormalDequantizer(), "samples": 2, "bound": "importance"},
    {"dequantizer": sdekit.VariationalDequantizer(), "entropy": "sampled", "slots": 2, "t": 0.05},
    {
        "samples": 2,
        "bound": "importance",
        "debias": True,
        "divergence": sdekit.Hutchinson(2),
        "t": times(0.01, 0.02, 0.03),
    },
]


@pytest.mark.parametrize("options", DISCRETE, ids=repr)
def test_integers(options):
    def call(device):
        found = sdekit.discrete_log_likelihood(network(device), K.to(device), levels=5, nodes=4, **options)
        return found, found.bits_per_dim(), found.effective_draws()

    agree(call, 1e-6, 1e-6)
    with pytest.raises(ValueError, match="integer"):
        sdekit.require_dequantized(K.double().cuda())


def test_gradients():
    def call(device):
        bound = draw(5, 4, 3).to(device).requires_grad_()
        model = sdekit.ScoreModel(Conditioned(), VP).eval().to(device).condition(y=bound, by=0.5)
        x = X.clone().to(device).requires_grad_()
        options = {"divergence": sdekit.Hutchinson(2), "data_moments": GAUSSIANS["full"], "transform": TABLES}
        value = sdekit.log_prob(model, x, nodes=4, **options)
        return value, torch.autograd.grad(value.sum(), [x, bound, *model.parameters()])

    agree(call, 1e-7, 1e-7)


def test_a_plan():
    plans = [sdekit.plan_sampling(network(device), (3,), 3, samples=2, device=device) for device in ("cpu", "cuda")]
    torch.testing.assert_close(plans[1].times, plans[0].times, rtol=1e-4, atol=1e-4)
    assert plans[1].solver == plans[0].solver
    assert plans[1].error == pytest.approx(plans[0].error, rel=1e-2)
    agree(lambda d: sdekit.sample(network(d), (3, 3), solver=plans[0].solver, controller=plans[0].controller).x, 1e-4)


TIMES = [
    loss.UniformTime(low_discrepancy=False),
    loss.UniformHalfLogSNR(),
    loss.LogNormalSigma(),
    loss.CauchyLogSigma(),
]
WEIGHTS = [loss.uniform, loss.likelihood, loss.EDMWeight(), loss.MinSNR(), loss.Native(sdekit.v())]


@pytest.mark.parametrize("law", TIMES, ids=repr)
def test_losses(law):
    u = torch.linspace(0.05, 0.95, 4, dtype=torch.float64)
    agree(lambda device: law.at(VP, u.to(device)))
    source, x = torch.Generator("cuda"), X.cuda()
    t, density = law.draw(VP, 4, source.manual_seed(1))
    noise = torch.randn(x.shape, generator=source, dtype=x.dtype, device="cuda")
    for weight in WEIGHTS:
        drawn = {"weight": weight, "times": law, "importance": True, "generator": source.manual_seed(1)}
        found = loss.denoising_loss(network("cuda"), x, **drawn)
        plain = loss.denoising_error(network("cpu"), X, t.cpu(), noise.cpu()) * weight(VP, t.cpu()) / density.cpu()
        torch.testing.assert_close(found.detach().cpu(), plain.detach(), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="one device"):
        loss.denoising_loss(network("cpu"), X, generator=source)


def batches(generator):
    rows = torch.randint(64, (8,), generator=generator, device=generator.device)
    return Batch(TARGET.sample(64).float().to(generator.device)[rows], {"y": rows % 3})


def test_training_goes_on_where_it_stopped_and_its_model_goes_to_files_and_back(tmp_path):
    def model():
        torch.manual_seed(0)
        return sdekit.ScoreModel(MLP((3,), 8, 2, dropout=0.1, classes=3), VP, sdekit.edm(0.7)).cuda()

    recipe = Recipe(6, warmup=2, learning_rate=1e-2)
    fresh, before = model(), torch.cuda.get_rng_state()
    whole = train(fresh, batches, recipe, progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    calls = []

    def stopping(generator):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("stop")
        return batches(generator)

    options = {"checkpoint": tmp_path / "run.safetensors", "every": 3, "progress": False}
    with pytest.raises(RuntimeError, match="stop"):
        train(model(), stopping, recipe, **options)
    parts = train(model(), batches, recipe, **options)
    assert parts.step == whole.step == 6
    assert torch.isfinite(whole.losses).all()
    for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert other.device.type == "cuda"
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    whole.model.save(tmp_path / "model.safetensors")
    y = torch.tensor([0, 1, 2, 0])

    def call(device):
        net = MLP((3,), 8, 2, dropout=0.1, classes=3)
        loaded = sdekit.ScoreModel.load(tmp_path / "model.safetensors", net, device=device).eval()
        return loaded.condition(y=y.to(device)).score(X.float().to(device), 0.3)

    agree(call, 1e-4, 1e-4)


def test_networks_for_images():
    torch.manual_seed(0)
    net = UNet(1, 4, 2, attention=True).double()
    x = draw(1, 2, 1, 4, 4)
    agree(lambda d: sdekit.log_likelihood(sdekit.ScoreModel(net.to(d), VP).eval(), x.to(d), nodes=4).log_prob, 1e-6)


def test_the_digits_network():
    levels = digits.load_split().test[:1]
    model = digits.load()
    agree(lambda device: digits.bits_per_dim(model.to(device), levels.to(device), tolerance=1e3), 1e-2, 1e-2)


def test_orders():
    *grids, finest = accuracy.half_log_snr_grids(VP, (2, 4, 6, 8), -1.0, 1.0)

    def studies(device):
        model, x = network(device), X.to(device)
        flow, noisy = sdekit.ProbabilityFlow(model), sdekit.ReverseSDE(model)
        reference = accuracy.reference_endpoint(sdekit.RK4(), flow, x, finest)
        strong = {"reference": sdekit.EulerMaruyama(), "finest": finest, "claimed": 1.0}
        return [
            accuracy.deterministic_order(sdekit.Heun(), flow, x, reference, grids),
            accuracy.strong_order(sdekit.EulerMaruyama(), noisy, x, grids, **strong),
        ]

    for ours, theirs in zip(studies("cpu"), studies("cuda"), strict=True):
        assert theirs.estimate == pytest.approx(ours.estimate, abs=1e-4)
        assert theirs.errors == pytest.approx(ours.errors, rel=1e-5)


def test_other_libraries_and_pictures(tmp_path):
    slopes = [right_hand_side(sdekit.ProbabilityFlow(network(d)), X.to(d)) for d in ("cpu", "cuda")]
    np.testing.assert_array_equal(slopes[0][1], slopes[1][1])
    np.testing.assert_allclose(slopes[1][0](0.3, slopes[1][1]), slopes[0][0](0.3, slopes[0][1]), rtol=1e-10)
    images = draw(1, 4, 3, 3).cuda()
    plot.save(plot.samples_figure(images), tmp_path / "images.png")
    plot.save(plot.samples_figure(X.cuda()), tmp_path / "samples.png")
    figure = plot.demo_figure(images, images[0, 0], images[0, 1].abs(), [(0.1, "here")], "title")
    plot.save(figure, tmp_path / "demo.png")


def command(*arguments):
    result = CliRunner().invoke(main, ["--traceback", *arguments, "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X.numpy())
    np.save("k.npy", K.numpy())
    levels = ("--levels", "5")
    command("train", "x.npy", "--out", "m.safetensors", "--width", "8", "--steps", "3", "--device", "cuda")
    command("train", "k.npy", *levels, "--out", "k.safetensors", "--width", "8", "--steps", "3", "--device", "cuda")
    trained = ("--model", "m.safetensors")
    for device in ("cpu", "cuda"):
        tail = ("--device", device, "--batch-size", "3")
        rough = ("--tolerance", "30", "--divergence", "hutchinson", "--out", f"p-{device}.npz")
        command("likelihood", "x.npy", *trained, *rough, *tail)
        command("likelihood", "k.npy", "--model", "k.safetensors", *levels, "--tolerance", "30", *tail)
        drawn = ("--count", "4", "--steps", "4", "--out", f"x-{device}.npz", "--picture", f"x-{device}.png")
        command("sample", *trained, *drawn, *tail)
        command("sample", *trained, "--count", "4", "--eta", "1", "--steps", "4", "--out", f"e-{device}.npz", *tail)
    for kind, name in (("p", "log_prob"), ("x", "x"), ("e", "x")):
        ours, theirs = (np.load(f"{kind}-{device}.npz")[name] for device in ("cpu", "cuda"))
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-3)


def test_a_function_as_a_network_and_solves_that_are_stopped():
    def call(device):
        model, x = sdekit.ScoreModel(Function(lambda x, label: 0.5 * x), VP), X.to(device)
        with pytest.warns(sdekit.PartialResultWarning):
            found = sdekit.encode(model, x, wall_time=1e-9, throw=False)
        with pytest.raises(sdekit.SolveError, match="samples"):
            sdekit.log_likelihood(model, x, max_evaluations=5)
        return found.status, sdekit.log_likelihood(model, x, max_evaluations=5, throw=False).t

    agree(call, 1e-6, 1e-6)

"""Other packages' samplers, step for step ours where conventions match; and where they fail, what ours do there.

Both get the same start, the same exact score of a mixture and the same levels, the last one above sigma = 0. Tolerances
are 1e-9 where theirs is float64 throughout, and 5e-6 where it casts the state to float32 (diffusers' DPM-Solver).
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers import draw, gaussian, mixture, observed_order, reference_flow, times

import sdekit
from sdekit.solver.multistep import History

samplers = pytest.importorskip("benchmarks.samplers", reason="run from the repository's root: python -m pytest")

# diffusers turns tensors into arrays as numpy 2 no longer likes, and scipy's quad is asked for the values of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

TARGET = mixture(3, 4)
TABLE = sdekit.TableVPSDE.linear(1000)
KARRAS = sdekit.KarrasSDE()
TIGHT, SINGLE = 1e-9, 5e-6
STEPS = 12


def require(package):
    """Skips the test where the package is not installed; it is not imported yet."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; the bench extra has it")


class Fed:
    """A path whose increment in the k-th step is `noise[k]` standard deviations."""

    refinable = False

    def __init__(self, noise):
        self.noise = noise

    def increment(self, s0, s1, step, like, lane=0):
        return self.noise[int(step[0])] * (s1 - s0).abs().sqrt()[:, None]

    def take(self, rows):
        return Fed([part[rows] for part in self.noise])

    def __len__(self):
        return len(self.noise[0])


def start(sde, count=5):
    return sde.prior_std * draw(1, count, 3)


def ours(term, solver, grid, x, path=None):
    return sdekit.integrate(term, solver, sdekit.FixedGrid(grid), x, grid[0], grid[-1], path).x


def agree(found, theirs, tolerance):
    torch.testing.assert_close(found, theirs.double(), rtol=tolerance, atol=tolerance)


# diffusers, on its own linear table


def chained(kind, steps=STEPS, **settings):
    """A scheduler with its sigmas in float64, the times of its levels, and the field it asks."""
    require("diffusers")
    chain = samplers.scheduler(kind, samplers.table(TABLE), **settings)
    chain.set_timesteps(steps)
    grid = torch.cat(((chain.timesteps.double() + 1.0) / 1000.0, times(1e-3)))
    if hasattr(chain, "sigmas"):
        chain.sigmas = torch.exp(-TABLE.half_log_snr(grid))
    return chain, grid, samplers.Counted(TARGET.score_model(TABLE))


def flow(sde=TABLE, target=TARGET):
    return sdekit.ProbabilityFlow(target.score_model(sde))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_diffusers_dpm_solver_multistep(order):
    settings = {"solver_order": order, "final_sigmas_type": "sigma_min", "lower_order_final": False}
    chain, grid, field = chained("DPMSolverMultistepScheduler", **settings)
    theirs = samplers.follow(chain, field, start(TABLE))
    agree(ours(flow(), sdekit.DPMSolverPP(order, compat=order > 1), grid, start(TABLE)), theirs, SINGLE)
    if order > 1:  # the published coefficients are others: the agreement could fail
        other = ours(flow(), sdekit.DPMSolverPP(order), grid, start(TABLE))
        assert float((other - theirs).abs().max()) > 100 * SINGLE


def test_diffusers_second_order_of_heun_type_is_the_exact_one():
    settings = {"solver_type": "heun", "final_sigmas_type": "sigma_min", "lower_order_final": False}
    chain, grid, field = chained("DPMSolverMultistepScheduler", **settings)
    agree(ours(flow(), sdekit.DPMSolverPP(2), grid, start(TABLE)), samplers.follow(chain, field, start(TABLE)), SINGLE)


@pytest.mark.parametrize(("order", "variable"), [(1, "t"), (2, "half_log_snr")])
def test_diffusers_deis_is_polynomial_in_the_half_log_snr(order, variable):
    chain, grid, field = chained("DEISMultistepScheduler", solver_order=order, lower_order_final=False)
    theirs = samplers.follow(chain, field, start(TABLE))
    agree(ours(flow(), sdekit.DEIS(order, variable), grid, start(TABLE)), theirs, TIGHT)
    if order > 1:
        assert float((ours(flow(), sdekit.DEIS(order, "t"), grid, start(TABLE)) - theirs).abs().max()) > 1e-4


def step_by_step(chain, field, grid, solver, form, corrected):
    """Each of their steps from the history that theirs had, as soon as it is as long as ours needs.

    Yields:
        What our solver makes of the state and the past predictions, and what theirs did.
    """
    term, x, nodes, past, before = flow(), start(TABLE), [], [], []
    levels = TABLE.half_log_snr(grid)
    for k, t in enumerate(chain.timesteps):
        prediction = field.noise(x, grid[k])
        data = (x - TABLE.sigma(grid[k]) * prediction) / TABLE.alpha(grid[k])
        depth = solver.points if corrected else solver.depth
        if corrected and len(before) >= depth:  # predicted x and its correction: of the step that ended here
            memory = History(torch.full((5,), 9), torch.cat(nodes[:depth]).expand(5, -1), tuple(past[:depth]))
            made = solver.propose(term, grid[k - 1].expand(5), grid[k].expand(5), before[0], memory, None)
            after = chain.step(prediction, t, x).prev_sample
            yield made.z, chain.last_sample
        else:
            after = chain.step(prediction, t, x).prev_sample
        nodes.insert(0, levels[k].expand(1))
        past.insert(0, data if form == "data" else prediction)
        if corrected:
            before.insert(0, chain.last_sample)
        elif len(past) >= depth:
            kept = torch.cat(nodes[1:depth] + nodes[:1]).expand(5, -1)
            memory = History(torch.full((5,), 9), kept, tuple(past[1:depth] + past[:1]))
            made = solver.propose(term, grid[k].expand(5), grid[k + 1].expand(5), x, memory, None)
            yield made.z, after
        x = after


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("points", [1, 2, 3])
def test_diffusers_unipc_steps_from_the_same_history(points, predict_x0, variant):
    settings = {"solver_order": points, "solver_type": variant, "predict_x0": predict_x0, "lower_order_final": False}
    chain, grid, field = chained("UniPCMultistepScheduler", final_sigmas_type="sigma_min", **settings)
    form = "data" if predict_x0 else "noise"
    pairs = list(step_by_step(chain, field, grid, sdekit.UniPC(points, variant, form), form, True))
    assert len(pairs) == STEPS - points
    for made, theirs in pairs:
        agree(made, theirs, TIGHT)


def test_diffusers_unipc_of_one_point_whole():
    # Of more points their first corrector puts 1/2 for its coefficient, ours is exact: only there they differ.
    settings = {"solver_order": 1, "final_sigmas_type": "sigma_min", "lower_order_final": False}
    for variant in ("bh1", "bh2"):
        chain, grid, field = chained("UniPCMultistepScheduler", solver_type=variant, **settings)
        samplers.follow(chain, field, start(TABLE))
        agree(ours(flow(), sdekit.UniPC(1, variant), grid[:-1], start(TABLE)), chain.last_sample, TIGHT)


def test_diffusers_deis_of_order_three_steps_from_the_same_history():
    chain, grid, field = chained("DEISMultistepScheduler", solver_order=3, lower_order_final=False)
    pairs = list(step_by_step(chain, field, grid, sdekit.DEIS(3, "half_log_snr"), "noise", False))
    assert len(pairs) == STEPS - 2
    for made, theirs in pairs:
        agree(made, theirs, TIGHT)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_diffusers_ddim_with_the_same_noise(eta):
    settings = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    chain, grid, field = chained("DDIMScheduler", 10, **settings)
    noise, x = [draw(10 + k, 5, 3) for k in range(10)], start(TABLE)
    theirs = x
    for k, t in enumerate(chain.timesteps):
        fed = {"variance_noise": noise[k]} if eta > 0 else {}
        theirs = chain.step(field.noise(theirs, grid[k]), t, theirs, eta=eta, **fed).prev_sample
    term = sdekit.ReverseSDE(TARGET.score_model(TABLE), eta) if eta > 0 else flow()
    agree(ours(term, sdekit.DDIM(eta), grid, x, Fed(noise) if eta > 0 else None), theirs, TIGHT)


def test_diffusers_ddpm_is_the_exact_posterior_step():
    require("diffusers")
    chain = samplers.scheduler("DDPMScheduler", samplers.table(TABLE), clip_sample=False)
    spaced, x = [999, 700, 450, 300, 150, 60, 10, 0], start(TABLE)
    chain.set_timesteps(timesteps=spaced)
    source = torch.Generator().manual_seed(5)
    theirs = samplers.follow(chain, samplers.Counted(TARGET.score_model(TABLE)), x, len(spaced) - 1, generator=source)
    source = torch.Generator().manual_seed(5)
    path = Fed([torch.randn(5, 3, generator=source, dtype=torch.float64) for _ in spaced])
    grid = (torch.tensor(spaced, dtype=torch.float64) + 1.0) / 1000.0
    term = sdekit.ReverseSDE(TARGET.score_model(TABLE))
    for solver in (sdekit.SDEDPMSolverPP(1), sdekit.DDIM(1.0)):
        agree(ours(term, solver, grid, x, path), theirs, TIGHT)


# k-diffusion, in x/alpha and sigma/alpha: the Karras process is that itself, the VP process tests the change of scale


def kd_grid(sde, spacing="karras"):
    require("k_diffusion")
    return samplers.sigmas(sde, STEPS, spacing)


def times_of(sde, sigmas):
    grid = sde.time_at(-sigmas.log())
    grid[0], grid[-1] = sde.t_max, sde.t_min
    return grid


@pytest.mark.parametrize("sde", [KARRAS, sdekit.VPSDE(t_min=1e-3)], ids=["karras", "vp"])
@pytest.mark.parametrize(
    ("name", "solver", "settings"),
    [
        ("euler", sdekit.DDIM(), {}),
        ("dpmpp_2m", sdekit.DPMSolverPP(2, compat=True), {}),
        ("dpmpp_2s_ancestral", sdekit.DPMSolverPP(2, multistep=False), {"eta": 0.0}),
        ("lms", sdekit.DEIS(2, "rho"), {"order": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_k_diffusion_flow_samplers(name, solver, settings, sde):
    sigmas, x, model = kd_grid(sde), start(sde), TARGET.score_model(sde)
    theirs = samplers.denoise_along(name, samplers.Counted(model), x, sigmas, **settings)
    agree(ours(flow(sde), solver, times_of(sde, sigmas), x), theirs, TIGHT)


@pytest.mark.parametrize(("name", "solver"), [("euler", sdekit.Euler()), ("heun", sdekit.Heun())])
def test_k_diffusion_runge_kutta_in_sigma(name, solver):
    sigmas, x, model = kd_grid(KARRAS), start(KARRAS), TARGET.score_model(KARRAS)
    theirs = samplers.denoise_along(name, samplers.Counted(model), x, sigmas)
    agree(ours(flow(KARRAS), solver, sigmas, x), theirs, TIGHT)


@pytest.mark.parametrize("sde", [KARRAS, sdekit.VPSDE(t_min=1e-3)], ids=["karras", "vp"])
@pytest.mark.parametrize(
    ("name", "solver", "settings"),
    [
        ("dpmpp_2m_sde", sdekit.SDEDPMSolverPP(2, compat=True), {"solver_type": "midpoint"}),
        ("dpmpp_2m_sde", sdekit.SDEDPMSolverPP(2), {"solver_type": "heun"}),
        ("euler_ancestral", sdekit.DDIM(1.0), {}),
        ("euler_ancestral", sdekit.SDEDPMSolverPP(1), {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_k_diffusion_noisy_samplers_with_the_same_noise(name, solver, settings, sde):
    sigmas, x, model = kd_grid(sde), start(sde), TARGET.score_model(sde)
    noise = [draw(20 + k, 5, 3) for k in range(STEPS)]
    drawn = iter(noise)
    settings = {**settings, "noise_sampler": lambda *_: next(drawn)}
    theirs = samplers.denoise_along(name, samplers.Counted(model), x, sigmas, **settings)
    agree(ours(sdekit.ReverseSDE(model), solver, times_of(sde, sigmas), x, Fed(noise)), theirs, TIGHT)


def test_k_diffusion_churn_with_the_same_noise(monkeypatch):
    sigmas, model, churn = kd_grid(KARRAS), TARGET.score_model(KARRAS), 3.0
    sigmas = sigmas[1:]  # theirs raises the first level above the largest
    x, steps = float(sigmas[0]) * draw(1, 5, 3), len(sigmas) - 1
    noise = [draw(20 + k, 5, 3) for k in range(steps)]
    drawn = iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda like: next(drawn))
    levels = {"s_tmin": 0.05, "s_tmax": 2.0, "s_noise": 1.003}
    theirs = samplers.denoise_along("heun", samplers.Counted(model), x, sigmas, s_churn=churn, **levels)
    monkeypatch.undo()

    class Path(Fed):
        def normal(self, step, like, lane=0):
            return self.noise[int(step[0])]

    solver = sdekit.EDMChurn(
        start=levels["s_tmax"], stop=levels["s_tmin"], noise=levels["s_noise"], gamma=min(churn / steps, 2**0.5 - 1)
    )
    agree(ours(flow(KARRAS), solver, sigmas, x, Path(noise)), theirs, TIGHT)


# azula


@pytest.mark.parametrize(
    ("name", "solver", "settings"),
    [("DDIMSampler", sdekit.DDIM(), {}), ("zABSampler", sdekit.DEIS(2, "rho"), {"order": 2})],
    ids=["ddim", "zab"],
)
def test_azula_flow_samplers(name, solver, settings):
    require("azula")
    sde = sdekit.VPSDE(t_min=1e-3)
    theirs = samplers.draw(samplers.with_azula(name, **settings), TARGET.score_model(sde), start(sde), STEPS)
    assert theirs.evaluations == STEPS
    agree(ours(flow(sde), solver, sdekit.grid.uniform_time(sde, STEPS), start(sde)), theirs.x, TIGHT)


# torchsde, torchdiffeq, scipy


class Shared:
    """The path of one of torchsde's Brownian intervals."""

    refinable = False

    def __init__(self, interval):
        self.interval = interval

    def increment(self, s0, s1, step, like, lane=0):
        return self.interval(s0[0], s1[0])

    def __len__(self):
        return self.interval.shape[0]


def interval(torchsde, reverse, count=5):
    first, last = torch.tensor(reverse.span, dtype=torch.float64)
    settings = {"dtype": torch.float64, "entropy": 3, "tol": 0.0, "levy_area_approximation": "space-time"}
    return torchsde.BrownianInterval(first, last, (count, 3), **settings)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_torchsde_euler_on_the_same_path(eta):
    # Steps of 1/64 from 1 to 1/4 are exact in binary: both ask the path for the same intervals.
    torchsde = pytest.importorskip("torchsde")
    sde = sdekit.VPSDE(t_min=0.25)
    reverse, x = sdekit.ReverseSDE(TARGET.score_model(sde), eta), start(sde)
    path, ends = interval(torchsde, reverse), torch.tensor(reverse.span, dtype=torch.float64)
    with torch.no_grad():
        theirs = torchsde.sdeint(reverse, x, ends, bm=path, dt=1 / 64, method="euler")[-1]
    found = ours(reverse, sdekit.EulerMaruyama(), sdekit.grid.uniform_time(sde, 48), x, Shared(path))
    agree(found, theirs, TIGHT)


def test_euler_maruyama_goes_where_torchsde_srk_goes_at_strong_order_one():
    torchsde = pytest.importorskip("torchsde")
    sde = sdekit.VPSDE(t_min=0.25)
    reverse, x = sdekit.ReverseSDE(TARGET.score_model(sde), 1.0), start(sde, 400)
    path, ends = interval(torchsde, reverse, 400), torch.tensor(reverse.span, dtype=torch.float64)
    with torch.no_grad():
        theirs = torchsde.sdeint(reverse, x, ends, bm=path, dt=1 / 512, method="srk")[-1]
    errors = []
    for n in (24, 48, 96):
        found = ours(reverse, sdekit.EulerMaruyama(), sdekit.grid.uniform_time(sde, n), x, Shared(path))
        errors.append(float((found - theirs).square().mean().sqrt()))
    assert errors[-1] < 0.05
    assert min(observed_order(errors)) > 0.75, errors


@pytest.mark.parametrize(("name", "solver"), [("euler", sdekit.Euler()), ("midpoint", sdekit.Midpoint())])
def test_torchdiffeq_fixed_steps(name, solver):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    sde = sdekit.VPSDE(t_min=1e-2)
    term, x, grid = flow(sde), start(sde), sdekit.grid.karras(sde, STEPS)
    with torch.no_grad():
        agree(ours(term, solver, grid, x), torchdiffeq.odeint(term, x, grid, method=name)[-1], TIGHT)


def test_torchdiffeq_dopri5_and_scipy_arrive_where_ours_does():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    sde = sdekit.VPSDE(t_min=1e-3)
    term, x = flow(sde), start(sde)
    ends = times(sde.t_max, sde.t_min)
    with torch.no_grad():
        theirs = torchdiffeq.odeint(term, x, ends, rtol=1e-10, atol=1e-11, method="dopri5")[-1]
    found = sdekit.integrate(term, sdekit.Dopri5(), sdekit.PID(1e-10, 1e-11), x, *ends.tolist()).x
    agree(found, theirs, 1e-8)  # each controls its steps by itself: the errors are 1e-10 times the flow's stretching
    agree(found, reference_flow(TARGET, sde, x, *ends.tolist()), 1e-8)


# where they fail


def test_a_step_without_length_is_nan_in_diffusers_and_none_in_ours():
    require("diffusers")
    settings = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False}
    chain = samplers.scheduler("DPMSolverMultistepScheduler", samplers.table(TABLE), solver_order=3, **settings)
    chain.set_timesteps(STEPS)
    assert chain.sigmas[-1] == chain.sigmas[-2]
    theirs = samplers.follow(chain, samplers.Counted(TARGET.score_model(TABLE)), start(TABLE))
    assert not bool(theirs.isfinite().any())
    t, x = times(0.3).expand(5), start(TABLE)
    nodes = TABLE.half_log_snr(times(0.4, 0.5, 0.6)).expand(5, 3)
    for solver in (sdekit.DPMSolverPP(3, compat=True), sdekit.DPMSolverPP(3)):
        memory = History(torch.full((5,), 9), nodes, (draw(2, 5, 3), draw(3, 5, 3), draw(4, 5, 3)))
        agree(solver.propose(flow(), t, t, x, memory, None).z, x, 1e-14)


def closed_form(grid):
    """The error in a Gaussian's flow, whose map is known, of a function that takes (field, x) along `grid`."""
    target, x = gaussian(3), start(TABLE)
    exact = target.flow_map(TABLE, x, grid[0], grid[-1])
    return target, x, lambda found: float((found - exact).square().mean().sqrt())


def test_diffusers_deis_of_order_three_gets_worse_with_more_steps_and_ours_better():
    require("diffusers")
    theirs, mine = [], []
    for steps in (48, 96, 192):
        chain = samplers.scheduler("DEISMultistepScheduler", samplers.table(TABLE), solver_order=3)
        chain.set_timesteps(steps)
        grid = torch.cat(((chain.timesteps.double() + 1.0) / 1000.0, times(1e-3)))
        target, x, error = closed_form(grid)
        field = samplers.Counted(target.score_model(TABLE))
        theirs.append(error(samplers.follow(chain, field, x)))
        mine.append(error(ours(flow(target=target), sdekit.DEIS(3, "half_log_snr"), grid, x)))
    assert theirs[-1] > 3.0 * min(theirs), theirs
    assert mine[0] > 2.0 * mine[1] > 4.0 * mine[2], mine
    assert mine[-1] < 0.1 * theirs[-1]


def test_the_published_third_order_is_of_order_two_in_k_diffusion_and_ours_is_of_three():
    require("k_diffusion")
    sde, target = sdekit.KarrasSDE(0.05, 5.0), gaussian(3)
    x, model = start(sde), target.score_model(sde)
    exact, theirs, mine = target.flow_map(sde, x, sde.t_max, sde.t_min), [], []
    for n in (40, 80, 160):
        sigmas = samplers.sigmas(sde, n, "exponential")
        found = samplers.denoise_along("dpmpp_3m_sde", samplers.Counted(model), x, sigmas, eta=0.0)
        theirs.append(float((found - exact).square().mean().sqrt()))
        found = ours(flow(sde, target), sdekit.DPMSolverPP(3), times_of(sde, sigmas), x)
        mine.append(float((found - exact).square().mean().sqrt()))
    assert max(observed_order(theirs)) < 2.4, theirs
    assert min(observed_order(mine)) > 2.7, mine


def test_azula_reab_of_order_three_is_of_order_one():
    require("azula")
    sde, target = sdekit.VPSDE(t_min=0.05), gaussian(3)
    x, model = start(sde), target.score_model(sde)
    exact, theirs, mine = target.flow_map(sde, x, sde.t_max, sde.t_min), [], []
    for n in (40, 80, 160):
        found = samplers.draw(samplers.with_azula("REABSampler", order=3), model, x, n).x
        theirs.append(float((found - exact).square().mean().sqrt()))
        found = ours(flow(sde, target), sdekit.DEIS(3), sdekit.grid.uniform_time(sde, n), x)
        mine.append(float((found - exact).square().mean().sqrt()))
    assert max(observed_order(theirs)) < 1.3, theirs
    assert min(observed_order(mine)) > 2.6, mine

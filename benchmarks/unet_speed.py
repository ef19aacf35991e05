"""Wall time of a U-Net's likelihood at equal measured error, beside score_sde's algorithm, k-diffusion and torchdiffeq.

On CUDA diffusers' UNet2DModel as for CIFAR-10 (35.7M parameters, 3 x 32 x 32), batch 64 and 256; on the CPU sdekit's
U-Net with 2.0M parameters, 3 x 32 x 32, batch 4 and one thread. float32, random weights from a fixed seed, scaled to a
flow like a trained one's: EDM's preconditioned network with outputs of size 1, and time features of at most 3 radians a
unit of log(sigma)/4 (random weights would follow faster ones, which training damps). VE, sigma 0.01 to 50. All get the
same Rademacher probe, fixed along the path:

    score_sde      scipy's RK45 at 1e-5 on the flattened batch, state on the host, two forward passes an evaluation
    k-diffusion    its log_likelihood: torchdiffeq's dopri5 in sigma at 1e-4
    torchdiffeq    dopri5 in t at 1e-5
    sdekit         fixed grids of 24 to 128 nodes, and tolerances from 10 to 0.1 nats

Of these the goal is on the fastest that is as close as score_sde's algorithm, and from which on every finer setting of
its kind is too: errors fall with the nodes, but not evenly with tolerances of several nats, and what hits by luck does
not count.

Error: the largest of four samples against torchdiffeq's dopri8 in float64 at 1e-9, kept in the cache.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torchdiffeq import odeint
from tqdm import tqdm

import sdekit
from sdekit.model.nets import UNet

from .common import Goal, Report, arguments, cached, digest
from .overhead import bare
from .peers import PEERS, _Field, fixed_probe
from .samplers import k_diffusion
from .timing import best_device, clock, device_name, least_each, paired, runtimes

STD, SEED = 0.5, 0
NODES = 48  # of the solves in which what is added is measured
LADDER = (24, 32, 36, 40, 48, 64, 96, 128)
TOLERANCES = (10.0, 8.0, 7.0, 5.0, 3.0, 1.0, 0.1)
CHECKED = 4  # samples whose error is measured
PROBE = sdekit.Hutchinson(probes=1, fresh=False)
_READY: set[tuple[object, ...]] = set()  # solves whose kernels or graphs are made


class Sized(nn.Module):
    """A network of (x, label): its labels multiplied by `scale`, its output divided by `size`."""

    def __init__(self, net: nn.Module, scale: float = 1.0, size: float = 1.0) -> None:
        super().__init__()
        self.net, self.size, self.scale = net, size, scale

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        out = self.net(x, self.scale * label)
        return (out if isinstance(out, Tensor) else out.sample) / self.size


def network(device: torch.device) -> tuple[nn.Module, tuple[int, ...], float]:
    """An untrained U-Net, its event shape, and what its labels are multiplied by."""
    torch.manual_seed(SEED)
    if device.type == "cpu":
        return UNet(3, 44, 3, attention=True, period=32.0), (3, 32, 32), 1.0
    net, scale = cifar()
    return net, (3, 32, 32), scale


def cifar() -> tuple[nn.Module, float]:
    """diffusers' U-Net as for CIFAR-10, and what labels near 1 are multiplied by."""
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=32,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return net, 3.0


def made(device: torch.device) -> tuple[sdekit.ScoreModel, tuple[int, ...]]:
    """The model with outputs of size 1 on noise of all levels, and its event shape."""
    net, event, scale = network(device)
    net = net.to(device).eval().requires_grad_(False)
    source = torch.Generator().manual_seed(SEED)
    x, label = torch.randn(16, *event, generator=source).to(device), torch.linspace(-1.1, 1.0, 16, device=device)
    with torch.no_grad():
        size = float(Sized(net, scale)(x, label).square().mean().sqrt())
    model = sdekit.ScoreModel(
        Sized(net, scale, size), sdekit.VESDE(), sdekit.edm(STD, sdekit.LogSigmaLabel(0.25)), data_std=STD
    )
    return model.eval(), event


class Answer(NamedTuple):
    """(B,) log p, network evaluations, and seconds by the wall clock (CPU seconds where there is no device)."""

    log_prob: Tensor
    evaluations: float
    seconds: float


def score_sde(model: sdekit.ScoreModel, x: Tensor, probe: Tensor) -> Answer:
    """The drift by one forward pass, its divergence by another with a backward pass, scipy in between on the host."""
    sde, shape, began, calls = model.sde, x.shape, clock(x.device), 0

    def rhs(t: float, flat: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        now = torch.full((shape[0],), float(t), dtype=torch.float64, device=x.device)
        state = torch.from_numpy(flat[: x.numel()].reshape(shape)).to(x.device, torch.float32)
        with torch.no_grad():
            slope = model.velocity(state, now)
        with torch.enable_grad():
            leaf = state.requires_grad_()
            total = (model.velocity(leaf, now).flatten(1) * probe).sum()
            trace = (torch.autograd.grad(total, leaf)[0].flatten(1) * probe).sum(1)
        return np.concatenate((slope.cpu().numpy().reshape(-1), trace.cpu().numpy()))

    start = np.concatenate((x.cpu().numpy().reshape(-1), np.zeros(shape[0])))
    path = solve_ivp(rhs, (sde.t_min, sde.t_max), start, rtol=1e-5, atol=1e-5, method="RK45")
    last = torch.from_numpy(path.y[:, -1])
    latent, log_det = last[: x.numel()].reshape(shape), last[x.numel() :]
    return Answer(sde.prior_log_prob(latent) + log_det, float(calls), clock(x.device) - began)


def with_k_diffusion(model: sdekit.ScoreModel, x: Tensor, probe: Tensor) -> Answer:
    """Its probe is drawn inside: there it is given ours."""
    sde, began = model.sde, clock(x.device)

    def denoiser(state: Tensor, sigma: Tensor) -> Tensor:
        return model.data(state, sde.clamp(sde.time_at(-sigma.double().log())))

    signs = (probe.reshape(x.shape) + 1) / 2
    ends = (float(sde.sigma(t)) for t in (sde.t_min, sde.t_max))
    with mock.patch.object(torch, "randint_like", return_value=signs), torch.no_grad():
        found, facts = k_diffusion().log_likelihood(denoiser, x, *ends)
    return Answer(found.double().cpu(), float(facts["fevals"]), clock(x.device) - began)


def torchdiffeq_at(model: sdekit.ScoreModel, x: Tensor, probe: Tensor) -> Answer:
    began = clock(x.device)
    found = PEERS["torchdiffeq dopri5"](model, x, probe, 1e-5)
    return Answer(found.log_prob.cpu(), found.evaluations, clock(x.device) - began)


def ours(runtime: str, **how: float) -> Callable[[sdekit.ScoreModel, Tensor, Tensor], Answer]:
    """By `nodes` or `tolerance`; graphs or kernels are made before the clock starts."""

    def run(model: sdekit.ScoreModel, x: Tensor, probe: Tensor) -> Answer:
        def solve() -> sdekit.LogLikelihood:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return sdekit.log_likelihood(model, x, divergence=PROBE, throw=False, runtime=runtime, **how)  # type: ignore[arg-type]

        kind: tuple[object, ...] = (runtime, how.get("tolerance"))
        if runtime.endswith("graph"):
            kind += (how.get("nodes"), x.shape)
        if runtime != "eager" and kind not in _READY:
            solve()
            _READY.add(kind)
        began = clock(x.device)
        found = solve()
        return Answer(found.log_prob.cpu(), float(found.stats.calls), clock(x.device) - began)

    return run


def reference(model: sdekit.ScoreModel, x: Tensor, probe: Tensor) -> Tensor:
    """(B,) log p of the same probe, tight."""

    def tight() -> dict[str, Tensor]:
        double = copy.deepcopy(model).double()
        field, sde = _Field(double, x.shape[1:], probe.double()), model.sde
        times = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64, device=x.device)
        with torch.no_grad():
            last = odeint(field, field.start(x.double()), times, rtol=1e-9, atol=1e-9, method="dopri8")[-1]
        return {"log_prob": field.finish(last)}

    weights = [part.flatten()[:1000] for part in model.state_dict().values()]
    return cached(f"unet-{digest(x, probe, repr(model), *weights)}", tight)["log_prob"]


def surely_within(names: list[str], errors: dict[str, float], aim: float) -> list[str]:
    """Those within `aim` for which every finer one of their kind, which stands behind them, is too."""
    found = []
    for kind in ("nodes", "tolerance"):
        for name in reversed([name for name in names if kind in name]):
            if errors[name] > aim:
                break
            found.append(name)
    return found


def compare(report: Report, batch: int, quick: bool) -> None:
    """All methods on one batch."""
    device = best_device()
    model, event = made(device)
    x = STD * torch.randn(batch, *event, generator=torch.Generator().manual_seed(1)).to(device)
    probe = fixed_probe(x)
    few = slice(0, min(CHECKED, batch))
    truth = reference(model, x[few], probe[few])
    size = sum(p.numel() for p in model.parameters()) / 1e6
    table = report.table(
        f"batch {batch}, {size:.1f}M parameters, {device_name(device)}",
        ["method", "evaluations", "error, nats", "seconds", "times score_sde's", "over evaluations x (forward + vjp)"],
    )
    floor = least_each(lambda: bare(model, x, probe.reshape(x.shape), 5), 2, device)
    methods = {"score_sde's algorithm": score_sde, "torchdiffeq dopri5": torchdiffeq_at}
    try:
        k_diffusion()
        methods["k-diffusion"] = with_k_diffusion
    except ModuleNotFoundError:
        pass
    first = runtimes(device)[-1]
    for nodes in (24, 64) if quick else LADDER:
        methods[f"sdekit, nodes={nodes}, {first}"] = ours(first, nodes=nodes)
    for tolerance in TOLERANCES[-2:-1] if quick else TOLERANCES:
        methods[f"sdekit, tolerance={tolerance:g}, {first}"] = ours(first, tolerance=tolerance)
    answers, errors = {}, {}
    for name, method in tqdm(methods.items(), desc=f"batch {batch}"):
        found = answers[name] = method(model, x, probe)
        errors[name] = float((found.log_prob[few].cpu() - truth).abs().max())
        base = answers["score_sde's algorithm"].seconds
        table.rows.append(
            [name, found.evaluations, errors[name], found.seconds, base / found.seconds,
             found.seconds / (found.evaluations * floor)]
        )  # fmt: skip
    table.note = f"Forward + vjp: {1e3 * floor:.1f} ms, the least of 2 x 5; what a solve adds to it is measured below."
    aim = errors["score_sde's algorithm"]
    mine = [name for name in methods if name.startswith("sdekit")]
    fastest = min(surely_within(mine, errors, aim), key=lambda name: answers[name].seconds, default="")
    chosen = fastest or min(mine, key=lambda name: errors[name])
    label = f"batch {batch}: {chosen} ({errors[chosen]:.1e} nats where score_sde's algorithm leaves {aim:.1e})"
    report.goals.append(Goal(f"{label}: times faster", base / answers[chosen].seconds, 5.0))
    report.save(final=False)
    rows = report.table(
        f"batch {batch}: an evaluation in a solve of {NODES} nodes beside the bare network, side by side",
        ["runtime", "forward + vjp, ms", "an evaluation, ms", "ratio"],
    )
    for runtime in runtimes(device):
        solve = ours(runtime, nodes=NODES)
        one, took, ratio = paired(
            lambda solve=solve: solve(model, x, probe).evaluations,  # type: ignore[misc]
            lambda: bare(model, x, probe.reshape(x.shape), 4),
            2 if quick else 5,
            device,
        )
        rows.rows.append([runtime, 1e3 * one, 1e3 * took, ratio])
        name = f"batch {batch}: nodes={NODES}, {runtime}: time over evaluations x (forward + vjp)"
        report.goals.append(Goal(name, ratio, high=1.03))
    report.save(final=False)


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("unet_speed", chosen)
    for batch in (64, 256) if best_device().type == "cuda" else (2 if chosen.quick else 4,):
        with sdekit.keep_graphs():  # the network stays as it is
            compare(report, batch, chosen.quick)
    report.save()


if __name__ == "__main__":
    main()

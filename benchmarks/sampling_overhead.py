"""What a sampler itself costs on a fixed grid: time of a solve over evaluations x the bare forward pass.

A float32 MLP (64-512x4-64) at batch 1, 64 and 1024, 50 evaluations, CPU seconds of one thread, medians of a few
repeats. The other packages get the network with as little around it as they ask for: a drift that is its output, a
denoiser x - sigma net. Ours is `sdekit.sample` as users call it; its recording is made before the clock starts, and
what making it costs is the last table. *By hand* is the least that a sampler can do in PyTorch: a label, a multiple and
a sum for each call, without prior, checks, or results; *with noise*, a draw by `torch.randn` and a sum more.

What is added is a time, not a share. So the second table has, at batch 1, networks from 20 microseconds a pass to the
package's own for digits and a U-Net with 2.0M parameters; and the third, what a solve takes besides its network, as
a + b (calls), from 10, 50 and 400 evaluations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import sdekit
from sdekit import recording

from .common import Goal, Report, arguments
from .samplers import k_diffusion, scheduler, table
from .timing import paired
from .unet_speed import made

EVALUATIONS = 50
BATCHES = {1: 1.15, 64: 1.08, 1024: 1.05}  # with the ratio wanted
Sampler = Callable[[nn.Module, Tensor], int]


class Net(nn.Module):
    """Hidden layers of one width, four of 512 if nothing else is asked for."""

    def __init__(self, width: int = 512, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = (64, *[width] * depth, 64)
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.body = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        out: Tensor = self.body(x)
        return out


OURS: dict[str, tuple[sdekit.Solver | None, int]] = {
    "sdekit Euler": (sdekit.Euler(), 50),
    "sdekit Heun": (sdekit.Heun(), 25),
    "sdekit DDIM": (sdekit.DDIM(), 50),
    "sdekit DPMSolverPP(2)": (sdekit.DPMSolverPP(2), 50),
    "sdekit default": (None, 49),
    "sdekit EulerMaruyama": (sdekit.EulerMaruyama(), 50),
    "sdekit SDEDPMSolverPP(2)": (sdekit.SDEDPMSolverPP(2), 50),
}


@lru_cache(maxsize=8)
def model_of(net: nn.Module) -> sdekit.ScoreModel:
    """The network as data prediction: states stay of order 1, for denormal numbers would make it slower."""
    return sdekit.ScoreModel(net, sdekit.VPSDE(), sdekit.data())


def ours(solver: sdekit.Solver | None, steps: int) -> Sampler:
    """`sdekit.sample` by a solver."""

    def run(net: nn.Module, x: Tensor) -> int:
        found = sdekit.sample(model_of(net), tuple(x.shape), solver=solver, steps=steps, denoise=False)
        return found.stats.calls

    return run


def torchdiffeq(net: Net, x: Tensor) -> int:
    from torchdiffeq import odeint

    odeint(lambda t, y: net(y), x, torch.linspace(1.0, 0.0, EVALUATIONS + 1), method="euler")
    return EVALUATIONS


def torchsde(net: Net, x: Tensor) -> int:
    from torchsde import sdeint

    class Equation:
        noise_type, sde_type = "diagonal", "ito"
        f = staticmethod(lambda t, y: net(y))
        g = staticmethod(lambda t, y: torch.full_like(y, 0.1))

    sdeint(Equation(), x, torch.tensor([0.0, 1.0]), dt=1.0 / EVALUATIONS, method="euler")
    return EVALUATIONS


def diffusers(kind: str, **settings: object) -> Sampler:
    made = scheduler(kind, table(sdekit.VPSDE(t_min=1e-3)), **settings)
    made.alphas_cumprod = made.alphas_cumprod.float()

    def run(net: Net, x: Tensor) -> int:
        made.set_timesteps(EVALUATIONS)
        for t in made.timesteps:
            x = made.step(net(x), t, x).prev_sample
        return EVALUATIONS

    return run


def with_k_diffusion(name: str) -> Sampler:
    def run(net: Net, x: Tensor) -> int:
        grid = k_diffusion().get_sigmas_karras(EVALUATIONS, 0.01, 80.0)[:-1]
        denoiser = lambda y, sigma: y - sigma[:, None] * net(y)  # noqa: E731
        getattr(k_diffusion(), f"sample_{name}")(denoiser, x, grid, disable=True)
        return EVALUATIONS - 1

    return run


def rivals() -> dict[str, Sampler]:
    """The other packages that are installed."""
    makers: dict[str, Callable[[], Sampler]] = {
        "torchdiffeq euler": lambda: torchdiffeq,
        "torchsde euler": lambda: torchsde,
        "diffusers DDIM": lambda: diffusers("DDIMScheduler", clip_sample=False),
        "diffusers DPM++2M": lambda: diffusers("DPMSolverMultistepScheduler"),
        "k-diffusion euler": lambda: with_k_diffusion("euler"),
        "k-diffusion dpmpp_2m": lambda: with_k_diffusion("dpmpp_2m"),
        "k-diffusion dpmpp_2m_sde": lambda: with_k_diffusion("dpmpp_2m_sde"),
    }
    found = {}
    for name, make in makers.items():
        try:
            sampler = make()
            sampler(Net().eval(), torch.zeros(1, 64))
            found[name] = sampler
        except ModuleNotFoundError:
            continue
    return found


def by_hand(net: nn.Module, x: Tensor, calls: int = EVALUATIONS) -> int:
    """The least that a sampler can do."""
    for label in torch.linspace(1.0, 0.0, calls)[:, None].repeat(1, len(x)).unbind(0):
        x = (net(x, label) * 0.02).add_(x, alpha=0.98)
    return calls


def by_hand_with_noise(net: nn.Module, x: Tensor) -> int:
    """The least that a sampler of a stochastic equation can do, with the generator's own draws."""
    source = torch.Generator().manual_seed(0)
    for label in torch.linspace(1.0, 0.0, EVALUATIONS)[:, None].repeat(1, len(x)).unbind(0):
        noise = torch.randn(x.shape, generator=source)
        x = (net(x, label) * 0.02).add_(x, alpha=0.98).add_(noise, alpha=0.1)
    return EVALUATIONS


def bare(net: nn.Module, x: Tensor, calls: int = EVALUATIONS) -> int:
    """The network and nothing else."""
    label = torch.full((len(x),), 0.5)
    for _ in range(calls):
        net(x, label)
    return calls


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Networks of many sizes, with their event shapes."""
    from sdekit.zoo import digits

    unet, event = made(torch.device("cpu"))
    return {
        "MLP 64-64-64": (Net(64, 1).eval(), (64,)),
        "MLP 64-512x4-64": (Net().eval(), (64,)),
        "MLP 64-1024x4-64": (Net(1024).eval(), (64,)),
        "sdekit.zoo.digits": (digits.load().net, digits.SHAPE),
        "U-Net, 2.0M": (unet.net, event),
    }


def sizes(report: Report, quick: bool) -> None:
    """Part two: networks of other sizes at batch 1."""
    table = report.table(
        "batch 1, other networks: time over evaluations x forward", ["network", "forward, us", "method", "ratio"]
    )
    chosen = ("sdekit Euler", "sdekit DPMSolverPP(2)", "sdekit default", "sdekit EulerMaruyama")
    methods: dict[str, Sampler] = {"by hand": by_hand, **{name: ours(*OURS[name]) for name in chosen}}
    for label, (net, event) in tqdm(networks().items(), desc="networks"):
        x = torch.randn(1, *event, generator=torch.Generator().manual_seed(1))
        repeats = 2 if quick or x.numel() > 64 else 20
        for name, method in methods.items():
            run = lambda method=method: method(net, x)  # noqa: E731
            floor, _, ratio = paired(run, lambda: bare(net, x), repeats, x.device)
            table.rows.append([label, 1e6 * floor, name, ratio])
            if name.startswith("sdekit") and label.startswith(("sdekit", "U-Net")):
                report.goals.append(Goal(f"batch 1, {label}: {name}", ratio, high=BATCHES[1]))
        report.save(final=False)


def lengths(report: Report, quick: bool) -> None:
    """Part three: what is added to the network's time by a solve, and by each of its calls."""
    table = report.table(
        "batch 1, MLP 64-512x4-64: time besides the network's",
        ["method", "10 evaluations, us", "50", "400", "a solve, us", "a call, us", "a call / forward"],
        "The last three by least squares, each length weighed by its inverse.",
    )
    net, x = Net().eval(), torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    methods: dict[str, Callable[[int], Sampler]] = {"by hand": lambda calls: lambda net, x: by_hand(net, x, calls)}
    for name in ("sdekit Euler", "sdekit DPMSolverPP(2)", "sdekit default", "sdekit EulerMaruyama"):
        methods[name] = lambda calls, solver=OURS[name][0]: ours(solver, calls)  # type: ignore[misc]
    counts = (10, 50, 400)
    for name, method in tqdm(methods.items(), desc="lengths"):
        added, floors = [], []
        for calls in counts:
            run = lambda calls=calls, method=method: method(calls)(net, x)  # noqa: E731
            repeats = 2 if quick else 2000 // calls
            floor, _, ratio = paired(run, lambda calls=calls: bare(net, x, calls), repeats, x.device)  # type: ignore[misc]
            added.append(1e6 * (ratio - 1) * floor * calls)
            floors.append(floor)
        slope, first = np.polyfit(counts, added, 1, w=[1 / calls for calls in counts])
        share = float(slope) / (1e6 * min(floors))
        table.rows.append([name, *added, first, slope, share])
        if name.startswith("sdekit"):
            report.goals.append(Goal(f"batch 1, a call without the solve's own share: {name}", 1.0 + share, high=1.15))
    report.save(final=False)


def main() -> None:
    chosen = arguments(__doc__)
    report = Report("sampling_overhead", chosen)
    net = Net().eval()
    methods = {**{name: ours(*how) for name, how in OURS.items()}, "by hand": by_hand}
    methods |= {"by hand, with noise": by_hand_with_noise, **rivals()}
    rows = report.table("time over evaluations x forward", ["batch", "method", "forward, us", "a call, us", "ratio"])
    with torch.no_grad():
        for batch, wanted in BATCHES.items():
            x = torch.randn(batch, 64, generator=torch.Generator().manual_seed(1))
            repeats = 2 if chosen.quick else 20 if batch < 1024 else 4
            for name, method in tqdm(methods.items(), desc=f"batch {batch}"):
                run = lambda method=method: method(net, x)  # noqa: E731
                floor, took, ratio = paired(run, lambda: bare(net, x), repeats, x.device)
                rows.rows.append([batch, name, 1e6 * floor, 1e6 * took, ratio])
                if name.startswith("sdekit"):
                    report.goals.append(Goal(f"batch {batch}: {name}", ratio, high=wanted))
            report.save(final=False)
        sizes(report, chosen.quick)
        lengths(report, chosen.quick)
        first = report.table("the first solve of a kind, which is recorded", ["method", "recording, ms"])
        for name, (solver, steps) in OURS.items():
            recording.forget()
            began = time.process_time()
            ours(solver, steps)(net, torch.randn(1, 64))
            took = time.process_time() - began
            began = time.process_time()
            ours(solver, steps)(net, torch.randn(1, 64))
            first.rows.append([name, 1e3 * (took - (time.process_time() - began))])
    report.save()


if __name__ == "__main__":
    main()

"""What a sampler itself costs on a fixed grid: time of a solve over evaluations x the bare forward pass.

A float32 MLP (64-512x4-64) at batch 1, 64 and 1024, 50 evaluations, CPU seconds of one thread, medians of a few
repeats. The other packages get the network with as little around it as they ask for: a drift that is its output, a
denoiser x - sigma net. Ours is `sdekit.sample` as users call it; its recording is made before the clock starts, and
what making it costs is the last table. *By hand* is the least that a sampler can do in PyTorch: a label, a multiple and
a sum for each call, without prior, checks, or results; *with noise*, a draw by `torch.randn` and a sum more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sdekit
from sdekit import recording

from .common import Goal, Report, arguments
from .samplers import k_diffusion, scheduler, table
from .timing import paired

EVALUATIONS = 50
BATCHES = {1: 1.15, 64: 1.08, 1024: 1.05}  # with the ratio wanted
Sampler = Callable[["Net", Tensor], int]


class Net(nn.Module):
    """Four hidden layers of 512."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = (64, 512, 512, 512, 512, 64)
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


def ours(solver: sdekit.Solver | None, steps: int) -> Sampler:
    """`sdekit.sample` by a solver."""

    def run(net: Net, x: Tensor) -> int:
        # As data prediction: states stay of order 1, for denormal numbers would make the network itself slower.
        model = sdekit.ScoreModel(net, sdekit.VPSDE(), sdekit.data())
        return sdekit.sample(model, tuple(x.shape), solver=solver, steps=steps, denoise=False).stats.calls

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


def by_hand(net: Net, x: Tensor) -> int:
    """The least that a sampler can do."""
    for label in torch.linspace(1.0, 0.0, EVALUATIONS)[:, None].repeat(1, len(x)).unbind(0):
        x = (net(x, label) * 0.02).add_(x, alpha=0.98)
    return EVALUATIONS


def by_hand_with_noise(net: Net, x: Tensor) -> int:
    """The least that a sampler of a stochastic equation can do, with the generator's own draws."""
    source = torch.Generator().manual_seed(0)
    for label in torch.linspace(1.0, 0.0, EVALUATIONS)[:, None].repeat(1, len(x)).unbind(0):
        noise = torch.randn(x.shape, generator=source)
        x = (net(x, label) * 0.02).add_(x, alpha=0.98).add_(noise, alpha=0.1)
    return EVALUATIONS


def bare(net: Net, x: Tensor) -> int:
    for _ in range(EVALUATIONS):
        net(x)
    return EVALUATIONS


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
        first = report.table("the first solve of a kind, which is recorded", ["method", "recording, ms"])
        for name, (solver, steps) in OURS.items():
            recording._recordings.clear()
            began = time.process_time()
            ours(solver, steps)(net, torch.randn(1, 64))
            took = time.process_time() - began
            began = time.process_time()
            ours(solver, steps)(net, torch.randn(1, 64))
            first.rows.append([name, 1e3 * (took - (time.process_time() - began))])
    report.save()


if __name__ == "__main__":
    main()

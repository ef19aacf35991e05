"""Other packages' samplers on a model of sdekit, each in its own habitual setting and convention.

    diffusers     x, a table of levels, noise predictions; their table is the SDE's own, level i at (i + 1)/N
    k-diffusion   x/alpha, sigmas = sigma/alpha, data predictions
    azula         x, a schedule (alpha(t), sigma(t)), equal steps of t, data predictions

All go from t_max to t_min = 1/N and are asked for the same number of network evaluations; the counts are those made.
Where a table rounds a level to a step number, the network is asked at the level itself, which favours them. Packages
are imported where they are first used. k-diffusion's sampling.py is loaded alone: its package imports image libraries.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdekit

LEVELS = 1000  # of the table given to diffusers


class Drawn(NamedTuple):
    """(B, *event) where a sampler arrived, and the network evaluations it made."""

    x: Tensor
    evaluations: int


class Counted:
    """A model's predictions, counted."""

    def __init__(self, model: sdekit.ScoreModel) -> None:
        self.model, self.sde, self.calls = model, model.sde, 0

    def noise(self, x: Tensor, t: Tensor | float) -> Tensor:
        self.calls += 1
        return self.model.noise(x, t)

    def data(self, x: Tensor, t: Tensor | float) -> Tensor:
        self.calls += 1
        return self.model.data(x, t)

    def time(self, ratio: Tensor | float) -> Tensor:
        """The time at which sigma/alpha is `ratio`."""
        return self.sde.clamp(self.sde.time_at(-torch.as_tensor(ratio, dtype=torch.float64).log()))


def ratios(sde: sdekit.SDE) -> tuple[float, float]:
    """sigma/alpha at t_min and at t_max."""
    return math.exp(-float(sde.half_log_snr(sde.t_min))), math.exp(-float(sde.half_log_snr(sde.t_max)))


# diffusers


def table(sde: sdekit.SDE, levels: int = LEVELS) -> Tensor:
    """(levels,) float64 alpha^2 at the times 1/levels, 2/levels, .. 1."""
    return (2.0 * sde.log_alpha(torch.arange(1, levels + 1, dtype=torch.float64) / levels)).exp()


def scheduler(kind: str, level: Tensor, **settings: Any) -> Any:
    """A diffusers scheduler by the name of its class on the table of alpha^2 `level`, in float64 where it keeps it."""
    import diffusers

    betas = 1.0 - level / torch.cat((torch.ones(1, dtype=torch.float64), level[:-1]))
    made = getattr(diffusers, kind)(num_train_timesteps=len(level), trained_betas=betas.tolist(), **settings)
    made.alphas_cumprod = level
    if hasattr(made, "final_alpha_cumprod"):
        made.final_alpha_cumprod = level[0]
    return made


def follow(chain: Any, field: Counted, x: Tensor, steps: int | None = None, **extra: Any) -> Tensor:
    """`x` through a scheduler whose timesteps are set, at most `steps` of them."""
    dtype, count = x.dtype, len(chain.timesteps) if steps is None else steps
    for place, t in enumerate(chain.timesteps[:count]):
        levels = getattr(chain, "sigmas", None)
        now = field.time(levels[place].double()) if levels is not None else (t.double() + 1.0) / len(chain.betas)
        x = chain.step(field.noise(x, now), t, x, **extra).prev_sample.to(dtype)
    return x


_FULL: dict[str, object] = {"lower_order_final": False}
_ENDS: dict[str, object] = {"final_sigmas_type": "sigma_min", **_FULL}


def with_diffusers(kind: str, **settings: Any) -> Callable[[Counted, Tensor, int], Tensor]:
    """A multistep scheduler of diffusers on its default spacing, to the last level of its table."""

    def run(field: Counted, x: Tensor, evaluations: int) -> Tensor:
        chain = scheduler(kind, table(field.sde), **settings)
        chain.set_timesteps(evaluations)
        return follow(chain, field, x)

    return run


def diffusers_ddpm(field: Counted, x: Tensor, evaluations: int) -> Tensor:
    """DDPM's posterior steps between equally spaced levels."""
    chain = scheduler("DDPMScheduler", table(field.sde), clip_sample=False)
    spaced = torch.linspace(LEVELS - 1, 0, evaluations + 1).round().long().tolist()
    chain.set_timesteps(timesteps=spaced)
    return follow(chain, field, x, evaluations, generator=torch.Generator().manual_seed(0))


# k-diffusion


@lru_cache(maxsize=1)
def k_diffusion() -> Any:
    """k-diffusion's sampling module without its package.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("k-diffusion is not installed: pip install --no-deps k-diffusion")
    package, utils = types.ModuleType("_k_diffusion"), types.ModuleType("_k_diffusion.utils")
    package.__path__ = []  # type: ignore[attr-defined]
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    path = Path(found.submodule_search_locations[0]) / "sampling.py"
    spec = importlib.util.spec_from_file_location("_k_diffusion.sampling", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.update({"_k_diffusion": package, "_k_diffusion.utils": utils})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def sigmas(sde: sdekit.SDE, steps: int, spacing: str) -> Tensor:
    """(steps + 1,) float64 sigma/alpha, k-diffusion's "karras" or "exponential" spacing from t_max to t_min."""
    low, high = ratios(sde)
    grid = getattr(k_diffusion(), f"get_sigmas_{spacing}")(steps + 1, low, high)[:-1].double()
    grid[0], grid[-1] = high, low
    return grid


def denoise_along(name: str, field: Counted, x: Tensor, grid: Tensor, **settings: Any) -> Tensor:
    """`x` at the first of the sigma/alpha in `grid`, taken to the last by k-diffusion's `sample_<name>`."""
    sde = field.sde
    first, last = (sde.alpha(field.time(grid[k])) for k in (0, -1))

    def denoiser(y: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        t = field.time(sigma)
        return field.data(sde.alpha(t).reshape(-1, *[1] * (y.dim() - 1)) * y, t)

    function = getattr(k_diffusion(), f"sample_{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of quad's and numpy's conversions
        return last * function(denoiser, x / first, grid, disable=True, **settings)


def with_k_diffusion(
    name: str, spacing: str, cost: int = 1, noisy: bool = False
) -> Callable[[Counted, Tensor, int], Tensor]:
    """A sampler of k-diffusion that evaluates `cost` times a step."""

    def run(field: Counted, x: Tensor, evaluations: int) -> Tensor:
        settings: dict[str, Any] = {}
        if noisy:
            source = torch.Generator().manual_seed(0)
            settings["noise_sampler"] = lambda *_: torch.randn(x.shape, generator=source, dtype=x.dtype)
        return denoise_along(name, field, x, sigmas(field.sde, max(1, evaluations // cost), spacing), **settings)

    return run


# azula


def azula_denoiser(field: Counted) -> Any:
    """A model as azula's denoiser, its schedule the model's SDE."""
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import Schedule

    class OurSchedule(Schedule):
        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return field.sde.alpha(t), field.sde.sigma(t)

    class OurDenoiser(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = OurSchedule()

        def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
            return DiracPosterior(mean=field.data(x_t, field.sde.clamp(t)))

    return OurDenoiser()


def with_azula(name: str, cost: int = 1, **settings: Any) -> Callable[[Counted, Tensor, int], Tensor]:
    """A sampler of azula on its own equal steps of t."""

    def run(field: Counted, x: Tensor, evaluations: int) -> Tensor:
        from azula import sample

        sde = field.sde
        span = {"start": sde.t_max, "stop": sde.t_min, "steps": max(1, evaluations // cost)}
        made = getattr(sample, name)(azula_denoiser(field), **span, **settings, silent=True, dtype=torch.float64)
        return made(x)

    return run


Sampler = Callable[[Counted, Tensor, int], Tensor]

# What diffusers' schedulers take: the third order is what their docstrings recommend without guidance.
_SPACINGS: dict[str, dict[str, bool]] = {
    "": {},
    " karras": {"use_karras_sigmas": True},
    " exponential": {"use_exponential_sigmas": True},
    " lu": {"use_lu_lambdas": True},
}
FLOW: dict[str, Sampler] = {
    "diffusers DDIM": with_diffusers(
        "DDIMScheduler", clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    ),
    **{
        f"diffusers {name}{label}": with_diffusers(f"{kind}MultistepScheduler", solver_order=order, **ends, **grid)
        for name, kind, order, ends in (
            ("DPM++2M", "DPMSolver", 2, _ENDS),
            ("DPM++3M", "DPMSolver", 3, {**_ENDS, "euler_at_final": True}),  # its last step may be of length 0
            ("UniPC", "UniPC", 2, _ENDS),
            ("UniPC3", "UniPC", 3, {**_ENDS, "lower_order_final": True}),  # the same
            ("DEIS", "DEIS", 2, _FULL),
            ("DEIS3", "DEIS", 3, _FULL),
        )
        for label, grid in _SPACINGS.items()
        if kind == "DPMSolver" or label != " lu"
    },
    "k-diffusion heun karras": with_k_diffusion("heun", "karras", 2),
    "k-diffusion dpmpp_2m karras": with_k_diffusion("dpmpp_2m", "karras"),
    "k-diffusion dpmpp_2m exponential": with_k_diffusion("dpmpp_2m", "exponential"),
    "k-diffusion lms karras": with_k_diffusion("lms", "karras"),
    "k-diffusion lms exponential": with_k_diffusion("lms", "exponential"),
    "azula DDIM": with_azula("DDIMSampler"),
    "azula Heun": with_azula("HeunSampler", 2),
    "azula zAB2": with_azula("zABSampler", order=2),
    "azula zAB3": with_azula("zABSampler", order=3),
    "azula zAB4": with_azula("zABSampler", order=4),
    "azula xEAB2": with_azula("xEABSampler", order=2),
    "azula xEAB3": with_azula("xEABSampler", order=3),
}
NOISY: dict[str, Sampler] = {
    "diffusers DDPM": diffusers_ddpm,
    "k-diffusion euler_ancestral": with_k_diffusion("euler_ancestral", "karras", noisy=True),
    "k-diffusion dpmpp_2m_sde": with_k_diffusion("dpmpp_2m_sde", "karras", noisy=True),
}


def draw(sampler: Sampler, model: sdekit.ScoreModel, x: Tensor, evaluations: int) -> Drawn:
    """Where `sampler` takes `x` (B, *event) from t_max to t_min, and what it cost."""
    field = Counted(model)
    with torch.no_grad():
        end = sampler(field, x, evaluations)
    return Drawn(end, field.calls)

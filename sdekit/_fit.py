"""Do equation, solver, controller, path and times fit one another? Asked once, before a solve."""

from __future__ import annotations

import torch
from torch import Tensor

from .brownian import BrownianPath
from .brownian_motion import BrownianMotion
from .controller import Controller, FixedGrid, Nats
from .sde.base import as_time
from .solver.base import Solver
from .targets import Gaussian
from .terms import ReverseSDE, Term


def check_method(solver: Solver, controller: Controller, path: BrownianPath | None) -> None:
    """Raises ValueError where solver, controller and path do not fit one another."""
    if controller.needs_error and solver.error_order is None:
        raise ValueError(
            f"{solver} has no error estimate, so {type(controller).__name__} cannot control it: "
            "pass controller=sdekit.FixedGrid(times), or a solver with an embedded estimate."
        )
    if solver.needs_control and not controller.needs_error:
        raise ValueError(
            f"{solver} is for controlled steps, and {type(controller).__name__} accepts every step: "
            "take a fixed order, for example sdekit.Adams(4), or a controller such as sdekit.Nats() or sdekit.PID()."
        )
    if solver.draws and path is None:
        raise ValueError(
            f"path=None; {type(solver).__name__} draws noise: pass path=sdekit.IndependentIncrements(seed, indices), "
            "or a refinable one."
        )
    if controller.needs_error and path is not None and not path.refinable:
        raise ValueError(
            f"{type(path).__name__} cannot be refined, and redrawing noise after a rejected step biases the law: "
            "pass controller=sdekit.FixedGrid(times)."
        )


def check_path(path: BrownianPath | None, x: Tensor) -> None:
    """Raises ValueError unless the path has increments for each sample of `x` (B, *event)."""
    if path is not None and len(path) != x.shape[0]:
        raise ValueError(
            f"the path is for {len(path)} samples, x0 has {x.shape[0]}: pass one index a sample, "
            "e.g. sdekit.IndependentIncrements(seed, torch.arange(len(x0)))."
        )


def check_span(path: BrownianPath | None, s0: Tensor, s_end: Tensor) -> None:
    """Raises ValueError where a solve leaves the times its path is for: beyond them it stands still."""
    if not isinstance(path, BrownianMotion):
        return
    low, high = (choose(path.start, path.end) for choose in (torch.minimum, torch.maximum))
    slack = 1e-9 * (high - low)
    inside = (torch.minimum(s0, s_end) >= low - slack) & (torch.maximum(s0, s_end) <= high + slack)
    if not bool(inside.all()):
        raise ValueError(
            f"the path is for {float(low.min()):.6g} to {float(high.max()):.6g} in the equation's coordinate, the "
            f"solve goes from {float(s0[0]):.6g} to {float(s_end[0]):.6g}: make it for term.coordinate(t0) to (t_end)."
        )


def times_of(name: str, t: Tensor | float, x: Tensor, low: float, high: float) -> Tensor:
    """(B,) float64 times, checked to lie in [low, high]."""
    time = as_time(t).to(x.device)
    if time.dim() > 1 or (time.dim() == 1 and time.shape[0] != x.shape[0]):
        raise ValueError(f"{name}.shape={tuple(time.shape)}; a number or shape ({x.shape[0]},) is needed.")
    if not bool(((time >= low) & (time <= high)).all()):
        raise ValueError(f"{name}={t}; times within [t_min, t_max] = [{low!r}, {high!r}] are needed.")
    return time.expand(x.shape[0]).contiguous()


def check_direction(term: Term, controller: Controller, s0: Tensor, s_end: Tensor) -> None:
    """Raises ValueError for what runs one way only (a reverse SDE, control in nats) asked to run the other."""
    if not (isinstance(term, ReverseSDE) or isinstance(controller, Nats)):
        return
    if bool((s_end < s0).any()):
        raise ValueError(
            f"{type(term).__name__} under {type(controller).__name__} runs one way only, from "
            f"{'t_max to t_min' if isinstance(term, ReverseSDE) else 't_min to t_max'}: exchange t0 and t_end."
        )


def check_grid_ends(controller: FixedGrid, begin_at: Tensor, end_at: Tensor) -> None:
    """Raises ValueError unless the grid runs from `begin_at` to `end_at` (B,) exactly."""
    first, last = controller.numbers[0], controller.numbers[-1]
    if bool((begin_at != first).any() | (end_at != last).any()):
        near = torch.allclose(begin_at, torch.full_like(begin_at, first), rtol=1e-6, atol=0.0)
        near = near and torch.allclose(end_at, torch.full_like(end_at, last), rtol=1e-6, atol=0.0)
        raise ValueError(
            f"the grid runs from t={first!r} to t={last!r}, the solve from t0 to t_end; they must agree exactly: "
            + (
                f"they differ by rounding only (the grid is {controller.times.dtype}): make the grid in float64, or "
                "set its first and last time to the solve's."
                if near
                else "flip the grid with .flip(0), or pass its own ends as t0 and t_end."
            )
        )


def check_moments(data_moments: Gaussian | None, x: Tensor) -> None:
    """Raises where the moments do not fit the data `x` (B, *event)."""
    given: object = data_moments
    if given is not None and not isinstance(given, Gaussian):
        kind = type(given).__name__
        raise TypeError(f"data_moments is a {kind}; an sdekit.targets.Gaussian is needed, e.g. Gaussian.fit(data).")
    size = x.shape[1:].numel()
    if data_moments is not None and data_moments.dim != size:
        raise ValueError(f"data_moments has {data_moments.dim} dimensions, a sample has {size}; they must agree.")

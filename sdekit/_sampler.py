"""What a sampler is made of where users name only some of its parts: solver, noise level, steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ._checks import is_own, require_count, require_part
from .controller import Controller, FixedGrid
from .grid import likelihood as likelihood_grid
from .model.score_model import ScoreModel
from .pid import PID
from .sde.base import SDE
from .solver.adams import Adams
from .solver.base import Solver
from .solver.exponential_sde import SDEDPMSolverPP
from .solver.stochastic import StochasticHeun

_FLOW_STEPS = 32  # of the default grid, eta = 0
_SDE_STEPS = 100  # of the default grid, eta > 0
_ORDERS = ((11, 3), (20, 4))  # of Adams by the steps of a grid, 5 beyond: docs/decisions/0007-default-samplers.md
_TOLERANCE = 1e-6  # of encode and decode, relative and absolute
Eta = float | Callable[[Tensor], Tensor]


def default_steps(level: Eta) -> int:
    """How many steps a grid has at this noise level."""
    return _SDE_STEPS if level != 0 else _FLOW_STEPS


def default_solver(level: Eta, steps: int | None) -> Solver:
    """The solver that won where it was measured, for a grid of so many steps, or for a controller (None)."""
    if steps is not None:
        require_count("steps", steps)
    if level != 0:
        return StochasticHeun() if steps is None else SDEDPMSolverPP(2)
    return Adams(next((order for most, order in _ORDERS if steps is not None and steps <= most), 5))


def level_of(solver: Solver | None, eta: Eta | None) -> Eta:
    """The noise level asked for, or that which the solver is for."""
    require_part("solver", solver, "propose", "sdekit.Heun()")
    if eta is None:
        own = getattr(getattr(solver, "predictor", solver), "eta", None)
        return float(own) if own is not None else float(solver is not None and solver.equation == "reverse")
    if not callable(eta) and not (isinstance(eta, (int, float)) and eta >= 0):
        raise ValueError(f"eta={eta!r}; a number eta >= 0 is needed, or a function of t (B,).")
    return eta


def controller_of(model: ScoreModel, controller: Controller | None, steps: int | None, forward: bool) -> Controller:
    """Who decides the steps: what is asked for, else a grid of so many, else a tolerance."""
    require_part("controller", controller, "judge", "sdekit.PID()")
    if controller is not None:
        if steps is not None:
            raise ValueError(f"steps={steps} together with controller={controller!r}; pass one or the other.")
        return controller
    if steps is None:
        return PID(rtol=_TOLERANCE, atol=_TOLERANCE)
    require_count("steps", steps)
    return (_grid if is_own(model.sde) else _grid.__wrapped__)(model.sde, steps, model.data_std, forward)


@lru_cache(maxsize=64)
def _grid(sde: SDE, steps: int, data_std: float, forward: bool) -> FixedGrid:
    """So many steps equally spaced in the mixed variable."""
    with torch.inference_mode(False):  # it is kept for calls outside of that mode
        times = likelihood_grid(sde, steps, data_std)
        return FixedGrid(times.flip(0) if forward else times)

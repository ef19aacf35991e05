"""How a density is solved for: divergence, solver and controller, chosen and checked; what their estimate means."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import require_count, require_part, require_positive
from ._fit import check_method
from ._products import require_traceable
from ._tensor import dot
from .controller import Controller, FixedGrid, Nats
from .divergence import Divergence, Hutchinson, default_divergence
from .errors import SdekitWarning, ToleranceWarning
from .grid import mixed_time
from .loop import Carry
from .model.guidance import strength
from .model.score_model import ScoreModel
from .solution import Status
from .solver.adams import Adams
from .solver.base import Solver

_CONTROLLED = Adams(7, adaptive=True)
_FRESH = Adams(5, adaptive=True)  # longer formulas weigh neighbouring nodes unevenly, and their probes' noise with them
_STRONG = 2.0  # guidance beyond it is warned of: all errors are covered at 1.5, six in ten at 3 (docs/guides/limits.md)
_ON_A_GRID = Adams(4)  # more nodes in the formula amplify what the grid misses


class Method(NamedTuple):
    """The solve's parts, and the tolerance its estimate is held against (None for none)."""

    divergence: Divergence
    solver: Solver
    controller: Controller
    tolerance: float | None


def choose_method(
    model: ScoreModel,
    x: Tensor,
    divergence: Divergence | None,
    tolerance: float,
    nodes: int | None,
    solver: Solver | None,
    controller: Controller | None,
) -> Method:
    """The divergence, solver and controller asked for, checked to fit one another."""
    require_positive("tolerance", tolerance)
    require_part("solver", solver, "propose", "sdekit.Adams(4)")
    require_part("controller", controller, "judge", "sdekit.PID()")
    if nodes is not None and (solver is not None or controller is not None):
        raise ValueError("nodes= together with solver= or controller=; nodes chooses both: pass one or the other.")
    if divergence is None:
        divergence = default_divergence(x.shape[1:].numel(), solver is None or solver.weighs_nodes)
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence={divergence!r}; sdekit.Exact() or sdekit.Hutchinson(...) is needed.")
    fresh = isinstance(divergence, Hutchinson) and divergence.fresh
    on_a_grid = nodes is not None or isinstance(controller, FixedGrid)
    default = _ON_A_GRID if on_a_grid else _FRESH if fresh else _CONTROLLED
    chosen_solver: Solver = default if solver is None else solver
    if controller is not None:
        judge = controller
    elif nodes is not None:
        require_count("nodes", nodes, 2)
        mixed = mixed_time(model.sde, model.data_std)
        judge = FixedGrid(mixed.time(torch.linspace(0.0, 1.0, nodes, dtype=torch.float64)))
    elif chosen_solver.error_order is None:
        raise ValueError(f"{solver} has no error estimate; pass controller=sdekit.FixedGrid(times) with it.")
    else:
        judge = Nats(tolerance)
    check_method(chosen_solver, judge, None)
    if fresh and not chosen_solver.weighs_nodes:
        raise ValueError(
            f"fresh probes need a solver that weighs its nodes, and {type(chosen_solver).__name__} does not: "
            "use the default solver, or Hutchinson(..., fresh=False)."
        )
    _warn_few_signs(divergence, x.shape[1:].numel())
    if isinstance(judge, Nats) and not -1.0 <= strength(model) <= _STRONG:
        warnings.warn(
            f"the model is guided by w={strength(model):g}: such a field is the gradient of no log density, and "
            "solver_error, which takes it for one, may be far too small, unmarked. Solve again with a tenth of the "
            "tolerance: the two differ by about what the first is off.",
            SdekitWarning,
            stacklevel=3,
        )
    return Method(divergence, chosen_solver, judge, judge.tolerance if isinstance(judge, Nats) else None)


def _warn_few_signs(divergence: Divergence, size: int) -> None:
    """Warns where K fixed probes of signs may all give one answer, whatever their error, in more than 1% of draws."""
    if not isinstance(divergence, Hutchinson) or divergence.fresh or divergence.law != "rademacher":
        return
    alike = 0.5 ** ((size - 1) * (divergence.probes - 1))
    if size > 1 and divergence.probes > 1 and alike > 0.01:
        warnings.warn(
            f"{divergence.probes} fixed probes of signs in {size} dimensions give one and the same answer in "
            f"{100 * alike:.0f}% of all draws, and std_error is then 0 whatever the error: use sdekit.Exact(), which "
            "takes as many products as there are dimensions.",
            SdekitWarning,
            stacklevel=4,
        )


class Judgement(NamedTuple):
    """(B,) nats estimated of solver and rounding (NaN without), status (LOOSE above the tolerance), and arrived."""

    solver_error: Tensor
    rounding: Tensor
    status: Tensor
    arrived: Tensor


def judged(method: Method, carry: Carry, pull: Tensor | None = None) -> Judgement:
    """What the controller says of a finished solve, and what it could not see.

    An error e of the state costs the gradient of the log density times e, and the control takes the model's score for
    that gradient. At the end it is the terminal law's: where the score there is another (data far from the middle, a
    network that says nothing), sum_i |law's gradient - score|_i sum |e_i| is added, as if nothing shrank on the way.

    Args:
        method: How it was solved.
        carry: Where it ended.
        pull: (B, D) gradient of the terminal law's log density by the state; None where a solve begins there.
    """
    spent = method.controller.spent(carry.control)
    solver_error, rounding = (torch.full_like(carry.s, math.nan),) * 2 if spent is None else spent
    if carry.stray is not None and pull is not None:
        solver_error = solver_error + dot((pull - carry.stray.slope).abs(), carry.stray.drift)
    status = carry.status
    if method.tolerance is not None:
        status = torch.where((status == Status.DONE) & (solver_error > method.tolerance), int(Status.LOOSE), status)
    return Judgement(solver_error, rounding, status, (status == Status.DONE) | (status == Status.LOOSE))


def warn_loose(status: Tensor, solver_error: Tensor, method: Method) -> None:
    """Warns of samples that arrived with an estimated error above the tolerance."""
    loose = int((status == Status.LOOSE).sum())
    if loose:
        worst = float(solver_error.nan_to_num(0.0).max())
        warnings.warn(
            f"{loose} of {status.shape[0]} samples arrived with an estimated error above tolerance="
            f"{method.tolerance:g} (worst {worst:.3g} nats); see solver_error and status. Kinked networks (ReLU), "
            "features that oscillate between integer labels and low precision reach the cap: loosen the tolerance.",
            ToleranceWarning,
            stacklevel=3,
        )


def check_forward_mode(divergence: Divergence, model: ScoreModel, x: Tensor, t: Tensor) -> None:
    """Raises NetworkError where a divergence by forward mode would take a detached output for a constant one.

    Args:
        divergence: How the trace is had.
        model: The score model.
        x: (B, *event) states; the first is tried.
        t: (B,) float64 their times.
    """
    if isinstance(divergence, Hutchinson) and divergence.mode != "vjp" and x.shape[0]:
        first = model.take(torch.zeros(1, dtype=torch.int64, device=x.device))
        require_traceable(lambda state: first.output(state, t[:1]), x[:1].detach())

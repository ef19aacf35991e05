"""Sampling, encoding and decoding.

    sample   noise -> data, by the probability flow (eta = 0) or the reverse SDE (eta > 0)
    encode   data -> latent, the probability flow from t_min to t_max; decode is its inverse

Every sample's noise is keyed by (seed, its index): it is the same alone, in any batch, on any machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import (
    choose_device,
    require_batch,
    require_count,
    require_deterministic,
    require_indices,
    require_part,
    require_same_device,
    require_seed,
    require_shape,
)
from ._sampler import Eta, controller_of, default_solver, default_steps, level_of
from .brownian import BrownianPath, IndependentIncrements
from .brownian_motion import BrownianMotion
from .controller import Controller
from .errors import NetworkError, PartialResultWarning, SolveError
from .likelihood_flow import LikelihoodFlow
from .model.score_model import ScoreModel
from .playback import solve
from .prior import draw_prior
from .runtime import Runtime
from .sde.base import as_time
from .solution import Solution, Status
from .solver.base import Solver
from .terms import ProbabilityFlow, ReverseSDE, Term


def sample(
    model: ScoreModel,
    shape: Sequence[int],
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    controller: Controller | None = None,
    eta: Eta | None = None,
    denoise: bool = True,
    seed: int = 0,
    indices: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    max_evaluations: int = 10_000,
    wall_time: float | None = None,
    progress: bool = False,
    throw: bool = True,
    return_path: bool = False,
    runtime: Runtime = "auto",
    slots: int | None = None,
) -> Solution:
    """Samples of the model.

    Args:
        model: The score model, in eval mode.
        shape: (n, *event).
        solver: None: Adams, of order 3 to 11 steps, 4 to 20, then 5 (eta = 0), or SDEDPMSolverPP(2) (eta > 0); with a
            controller Adams(5) or StochasticHeun. Any solver else.
        steps: Of a grid equally spaced in the mixed variable; default 32 (eta = 0) or 100.
        controller: Instead of `steps`: any controller, for example PID().
        eta: Noise level of the reverse SDE, >= 0, or a function of t (B,); 0 is the probability flow. None: 0, or what
            the solver is for (1 for solvers of the reverse SDE, DDIM's own).
        denoise: Return the denoised data at t_min (one evaluation more, counted) instead of x at t_min.
        seed: 0 <= seed < 2^63.
        indices: (n,) global sample numbers that key the noise; default 0..n-1.
        dtype: Of the samples; default torch's default.
        device: Default: that of the network's parameters, else the CPU.
        max_evaluations: Network evaluations a sample at most.
        wall_time: Seconds at most; what there is is returned with a warning.
        progress: Show a progress bar.
        throw: Raise SolveError if a sample fails; else read `status`.
        return_path: Keep the states of all steps, from t_max to t_min, as the solution's `path`.
        runtime: How a step runs, to rounding the same: "eager" (and "auto"), "compile" (by torch's compiler: tens
            of seconds once for a kind of solve, then less overhead a step), "graph" (captured, on CUDA),
            "compiled-graph" (both).
        slots: Samples in work at a time, the next entering when one is done; None: all. On a fixed grid the results
            are the same to rounding with and without, since only without is it played back from a recording.

    Returns:
        A Solution: `x` (n, *event), status and cost per sample.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        SolveError: A sample failed and `throw`.
    """
    sizes = require_shape(shape)
    level = level_of(solver, eta)
    require_seed(seed)
    require_count("max_evaluations", max_evaluations, 1 + int(denoise))
    require_deterministic(model)
    where = choose_device(model, device)
    numbers = require_indices(indices, sizes[0], where)
    start = draw_prior(model, sizes, seed, numbers, dtype or torch.get_default_dtype())
    count = steps if steps is not None else default_steps(level)
    chosen = solver if solver is not None else default_solver(level, count if controller is None else None)
    term = equation_of(model, chosen, level, start)
    judge = controller_of(model, controller, count if controller is None else steps, forward=False)
    draws = chosen.draws or isinstance(term, ReverseSDE)
    path: BrownianPath | None = None
    if draws and judge.needs_error:
        s0, s1 = (term.coordinate(as_time(t)) for t in (model.sde.t_max, model.sde.t_min))
        path = BrownianMotion(seed, numbers, float(s0), float(s1))
    elif draws:
        path = IndependentIncrements(seed, numbers)
    with torch.no_grad():
        solution = solve(
            *(term, chosen, judge, start, model.sde.t_max, model.sde.t_min, path, numbers),
            max_evaluations=max_evaluations - int(denoise),
            wall_time=wall_time,
            progress=progress,
            throw=throw,
            return_path=return_path,
            runtime=runtime,
            slots=slots,
        )
        if not denoise or sizes[0] == 0:
            return solution
        return _denoised(model, solution)


def _denoised(model: ScoreModel, solution: Solution) -> Solution:
    """The solution with the data its samples mean, from one evaluation more; `solution` itself if that is stopped."""
    try:
        data = model.data(solution.x, solution.t)
    except NetworkError as error:
        raise SolveError(f"{error} (at the last denoising step)", solution) from error
    except KeyboardInterrupt:
        status = torch.where(solution.status == Status.DONE, int(Status.INTERRUPTED), solution.status)
        warnings.warn(
            "interrupted before the last denoising step: x are the states at t_min.", PartialResultWarning, stacklevel=3
        )
        return solution._replace(status=status)
    return solution._replace(x=data, stats=solution.stats.plus(1))


def encode(
    model: ScoreModel,
    x: Tensor,
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    controller: Controller | None = None,
    max_evaluations: int = 10_000,
    wall_time: float | None = None,
    progress: bool = False,
    throw: bool = True,
    runtime: Runtime = "auto",
    slots: int | None = None,
) -> Solution:
    """The latents of `x`: where the probability flow carries it from t_min to t_max.

    Args:
        model: The score model, in eval mode.
        x: (B, *event) at t_min.
        solver: None: Adams in the mixed variable; any flow solver else.
        steps: Of a grid equally spaced in the mixed variable; `decode` with the same steps shares it.
        controller: Instead of `steps`; default PID(rtol=1e-6, atol=1e-6).
        max_evaluations: Network evaluations a sample at most.
        wall_time: Seconds at most; what there is is returned with a warning.
        progress: Show a progress bar.
        throw: Raise SolveError if a sample fails; else read `status`.
        runtime: As in `sample`.
        slots: As in `sample`, to rounding the same.

    Returns:
        A Solution whose `x` are the latents, the shape and dtype of `x`.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        SolveError: A sample failed and `throw`.
    """
    return _transport(
        *(model, x, True, solver, steps, controller),
        max_evaluations=max_evaluations,
        wall_time=wall_time,
        progress=progress,
        throw=throw,
        runtime=runtime,
        slots=slots,
    )


def decode(
    model: ScoreModel,
    z: Tensor,
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    controller: Controller | None = None,
    max_evaluations: int = 10_000,
    wall_time: float | None = None,
    progress: bool = False,
    throw: bool = True,
    runtime: Runtime = "auto",
    slots: int | None = None,
) -> Solution:
    """The data of latents `z`: the inverse of `encode`, from t_max to t_min. Arguments as there."""
    return _transport(
        *(model, z, False, solver, steps, controller),
        max_evaluations=max_evaluations,
        wall_time=wall_time,
        progress=progress,
        throw=throw,
        runtime=runtime,
        slots=slots,
    )


def equation_of(model: ScoreModel, solver: Solver, level: Eta, x: Tensor) -> Term:
    """The equation that the solver integrates at this noise level, in the coordinates it works in."""
    if level != 0 or solver.equation == "reverse":
        return ReverseSDE(model, level)
    if solver.equation == "any":  # without a density nothing is probed: any keys will do
        return LikelihoodFlow(model, None, x.shape[1:], torch.zeros(x.shape[0], 2, dtype=torch.int64, device=x.device))
    return ProbabilityFlow(model)


def _transport(
    model: ScoreModel,
    x: Tensor,
    forward: bool,
    solver: Solver | None,
    steps: int | None,
    controller: Controller | None,
    *,
    max_evaluations: int,
    wall_time: float | None,
    progress: bool,
    throw: bool,
    runtime: Runtime,
    slots: int | None,
) -> Solution:
    """The probability flow of `x` from one end of time to the other."""
    require_batch("x", x)
    require_same_device(model, x)
    require_deterministic(model)
    t0, t1 = (model.sde.t_min, model.sde.t_max) if forward else (model.sde.t_max, model.sde.t_min)
    require_part("solver", solver, "propose", "sdekit.Heun()")
    chosen, numbers = solver or default_solver(0.0, steps), require_indices(None, x.shape[0], x.device)
    if chosen.equation == "reverse" or chosen.draws:
        raise ValueError(f"solver={chosen}; encode and decode need a solver of the probability flow, without noise.")
    term = equation_of(model, chosen, 0.0, x)
    with torch.no_grad():
        return solve(
            *(term, chosen, controller_of(model, controller, steps, forward=forward), x, t0, t1, None, numbers),
            max_evaluations=max_evaluations,
            wall_time=wall_time,
            progress=progress,
            throw=throw,
            return_path=False,
            runtime=runtime,
            slots=slots,
        )

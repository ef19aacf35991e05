"""log p as a function that can be differentiated: in x, in the network's parameters and in its condition.

    log p(x) = log q_T(x_T) + log det,      d log p/dx,    d log p/dtheta

of the fixed-grid likelihood (`log_likelihood(..., nodes=n)`, the same number), by the discrete adjoint of `adjoint.py`:
exact for the number computed, in memory that does not grow with n. With fresh probes it is the gradient of that draw,
an unbiased estimate of the exact trace's gradient as the value is of the value.

First derivatives only. Networks are differentiated twice on the way: where their activations have kinks (ReLU) the
divergence jumps, and its gradient does not see that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import grid
from ._checks import (
    require_batch,
    require_count,
    require_deterministic,
    require_indices,
    require_same_device,
    require_seed,
)
from ._fit import times_of
from ._method import check_forward_mode, choose_method
from ._tensor import put, take, widened
from .adjoint import Course, follow
from .controller import FixedGrid
from .divergence import Divergence, Hutchinson
from .errors import SolveError
from .likelihood import check_laws, density
from .likelihood_flow import FlowState, LikelihoodFlow
from .model.score_model import ScoreModel
from .solver.base import Solver
from .targets import Gaussian
from .units import Affine


def log_prob(
    model: ScoreModel,
    x: Tensor,
    *,
    nodes: int = 64,
    solver: Solver | None = None,
    divergence: Divergence | None = None,
    t: Tensor | float | None = None,
    data_moments: Gaussian | None = None,
    transform: Affine | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
) -> Tensor:
    """Log densities (B,) of `x` under the model's probability flow, float64 nats, to be differentiated by autograd.

    Gradients reach `x`, the model's parameters and its bound tensors (`model.condition`), each where it requires one;
    `model.requires_grad_(False)` saves the part that is not asked for. The same number as
    `log_likelihood(model, x, nodes=nodes, ...)`, which has its error estimates. The backward pass costs two more
    network calls a node at 64 nodes (2.5 at 128, 3 at 256), and memory that does not depend on `nodes`.

    Args:
        model: The score model, in eval mode.
        x: Data, (B, *event), floating, on the model's device.
        nodes: Nodes of the fixed grid, >= 2; of the default solver, the evaluations.
        solver: None: Adams. Any solver of the probability flow that needs no noise and works in every coordinate,
            RK4() for example.
        divergence: How the trace is had. None: Exact() up to 128 dimensions, else Hutchinson(probes=1).
        t: Noise level whose density is asked, a number or (B,); default t_min. Not differentiated by.
        data_moments: Gaussian of the *data* (in the model's units): the terminal law is then its p_T, not the prior.
        transform: Maps x into the model's units; log_prob stays a density in the units of x. Not differentiated by.
        seed: Of the probes, 0 <= seed < 2^63. A new one each step of an optimisation makes their noise average out.
        indices: (B,) global sample numbers that key the probes; default 0..B-1.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        NetworkError: The network cannot be used, or not be differentiated twice (in the backward pass).
        SolveError: log p of a sample is not finite.
        RuntimeError: A second derivative is asked for, or a parameter was written into before the backward pass.
    """
    require_batch("x", x)
    require_seed(seed)
    require_same_device(model, x)
    require_deterministic(model)
    model.check_batch(x.shape[0])
    require_count("nodes", nodes, 2)
    if solver is None:
        method = choose_method(model, x, divergence, 1.0, nodes, None, None)
    else:
        times = grid.likelihood(model.sde, nodes - 1, model.data_std).flip(0)
        method = choose_method(model, x, divergence, 1.0, None, solver, FixedGrid(times))
    sde, numbers = model.sde, require_indices(indices, x.shape[0], x.device)
    start = times_of("t", sde.t_min if t is None else t, x, sde.t_min, sde.t_max).detach()
    check_laws(data_moments, transform, x)
    keeps = torch.is_grad_enabled()  # asked here: leaving inference mode turns gradients on
    with torch.inference_mode(False), torch.set_grad_enabled(keeps):
        state = widened(x)
        if transform is not None:
            _refuse_gradients(transform)
            state = transform.forward(state)
        term = LikelihoodFlow(model, method.divergence, x.shape[1:], Hutchinson.keys(seed, numbers))
        check_forward_mode(method.divergence, model, state, start)
        s0 = term.coordinate(start)
        last = torch.ones_like(s0)
        alike = slice(1) if bool((s0 == s0[:1]).all()) else slice(None)  # one row of nodes for all where it serves
        rows = method.controller.start(term, s0[alike], last[alike]).nodes[:, :nodes]  # without those that fill them up
        z = _solved(term, method.solver, rows.expand(len(s0), -1), term.enter(state, s0))
        log_prior, log_det, *_ = density(term, z, start, last, data_moments, transform)
        value = log_prior + log_det
    bad = numbers[~torch.isfinite(value.detach())]
    if len(bad):
        raise SolveError(
            f"log p of {len(bad)} of {len(numbers)} samples is not finite, the first of them {bad[:8].tolist()}: "
            f"log_likelihood(model, x, nodes={nodes}, throw=False) returns the others, and where these stopped."
        )
    return value


def _refuse_gradients(transform: Affine) -> None:
    """Raises ValueError if the map is to be learned: its log determinant is a plain number here."""
    for name, value in (("scale", transform.scale), ("shift", transform.shift)):
        if torch.as_tensor(value).requires_grad:
            raise ValueError(f"the transform's {name} requires a gradient, which log_prob does not give: detach it.")


def _solved(term: LikelihoodFlow, solver: Solver, nodes: Tensor, z: FlowState) -> FlowState:
    """The state at t_max; samples that are there already (`t`) stay as they are."""
    rows = (nodes[:, 0] < nodes[:, -1]).nonzero().squeeze(1)
    if not len(rows):
        return z
    if len(rows) == len(nodes):
        return follow(Course(term, solver, nodes), z.u)
    part = follow(Course(term.take(rows), solver, nodes[rows]), take(z.u, rows))
    u, log_det = put((z.u, z.log_det), rows, (part.u, part.log_det))
    return FlowState(u, log_det, None)

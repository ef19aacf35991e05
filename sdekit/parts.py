"""What belongs to the samples of a problem, and what tells one kind of problem from another.

A step that was compiled or captured is used again for other samples: their tensors take the place of those it was made
with. What is not tensors stays as it was then, so only values of this package may be in it, whose equality says all
about them: what users write may keep a state that no comparison sees.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import is_own
from ._tensor import leaves
from .brownian import IndependentIncrements
from .brownian_motion import BrownianMotion
from .controller import FixedGrid
from .errors import SdekitError
from .likelihood_flow import LikelihoodFlow
from .loop import Carry, Problem
from .model.score_model import ScoreModel
from .solver.base import batch_of
from .terms import ReverseSDE


class CannotCompileError(SdekitError):
    """Why this solve cannot be compiled or captured."""


def own_parts(problem: Problem) -> tuple[Tensor, ...]:
    """The tensors of a problem that belong to its samples, those of the network's condition left out.

    Raises:
        CannotCompileError: Something of it is the user's own, which may keep a state that no trace sees.
    """
    term, path = problem.term, problem.path
    parts = term.parts()
    if parts is None or not is_own(term):
        noise = isinstance(term, ReverseSDE)
        raise CannotCompileError("its eta is a function" if noise else f"its equation is a {type(term).__name__}")
    if path is None:
        return problem.s_end, *parts
    if not isinstance(path, (IndependentIncrements, BrownianMotion)):
        raise CannotCompileError(f"its path is a {type(path).__name__}")
    return problem.s_end, *parts, *path.parts()


def having(problem: Problem, parts: Sequence[Tensor], model: ScoreModel, ask: Any = None) -> Problem:
    """The problem with other tensors in the place of `own_parts`, around another model."""
    term, path = problem.term, problem.path
    count = len(parts) - 1 - (0 if path is None else len(path.parts()))  # type: ignore[attr-defined]
    own = tuple(parts[1 : 1 + count])
    other = term.around(model, own, ask) if isinstance(term, LikelihoodFlow) else term.around(model, own)
    if isinstance(path, (IndependentIncrements, BrownianMotion)):
        path = path.having(tuple(parts[1 + count :]))
    return problem._replace(term=other, s_end=parts[0], path=path)


def kind(problem: Problem, carry: Carry) -> Hashable:
    """What tells apart steps that are compiled apart.

    Raises:
        CannotCompileError: Something of the problem is the user's own.
    """
    term, model = problem.term, problem.term.model
    if type(model) is not ScoreModel:
        raise CannotCompileError(f"its model is a {type(model).__name__}")
    controller = FixedGrid if isinstance(problem.controller, FixedGrid) else problem.controller
    values: list[Any] = [problem.solver, model.sde, model.parameterization, model.parameterization.label]
    own: list[Any] = [type(term), controller, problem.max_evaluations, model.data_std, type(problem.path)]
    if isinstance(problem.path, BrownianMotion):
        own.append(problem.path.depth)
    if isinstance(term, LikelihoodFlow):
        values += [term.divergence] if term.divergence is not None else []
        own += [term.event, term.mixed.downward, term.mixed.data_std]
    if isinstance(term, ReverseSDE):
        own.append(term.eta)
    for value in (*values, problem.controller):
        if not is_own(value):
            raise CannotCompileError(f"{type(value).__name__} is not of this package, and may keep a state")
    tensors = [*own_parts(problem), *leaves(carry)]
    shapes = tuple((leaf.dtype, leaf.shape[1:]) for leaf in tensors)
    like = batch_of(carry.z)
    kinds = model.network_dtype(like), model.precision(like)
    return (*values, *own, shapes, tensors[0].device, *kinds, torch.get_num_threads())

"""The step compiled: one fused loop before each network call and one after it.

The step is traced once, with a mark wherever the network is asked, for a batch of any size; the trace is cut at the
marks, and the pieces are compiled by torch's inductor. The network itself is called as ever, between the pieces: nothing
of it goes into the trace, so what was compiled serves every network, condition, seed and batch of the same shapes, and
no change of weights or modes can be missed. What is not tensors (SDE, solver, controller, divergence) is written into
the trace: only values of this package are, whose equality says all about them.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ._checks import is_own
from ._tensor import column, flatten, leaves, rebuilt
from .brownian import IndependentIncrements
from .brownian_motion import BrownianMotion
from .controller import FixedGrid
from .divergence import FieldValue
from .errors import SdekitError
from .likelihood_flow import LikelihoodFlow
from .loop import Carry, Problem, advance
from .model.score_model import ScoreModel
from .solution import Status
from .terms import ReverseSDE, Term

_EXAMPLE = 23  # samples in the trace: any number above 1 that no other size is compared with
_KEPT = 32  # compiled steps held


class CannotCompileError(SdekitError):
    """Why this solve cannot be compiled or captured."""


class Cut(NamedTuple):
    """A piece of the trace: a function of the values at `takes`, whose results go to `gives`; None: the network."""

    run: Callable[..., Any] | None
    traced: bool
    takes: tuple[int | None, ...]
    gives: tuple[int, ...]


class Program(NamedTuple):
    """The pieces in order; the values after those given (constants, and None for what is to come); the results' places."""

    cuts: tuple[Cut, ...]
    rest: list[Any]
    results: tuple[int, ...]


def step(problem: Problem, carry: Carry, program: Program) -> tuple[Carry, Tensor]:
    """`advance`, by a compiled program; the carry after it and how many samples still run."""
    values: list[Any] = [*own_parts(problem), *leaves(carry), *program.rest]
    for cut in program.cuts:
        taken = [None if place is None else values[place] for place in cut.takes]
        found = _ask(problem.term, cut.traced, *taken) if cut.run is None else cut.run(*taken)
        for place, value in zip(cut.gives, found, strict=True):
            values[place] = value
    results = [values[place] for place in program.results]
    return rebuilt(carry, results[:-1]), results[-1]


def _ask(term: Term, traced: bool, x: Tensor, label: Tensor, scale: Tensor | None, probes: Tensor | None) -> Any:
    """What the network answers at a mark: its output, or value, traces and products of the divergence."""
    model = term.model
    if not traced:
        return (model.answer(x, label).contiguous(),)
    assert isinstance(term, LikelihoodFlow) and term.divergence is not None  # no other term asks for traces

    def field(state: Tensor) -> Tensor:
        seen = state if scale is None else column(scale, state) * state
        return flatten(model.answer(seen.reshape(seen.shape[0], *term.event), label))

    found = term.divergence.evaluate(field, x, probes)
    return [part.contiguous() for part in found if part is not None]


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


_programs: OrderedDict[Hashable, Program] = OrderedDict()
_lock = Lock()


def compiled(problem: Problem, carry: Carry) -> Program:
    """The program for this kind of problem, from the cache or made now.

    Raises:
        CannotCompileError: With the reason.
    """
    key = kind(problem, carry)
    with _lock:
        if key in _programs:
            _programs.move_to_end(key)
            return _programs[key]
    try:
        program = _made(problem, carry)
    except CannotCompileError:
        raise
    except Exception as error:  # a compiler may fail in any way: none of them is a reason not to solve
        lines = str(error).strip().splitlines()
        raise CannotCompileError(f"{type(error).__name__}: {lines[0] if lines else error!r}") from error
    with _lock:
        _programs[key] = program
        while len(_programs) > _KEPT:
            _programs.popitem(last=False)
    return program


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
    return (*values, *own, shapes, tensors[0].device, model.network_dtype(tensors[-1]), torch.get_num_threads())


class _Marked(nn.Module):
    """A network that leaves a mark in a trace, of another network's precision."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        if dtype is not None:
            self.precision = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        out: Tensor = _mark()(x, label, None, None, False)[0]
        return out


@lru_cache(maxsize=1)
def _mark() -> Any:
    """The operation that stands for the network in a trace; it is never run."""
    name = "sdekit::ask"
    torch.library.define(name, "(Tensor x, Tensor label, Tensor? scale, Tensor? probes, bool traced) -> Tensor[]")

    @torch.library.register_fake(name)
    def shapes(x: Tensor, label: Tensor, scale: Tensor | None, probes: Tensor | None, traced: bool) -> list[Tensor]:
        out = torch.empty_like(x)
        if not traced:
            return [out]
        if probes is None:
            return [out, x.new_empty((x.shape[0], 1), dtype=torch.float64)]
        count = probes.shape[0]
        traces = x.new_empty((x.shape[0], count), dtype=torch.float64)
        return [out, traces, x.new_empty((x.shape[0], count, x.shape[1]))]

    return torch.ops.sdekit.ask.default


def _made(problem: Problem, carry: Carry) -> Program:
    """Traces the step, cuts it at the marks and compiles the pieces."""
    from torch._inductor import compile as inductor
    from torch.fx.passes.split_module import split_module

    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's about its own parts
        examples, graph = _trace(problem, carry)
        places = _places(graph.graph)
        parent = split_module(graph, nn.Module(), lambda node: places[node])
        inputs: dict[str, tuple[Any, ...]] = {}
        pieces = dict(parent.named_children())
        for name, piece in pieces.items():
            piece.register_forward_hook(lambda _, given, __, name=name: inputs.__setitem__(name, given))
        with examples[0].fake_mode:
            parent(*examples)
        runs: dict[str, Any] = {}
        for name, piece in pieces.items():
            piece._forward_hooks.clear()
            marks = [node for node in piece.graph.nodes if node.target is _mark()]  # type: ignore[union-attr]
            runs[name] = marks[0] if marks else inductor(piece, list(inputs[name]))
    return _program(parent, runs)


def _trace(problem: Problem, carry: Carry) -> tuple[list[Any], fx.GraphModule]:
    """Example inputs without contents, the batch's size left open, and the graph of the step."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    model, parts = problem.term.model, own_parts(problem)
    exact = next((p.dtype for p in model.net.parameters() if p.is_floating_point()), None)
    stand_in = ScoreModel(_Marked(exact), model.sde, model.parameterization, model.data_std)

    def ask(x: Tensor, t: Tensor, probes: Tensor | None) -> FieldValue:
        scale = model.parameterization.input_scale(model.sde, t)
        found = _mark()(x, model.parameterization.label(model.sde, t), scale, probes, True)
        return FieldValue(found[0], found[1], found[2] if len(found) > 2 else None)

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        other = having(problem, tensors[: len(parts)], stand_in, ask)
        after = advance(other, rebuilt(carry, tensors[len(parts) :]))
        return (*leaves(after), (after.status == Status.RUNNING).sum())

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    examples = []
    for number, leaf in enumerate((*parts, *leaves(carry))):
        blank = torch.zeros((_EXAMPLE, *leaf.shape[1:]), dtype=leaf.dtype, device=leaf.device)
        open_size = StatelessSymbolicContext([DimDynamic.DUCK] + [DimDynamic.STATIC] * (leaf.dim() - 1))
        examples.append(mode.from_tensor(blank, symbolic_context=open_size, source=ConstantSource(f"given{number}")))
    graph = make_fx(flat, _allow_non_fake_inputs=True)(*examples)
    if shapes.guards or isinstance(examples[0].shape[0], int):
        raise CannotCompileError("its operations depend on the number of samples")
    graph.graph.eliminate_dead_code()
    return examples, graph


def _places(graph: fx.Graph) -> dict[fx.Node, int]:
    """In which piece each operation is: a mark, with what takes its parts, in one of its own."""
    places: dict[fx.Node, int] = {}
    count = 0
    for node in graph.nodes:
        if node.target is _mark():
            count += 2
            places[node] = count - 1
        elif node.op == "call_function" and node.name.startswith("getitem") and node.args[0] in places:
            of = node.args[0]
            places[node] = places[of] if of.target is _mark() else count
        else:
            places[node] = count
    return places


def _program(parent: fx.GraphModule, runs: dict[str, Any]) -> Program:
    """The calls of the cut graph as a list of pieces with numbered values."""
    nodes = [node for node in parent.graph.nodes if node.op != "output"]  # those given come first
    number = {node: place for place, node in enumerate(nodes)}
    spare = len(nodes)  # where results go that nobody takes
    cuts = []
    for node in nodes:
        if node.op != "call_module":
            continue
        run, takes = runs[node.target], [number[value] for value in node.args]
        piece = parent.get_submodule(node.target).graph  # type: ignore[union-attr]
        given = [inner for inner in piece.nodes if inner.op == "placeholder"]  # type: ignore[union-attr]
        out = next(inner.args[0] for inner in piece.nodes if inner.op == "output")  # type: ignore[union-attr]
        taken = {user.args[1]: number[user] for user in node.users} if isinstance(out, tuple) else {0: number[node]}
        if not isinstance(run, fx.Node):
            count = len(out) if isinstance(out, tuple) else 1
            gives = tuple(taken.get(place, spare) for place in range(count))
            cuts.append(Cut(run if isinstance(out, tuple) else _alone(run), False, tuple(takes), gives))
            continue
        asked = tuple(None if value is None else takes[given.index(value)] for value in run.args[:4])
        kept = dict(zip([inner.args[1] for inner in (out if isinstance(out, tuple) else (out,))], range(9), strict=False))
        many = 1 if not run.args[4] else 2 if run.args[3] is None else 3
        gives = tuple(taken.get(kept.get(place, -1), spare) for place in range(many))
        cuts.append(Cut(None, bool(run.args[4]), asked, gives))
    last = next(node for node in parent.graph.nodes if node.op == "output")
    rest = [getattr(parent, node.target) if node.op == "get_attr" else None for node in nodes if node.op != "placeholder"]
    return Program(tuple(cuts), [*rest, None], tuple(number[value] for value in last.args[0]))


def _alone(run: Callable[..., Any]) -> Callable[..., tuple[Any]]:
    """A piece with one result, as a tuple."""
    return lambda *given: (run(*given),)

"""A step as pieces of tensor operations between network calls, compiled.

The step is traced once, with a mark wherever the network is asked, for a batch of any size; the trace is cut at the
marks, and the pieces are compiled by torch's inductor.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ._tensor import column, flatten, leaves, rebuilt
from .divergence import FieldValue, traces_of
from .folding import fold
from .fusing import fused
from .likelihood_flow import LikelihoodFlow
from .loop import Carry, Problem, advance, still_running
from .model.score_model import ScoreModel
from .parts import CannotCompileError, having, own_parts
from .solver.base import batch_of

_EXAMPLE = 23  # samples in the trace: any number above 1 that no other size is compared with
VALUE, TRACE, PRODUCTS = 0, 1, 2  # what is asked at a mark: the output; with its exact trace; with vectors' products


class Cut(NamedTuple):
    """A piece of the trace: a function of the values at `takes`, whose results go to `gives`; None: the network."""

    run: Callable[..., Any] | None
    kind: int
    takes: tuple[int | None, ...]
    gives: tuple[int, ...]


class Program(NamedTuple):
    """The pieces in order; the values after those given (constants, None for what is to come); the results' places."""

    cuts: tuple[Cut, ...]
    rest: list[Any]
    results: tuple[int, ...]


class _Marked(nn.Module):
    """A network that leaves a mark in a trace, of another network's precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        out: Tensor = _mark()(x, label, None, VALUE)[0]
        return out


@lru_cache(maxsize=1)
def _mark() -> Any:
    """The operation that stands for the network in a trace; it is never run."""
    name = "sdekit::ask"
    torch.library.define(name, "(Tensor seen, Tensor label, Tensor? vectors, int kind) -> Tensor[]")

    @torch.library.register_fake(name)  # type: ignore[untyped-decorator]
    def shapes(seen: Tensor, label: Tensor, vectors: Tensor | None, kind: int) -> list[Tensor]:
        out = torch.empty_like(seen)
        if kind == PRODUCTS and vectors is not None:
            return [out, torch.empty_like(vectors)]
        return [out] if kind == VALUE else [out, seen.new_empty((seen.shape[0], 1), dtype=torch.float64)]

    return torch.ops.sdekit.ask.default


def made(problem: Problem, carry: Carry) -> Program:
    """Traces the step, cuts it at the marks and compiles the pieces."""
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
            assert isinstance(piece, fx.GraphModule)  # as all parts of a cut graph are
            marks = [node for node in piece.graph.nodes if node.target is _mark()]
            runs[name] = marks[0] if marks else fused(piece, list(inputs[name]))
    return _program(parent, runs)


def _trace(problem: Problem, carry: Carry) -> tuple[list[Any], fx.GraphModule]:
    """Example inputs without contents, the batch's size left open, and the graph of the step."""
    model, parts = problem.term.model, own_parts(problem)
    stand_in = ScoreModel(
        _Marked(model.network_dtype(batch_of(carry.z))), model.sde, model.parameterization, model.data_std
    )
    stand_in._precision = copy.deepcopy(model._precision)

    def ask(x: Tensor, t: Tensor, probes: Tensor | None) -> FieldValue:
        assert isinstance(problem.term, LikelihoodFlow)  # no other term asks for more than the value
        meaning = model.parameterization
        scale, label = meaning.input_scale(model.sde, t), meaning.label(model.sde, t)
        seen = (x if scale is None else column(scale, x) * x).reshape(x.shape[0], *problem.term.event)
        back = torch.ones_like(t) if scale is None else scale  # from derivatives by what is seen to those by x
        if probes is None:
            out, traces = _mark()(seen, label, None, TRACE)
            return FieldValue(flatten(out), traces * back[:, None], None)
        out, products = _mark()(seen, label, probes.reshape(-1, *seen.shape), PRODUCTS)
        products = products.flatten(2) * column(back, products[0].flatten(1))
        return FieldValue(flatten(out), traces_of(probes, products), products.transpose(0, 1))

    mixed = problem.term.mixed.for_compiler() if isinstance(problem.term, LikelihoodFlow) else None

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        other = having(problem, tensors[: len(parts)], stand_in, ask)._replace(solver=problem.solver.for_compiler())
        if isinstance(other.term, LikelihoodFlow) and mixed is not None:
            other.term.mixed = mixed
        after = advance(other, rebuilt(carry, tensors[len(parts) :]))
        return (*leaves(after), still_running(after))

    return trace(flat, (*parts, *leaves(carry)))


def trace(function: Callable[..., Any], batches: Sequence[Tensor], *fixed: Tensor) -> tuple[list[Any], fx.GraphModule]:
    """Example inputs without contents, and the graph of a function of tensors whose leading size is left open.

    Args:
        function: Takes all tensors, those of `fixed` last.
        batches: Tensors like its first, of any leading size.
        fixed: Tensors like its last, of the shapes they will have.

    Raises:
        CannotCompileError: What it does depends on the leading size.
    """
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    examples = []
    for number, leaf in enumerate(batches):
        blank = torch.zeros((_EXAMPLE, *leaf.shape[1:]), dtype=leaf.dtype, device=leaf.device)
        open_size: Any = StatelessSymbolicContext([DimDynamic.DUCK] + [DimDynamic.STATIC] * (leaf.dim() - 1))
        examples.append(mode.from_tensor(blank, symbolic_context=open_size, source=ConstantSource(f"given{number}")))
    examples += [mode.from_tensor(leaf, static_shapes=True) for leaf in fixed]
    with mode:
        graph = make_fx(function, _allow_non_fake_inputs=True)(*examples)
    batch: Any = examples[0].shape[0]
    nothing = f"Ne({batch}, {sys.maxsize})"  # torch 2.6 asks so of a slice to its end
    if type(batch) is int or any(str(guard.expr) != nothing for guard in shapes.guards):
        raise CannotCompileError("its operations depend on the number of samples")
    fold(graph.graph)
    graph.recompile()
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
        piece: Any = parent.get_submodule(node.target)
        given = [inner for inner in piece.graph.nodes if inner.op == "placeholder"]
        out = next(inner.args[0] for inner in piece.graph.nodes if inner.op == "output")
        taken = {user.args[1]: number[user] for user in node.users} if isinstance(out, tuple) else {0: number[node]}
        if not isinstance(run, fx.Node):
            count = len(out) if isinstance(out, tuple) else 1
            gives = tuple(taken.get(place, spare) for place in range(count))
            cuts.append(Cut(run if isinstance(out, tuple) else _alone(run), VALUE, tuple(takes), gives))
            continue
        asked = tuple(None if value is None else takes[given.index(value)] for value in run.args[:3])
        kept = {inner.args[1]: place for place, inner in enumerate(out if isinstance(out, tuple) else (out,))}
        many = 1 if run.args[3] == VALUE else 2
        gives = tuple(taken.get(kept.get(place, -1), spare) for place in range(many))
        cuts.append(Cut(None, int(str(run.args[3])), asked, gives))
    last = next(node for node in parent.graph.nodes if node.op == "output")
    later = [node for node in nodes if node.op != "placeholder"]
    rest = [getattr(parent, node.target) if node.op == "get_attr" else None for node in later]
    return Program(tuple(cuts), [*rest, None], tuple(number[value] for value in last.args[0]))


def _alone(run: Callable[..., Any]) -> Callable[..., tuple[Any]]:
    """A piece with one result, as a tuple."""
    return lambda *given: (run(*given),)

"""A piece of a trace compiled by torch's inductor, called without what torch puts around it.

What inductor generates is a function of a list of tensors. Around it torch puts layers that serve what our pieces do
not have (inputs written to, results that share memory, tensors of other kinds) and that cost as much as ten small
operations at every call. The function within is used instead once it has given the same results as the whole, on the
first tensors that come; where it does not, the whole is used for good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx

Piece = Callable[..., Sequence[Tensor]]
Call = tuple[Callable[..., Any], tuple[Any, ...]]  # of a kernel

_OPTIONS = {
    # What inductor checks at every call we know: shapes, alignment and indices come from our own code.
    "size_asserts": False,
    "alignment_asserts": False,
    "assert_indirect_indexing": False,
    # Columns of scalars are made in one loop, however many: not stored on the way.
    "realize_opcount_threshold": 300,
    "realize_reads_threshold": 40,
    "realize_acc_reads_threshold": 80,
}


_COUNTED = "outside of a MetricsContext"  # torch 2.6 says so of a piece that it finds in its cache


# All that a generated function may use besides its kernels, if it is to be recorded.
_KERNEL = "cpp_fused"
_TYPES = frozenset(("bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"))
_MAKING = _TYPES | {"clear", "size", "empty_strided_cpu", "reinterpret_tensor", "torch"}


class Fused:
    """A piece, by the function within from its second call on.

    Args:
        whole: The piece as torch returns it.
        within: What it calls, of a list of the same tensors.

    Attributes:
        proved: Whether what `recorded` gives was found to be what it does.
    """

    proved = False

    def __init__(self, whole: Piece, within: Callable[[list[Tensor]], Any]) -> None:
        self._whole, self._within = whole, within
        self._call: Piece = self._first

    def __call__(self, *given: Tensor) -> Sequence[Tensor]:
        return self._call(*given)

    def _first(self, *given: Tensor) -> Sequence[Tensor]:
        """Both, to compare them."""
        wanted = self._whole(*given)
        try:
            found = self._within(list(given))
        except Exception:  # it is no public function: whatever it says, there is the other
            found = None
        self._call = self._direct if same(wanted, found) else self._whole
        return wanted

    def _direct(self, *given: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self._within(list(given))
        return found

    @property
    def recordable(self) -> bool:
        """Whether the function within is known to be right, and calls kernels and makes tensors for them, no more."""
        function = getattr(self._within, "__func__", self._within)
        if self._call != self._direct or not isinstance(function, FunctionType):
            return False
        return all(name in _MAKING or name.startswith(_KERNEL) for name in function.__code__.co_names)

    def recorded(self, *given: Any) -> tuple[list[Call], list[Any]]:
        """The kernels that it calls, with what it gives them, and its results: what they write to."""
        calls: list[Call] = []

        def noting(kernel: Callable[..., Any]) -> Callable[..., None]:
            def call(*parts: Any) -> None:
                calls.append((kernel, parts))
                kernel(*parts)

            return call

        function = getattr(self._within, "__func__", self._within)
        names = {
            name: noting(value) if name.startswith(_KERNEL) else value for name, value in function.__globals__.items()
        }
        again = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
        owner = getattr(self._within, "__self__", None)
        return calls, list(again(list(given)) if owner is None else again(owner, list(given)))


def same(wanted: Any, found: Any) -> bool:
    """Whether two calls returned the same: lists of tensors, and of sizes."""
    if not isinstance(wanted, (tuple, list)) or not isinstance(found, (tuple, list)) or len(wanted) != len(found):
        return False
    return all(_alike(a, b) for a, b in zip(wanted, found, strict=True))


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    kinds = [(x.shape, x.stride(), x.dtype, x.device) for x in (a, b)]
    return kinds[0] == kinds[1] and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def fused(piece: fx.GraphModule, examples: list[Any]) -> Piece:
    """The piece compiled, a function of tensors that returns several.

    Args:
        piece: A graph of tensor operations.
        examples: Its inputs, without contents.
    """
    from torch._functorch import config as around
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    made: list[tuple[Any, int]] = []

    def inner(graph: Any, given: Sequence[Any], **options: Any) -> Any:
        compiled = compile_fx_inner(graph, given, **options)
        made.append((compiled, len(given)))
        return compiled

    known = {name: value for name, value in _OPTIONS.items() if hasattr(config, name)}

    def compiled_by(options: dict[str, Any]) -> Any:
        return compile_fx(piece, examples, inner_compile=inner, config_patches=options)

    with around.patch(enable_autograd_cache=False):  # what it holds is the whole: the function within is not shown
        try:
            whole = compiled_by(known)
        except RuntimeError as error:
            if _COUNTED not in str(error):
                raise
            made.clear()
            whole = compiled_by({**known, "fx_graph_cache": False})
    within = getattr(made[0][0], "current_callable", None) if len(made) == 1 else None
    if within is None or made[0][1] != len(examples):
        return whole  # type: ignore[no-any-return]
    return Fused(whole, within)

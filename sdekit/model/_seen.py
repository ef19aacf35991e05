"""What a network is given and what it answers: looked at, and said in words where it cannot be used."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._tensor import HALF, tf32
from ..errors import NetworkError, SdekitWarning
from ._labels import label_dtype

WRITES = (
    "the network writes into its input, label or condition, and did not in its first calls, so what it was given is "
    "lost: have it work on a copy (x = x.clone()), or out of place."
)
SHARES = (
    "the network answers in memory that it has answered in before, and did not in its first calls, so answers that are "
    "still needed are lost: have it return a copy (out.clone()), or make the sdekit.ScoreModel anew."
)


_MATRICES = {"mm", "addmm", "linear"}
_OTHERS = ("_scaled_dot_product", "lstm", "gru", "rnn", "_thnn_fused", "_fft")
_WIDEST, _SMALL = 1 << 14, 1 << 11  # numbers
_CONVOLUTIONS = {"convolution", "_convolution", "cudnn_convolution", "cudnn_convolution_transpose"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "linear", "_scaled_dot_product_efficient_attention"}
_TRAINED = (
    "the network was compiled by torch.compile and its weights require a gradient, so its backward pass makes theirs "
    "too: for a perceptron 1.4 to 2.4 times the time of the network that was not compiled. Call "
    "net.requires_grad_(False) first."
)


def require_followed(name: str, value: object) -> None:
    """Raises TypeError for a condition of one entry a sample whose entries could not follow their samples."""
    if isinstance(value, np.ndarray):
        raise TypeError(f"condition {name} is a numpy array; a tensor is needed: torch.as_tensor(..).")
    if isinstance(value, list):
        raise TypeError(
            f"condition {name} is a list, whose entries could not follow their samples: pass a tensor of an entry a "
            "sample; or a tuple, if all of it is for every sample."
        )
    if not isinstance(value, Tensor) and any(isinstance(part, (Tensor, np.ndarray)) for part in tree_leaves(value)):
        raise TypeError(
            f"condition {name} is a {type(value).__name__} that holds tensors, whose rows could not follow their "
            "samples: pass each tensor as a keyword of its own."
        )


def usable(bound: dict[str, Any]) -> dict[str, Any]:
    """What is bound, with tensors of inference mode copied where autograd may have to keep them."""
    if torch.is_inference_mode_enabled() or not any(
        isinstance(part, Tensor) and part.is_inference() for part in bound.values()
    ):
        return bound
    return {
        name: part.clone() if isinstance(part, Tensor) and part.is_inference() else part for name, part in bound.items()
    }


def versions(x: Tensor, bound: dict[str, Any] | None = None) -> int:
    """How often it and what is bound were written to, where that is counted."""
    count = 0 if x.is_inference() else x._version
    if bound:
        count += sum(versions(part) for part in bound.values() if isinstance(part, Tensor))
    return count


def share_memory(x: Tensor, other: Tensor) -> bool:
    """Whether one of the two, or what it is a view of, is written to where the other is."""
    return x.numel() > 0 and x.untyped_storage()._cdata == other.untyped_storage()._cdata


def autocast(x: Tensor, dtype: torch.dtype) -> torch.dtype | None:
    """What autocast has operations of a network of that type on the device of `x` compute in, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if dtype.itemsize < 8 and torch.is_autocast_enabled(kind) else None


class _Coarsest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the coarsest type that operations answer in.

    And whether all are a perceptron's: products of one row a sample with a matrix, and functions of few numbers.

    Attributes:
        found: That of half precision, where there is one: float16 for TF32, which rounds factors as much.
        perceptron: Whether they are.
    """

    found: torch.dtype | None = None

    def __init__(self, batch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch, self.perceptron = batch, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        made = all(returned.alias_info is None for returned in func._schema.returns)
        for part in tree_leaves(out):
            if not isinstance(part, Tensor):
                continue
            if made and part.dim() and part.numel() > self.batch * self._most(name, part):
                self.perceptron = False
            if part.dtype in HALF and self.found is not torch.bfloat16:
                self.found = part.dtype
            elif self.found is None and part.dtype is torch.float32:
                convolutions, products = tf32(part.device) or (False, False)
                if (convolutions and name in _CONVOLUTIONS) or (products and name in _PRODUCTS):
                    self.found = torch.float16
        return out

    @staticmethod
    def _most(name: str, made: Tensor) -> int:
        """Numbers that an operation of a perceptron makes for a sample, at most."""
        if name in _MATRICES:
            return max(made.shape[-1], _SMALL)
        return 0 if name in _CONVOLUTIONS or name in _PRODUCTS or name.startswith(_OTHERS) else _WIDEST


def _kind(x: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """What a network's rounding depends on, besides the network of that type."""
    return x.dtype, dtype, autocast(x, dtype), tf32(x.device)


class Precision:
    """What a network's answers are rounded to, by the kind of call: as far as it was seen.

    Its parameters do not tell, nor does the type of an answer: autocast within `forward` casts back, and TF32 (which
    torch uses for convolutions on CUDA unless told otherwise) looks like float32. So the first call of a kind is looked
    into, operation by operation; of compiled parts nothing is seen.
    """

    def __init__(self) -> None:
        self._coarser: dict[Any, torch.dtype] = {}  # than the input's
        self._within: dict[Any, torch.dtype | None] = {}  # half precision that operations answered in
        self._perceptrons: set[Any] = set()
        self._differentiated = False  # whether it was called to be

    def ask(
        self, net: nn.Module, x: Tensor, dtype: torch.dtype, seen: Tensor, label: Tensor, bound: dict[str, Any]
    ) -> Any:
        """What the network of that dtype answers where it is given `seen` in the place of the input `x`."""
        if not self._differentiated and seen.requires_grad and torch.is_grad_enabled():
            self._differentiated = True
            _warn_of_weights(net)
        call = _kind(x, dtype)
        if call in self._within or torch.compiler.is_compiling():
            return net(seen, label, **bound)
        if any(map(_is_compiled, net.modules())):
            self._within[call] = None
            return net(seen, label, **bound)
        with _Coarsest(seen.shape[0]) as mode:
            out = net(seen, label, **bound)
        self._within[call] = mode.found
        if mode.perceptron:
            self._perceptrons.add(call)
        return out

    def note(self, answer: Tensor, x: Tensor, dtype: torch.dtype) -> None:
        """Takes down what it answered in to the input `x`."""
        if answer.dtype is x.dtype and not self._coarser and not any(self._within.values()):
            return
        call = _kind(x, dtype)
        kind = _coarsest(answer.dtype, self._within.get(call) or answer.dtype)
        if _coarsest(x.dtype, kind) is not x.dtype:
            self._coarser[call] = kind
        else:
            self._coarser.pop(call, None)

    def known(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether a call of this kind was looked into."""
        return _kind(x, dtype) in self._within

    def perceptron(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether a call of this kind was seen to use each of its matrices for one row a sample, as a perceptron's."""
        return _kind(x, dtype) in self._perceptrons

    def ask_apart(self, x: Tensor, dtype: torch.dtype) -> None:
        """Takes down that samples are not to be put together for it."""
        self._perceptrons.discard(_kind(x, dtype))

    def of(self, x: Tensor, dtype: torch.dtype) -> torch.dtype:
        """The coarsest of what the network computes in, that was seen, and autocast's."""
        cast = autocast(x, dtype)
        kind = dtype if cast is None else _coarsest(dtype, cast)
        return _coarsest(kind, self._coarser.get(_kind(x, dtype), kind)) if self._coarser else kind


def _is_compiled(part: nn.Module) -> bool:
    """Whether torch.compile made it: it would not run as compiled while its operations are looked at."""
    return hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None


def _warn_of_weights(net: nn.Module) -> None:
    """Warns of a network, compiled as a whole, whose products with vectors take what a step of training would."""
    within = {id(weight) for part in net.modules() if _is_compiled(part) for weight in part.parameters()}
    trained = [id(weight) for weight in net.parameters() if weight.requires_grad] if within else []
    if trained and within.issuperset(trained):
        warnings.warn(_TRAINED, SdekitWarning, stacklevel=2)


def _coarsest(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Of two floating types the one of larger rounding, `a` if neither is."""
    return a if a is b or torch.finfo(b).eps <= torch.finfo(a).eps else b


def require_answer(out: Any, x: Tensor) -> Tensor:
    """A network's answer to `x`; raises NetworkError unless it is a floating tensor of its shape."""
    if not isinstance(out, Tensor):
        raise NetworkError(
            f"the network returned a {type(out).__name__}; a tensor of shape {tuple(x.shape)} is needed: wrap it in a "
            "module that takes the tensor out, as net(x, label, return_dict=False)[0] does of diffusers' models."
        )
    if out.shape != x.shape:
        raise NetworkError(
            f"the network returned shape {tuple(out.shape)} for an input of shape {tuple(x.shape)}; "
            f"the same shape is needed: {_other_shape(out, x)}"
        )
    if not out.is_floating_point():
        raise NetworkError(f"the network returned {out.dtype}; a floating tensor is needed.")
    return out


def _other_shape(out: Tensor, x: Tensor) -> str:
    """What may be meant by an answer of another shape."""
    if out.dim() == x.dim() > 1 and out.shape[1] == 2 * x.shape[1] and out.shape[2:] == x.shape[2:]:
        return "where the second half of the channels is a variance, keep the first (out.chunk(2, 1)[0]), in a wrapper."
    return "broadcasting it would mix samples."


def raised(error: Exception, x: Tensor, dtype: torch.dtype) -> NetworkError:
    """What to say of an error that a network of that type raised for the input `x`."""
    said, hint = str(error), ""
    if "does not require grad" in said and not torch.is_grad_enabled():
        hint = " (The network is called under torch.no_grad() here: one that differentiates needs torch.enable_grad().)"
    if "dtype" in said and label_dtype(dtype) is not dtype:
        hint = " (Labels are float32 where a network is in half precision: label.to(x.dtype) where they meet.)"
    kind = type(error).__name__
    return NetworkError(f"the network raised {kind} for an input of shape {tuple(x.shape)}: {said}{hint}")

"""What a network is given and what it answers: looked at, and said in words where it cannot be used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import NetworkError
from ._labels import label_dtype

WRITES = (
    "the network writes into its input, label or condition, and did not in its first calls, so what it was given is "
    "lost: have it work on a copy (x = x.clone()), or out of place."
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

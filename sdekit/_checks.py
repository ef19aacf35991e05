"""Validation at the door: what was passed, what is needed, what to do.

Nothing here runs inside a step. Values that only some samples get wrong (NaN) are not errors here: they are recorded
for those samples alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from ._tensor import may_stay

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_WITH_FLOAT64 = ("cpu", "cuda")  # known to have it: not asked every time
_RANDOM = (*(f"Dropout{kind}" for kind in ("", "1d", "2d", "3d")), "StochasticDepth", "DropPath")  # classes' names
_DROPS = re.compile(r"(^|_)(drop|dropout|drop_path)(_?(p|prob|rate|probability))?$")  # attributes of such a probability
_NUMBERS = 1 << 10  # samples, at most, whose numbers are kept, and of how many batches
_numbers: dict[tuple[int, torch.device], Tensor] = {}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # all others only store numbers


def require_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a finite number above zero."""
    given: Any = value  # numpy's numbers are taken too
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}); a real number is needed.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r}; a finite number above 0 is needed.")


def require_times(t_min: float, t_max: float, lower: float = 0.0, upper: float = math.inf) -> None:
    """Raises ValueError unless lower < t_min < t_max < upper (t_max may equal an infinite or closed upper end)."""
    require_positive("t_min", t_min)
    require_positive("t_max", t_max)
    if not lower < t_min < t_max <= upper:
        raise ValueError(
            f"t_min={t_min!r}, t_max={t_max!r}; {lower:g} < t_min < t_max <= {upper:g} is needed: "
            "t_min is the data's end, t_max the noise's."
        )


def require_count(name: str, value: int, least: int = 1) -> None:
    """Raises unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}); an int is needed.")
    if value < least:
        raise ValueError(f"{name}={value}; at least {least} is needed.")


def require_float64(device: torch.device) -> None:
    """Raises ValueError for a device without float64 (schedules, time and log-densities need it)."""
    if device.type in _WITH_FLOAT64:
        return
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"device={str(device)!r} has no float64, in which schedules, time and log-densities are kept ({error}). "
            "Move the model and the data to a CPU or CUDA device."
        ) from error


def choose_device(module: nn.Module, device: torch.device | str | None) -> torch.device:
    """`device`, or that of the module's parameters, or the CPU; checked to know float64 and to have the parameters."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.is_meta:
        raise ValueError("the network's parameters are on the meta device and hold no numbers: load its weights first.")
    if device is None:
        device = parameter.device if parameter is not None else torch.device("cpu")
        if device.type in _WITH_FLOAT64:
            return device
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}; a device is needed, for example 'cpu' or 'cuda:0' ({error}).") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(chosen)!r}; torch finds no CUDA here: use 'cpu', or install torch for CUDA.")
    require_float64(chosen)
    if parameter is not None and (
        parameter.device.type != chosen.type or chosen.index not in (None, parameter.device.index)
    ):
        raise ValueError(
            f"device={str(device)!r}, but the network's parameters are on {str(parameter.device)!r}; they must be on "
            "one device: move the model with .to(device)."
        )
    return chosen


def require_batch(name: str, x: Any) -> Tensor:
    """`x`, checked to be a real floating tensor with a batch axis and at least one event axis."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; a torch.Tensor of shape (B, *event) is needed.")
    if x.is_complex():
        raise TypeError(f"{name}.dtype={x.dtype}; a real floating tensor is needed: stack real and imaginary parts.")
    if not x.is_floating_point():
        raise TypeError(
            f"{name}.dtype={x.dtype}; a floating tensor is needed. A density of integers does not exist: "
            "dequantise first (add uniform noise within each bin), then convert to floating point."
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}.dtype={x.dtype}; float64, float32, float16 or bfloat16 is needed: convert it first.")
    if x.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no numbers; a tensor on a CPU or CUDA is needed.")
    if x.layout != torch.strided:
        raise TypeError(f"{name}.layout={x.layout}; a dense tensor is needed: use .to_dense().")
    if x.dim() < 2:
        raise ValueError(
            f"{name}.shape={tuple(x.shape)}; shape (B, *event) with at least one event axis is needed: "
            "use x[:, None] for scalar events, x[None] for one sample."
        )
    if not x.shape[1:].numel():
        raise ValueError(f"{name}.shape={tuple(x.shape)}; at least one number a sample is needed.")
    require_float64(x.device)
    return x


def require_indices(indices: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """(B,) int64 global sample numbers: `indices` checked, or 0..B-1."""
    if indices is None:
        return _first_numbers(batch, device)
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices={indices!r}; an integer tensor of shape ({batch},) is needed.")
    if indices.shape != (batch,):
        raise ValueError(f"indices.shape={tuple(indices.shape)}; ({batch},) is needed, a number for each sample.")
    return indices.to(device=device, dtype=torch.int64)


def _first_numbers(count: int, device: torch.device) -> Tensor:
    """(count,) int64 0, 1, ..: the same tensor again where it is small; not to be written to."""
    made = _numbers.get((count, device))
    if made is None:
        made = torch.arange(count, dtype=torch.int64, device=device)
        if count <= _NUMBERS and len(_numbers) < _NUMBERS and may_stay(made):
            _numbers[count, device] = made
    return made


def require_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` as (n, *event), checked."""
    if type(shape) is tuple and len(shape) > 1 and all(type(size) is int and size > 0 for size in shape):
        return shape
    sizes: tuple[Any, ...] = tuple(shape) if isinstance(shape, Iterable) else ()
    if len(sizes) < 2 or not all(isinstance(size, Integral) and not isinstance(size, bool) for size in sizes):
        raise ValueError(f"shape={shape!r}; (n, *event) with at least one event axis is needed, for example (16, 2).")
    if sizes[0] < 0 or min(sizes[1:]) < 1:
        raise ValueError(f"shape={shape!r}; (n, *event), n >= 0 samples of at least one number, is needed: (16, 2).")
    return tuple(int(size) for size in sizes)


def require_seed(seed: int) -> None:
    """Raises unless `seed` is an int that fits 63 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r} ({type(seed).__name__}); an int is needed.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}; 0 <= seed < 2**63 is needed.")


def require_model(model: object) -> None:
    """Raises TypeError for what is no score model."""
    if not hasattr(model, "parameterization") or not hasattr(model, "sde"):
        what = "a class" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(
            f"model is {what}; an sdekit.ScoreModel is needed, which says what a network means: "
            "ScoreModel(net, VPSDE(), noise())."
        )


def require_part(name: str, value: object, does: str, example: str) -> None:
    """Raises TypeError for what is not None and has no method `does`: a name, or a class that is still to be called."""
    if value is not None and (isinstance(value, type) or not hasattr(value, does)):
        raise TypeError(f"{name}={value!r}; an object is needed, for example {example}.")


def require_floating(name: str, dtype: object) -> None:
    """Raises TypeError unless `dtype` is None or a floating type."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{name}={dtype!r}; a floating torch.dtype is needed, for example torch.float32.")


def require_same_device(module: nn.Module, x: Tensor, name: str = "x") -> None:
    """Raises ValueError if the module's parameters lie on another device than `x`."""
    require_model(module)
    for parameter in module.parameters():
        if parameter.device != x.device:
            raise ValueError(
                f"{name} is on {str(x.device)!r} but the network's parameters are on {str(parameter.device)!r}; "
                "they must be on one device: move one of them with .to(device)."
            )
        return


def require_deterministic(module: nn.Module) -> None:
    """Raises ValueError if a sample's output would be random, depend on the other samples, or change the network.

    Dropout in train mode makes every evaluation another network; batch normalisation by batch statistics couples
    the samples, and then the trace of the Jacobian is not the per-sample divergence; spectral norms and running
    statistics are written to by every call. What a module of the user's own does in train mode shows in its attributes
    only: one that is a probability of dropping something is taken for dropout.
    """
    require_model(module)
    if not any(map(_may_change, module.modules())):
        return
    for name, part in module.named_modules():
        norm = isinstance(part, _BATCH_NORMS)
        if not norm and not getattr(part, "training", False):  # a frozen script has no mode
            continue
        if norm and (part.training or part.running_mean is None):
            why: str | None = (
                "is batch normalisation by batch statistics: samples influence one another, and the trace is not their "
                "divergence. Call net.eval(), with running statistics."
            )
        else:
            why = _moves(part) if part.training else None
        if why is not None:
            raise ValueError(f"the network's {name or type(part).__name__} {why}")


def _may_change(part: nn.Module) -> bool:
    """Whether a module needs a closer look: one in train mode, unless it is this package's own, or a batch norm."""
    return (getattr(part, "training", False) and not is_own(part)) or isinstance(part, _BATCH_NORMS)


def _moves(part: nn.Module) -> str | None:
    """Why a module in train mode gives random answers or is changed by a call; None where nothing is seen."""
    random = "in train mode: each call would be another network, and no density belongs to it. Call net.eval() first."
    kind = str(getattr(part, "original_name", type(part).__name__))  # a scripted module says what it was
    shares: list[Any] = [getattr(part, name, None) for name in ("p", "drop_prob", "rate")]
    share = next((value for value in shares if isinstance(value, Real)), None)
    if kind.endswith(_RANDOM) and share != 0:
        return f"is dropout (p={share}) {random}"
    if isinstance(part, nn.RReLU):
        return f"is random ({kind}) {random}"
    for attribute, value in vars(part).items():
        given: Any = value
        if isinstance(given, Real) and 0 < float(given) <= 1 and given is not True and _DROPS.search(attribute):
            return f"has {attribute}={value} {random}"
    if isinstance(part, nn.modules.instancenorm._InstanceNorm) and part.track_running_stats:
        return "tracks running statistics in train mode: every call changes the network. Call net.eval() first."
    hooks = (*part._forward_pre_hooks.values(), part)
    if any(type(hook).__name__ in ("SpectralNorm", "_SpectralNorm") for hook in hooks):
        return "has a spectral norm in train mode: every call changes the network. Call net.eval() first."
    return None


def is_own(value: object) -> bool:
    """Whether a value is of a class of this package: those of users may keep a state that no comparison sees."""
    return type(value).__module__.startswith("sdekit.")

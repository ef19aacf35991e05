"""How long a call takes, and what more there may be to choose.

On the CPU it is CPU time of the process, so that other work on the machine hardly counts; on CUDA it is the wall clock
between two points at which the device has finished. The least of a few repeats, after one that is not counted.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch

import sdekit


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """What a table calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"


def clock(device: torch.device) -> float:
    """Seconds from some fixed point on; what was launched before is included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    began = clock(device)
    call()
    return clock(device) - began


def least(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Least seconds of a call."""
    call()
    return min(timed(call, device) for _ in range(repeats))


def least_each(solve: Callable[[], float], repeats: int, device: torch.device) -> float:
    """Least seconds an evaluation of the network; `solve` returns how many it made."""
    solve()
    took = []
    for _ in range(repeats):
        began = clock(device)
        made = solve()
        took.append((clock(device) - began) / made)
    return min(took)


# Removed once every door has these arguments.


def accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of the options that the function takes."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def runtimes(device: torch.device) -> tuple[str, ...]:
    """How the steps between the network's calls can be computed, as `log_likelihood` takes it."""
    if not accepted(sdekit.log_likelihood, runtime="auto"):
        return ("eager",)
    return ("auto", "eager", "compile", *(("graph",) if device.type == "cuda" else ()))

"""How long a call takes, and what more there may be to choose.

On the CPU it is CPU time of the process, so that other work on the machine hardly counts; on CUDA it is the wall clock
between two points at which the device has finished. The least of a few repeats, after one that is not counted; ratios
are medians of runs side by side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


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


def least_each(solve: Callable[[], float], repeats: int, device: torch.device, warm: bool = True) -> float:
    """Least seconds an evaluation of the network; `solve` returns how many it made."""
    if warm:
        solve()
    took = []
    for _ in range(repeats):
        began = clock(device)
        made = solve()
        took.append((clock(device) - began) / made)
    return min(took)


def paired(
    solve: Callable[[], float], floor: Callable[[], float], repeats: int, device: torch.device
) -> tuple[float, float, float]:
    """Seconds an evaluation of `floor` and of `solve`, and the ratio of the two: medians.

    Each run of `solve` stands between two of the floor, long enough to be as disturbed as it: the least of many short
    runs of a floor would meet quiet moments that no long run does.
    """
    calls = solve()
    times = max(1, round(calls / floor()))
    floors, solves, ratios = [], [], []
    for _ in range(repeats):
        before = least_each(lambda: sum(floor() for _ in range(times)), 1, device, warm=False)
        took = least_each(solve, 1, device, warm=False)
        after = least_each(lambda: sum(floor() for _ in range(times)), 1, device, warm=False)
        floors.append(0.5 * (before + after))
        solves.append(took)
        ratios.append(took / floors[-1])
    return statistics.median(floors), statistics.median(solves), statistics.median(ratios)


def runtimes(device: torch.device) -> tuple[str, ...]:
    """How the steps between the network's calls can be computed, as `log_likelihood` takes it."""
    return ("eager", "compile", *(("graph", "compiled-graph") if device.type == "cuda" else ()))

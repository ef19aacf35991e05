"""Memory: how much is free, how much a call takes at its peak, and whether an error says that it ran out."""

from __future__ import annotations

import gc
import math
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")

# Limit and use of the control group a container runs in, and what of the use are files read once, which the system
# gives back when it is asked for memory; versions 2 and 1.
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)
_OUT = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "could not create a primitive",
)  # the last is oneDNN's, of a convolution that cannot have its room


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on a device: of CUDA what the driver has and torch holds unused, of the CPU what
    the system calls available, within the limits of the control group and of the process (`ulimit -v`).
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    rooms = [_system_bytes(), *_process_bytes()]
    for limit, used, table, files in _CONTROL_GROUPS:
        most, now = _number(Path(limit)), _number(Path(used))
        if most is not None and now is not None:
            rooms.append(max(0, most - max(0, now - _entry(Path(table), files))))
    return min(rooms)


def _system_bytes() -> int:
    """What the system calls available; where it says nothing, half of what there is."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    page = os.sysconf("SC_PAGE_SIZE")
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return page * os.sysconf("SC_AVPHYS_PAGES")
    return page * os.sysconf("SC_PHYS_PAGES") // 2


def _process_bytes() -> list[int]:
    """What the process may still map, if its address space is limited and the system tells how large it is."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, AttributeError, OSError, ValueError):  # not every system has these
        return []
    return [] if limit == resource.RLIM_INFINITY else [max(0, limit - mapped)]


def _number(path: Path) -> int | None:
    """The number a file holds, or None ("max", or no such file)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _entry(path: Path, name: str) -> int:
    """The number beside a name in a table of names and numbers, 0 where there is none."""
    try:
        found = (line.split() for line in path.read_text().splitlines())
        return next((int(words[1]) for words in found if words[:1] == [name]), 0)
    except (OSError, ValueError, IndexError):
        return 0


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make, for as long as each lives; no more than `room`."""

    def __init__(self, room: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room
        self.live = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [storage for storage in _storages(out) if storage._cdata not in self._known]
        if made:
            given = {storage._cdata for storage in _storages((args, kwargs))}  # a view takes nothing
            for storage in made:
                if storage._cdata not in given:
                    self._enter(storage)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._leave, key)
            if self.live > self.room:
                raise MemoryError(f"not enough memory: {self.live} bytes of tensors are more than {self.room:.0f}.")

    def _leave(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def counted(call: Callable[[], Result], room: float = math.inf) -> tuple[Result, int]:
    """What `call` returns, and the bytes of tensors it held at its peak, storage by storage.

    The device is not asked, so nothing waits for it; what kernels take for themselves is not seen.

    Raises:
        MemoryError: It held more than `room` bytes: stopped as soon as it does.
    """
    with _Live(room) as live:
        result = call()
    return result, live.peak


def peak_of(call: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """What `call` returns, and the bytes it added on the device at its peak, its result included; `counted` on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    return counted(call)


def ran_out(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that memory ran out."""
    return any(
        isinstance(cause, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(cause, RuntimeError) and any(words in str(cause).lower() for words in _OUT))
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__ or now.__context__


_holders: list[Callable[[], None]] = []


def on_release(let_go: Callable[[], None]) -> None:
    """Has `let_go` called where memory ran out."""
    _holders.append(let_go)


def release(device: torch.device) -> None:
    """Gives what torch and this package hold unused back to the device, and first what errors keep in cycles with their
    own frames.
    """
    gc.collect()
    for let_go in _holders:
        let_go()
    if device.type == "cuda":
        torch.cuda.empty_cache()

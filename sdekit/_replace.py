"""Files that a reader finds whole: the old one or the new one, never half; tensors in them."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path` and puts it in the place of `path`, whose folder is made if need be.

    The file beside it has a name of its own in every call, so that two writers do not meet in it, and is gone
    afterwards whether or not `write` succeeded. A link is followed: what it points to is replaced. What is no file
    (a pipe, a device) is written to as it is.

    Raises:
        OSError: It cannot be written (no space, no permission); names `path`.
    """
    target = path.resolve()
    part = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():
            write(target)
            return
        try:
            write(part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors and texts to a safetensors file, replacing it in one move.

    Raises:
        OSError: It cannot be written; an old one is still there.
    """
    # Not save_file: that leaves a file only its owner may read.
    stored = save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, metadata)
    replace_file(path, lambda part: part.write_bytes(stored))


def read_tensors(path: Any, device: Any = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and texts of a safetensors file.

    Raises:
        FileNotFoundError: There is no such file.
        SafetensorError: It is no such file, or damaged.
    """
    with safe_open(str(path), framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors, file.metadata() or {}

"""Files that a reader finds whole: the old one or the new one, never half."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path


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

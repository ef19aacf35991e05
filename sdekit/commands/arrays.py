"""Arrays on disk: .npy, .npz and .safetensors.

They are read without executing anything, and written so that a reader sees the old file or the new one, never half.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .._replace import replace_file
from ..units import Levels, require_dequantized

SUFFIXES = (".npy", ".npz", ".safetensors")


def require_suffix(path: Path) -> str:
    """The suffix of `path`, checked to be one of `SUFFIXES`.

    Raises:
        ValueError: It is another.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{str(path)!r} ends in {suffix or 'nothing'!r}; {', '.join(SUFFIXES)} are known.")
    return suffix


def read_array(path: Path, key: str | None = None) -> Tensor:
    """One array of a file, on the CPU in its own dtype.

    Args:
        path: A .npy, .npz or .safetensors file.
        key: Name of the array within the file; needed where there are several.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another kind of file, no such key, or no numbers.
    """
    suffix = require_suffix(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a directory; a {suffix} file is needed: name one within it.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    if suffix == ".npy" and key is not None:
        raise ValueError(f"key={key!r}, but {str(path)!r} holds one array without a name: leave the key out.")
    with _readable(path, suffix):
        if suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                stored: Tensor = file.get_tensor(_choose(path, list(file.keys()), key))
                return stored
        loaded = np.load(path, allow_pickle=False)
        if suffix == ".npy":
            return _tensor(path, loaded)
        with loaded:
            return _tensor(path, loaded[_choose(path, list(loaded.files), key)])


class _Unfit(ValueError):
    """What a file that was read well holds is not what is needed."""


@contextmanager
def _readable(path: Path, suffix: str) -> Iterator[None]:
    """Names the file in whatever its reader raises."""
    try:
        yield
    except _Unfit:
        raise
    except (SafetensorError, EOFError, OSError, ValueError, BadZipFile, MemoryError, zlib.error) as error:
        said = f"{error}".strip().partition("\n")[0].rstrip(".")
        reason = "it is broken, or holds Python objects, which would have to be executed"
        if isinstance(error, MemoryError):
            reason = "it is broken, or larger than the memory there is"
        why = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise ValueError(f"{str(path)!r} cannot be read as {suffix}: {reason} ({why}).") from error


def _choose(path: Path, names: list[str], key: str | None) -> str:
    if key is None and len(names) == 1:
        return names[0]
    if key is None or key not in names:
        raise _Unfit(f"{str(path)!r} holds {sorted(names)}; choose one of them by its key (now {key!r}).")
    return key


def _tensor(path: Path, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise _Unfit(f"{str(path)!r} holds {array.dtype}; real numbers of at most 64 bits are needed.")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)  # torch's own wide unsigned types know few operations
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=True)))


def write_arrays(path: Path, arrays: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes named arrays to `path`, replacing it in one move.

    Args:
        path: A .npz or .safetensors file; a .npy file for one array only.
        arrays: What to write.
        metadata: Texts to write beside them: the metadata of a .safetensors file, arrays of one string in .npz, left
            out of .npy.

    Raises:
        ValueError: Another kind of file, or several arrays for a .npy file.
    """
    suffix = require_suffix(path)
    texts = dict(metadata or {})
    if suffix == ".npy" and len(arrays) != 1:
        raise ValueError(f"{str(path)!r} can hold one array only, not {sorted(arrays)}: name a .npz file.")
    kept = {name: value.detach().cpu().contiguous() for name, value in arrays.items()}
    if suffix == ".safetensors":
        replace_file(path, lambda part: part.write_bytes(save(kept, metadata=texts)))
        return
    plain = {name: value.numpy() for name, value in kept.items()}
    if suffix == ".npy":
        replace_file(path, lambda part: _save(part, next(iter(plain.values()))))
        return
    replace_file(path, lambda part: _savez(part, {**plain, **{name: np.array(text) for name, text in texts.items()}}))


def _save(part: Path, array: np.ndarray) -> None:
    with part.open("wb") as file:  # given a name, numpy would add a suffix to it
        np.save(file, array, allow_pickle=False)


def _savez(part: Path, arrays: dict[str, np.ndarray]) -> None:
    with part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def floating(x: Tensor, levels: Levels | None, seed: int) -> Tensor:
    """`x`, (N, *event), as float32 or float64; integers are dequantised where the levels are known.

    Raises:
        ValueError: There are no samples, or integers of unknown levels.
    """
    if x.dim() == 0 or x.shape[0] == 0:
        raise ValueError("the array holds no samples.")
    x = x[:, None] if x.dim() == 1 else x
    if x.is_floating_point():
        if levels is not None:
            require_dequantized(x, levels, "the array")
        return x if x.dtype == torch.float64 else x.float()
    if x.is_complex():
        raise ValueError(
            f"the array holds complex numbers ({x.dtype}); real ones are needed: pass real and imaginary "
            "part as dimensions of their own."
        )
    if levels is None:
        raise ValueError(f"the array holds integers ({x.dtype}), which have no density: pass --levels.")
    levels.check(x)
    return levels.dequantise(x, torch.Generator().manual_seed(seed))

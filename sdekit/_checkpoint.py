"""The file that a training goes on from: tensors, the step, and facts that a resumed run must share.

A fact is a name and a text: the recipe, shapes, a digest of the data. Every fact is compared before anything is taken
from the file, so that one run is never continued as another. Checkpoints are due every so many steps and, since steps
may be slow, once a minute. One that cannot be written costs the file, not the training: it is tried again when due.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError
from torch import Tensor

from ._replace import read_tensors, write_tensors
from .errors import SdekitWarning

_FORMAT = "sdekit.training/1"
_SECONDS = 60.0  # lost at most where the process is killed
_SHARE = 0.05  # of the time that may go into checkpoints which are due by time
_ANEW = "Remove the file, or name another, to start anew."

Fact: TypeAlias = str | int | float


def joined(own: Mapping[str, str], further: Mapping[str, Fact]) -> dict[str, str]:
    """All facts as texts: those that are always compared, and the caller's.

    Raises:
        TypeError: One of the caller's is neither a text nor a number.
        ValueError: One has the name of another.
    """
    for name, value in further.items():
        if not isinstance(value, (str, Real)):
            raise TypeError(
                f"facts[{name!r}] is a {type(value).__name__}; a text or a number is needed, such as a digest of it."
            )
        if name in own:
            raise ValueError(f"facts[{name!r}]: {name} is compared in any case; leave it out, or name it otherwise.")
    # The caller's come first: where the data differ, so may the scale that the recipe took from them.
    return {**{name: str(value) for name, value in further.items()}, **own}


class Checkpoint:
    """One training's file.

    Args:
        path: A safetensors file; its folder is made.
        every: Steps after which it is due.
        facts: What a run that goes on from it must share.
    """

    def __init__(self, path: Path, every: int, facts: Mapping[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.every, self.facts = path, every, dict(facts)
        self._next, self._warned = time.monotonic() + _SECONDS, False

    def due(self, step: int) -> bool:
        """Whether it is to be written after this step."""
        return step % self.every == 0 or time.monotonic() >= self._next

    def write(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Writes it; a reader sees the old file or the new one, never half of it.

        Raises:
            OSError: It cannot be written.
        """
        metadata = {"format": _FORMAT, "facts": json.dumps(self.facts), "step": str(step)}
        write_tensors(self.path, tensors, metadata)

    def try_to_write(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Writes it or, the first time that it cannot be, warns."""
        start = time.monotonic()
        try:
            self.write(tensors, step)
        except OSError as error:
            if not self._warned:
                text = f"no checkpoint after step {step}: {error}. The training goes on and will try again."
                warnings.warn(text, SdekitWarning, stacklevel=3)
            self._warned = True
        now = time.monotonic()
        self._next = now + max(_SECONDS, (now - start) / _SHARE)

    def read(self) -> tuple[dict[str, Tensor], int]:
        """The tensors and the step.

        Raises:
            ValueError: It is no checkpoint, damaged, or one of other facts.
        """
        try:
            tensors, metadata = read_tensors(self.path)
        except SafetensorError as error:
            raise ValueError(f"{str(self.path)!r} is not a safetensors file: {error}. {_ANEW}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{str(self.path)!r} has format {metadata.get('format')!r}; {_FORMAT!r} is needed. {_ANEW}"
            )
        try:
            stored, step = dict(json.loads(metadata["facts"])), int(metadata["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(self.path)!r} is damaged: its step or facts cannot be read. {_ANEW}") from error
        self._compare(stored)
        return tensors, step

    def _compare(self, stored: Mapping[str, object]) -> None:
        for name in {**self.facts, **stored}:
            there, here = stored.get(name, "unknown"), self.facts.get(name, "unknown")
            if there != here:
                raise ValueError(
                    f"{str(self.path)!r} is of another run (recipe, network or data): {name} is {there} there and "
                    f"{here} here. {_ANEW}"
                )

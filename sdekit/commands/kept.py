"""What is finished of a long run, kept in a file beside its result, and only gone on from by the same run.

Which run a file is of is told by two things. A fingerprint, exact: the data, the options, and the model as far as it
can be read. And what the network answered at a few fixed states, which also tells what is written nowhere, a function
for example: equal up to rounding, since another machine rounds differently and is no other model.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._tensor import digest
from ..errors import SdekitError
from ..model.score_model import ScoreModel
from ..solution import Status
from .arrays import write_arrays

_FORMAT = "sdekit.evaluation/2"
_ANSWERS = "answers"  # their name in the file
_TIMES, _SAMPLES, _ENTRIES = 16, 3, 64  # of the answers: enough to see a guidance interval, little beside a solve
_TOLERANCE, _ROUNDINGS = 1e-4, 20.0  # of an answer's largest entry: a guidance scale of 2.002 is no longer one of 2
_SHARE = 20.0  # a write waits for this many times what the last one took


class Interrupted(SdekitError):
    """Ctrl-C during a command; the message says what was kept."""


def require_finished(status: Tensor) -> None:
    """Raises Interrupted where a solve was stopped by Ctrl-C: the library returns what there is, a command ends."""
    if bool((status == Status.INTERRUPTED).any()):
        raise Interrupted("interrupted.")


def fingerprint(model: ScoreModel, options: object, data: Tensor | None = None) -> str:
    """A text that differs whenever data, options, weights, settings of the network or the meaning of its output do.

    Args:
        model: The score model.
        options: What the numbers depend on besides, with a repr that says all of it.
        data: What is evaluated.
    """
    whole = hashlib.sha256()

    def add(name: str, value: object) -> None:
        # The address in the repr of a function differs from process to process.
        said = digest(value) if isinstance(value, Tensor) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        whole.update(f"\n{name} {said}".encode())

    add("data", data)
    weights = model.net.state_dict()
    for name, value in sorted({**dict(model.net.named_buffers()), **weights}.items()):
        add(name, value)
    for name, module in model.net.named_modules():
        for attribute, setting in sorted(_settings(module)):
            add(f"{name}.{attribute}", setting)
    for name, value in sorted(model.bound.items()):
        add(name, value)
    add("facts", (type(model.net).__name__, model.sde, model.parameterization, model.data_std, options))
    return whole.hexdigest()


def _settings(module: nn.Module) -> Iterator[tuple[str, object]]:
    """The public attributes of a module whose repr says all there is: gains, scales, kinds."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training" and _plain(value):
            yield name, value


def _plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    frozen = is_dataclass(value) and not isinstance(value, type) and type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
    return value is None or frozen or isinstance(value, (bool, int, float, str, torch.dtype))


class Answers(NamedTuple):
    """What a network answered.

    Attributes:
        values: (times, samples, entries) float64, on the CPU.
        tolerance: Up to which share of an answer's largest entry two are the same.
    """

    values: Tensor
    tolerance: float

    def same(self, other: Tensor) -> bool:
        """Whether `other` are the answers of the same network, up to rounding."""
        if other.shape != self.values.shape:
            return False
        largest = self.values.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
        near = (other - self.values).abs() <= self.tolerance * largest
        alike = (other == self.values) | (other.isnan() & self.values.isnan())
        return bool((near | alike).all())


def ask(model: ScoreModel, x: Tensor, rows: Tensor) -> Answers:
    """What the network answers for the first, middle and last of `x`, noised to levels from one end to the other.

    Args:
        model: The score model, on its device.
        x: (N, *event), N >= 1.
        rows: (N,) places of the samples in what is bound to the model, on the model's device.
    """
    few = sorted({0, x.shape[0] // 2, x.shape[0] - 1})[:_SAMPLES]
    state, sde = x[few].to(rows.device), model.sde
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(state)
    noisy, clean = float(sde.half_log_snr(sde.t_max)), float(sde.half_log_snr(sde.t_min))
    levels = sde.clamp(sde.time_at(torch.linspace(noisy, clean, _TIMES, dtype=torch.float64))).to(state.device)
    size = x.shape[1:].numel()
    entries = torch.linspace(0, size - 1, min(size, _ENTRIES), dtype=torch.float64).long().to(state.device)
    part, values = model.take(rows[few]), []
    with torch.no_grad():
        for t in levels.unbind():
            times = t.expand(state.shape[0])
            values.append(part.output(sde.perturb(state, times, noise), times).flatten(1)[:, entries])
    rounding = torch.finfo(part.precision(state)).eps
    return Answers(torch.stack(values).double().cpu(), max(_TOLERANCE, _ROUNDINGS * rounding))


class Kept:
    """The finished batches of a run and the file they are kept in.

    Args:
        path: The file; None: none is kept, and what tells runs apart may be empty.
        mark: The fingerprint of the run.
        answers: The network's.

    Raises:
        ValueError: What is in the file is no such run's.
    """

    def __init__(self, path: Path | None, mark: str, answers: Answers) -> None:
        self.path, self.mark, self.answers = path, mark, answers
        self.parts: list[dict[str, Tensor]] = []
        self.saved = 0
        self._next = 0.0  # when to write again
        if path is not None and path.exists():
            with _opened(path) as file:
                if not self._mine(file):
                    raise ValueError(
                        f"{str(path)!r} was left by a run with other data, another model or other options. "
                        "Repeat that run to finish it, or remove the file to start anew."
                    )
                found = {name: file.get_tensor(name) for name in file.keys() if name != _ANSWERS}  # noqa: SIM118
            self.parts, self.saved = [found], _rows(found)

    @classmethod
    def of(
        cls,
        path: Path | None,
        model: ScoreModel,
        options: object,
        states: Tensor,
        rows: Tensor,
        data: Tensor | None = None,
    ) -> Kept:
        """What is finished of a run: `fingerprint` and `ask` say of which, where there is a file."""
        if path is None:
            return cls(None, "", Answers(torch.zeros(0), 0.0))
        return cls(path, fingerprint(model, options, data), ask(model, states, rows))

    @property
    def done(self) -> int:
        """How many samples are finished."""
        return sum(map(_rows, self.parts))

    def joined(self) -> dict[str, Tensor]:
        """All that is finished, in one."""
        if len(self.parts) > 1:
            self.parts = [{name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}]
        return self.parts[0]

    def add(self, part: Mapping[str, Tensor]) -> None:
        """Books a batch, (n, ...) each; writes, unless that would take more than a small share of the time."""
        self.parts.append(dict(part))
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Writes what is not written yet.

        Raises:
            ValueError: Another run writes to the same file.
        """
        if self.path is None or self.done == self.saved:
            return
        began = time.monotonic()
        if self.path.exists() and not self._is_mine(self.path):
            raise ValueError(
                f"another run writes to {str(self.path)!r} too: it is left as it is, with what that run finished, and "
                f"what this one did since then is lost. Name another --out."
            )
        arrays = self.joined()
        write_arrays(self.path, {**arrays, _ANSWERS: self.answers.values}, _metadata(self.mark))
        self.saved = _rows(arrays)
        now = time.monotonic()
        self._next = now + _SHARE * (now - began)

    @contextmanager
    def until_done(self, total: int) -> Iterator[None]:
        """A block of work on `total` samples, at whose end, however it ends, everything finished is written.

        Raises:
            Interrupted: Ctrl-C was pressed; says what is kept.
        """
        try:
            yield
        except (KeyboardInterrupt, Interrupted) as stop:
            raise Interrupted(f"interrupted after {self.done} of {total} samples; {self._rest()}.") from stop
        except Exception:
            self._rest()
            raise
        self.write()

    def _rest(self) -> str:
        """Writes what is left after something went wrong; what is kept, in words."""
        trouble = ""
        try:
            self.write()
        except (OSError, ValueError) as error:
            trouble = f", the rest could not be written: {error}"
        kept = f"{self.saved} are kept in {str(self.path)!r}" if self.saved else "nothing was kept"
        return kept + trouble.rstrip(".")

    def _is_mine(self, path: Path) -> bool:
        """Whether a file is of this run; what was finished is not read."""
        with _opened(path) as file:
            return self._mine(file)

    def _mine(self, file: Any) -> bool:
        """Whether an open file is of this run."""
        metadata = file.metadata() or {}
        alike = all(metadata.get(name) == text for name, text in _metadata(self.mark).items())
        return alike and self.answers.same(file.get_tensor(_ANSWERS))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, open to be read; what is wrong with it is said with its name."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} cannot be resumed from: {error}. Remove it to start anew.") from error


def partial_of(out: Path) -> Path:
    """Where what is finished of a run that writes `out` is kept."""
    return out.with_name(f"{out.name}.partial.safetensors")


def _metadata(mark: str) -> dict[str, str]:
    return {"format": _FORMAT, "fingerprint": mark}


def _rows(part: Mapping[str, Tensor]) -> int:
    return next(iter(part.values())).shape[0]

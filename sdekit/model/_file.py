"""A whole ScoreModel as one safetensors file.

Weights are the tensors; SDE, parameterization, label and data_std are one JSON text in the metadata. Nothing is
executed on loading. Only sdekit's own values are written: a class of the user's could not be found again.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .._checks import require_positive
from .._replace import read_tensors, write_tensors
from ..sde import VESDE, VPSDE, CosineVPSDE, KarrasSDE, RectifiedFlow, SubVPSDE, TableVPSDE
from ..sde.base import SDE
from .parameterization import (
    EDM,
    Data,
    LogSigmaLabel,
    Noise,
    Parameterization,
    Score,
    SigmaLabel,
    TimeLabel,
    V,
    Velocity,
)

_FORMAT = "sdekit.ScoreModel/1"
_VALUES: tuple[type[Any], ...] = (
    *(VPSDE, SubVPSDE, CosineVPSDE, TableVPSDE, VESDE, KarrasSDE, RectifiedFlow),
    *(Noise, Score, Data, Velocity, V, EDM),
    *(TimeLabel, LogSigmaLabel, SigmaLabel),
)
_RENAMED = {KarrasSDE: {"t_min": "sigma_min", "t_max": "sigma_max"}}


def _encode(value: Any) -> Any:
    """JSON of a value made of sdekit's dataclasses and numbers."""
    if isinstance(value, (int, float, str)) or value is None:
        return value
    if isinstance(value, Real):  # numpy's
        return float(value)
    if isinstance(value, tuple):
        return [_encode(part) for part in value]
    if type(value) not in _VALUES:
        raise ValueError(
            f"{value!r} is not one of sdekit's own values and could not be read back from a file. "
            "Use sdekit's SDEs, parameterizations and labels (TimeLabel, LogSigmaLabel, SigmaLabel, table_label), "
            "or save net.state_dict() yourself and build the ScoreModel in code."
        )
    names = _RENAMED.get(type(value), {})
    fields = [f.name for f in dataclasses.fields(value) if not f.name.startswith("_")]
    return {"class": type(value).__name__, **{names.get(f, f): _encode(getattr(value, f)) for f in fields}}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(part) for part in value)
    if not isinstance(value, dict):
        return value
    known = {cls.__name__: cls for cls in _VALUES}
    name, fields = value.get("class"), {key: part for key, part in value.items() if key != "class"}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"class {name!r} is unknown to this version of sdekit; known: {sorted(known)}")
    taken = set(inspect.signature(known[name]).parameters)
    if not fields.keys() <= taken:
        more = sorted(fields.keys() - taken)
        raise ValueError(f"{name} has {more}, which this version of sdekit does not know; known: {sorted(taken)}")
    try:
        return known[name](**{key: _decode(part) for key, part in fields.items()})
    except (AttributeError, TypeError) as error:  # fields are missing, or hold something else
        raise ValueError(f"{name} cannot be made of {fields}: {error}") from error


def _decode_facts(text: str | None) -> dict[str, Any]:
    """SDE, parameterization and data_std from the JSON text of a file.

    Raises:
        ValueError: They are not there.
    """
    if text is None:
        raise ValueError("it has no metadata 'model'")
    stored = json.loads(text)
    if not isinstance(stored, dict):
        raise ValueError(f"its metadata 'model' is {text!r}, and no JSON object")
    facts = {name: _decode(value) for name, value in stored.items()}
    for name, kind in (("sde", SDE), ("parameterization", Parameterization), ("data_std", Real)):
        if not isinstance(facts.get(name), kind):
            raise ValueError(f"its {name} is {facts.get(name)!r}; {kind.__name__} is needed")
    require_positive("data_std", facts["data_std"])
    return facts


def write_model(path: Any, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes weights and facts (SDE, parameterization, numbers) to `path`, replacing it in one move.

    Raises:
        ValueError: A fact is not one of sdekit's own values.
        OSError: The file cannot be written; an old one is still there.
    """
    text = json.dumps({name: _encode(value) for name, value in facts.items()})
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the network's state {name!r} is a {type(value).__name__}, and a file of weights holds tensors only: "
                "save net.state_dict() yourself and build the ScoreModel in code."
            )
    write_tensors(Path(path), weights, {"format": _FORMAT, "model": text})


def read_model(path: Any, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and facts that `write_model` put into `path`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another kind of file, or damaged.
    """
    try:
        tensors, metadata = read_tensors(path, device)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file: {error}.") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{str(path)!r} has format {metadata.get('format')!r}; {_FORMAT!r} is needed, "
            "a file written by ScoreModel.save."
        )
    try:
        return tensors, _decode_facts(metadata.get("model"))
    except (TypeError, ValueError) as error:  # of JSON too
        raise ValueError(
            f"{str(path)!r} is damaged, or of another version of sdekit (save it again, or use that version): {error}"
        ) from error

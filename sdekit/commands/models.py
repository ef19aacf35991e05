"""Where a command's model comes from, and the files of those that `sdekit train` makes.

digits            the network that is shipped
file.safetensors  one that `sdekit train` wrote: the network's shape is in the file's metadata
module:function   a function of the user's, called without arguments, that returns a ScoreModel
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .._checks import require_count
from .._replace import read_tensors, replace_file, write_tensors
from ..model.nets import MLP, UNet
from ..model.score_model import ScoreModel

_KINDS = ("mlp", "unet", "digits")


@dataclass(frozen=True)
class Architecture:
    """What a network of `sdekit train` is built from.

    Attributes:
        kind: "mlp" for any event shape, "unet" for images (C, H, W), "digits" for the network of the zoo.
        event: The event's shape.
        width: Of hidden layers, or channels at full resolution.
        depth: Hidden layers, or resolutions.
        dropout: Probability, while training.
        period: Of the slowest time feature, in units of the label.
    """

    kind: Literal["mlp", "unet", "digits"]
    event: tuple[int, ...]
    width: int
    depth: int
    dropout: float
    period: float

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind={self.kind!r}; one of {', '.join(_KINDS)} is needed.")
        for size in self.event:
            require_count("a size of event", size)
        require_count("width", self.width)
        require_count("depth", self.depth)
        for name, value in (("dropout", self.dropout), ("period", self.period)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0.0:
                raise ValueError(f"{name}={value!r}; a number of at least 0 is needed.")

    def build(self, seed: int) -> nn.Module:
        """The network, its first weights drawn by `seed` and not by torch's global generator.

        Raises:
            ValueError: A U-Net for events that are no images.
        """
        with torch.random.fork_rng(devices=[]):
            # Layers of torch draw their weights from the global generator: it is lent a state and put back.
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            if self.kind == "digits":
                from ..zoo.digits import CellNet

                return CellNet(None, self.width, self.depth, self.dropout)
            if self.kind == "mlp":
                return MLP(self.event, self.width, self.depth, residual=True, dropout=self.dropout, period=self.period)
            if len(self.event) != 3:
                raise ValueError(f"event shape {self.event}; a U-Net needs images (C, H, W): add an axis of 1 channel.")
            return UNet(self.event[0], self.width, self.depth, dropout=self.dropout, period=self.period)


def save_trained(path: Path, model: ScoreModel, architecture: Architecture) -> None:
    """Writes a trained model to `path`: what `ScoreModel.save` writes, and the architecture."""

    def write(part: Path) -> None:
        model.save(part)
        tensors, metadata = read_tensors(part)
        write_tensors(part, tensors, {**metadata, "architecture": json.dumps(asdict(architecture))})

    replace_file(path, write)


def load_trained(path: Path) -> tuple[ScoreModel, Architecture]:
    """The model that `save_trained` wrote, in evaluation mode, and its architecture.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another kind of file, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("architecture")
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file: {error}.") from error
    if text is None:
        raise ValueError(
            f"{str(path)!r} does not say what network it is for: only files of `sdekit train` do. "
            "For a network of yours, name a function that returns the ScoreModel: --model module:function."
        )
    try:
        facts = json.loads(text)
        if not isinstance(facts, dict) or not isinstance(facts.get("event"), list):
            raise ValueError(f"a JSON object with the list 'event' is needed, not {text}")
        architecture = Architecture(**{**facts, "event": tuple(facts["event"])})
        net = architecture.build(0)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} does not say what network it is for; it is damaged, or of another version of sdekit "
            f"(train it again, or use that version): {error}"
        ) from error
    return ScoreModel.load(path, net).eval(), architecture


def find_model(name: str) -> tuple[ScoreModel, tuple[int, ...] | None]:
    """The model of that name, on the CPU or where a user's function puts it, and the event's shape if it is known.

    Args:
        name: `digits`, a file of `sdekit train`, or `module:function`; modules are looked for in the current
            directory too.

    Raises:
        ValueError: There is no such model, or the function failed or returned something else.
        FileNotFoundError: There is no such file.
    """
    if name == "digits":
        from ..zoo import digits

        return digits.load(), digits.SHAPE
    if name.endswith(".safetensors"):
        model, architecture = load_trained(Path(name))
        return model, architecture.event
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"model {name!r}; 'digits', a file of `sdekit train`, or 'module:function' is needed.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), attribute)
        found = function()
    except Exception as error:  # whatever a user's module raises, the message has to name it
        raise ValueError(f"model {name!r} cannot be had: {type(error).__name__}: {error}") from error
    if not isinstance(found, ScoreModel):
        raise ValueError(f"model {name!r} returned a {type(found).__name__}; an sdekit.ScoreModel is needed.")
    return found, None

"""A network, an SDE and the meaning of the output: everything a solver asks of a model.

    score = grad log p_t(x),   noise = -sigma score,   data = E[x_0 | x_t] = (x + sigma^2 score) / alpha,
    velocity = f x - g^2/2 score, the drift of the probability flow.

The network is called once for any of them. Schedules are float64, states keep their dtype, and the network is called
in the dtype of its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import FLOATS, require_batch, require_positive
from .._tensor import column, tensor
from ..errors import NetworkError
from ..sde.base import SDE, as_time
from ._caller import Caller, Memory, steady, trusting, watching
from ._file import read_model, write_model
from ._labels import label_dtype, label_rows
from ._seen import WRITES, Precision, raised, require_answer, require_followed, usable, versions
from .parameterization import EDM, Data, Mix, Noise, Parameterization, Score, Velocity, conversion

_DEFAULT_DATA_STD = 0.5


class ScoreModel(nn.Module):
    """A score network bound to its SDE and parameterization.

    Args:
        net: Called as `net(input_scale * x, label, **condition)`; returns the shape of x.
        sde: The forward process the network was trained for.
        parameterization: What the output means; default `noise()`.
        data_std: The data's standard deviation, for grids only. None: EDM's sigma_data, else 0.5. Never taken from
            a batch: a result must not depend on it. A factor of 10 off costs about 25% more network calls.
        condition: Keyword arguments for the network: tensors of leading size B, or anything else as it is.

    Raises:
        TypeError: A wrong kind of argument.
        ValueError: data_std not positive.
    """

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        parameterization: Parameterization | None = None,
        data_std: float | None = None,
        condition: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        chosen = Noise() if parameterization is None else parameterization
        if not isinstance(net, nn.Module):
            raise TypeError(f"net is a {type(net).__name__}; a torch.nn.Module is needed: wrap a function in one.")
        if not isinstance(sde, SDE):
            raise TypeError(f"sde is a {type(sde).__name__}; an sdekit.SDE is needed, for example sdekit.VPSDE().")
        if not isinstance(chosen, Parameterization):
            raise TypeError(
                f"parameterization={chosen!r}; an sdekit.Parameterization is needed, for example sdekit.noise()."
            )
        if data_std is None:
            data_std = chosen.sigma_data if isinstance(chosen, EDM) else _DEFAULT_DATA_STD
        require_positive("data_std", data_std)
        self.net = net
        self.sde = sde
        self.parameterization = chosen
        self.data_std = float(data_std)
        self.bound: dict[str, Any] = dict(condition or {})
        for name, value in self.bound.items():
            require_followed(name, value)
        self._writes: bool | None = None  # whether the network writes into what it is given, once it was seen
        self._memory = Memory()
        self._precision = Precision()

    def condition(self, **condition: Any) -> ScoreModel:
        """This model with keyword arguments bound for its network, sharing the weights.

        Args:
            condition: Tensors of leading size B (one entry a sample), or anything else, passed as it is.
        """
        return self._with({**self.bound, **condition})

    def _with(self, bound: dict[str, Any]) -> ScoreModel:
        """This model with what is bound replaced; what was seen of its network is known there too."""
        other = ScoreModel(self.net, self.sde, self.parameterization, self.data_std, bound)
        other._writes, other._memory, other._precision = self._writes, self._memory, self._precision
        return other

    def _apply(self, fn: Any, recurse: bool = True) -> ScoreModel:
        """Moves bound tensors along with the weights (`to`, `cuda`, `double`)."""
        self.bound = {name: fn(value) if isinstance(value, Tensor) else value for name, value in self.bound.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def take(self, rows: Tensor) -> ScoreModel:
        """This model for the samples `rows` only: their rows of every bound tensor."""
        if not self.bound:
            return self
        return self._with({k: value[rows] if isinstance(value, Tensor) else value for k, value in self.bound.items()})

    def check_batch(self, batch: int) -> None:
        """Raises ValueError unless every bound tensor has `batch` rows."""
        for name, value in self.bound.items():
            if isinstance(value, Tensor) and (value.dim() == 0 or value.shape[0] != batch):
                raise ValueError(
                    f"condition {name}.shape={tuple(value.shape)}; a leading size of {batch} is needed, "
                    "an entry for each sample: use .expand(batch, ...)."
                )

    def output(self, x: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The network's own output F at (x, t), in the dtype of `x`.

        Args:
            x: State, (B, *event).
            t: Times, (B,) float64, within [t_min, t_max].
            dtype: What `network_dtype` says, for whoever has asked already.

        Raises:
            NetworkError: The network raised, or its output is not a floating tensor of the shape of `x`.
        """
        scale = self.parameterization.input_scale(self.sde, t)
        seen = x if scale is None else column(scale, x) * x
        return self.answer(seen, self.parameterization.label(self.sde, t), dtype)

    def answer(self, seen: Tensor, label: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The network's own output for its scaled input `seen` (B, *event) and label (B,), in the dtype of `seen`.

        Args:
            seen: Its input.
            label: Its label.
            dtype: What `network_dtype` says, for whoever has asked already.
        """
        return self._answer(seen, label, self.network_dtype(seen) if dtype is None else dtype)

    def caller(self, x: Tensor, labels: tuple[float, ...], keeps: bool = True) -> Caller:
        """The network's own output as a function of its scaled input, like `x` (B, *event), and of a label's number.

        Inputs may be kept, and with `keeps` outputs too: a network found to write into its input, or to answer in the
        same buffer again, is given copies and its answers are copied.
        """
        dtype, net = self.network_dtype(x), self.net
        rows = label_rows(labels, x.shape[0], label_dtype(dtype), x.device)
        memory = self._memory.about(net)

        def check(out: Any, seen: Tensor) -> Tensor:
            return self._checked(out, seen, dtype)

        def answer(seen: Tensor, number: int) -> Tensor:
            return self._answer(seen, rows[number], dtype)

        if self._writes is False and x.dtype is dtype and (memory.shared is False or not keeps):
            return trusting(net, rows, usable(self.bound), x.shape, dtype, check, keeps)
        return watching(answer, memory) if keeps else answer

    def asker(self, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`answer` for inputs like `x`, with as little around each call as what was seen of the network allows."""
        dtype = self.network_dtype(x)

        def check(out: Any, seen: Tensor) -> Tensor:
            return self._checked(out, seen, dtype)

        if self._writes is False and x.dtype is dtype and self.knows_precision(x):
            return steady(self.net, usable(self.bound), label_dtype(dtype), check)
        return lambda seen, label: self._answer(seen, label, dtype)

    def network_dtype(self, x: Tensor) -> torch.dtype:
        """What the network computes in: the type of its parameters, that of `x` where it has none."""
        return next((p.dtype for p in self.net.parameters() if p.dtype in FLOATS), x.dtype)

    def precision(self, x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
        """What its answers are rounded to: the coarsest of what it computes in, was seen to answer in, and autocast's.

        Args:
            x: Its input.
            dtype: What `network_dtype` says, for whoever has asked already.
        """
        return self._precision.of(x, self.network_dtype(x) if dtype is None else dtype)

    def knows_precision(self, x: Tensor) -> bool:
        """Whether the network has been asked for an input like `x`, so that nothing about `precision` is to come."""
        return self._precision.known(x, self.network_dtype(x))

    def is_perceptron(self, x: Tensor) -> bool:
        """Whether a call like that was seen to use each of its matrices for one row a sample, as a perceptron's."""
        return self._precision.perceptron(x, self.network_dtype(x))

    def ask_apart(self, x: Tensor) -> None:
        """Has `is_perceptron` say no from now on: its answers for more samples at once are not those for each."""
        self._precision.ask_apart(x, self.network_dtype(x))

    def _answer(self, x: Tensor, label: Tensor, dtype: torch.dtype) -> Tensor:
        """What the network of that dtype says of its input x, checked, in the dtype of `x`."""
        try:  # what has the type already is not asked to take it: that costs as much as a small operation
            kind = label_dtype(dtype)
            seen, level = (
                x if x.dtype is dtype else x.to(dtype),
                label if label.dtype is kind else tensor(label, kind),
            )
            bound, copies = self.bound, self._writes is not False
            if bound:
                bound = usable(bound)
            if seen is x and (copies or x.is_inference()):
                seen = x.clone()
            if copies:
                level = level.clone()
                bound = {name: part.clone() if isinstance(part, Tensor) else part for name, part in bound.items()}
            before, others = versions(seen), versions(level, bound)
            out = self._precision.ask(self.net, x, dtype, seen, level, bound)
        except Exception as error:
            raise raised(error, x, dtype) from error
        wrote, spoilt = versions(seen) != before, versions(level, bound) != others
        if not copies and (spoilt or (wrote and seen is x)):
            raise NetworkError(WRITES)
        wrote = wrote or spoilt
        if wrote or (self._writes is None and not seen.is_inference()):
            self._writes = wrote
        return self._checked(out, x, dtype)

    def _checked(self, out: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the network of that dtype answered to `x`, in the dtype of `x`, if it is an answer."""
        answer = require_answer(out, x)
        self._precision.note(answer, x, dtype)
        return answer if answer.dtype is x.dtype else answer.to(x.dtype)

    def _as(self, target: Parameterization, x: Tensor, t: Tensor | float) -> Tensor:
        require_batch("x", x)
        time = as_time(t).to(x.device)
        if time.dim() > 1 or (time.dim() == 1 and time.shape[0] != x.shape[0]):
            raise ValueError(f"t.shape={tuple(time.shape)}; ({x.shape[0]},) or a number is needed.")
        time = time.expand(x.shape[0])
        return self.as_mix(x, time, self.output(x, time), target.mix(self.sde, time))

    def as_mix(self, x: Tensor, t: Tensor, out: Tensor, target: Mix) -> Tensor:
        """The quantity a x0 + b eps of weights `target` from the state and the network's output."""
        mine = self.parameterization.mix(self.sde, t)
        weights = conversion(self.sde.alpha(t), self.sde.sigma(t), mine, target)
        return column(weights.x, x) * x + column(weights.output, x) * out

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The score grad log p_t(x), the shape and dtype of `x` (B, *event); `t` is (B,) or a number."""
        return self._as(Score(), x, t)

    def noise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The predicted noise eps = -sigma score, the shape and dtype of `x` (B, *event)."""
        return self._as(Noise(), x, t)

    def data(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The denoised data E[x_0 | x_t], the shape and dtype of `x` (B, *event)."""
        return self._as(Data(), x, t)

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The drift dx/dt of the probability flow, the shape and dtype of `x` (B, *event)."""
        return self._as(Velocity(), x, t)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The score at (x, t)."""
        return self.score(x, t)

    def save(self, path: Any) -> None:
        """Writes weights, SDE, parameterization and data_std as one safetensors file at `path`, in one move.

        Raises:
            ValueError: The SDE, parameterization or label is not one of sdekit's: the file could not be read back.
            OSError: The file cannot be written; an old one is still there.
        """
        facts = {"sde": self.sde, "parameterization": self.parameterization, "data_std": self.data_std}
        write_model(path, getattr(self.net, "_orig_mod", self.net).state_dict(), facts)  # as it was not compiled

    @classmethod
    def load(cls, path: Any, net: nn.Module, *, device: torch.device | str = "cpu") -> ScoreModel:
        """The model saved at `path`, its weights loaded into `net`.

        Args:
            path: A file written by `save`.
            net: A network of the same architecture, its weights overwritten.
            device: Where the weights go.

        Raises:
            ValueError: Not such a file, or the weights do not fit `net`.
        """
        weights, facts = read_model(path, device)
        net.to(device)
        try:
            plain = {name.removeprefix("_orig_mod."): part for name, part in weights.items()}
            getattr(net, "_orig_mod", net).load_state_dict(plain)
        except RuntimeError as error:
            raise ValueError(f"the weights of {str(path)!r} do not fit the network: {error}") from error
        return cls(net, facts["sde"], facts["parameterization"], facts["data_std"])

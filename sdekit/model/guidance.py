"""Guided models: two score fields, or a score field and a classifier, extrapolated into one.

    classifier-free   F = F_u + w (F_c - F_u)                     F: noise, data, score or any other parameterization
    classifier        score = score_model + w grad_x log p_t(y | x)

Noise, data and score are affine in one another with coefficients that depend on t only, so extrapolating one of them is
extrapolating all. w = 1 is the conditional model (of an exact classifier: the posterior), w = 0 the unconditional one.

The result is a ScoreModel, so whatever takes one takes it. Its log density is that of the guided field's own flow. It
is *not* that of a product p(x) p(y|x)^w: noising does not commute with the product, so the guided field is the score
of that product's diffusion only for w = 0 and w = 1, and for learned or guided fields of no diffusion at all. Nor is it
the gradient of its own flow's log density, which the control of a likelihood takes it for: at w above 2 its estimate is
too small for a part of the samples, and `log_likelihood` warns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._checks import require_positive
from .._numbers import sigmoid
from .._tensor import column
from ..sde.base import as_time
from .parameterization import time_of_label
from .score_model import ScoreModel

Scale: TypeAlias = float | Callable[[Tensor], Tensor]

_OTHER, _CLASSIFIER = "unconditional_", "classifier_"


@dataclass(frozen=True)
class GuidanceInterval:
    """A scale that guides within an interval of half_log_snr only, and is 1 (the conditional model) elsewhere.

    The ends are smooth, 1 + (scale - 1) logistic((l - low)/width) logistic((high - l)/width): at a jump an adaptive
    solver rejects step after step, and a fixed grid loses its order.

    Args:
        scale: Within the interval.
        low: Its noisier end, half_log_snr = log(alpha/sigma).
        high: Its cleaner end, above `low`.
        width: Of the ends, > 0.
    """

    scale: float
    low: float
    high: float
    width: float = 0.25

    def __post_init__(self) -> None:
        require_positive("width", self.width)
        if not all(map(math.isfinite, (self.scale, self.low, self.high))) or not self.low < self.high:
            raise ValueError(
                f"scale={self.scale!r}, low={self.low!r}, high={self.high!r}; finite numbers, low < high, are needed."
            )

    def __call__(self, half_log_snr: Tensor) -> Tensor:
        inside = sigmoid((half_log_snr - self.low) / self.width)
        return 1.0 + (self.scale - 1.0) * inside * sigmoid((self.high - half_log_snr) / self.width)


def guided(conditional: ScoreModel, unconditional: ScoreModel, scale: Scale) -> ScoreModel:
    """The classifier-free guided model, a ScoreModel: unconditional + scale (conditional - unconditional).

    Both networks are called at every evaluation. Conditions bound to the two models stay bound, each to its own, and
    follow their samples; in the result those of the unconditional model are named `unconditional_...`, and
    `.condition(label=y)` binds for the conditional one. A saved file holds both networks' weights; as for any model,
    not what is bound to it, and not the scale: load it into `guided(..).net` of untrained models.

    Args:
        conditional: Its parameterization and data_std are those of the result.
        unconditional: Of the same SDE, in any parameterization; `conditional.condition(..)` with the label that stands
            for "none", where one network is both.
        scale: w, a finite number, or a function of half_log_snr (B,) float64 that returns w (B,), such as a
            `GuidanceInterval`. 1 is the conditional model.

    Raises:
        TypeError: Not ScoreModels.
        ValueError: Another SDE, a scale that is not finite, or a name that both kinds of condition would have.
    """
    for name, given in (("conditional", conditional), ("unconditional", unconditional)):
        _require_model(name, given)
    if conditional.sde != unconditional.sde:
        raise ValueError(
            f"conditional.sde={conditional.sde}, unconditional.sde={unconditional.sde}; one SDE is needed: the two "
            "fields must be of the same noise level at the same time."
        )
    _check_scale(scale, conditional)
    bound = _joined(conditional.bound, unconditional.bound, _OTHER)
    net = _ClassifierFree(_plain(conditional), _plain(unconditional), scale)
    return ScoreModel(net, conditional.sde, conditional.parameterization, conditional.data_std, bound)


def strength(model: ScoreModel) -> float:
    """The scale w of a classifier-free guided model, where it is a number or an interval's; 1 for any other model."""
    scale = model.net.scale if isinstance(model.net, _ClassifierFree) else 1.0
    if isinstance(scale, GuidanceInterval):
        return scale.scale
    return 1.0 if callable(scale) else scale


def classifier_guided(
    model: ScoreModel, log_prob_of_label: Callable[..., Tensor], scale: Scale, **condition: Any
) -> ScoreModel:
    """The classifier-guided model, a ScoreModel: score + scale grad_x log p_t(label | x).

    Args:
        model: The unconditional model.
        log_prob_of_label: A module (or function) called (x, t, **condition) with noised states x (B, *event) and t (B,)
            float64, returns log-probabilities (B,), each of its own sample. Twice differentiable in x where a
            likelihood is asked: piecewise linear logits (ReLU) have no divergence.
        scale: w, a finite number, or a function of half_log_snr (B,) float64 that returns w (B,).
        condition: For `log_prob_of_label`: the label asked for, for example; tensors of leading size B follow their
            samples. In the result they are named `classifier_...`.

    Raises:
        TypeError: Not a ScoreModel, or nothing that can be called.
        ValueError: A scale that is not finite, or a name that both kinds of condition would have.
    """
    _require_model("model", model)
    given: object = log_prob_of_label
    if not callable(given):
        kind = type(given).__name__
        raise TypeError(f"log_prob_of_label is a {kind}; a torch.nn.Module or a function (x, t) -> (B,) is needed.")
    _check_scale(scale, model)
    net = _Classified(_plain(model), log_prob_of_label, scale)
    bound = _joined(model.bound, condition, _CLASSIFIER)
    return ScoreModel(net, model.sde, model.parameterization, model.data_std, bound)


class _ClassifierFree(nn.Module):
    """w F_c + (1 - w) F_u in the conditional model's parameterization, called as its network is."""

    def __init__(self, conditional: ScoreModel, unconditional: ScoreModel, scale: Scale) -> None:
        super().__init__()
        self.conditional = conditional
        self.unconditional = unconditional
        self.scale = scale

    def forward(self, x: Tensor, label: Tensor, /, **condition: Any) -> Tensor:
        mine, others = _split(condition, _OTHER)
        one, other = self.conditional.condition(**mine), self.unconditional.condition(**others)
        own = one.answer(x, label)
        if one.parameterization == other.parameterization:  # the same question to both, unrounded
            base = other.answer(x, label)
        else:
            state, t = _asked(one, x, label)
            base = other.as_mix(state, t, other.output(state, t), one.parameterization.mix(one.sde, t))
        if not callable(self.scale):
            return self.scale * own + (1.0 - self.scale) * base
        weight = _weight(self.scale, one, label)
        return column(weight, own) * own + column(1.0 - weight, own) * base


class _Classified(nn.Module):
    """F = a data + b noise with the score moved by w grad log p(y|x): noise by -w sigma, data by w sigma^2/alpha."""

    def __init__(self, model: ScoreModel, log_prob_of_label: Callable[..., Tensor], scale: Scale) -> None:
        super().__init__()
        self.model = model
        self.log_prob_of_label = log_prob_of_label
        self.scale = scale

    def forward(self, x: Tensor, label: Tensor, /, **condition: Any) -> Tensor:
        mine, others = _split(condition, _CLASSIFIER)
        model = self.model.condition(**mine)
        own = model.answer(x, label)
        state, t = _asked(model, x, label)
        mix, sigma = model.parameterization.mix(model.sde, t), model.sde.sigma(t)
        weight = _weight(self.scale, model, label) if callable(self.scale) else torch.full_like(t, self.scale)
        gain = weight * sigma * (mix.data * torch.exp(-model.sde.half_log_snr(t)) - mix.noise)
        return own + column(gain, own) * self._gradient(state, t, others)

    def _gradient(self, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        """grad_x log p_t(y|x), the shape of `x`, with its graph where one is kept."""
        keep = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if x.is_inference():
                x, t = x.clone(), t.clone()
            leaf = x if keep and x.requires_grad else x.detach().requires_grad_()
            value = self.log_prob_of_label(leaf, t, **condition)
            if value.shape != t.shape:
                raise ValueError(
                    f"log_prob_of_label returned shape {tuple(value.shape)}; ({t.shape[0]},) is needed, the log-"
                    "probability of each sample's own label."
                )
            return torch.autograd.grad(value.sum(), leaf, create_graph=keep)[0]


def _asked(model: ScoreModel, seen: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The state (B, *event) and time (B,) that a network's input and label stand for."""
    t = time_of_label(model.parameterization.label, model.sde, label)
    scale = model.parameterization.input_scale(model.sde, t)
    return seen if scale is None else seen / column(scale, seen), t


def _weight(scale: Callable[[Tensor], Tensor], model: ScoreModel, label: Tensor) -> Tensor:
    """(B,) float64 w at a network's label."""
    t = time_of_label(model.parameterization.label, model.sde, label)
    return as_time(scale(model.sde.half_log_snr(t))).to(t.device)


def _require_model(name: str, model: Any) -> None:
    if not isinstance(model, ScoreModel):
        raise TypeError(f"{name} is a {type(model).__name__}; an sdekit.ScoreModel is needed.")


def _check_scale(scale: Any, model: ScoreModel) -> None:
    """Raises unless the scale is a finite number, or a function with finite values from t_min to t_max."""
    if callable(scale):
        levels = model.sde.half_log_snr(torch.tensor([model.sde.t_max, model.sde.t_min], dtype=torch.float64))
        found = scale(levels)
        if not isinstance(found, Tensor) or found.shape != (2,) or not bool(torch.isfinite(found).all()):
            raise ValueError(f"scale({levels}) returned {found!r}; finite weights of the same shape (2,) are needed.")
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale={scale!r} ({type(scale).__name__}); a number or a function of half_log_snr is needed.")
    elif not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}; a finite number is needed.")


def _plain(model: ScoreModel) -> ScoreModel:
    """The model without its conditions: those are bound to the guided one, whose rows are taken."""
    return ScoreModel(model.net, model.sde, model.parameterization, model.data_std)


def _joined(mine: dict[str, Any], others: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Conditions of both kinds under one roof, the others' names prefixed."""
    clash = [name for name in mine if name.startswith(prefix)]
    if clash:
        raise ValueError(f"condition {clash[0]!r} begins with {prefix!r}, which marks the other conditions: rename it.")
    return {**mine, **{prefix + name: value for name, value in others.items()}}


def _split(condition: dict[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `_joined`."""
    mine = {name: value for name, value in condition.items() if not name.startswith(prefix)}
    return mine, {name[len(prefix) :]: value for name, value in condition.items() if name.startswith(prefix)}

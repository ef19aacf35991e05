"""Products of a grid's nodes behind the path: several nodes' from one call of the network.

The path needs the network's answers one after another, but a trace or a probe's product acts on nothing. Where a
network's time is that of reading its weights and of launching its operations, 64 rows take little longer than one: so
along the path it is asked for its answers alone, and behind it for the products of many nodes at once, which makes each
forward pass twice. For perceptrons and few rows that takes the shorter time (`worth`).

A network may say something else of a row in another call: one that reads the first sample's label for all, or takes
batches of one size only. So its answers are compared, for the last node of each call its products too, and where they
differ by more than rounding it is asked for every node by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._memory import ran_out, release
from ._tensor import column, flatten
from .divergence import Exact, Hutchinson
from .errors import NetworkError, SdekitWarning
from .likelihood_flow import LikelihoodFlow

_FEW = 4  # products of a node up to which it is worth it; at 8 a perceptron gains nothing (docs/decisions)
_AT_ONCE, _NODES = 64, 8  # rows of a call, at most, and nodes of it, at least
_VALUES, _PRODUCTS = 1e3, 1e4  # units in the last place that answers of one row may differ by, and their products

_OTHERS = "of the same input and label it said something else beside other samples or labels"


class Shown(NamedTuple):
    """A node that waits for its products.

    Attributes:
        seen: (B, *event) what the network was shown.
        slope: (B, *event) its answer, plus `tilt` times `seen`.
        tilt: That.
        label: (B,) its label.
        probes: (P, B, D); None for an exact trace.
        known: What was asked for it along the path; None: nothing.
    """

    seen: Tensor
    slope: Tensor
    tilt: float
    label: Tensor
    probes: Tensor | None
    known: Tensor | None


def products_of(
    term: LikelihoodFlow, field: Callable[[Tensor], Tensor], seen: Tensor, probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The value (B, *event) of `field` at `seen`, and its trace (B, 1) or products (P, B, *event) of `probes`."""
    if isinstance(term.divergence, Hutchinson):
        assert probes is not None
        return term.divergence.push(field, seen, probes.reshape(-1, *seen.shape))
    assert isinstance(term.divergence, Exact)  # there is no third kind of ours
    value = term.divergence.evaluate(field, seen, None)
    return value.value, value.traces


def worth(term: LikelihoodFlow, seen: Tensor, answer: Tensor, block: int) -> bool:
    """Whether products are asked for behind the path.

    Args:
        term: Whose.
        seen: (B, *event) what the network was shown at a first node.
        answer: What `products_of` gave there.
        block: Nodes at once, at most.
    """
    divergence, batch = term.divergence, seen.shape[0]
    if isinstance(divergence, Hutchinson):
        products = 0 if divergence.mode == "jvp" else batch * answer.shape[0]
    else:
        products = seen.numel()
    return block >= _NODES and 0 < products <= _FEW and term.model.is_perceptron(seen)


class Behind:
    """Who asks for them.

    Attributes:
        block: Nodes at once, at most.
        calls: Calls of the network so far.
        paid: Rows of these.
        alone: Whether every node is asked by itself.
    """

    def __init__(self, term: LikelihoodFlow, batch: int) -> None:
        self.term = term
        self.block = max(1, _AT_ONCE // batch)
        self.calls, self.paid = 0, 0
        self.alone = False

    def answers(self, nodes: Sequence[Shown]) -> tuple[list[Tensor], NetworkError | None]:
        """What `products_of` gives for each node, up to the one where the network raised an error, if it did."""
        together = len(nodes) > 1 and not self.alone
        why, short = _OTHERS, False
        if together:
            try:
                found = self._at_once(nodes)
                if found is not None:
                    return found, None
            except NetworkError as error:
                why, short = str(error), ran_out(error)
            if short:
                release(nodes[0].seen.device)
        model, single = self.term.model, []
        for node in nodes:
            if node.known is not None:
                single.append(node.known)
                continue
            try:
                single.append(self._ask(model.answer, node.seen, node.label, node.probes)[1])
            except NetworkError as error:
                return single, error
        if together:
            self.alone = True
        if together and not short:  # that memory ran out says nothing of the network
            model.ask_apart(nodes[0].seen)
            warnings.warn(
                f"the network cannot be asked for several nodes of a grid at once, so it is asked for each by itself: "
                f"{why}. It should answer each row of its batch by that row and its own label.",
                SdekitWarning,
                stacklevel=2,
            )
        return single, None

    def _at_once(self, nodes: Sequence[Shown]) -> list[Tensor] | None:
        """By one call; None where the network says something else than along the path."""
        many, batch = len(nodes), nodes[0].seen.shape[0]
        seen, slope, label = map(torch.cat, zip(*((n.seen, n.slope, n.label) for n in nodes), strict=True))
        probes = [node.probes for node in nodes if node.probes is not None]
        model = self.term.model.take(torch.arange(batch, device=seen.device).repeat(many))
        value, found = self._ask(model.answer, seen, label, torch.cat(probes, 1) if probes else None)
        tilts = torch.tensor([node.tilt for node in nodes], dtype=seen.dtype, device=seen.device)
        tilt = column(tilts.repeat_interleave(batch), seen)
        off, own, whole = (flatten(part).norm(dim=1) for part in (value + tilt * seen - slope, value, slope))
        unit = torch.finfo(seen.dtype).eps
        differs = (off > _VALUES * unit * (own + whole)).any()
        answers = list(torch.split(found, batch, 1 if probes else 0))
        known = nodes[-1].known
        if known is not None:
            least = 0.0 if probes else 1.0  # an exact trace may be a small difference of its parts
            differs |= (known - answers[-1]).norm() > _PRODUCTS * unit * (known.norm() + least)
        return None if bool(differs) else answers

    def _ask(
        self, answer: Callable[[Tensor, Tensor], Tensor], seen: Tensor, label: Tensor, probes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self.calls, self.paid = self.calls + 1, self.paid + seen.shape[0]
        return products_of(self.term, lambda state: answer(state, label), seen, probes)

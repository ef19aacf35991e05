"""What stands between a number called log p and the log density that is meant, one line for each cause.

    trace        the probes' noise in the log determinant                    a standard error
    solver       the integration                                             an estimate, mostly above the true error
    truncation   log p at t_min is not log p_0                               an estimate, for smooth densities
    prior        the terminal law is not the law of x at t_max               an estimate, by the model's own score there
    rounding     states and network of finite precision                      an estimate, mostly above the true error

The first two and the last come with every `log_likelihood`; the two ends are asked for with `budget=True`, for they
take a few evaluations more. With a learned network the ends say what separates the flow's density from log p_0 of the
law that its score describes; none of the lines knows how far that law is from the data's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TRUNCATION, _TERMINAL = "truncation at t_min", "terminal law"
_ENDS_COUNT = 1.25


class Line(NamedTuple):
    """One cause of error.

    Attributes:
        name: Of the cause.
        nats: (B,) float64 its size in each sample, >= 0; None where it was not estimated.
        kind: What `nats` is: a standard error or an estimate.
        source: How it was obtained.
        remedy: The argument that reduces it.
    """

    name: str
    nats: Tensor | None
    kind: str
    source: str
    remedy: str


class Ends(NamedTuple):
    """(B,) float64 nats, signed: what was left out at the two ends; `end` and `moments` as they were asked for.

    Attributes:
        truncation: Estimate of log p_0 less the density reported, from the data's end.
        spread: (B,) standard error of it, from the trace's probes.
        mismatch: Estimate of the log density of x at t_max less that of the terminal law.
        end: The correction that was applied.
        moments: Whether the terminal law was matched to the data's moments.
    """

    truncation: Tensor
    spread: Tensor
    mismatch: Tensor
    end: str
    moments: bool


class Budget(NamedTuple):
    """The lines, and what they come to; printed, a table of medians and largest values over the samples.

    Attributes:
        lines: One a cause.
        quantile: How many standard errors a 95% interval reaches: 1.96, or Student's of few fixed probes.
    """

    lines: tuple[Line, ...]
    quantile: float = 1.96

    def total(self) -> Tensor:
        """(B,) float64 nats: all lines added, the standard error `quantile` times, the two ends 1.25 times.

        Causes seldom all add up, so it is conservative; but an end's line is an estimate of what is missing, as often
        below as above it, and a good one only where it is small: a quarter more is for where it is nearly all there is.
        """
        parts = [self._times(line) * line.nats for line in self.lines if line.nats is not None]
        return sum(parts, torch.zeros_like(parts[0]))

    def _times(self, line: Line) -> float:
        """How often a line counts."""
        if line.kind == "standard error":
            return self.quantile
        return _ENDS_COUNT if line.name in (_TRUNCATION, _TERMINAL) else 1.0

    def __str__(self) -> str:
        rows = [("error, nats", "median", "largest", "what it is", "made smaller by")]
        for line in self.lines:
            rows.append((line.name, *_sizes(line.nats), f"{line.kind}: {line.source}", line.remedy))
        rows.append(
            (
                "all together",
                *_sizes(self.total()),
                f"sum, the standard error {self.quantile:.3g} times, ends {_ENDS_COUNT:g} times",
                "",
            )
        )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        made = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join((made[0], "  ".join("-" * width for width in widths), *made[1:]))


def _sizes(nats: Tensor | None) -> tuple[str, str]:
    known = nats[~nats.isnan()] if nats is not None else torch.zeros(0)
    if not known.numel():
        return "?", "?"
    return f"{float(known.median()):.2g}", f"{float(known.max()):.2g}"


_AT_END = {
    "marginal": ("first order in (sigma/alpha)^2, by the score at t_min", 'end="extrapolate", or a smaller t_min'),
    "heat": ("the next order, by two more scores", 'end="extrapolate"'),
    "extrapolate": ("from how fast the orders before it fell", "a smaller t_min"),
}


def budget_of(
    std_error: Tensor, solver_error: Tensor, rounding: Tensor, ends: Ends | None, quantile: float = 1.96
) -> Budget:
    """The budget of a log likelihood; without `ends` two lines are not estimated.

    Args:
        std_error: (B,) nats.
        solver_error: (B,) nats; NaN where there is no estimate.
        rounding: (B,) nats.
        ends: From `log_likelihood(..., budget=True)`.
        quantile: How many standard errors a 95% interval of the trace reaches.
    """
    asked = ("not estimated", "pass budget=True")
    left = Line(_TRUNCATION, None, *asked, 'end="extrapolate"')
    right = Line(_TERMINAL, None, *asked, "data_moments=")
    if ends is not None:
        how, remedy = _AT_END[ends.end]
        left = Line(left.name, ends.truncation.abs() + 1.96 * ends.spread, "estimate", how, remedy)
        law = "the moment-matched law" if ends.moments else "the SDE's prior"
        further = "a larger t_max" if ends.moments else "data_moments="
        right = Line(right.name, ends.mismatch.abs(), "estimate", f"the model's score at t_max against {law}", further)
    return Budget(
        (
            Line("trace", std_error, "standard error", "of the trace's probes", "divergence=Exact(), or more probes"),
            Line("solver", solver_error, "estimate", "local errors in nats, added up", "tolerance="),
            left,
            right,
            Line("rounding", rounding, "estimate", "that of states and slopes, in nats", "double precision"),
        ),
        quantile,
    )

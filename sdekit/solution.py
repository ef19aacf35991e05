"""What a solve returns, per sample: where it got to, how it ended, what it cost."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .budget import Budget, Ends, budget_of
from .units import bits_per_dim


class Status(IntEnum):
    """How a sample ended.

    `DONE` and `LOOSE` arrived: `LOOSE` says that by its own estimate the error exceeds the tolerance (the cap on
    evaluations was reached, or the estimate came out above).
    """

    RUNNING = 0
    DONE = 1
    LOOSE = 2
    NOT_FINITE = 3
    STEP_FLOOR = 4
    BUDGET = 5
    TIME_LIMIT = 6
    INTERRUPTED = 7

    @property
    def arrived(self) -> bool:
        """Whether the result is valid."""
        return self in (Status.DONE, Status.LOOSE)


EXPLANATIONS = {
    Status.RUNNING: "not finished",
    Status.LOOSE: "arrived with an estimated error above the tolerance",
    Status.NOT_FINITE: "the state or the network's output is not finite",
    Status.STEP_FLOOR: "no step is small enough for the tolerance",
    Status.BUDGET: "max_evaluations reached",
    Status.TIME_LIMIT: "wall_time reached",
    Status.INTERRUPTED: "interrupted",
}


class Stats(NamedTuple):
    """What each sample cost.

    Attributes:
        evaluations: (B,) int64 network evaluations it needed, start-up and rejected steps included; one that is made
            twice, for the path and for its products, counts once.
        accepted: (B,) int64 accepted steps.
        rejected: (B,) int64 rejected steps.
        calls: Network calls of the whole solve; samples of one call share it.
        paid: Samples in all these calls together: evaluations computed, needed or not.
    """

    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor
    calls: int
    paid: int

    def plus(self, calls: int, needed: Tensor | int = 1) -> Stats:
        """These, and `calls` more of all samples, needed by those of `needed` (B,)."""
        return self._replace(
            evaluations=self.evaluations + calls * needed,
            calls=self.calls + calls,
            paid=self.paid + calls * len(self.evaluations),
        )

    @property
    def useful(self) -> float:
        """The share of the evaluations computed that some sample needed; 1 where none was computed."""
        return float(self.evaluations.sum()) / self.paid if self.paid else 1.0


class Path(NamedTuple):
    """Where a solve went, the start first; samples that took fewer steps stay at their last.

    Attributes:
        t: (B, n + 1) float64 times.
        x: (B, n + 1, *event) states.
    """

    t: Tensor
    x: Tensor


class Solution(NamedTuple):
    """Where a solve ended.

    Attributes:
        x: (B, *event) the state reached.
        t: (B,) float64 the time reached.
        status: (B,) int64 of `Status`.
        stats: What it cost.
        report: What the solver has to say besides, by name, (B,) each: acceptance rates of correctors, for example.
        path: All states on the way if they were asked for, else None.
    """

    x: Tensor
    t: Tensor
    status: Tensor
    stats: Stats
    report: dict[str, Tensor]
    path: Path | None = None


class LogLikelihood(NamedTuple):
    """Log densities of a batch, with what is known of their errors. All (B,) unless said otherwise.

    Attributes:
        log_prob: float64 nats, density in the units of x; NaN where `status` did not arrive.
        std_error: float64 nats, standard error from the trace's probes; 0 for exact traces.
        solver_error: float64 nats, estimate of the integration's error, mostly above it (with fixed grids an indicator;
            NaN for controllers in the state's norm).
        log_prior: float64 nats, log density of `latent` under the terminal law.
        log_det: float64 nats, log determinant; log_prob = log_prior + log_det.
        latent: (B, *event) x at t_max (where a sample did not arrive: where it got to).
        status: int64 of `Status`.
        stats: Cost.
        t: float64 time reached.
        by_probe: (B, K) float64 nats, `log_prob` as each of K >= 2 probes along the path has it, alone: their mean is
            `log_prob`; None for one probe or none. (What a correction at the data's end adds is that of all probes.)
        rounding: float64 nats, estimate of what the precision of states and network leaves, mostly above it (NaN like
            `solver_error`).
        ends: What was left out at the two ends, or None: asked for with `budget=True`.
        whole: bool, whether every value of a sample was an integer, or one over 255: then it has a probability, not a
            density.
        reach: float64, mean square of `latent` in units of the prior's: about 1 where a network knows the data. From 5
            on `solver_error` may be too small by any factor: the control trusts the network's score, and there the
            flow's own density has another gradient.
        degrees: K - 1 where `std_error` is the spread of K >= 2 fixed probes: its degrees of freedom. Else None.
    """

    log_prob: Tensor
    std_error: Tensor
    solver_error: Tensor
    log_prior: Tensor
    log_det: Tensor
    latent: Tensor
    status: Tensor
    stats: Stats
    t: Tensor
    by_probe: Tensor | None = None
    rounding: Tensor | None = None
    ends: Ends | None = None
    whole: Tensor | None = None
    reach: Tensor | None = None
    degrees: int | None = None

    def budget(self) -> Budget:
        """The error budget: trace, solver, both ends and rounding, each with its source and its remedy.

        The two ends are in it where `log_likelihood` was given `budget=True`.
        """
        unknown = torch.full_like(self.std_error, math.nan)
        rounding = unknown if self.rounding is None else self.rounding
        return budget_of(self.std_error, self.solver_error, rounding, self.ends, quantile(self.degrees, 0.95))

    def margin(self, level: float = 0.95) -> Tensor:
        """(B,) float64 nats to either side of `log_prob` that cover what the probes left, at a level of confidence.

        `std_error` times the normal law's quantile; of K >= 2 fixed probes, whose spread it is, times Student's with
        K - 1 degrees of freedom.

        Args:
            level: Between 0 and 1.

        Raises:
            ValueError: A level that is none.
        """
        return quantile(self.degrees, level) * self.std_error

    def bits_per_dim(self, levels: int = 256, low: float = -1.0, high: float = 1.0) -> Tensor:
        """(B,) float64 bits per dimension of data quantised to `levels` equal bins of [low, high], dequantised.

        -log2 p(x) / D - log2((high - low) / levels): the offset is that of a bin's width in the units of x. For
        8-bit images in [-1, 1] it is +7, in [0, 1] +8. Of dequantised x only: of integers it means nothing.

        Args:
            levels: Number of bins, >= 2.
            low: Lower edge of the first bin.
            high: Upper edge of the last bin.

        Raises:
            ValueError: All values of all samples were integers, or integers over 255; or levels and edges that make
                no bins.
        """
        if self.whole is not None and len(self.whole) and bool(self.whole.all()):
            raise ValueError(
                f"all {len(self.log_prob)} samples are integers, or integers over 255: levels not dequantised "
                "have probabilities, not densities, and bits/dim of a density there mean nothing. Use "
                "sdekit.discrete_log_likelihood, or add noise within each level's bin first."
            )
        return bits_per_dim(self.log_prob, self.latent.shape[1:].numel(), levels, low, high)


def quantile(degrees: int | None, level: float) -> float:
    """How many standard errors an interval of that confidence reaches to either side."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level!r}; a confidence between 0 and 1 is needed, for example 0.95.")
    from scipy.special import ndtri, stdtrit  # here, because it takes as long to import as all of this package

    tail = 0.5 * (1.0 + level)
    return float(ndtri(tail) if degrees is None else stdtrit(float(degrees), tail))


class DiscreteLogLikelihood(NamedTuple):
    """Lower bounds of the log-probabilities of a batch of integers, with what is known of their errors.

    Attributes:
        log_prob: (B,) float64 nats, of a probability, not of a density; NaN where `status` did not arrive.
        std_error: (B,) float64 nats, standard error over the draws, the probes' noise included; NaN with one draw. For
            the importance bound of first order, and too small: by a third where `effective_draws` is 4 of 5, by any
            factor where it is near 1.
        trace_error: (B,) float64 nats, how much of it comes from the trace's probes; 0 for exact traces.
        solver_error: (B,) float64 nats, estimate of the integrations' error.
        draws: (B, K) float64 log weights: `log_prob` is their mean, or the logarithm of the mean of their exponentials.
        status: (B,) int64 of `Status`; arrived where all draws did.
        evaluations: (B,) int64 network evaluations of all draws.
        t: (B,) float64 noise level of the states.
        dims: Dimensions of a sample.
    """

    log_prob: Tensor
    std_error: Tensor
    trace_error: Tensor
    solver_error: Tensor
    draws: Tensor
    status: Tensor
    evaluations: Tensor
    t: Tensor
    dims: int

    def bits_per_dim(self) -> Tensor:
        """(B,) float64 bits per dimension, -log2 P / D: an upper bound in expectation; no width or offset enters."""
        return -self.log_prob / (self.dims * math.log(2.0))

    def effective_draws(self) -> Tensor:
        """(B,) float64 in [1, K], how many draws the importance bound amounts to: 1 / sum of squared shares."""
        return self.draws.softmax(1).square().sum(1).reciprocal()


def describe(status: Tensor, t: Tensor, target: str, indices: Tensor) -> str:
    """The message for a batch in which some samples did not arrive.

    Args:
        status: (B,) of `Status`.
        t: (B,) times reached.
        target: Where they should have arrived, in words.
        indices: (B,) global sample numbers, named in the message.
    """
    bad = [(row, Status(code)) for row, code in enumerate(status.tolist()) if not Status(code).arrived]
    lines = [f"{len(bad)} of {status.shape[0]} samples did not reach {target}."]
    for row, code in bad[:8]:
        lines.append(f"  sample {int(indices[row])} at t={float(t[row]):.6g}: {EXPLANATIONS[code]}")
    if len(bad) > 8:
        lines.append(f"  and {len(bad) - 8} more")
    lines.append(
        "Loosen the tolerance, raise `max_evaluations` or `wall_time`, mend the network; or pass `throw=False` to keep "
        "the samples that succeeded and read `status`. This error carries what there is as `.solution`."
    )
    return "\n".join(lines)

"""Two models on the same data: log p_a(x) - log p_b(x), with the error bar of the difference.

Both are solved with common random numbers: the probes are keyed by (seed, sample, node), so both see the same probe at
the same node. For neighbouring models the noise of the traces then cancels: with fixed probes it is v' (A - B) v, A and
B the Jacobians accumulated along the two paths, instead of v' A v.

The errors of the two are therefore dependent, in a way that neither result alone knows. The standard error of the
difference d is

    exact traces        0
    K >= 2 probes       sd over probes of (a_k - b_k) / sqrt(K), each probe one paired draw of the whole difference
    one probe           se_a + se_b, which bounds it for any dependence (se^2 added up does not: it takes them to be
                        independent, and is too small where they are opposed). Far too large for neighbours.

From K probes it is known to K - 1 degrees of freedom: intervals are those of Student's t (K = 4: 3.18 for 95%).
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import require_batch
from .divergence import EXACT_UP_TO, Divergence, Exact, Hutchinson
from .errors import PartialResultWarning
from .likelihood import log_likelihood
from .model.score_model import ScoreModel
from .runtime import Runtime
from .solution import LogLikelihood, Status, quantile
from .targets import Gaussian
from .units import Affine

_PROBES = 4  # of the default above EXACT_UP_TO dimensions: 3 degrees of freedom for the error bar


class MeanRatio(NamedTuple):
    """The mean difference over samples.

    Attributes:
        value: Nats a sample.
        std_error: Nats, of the mean over samples drawn from one population: each sample is its own control, and what
            the probes left is in the spread already. NaN from fewer than two samples.
        solver_error: Nats, the mean of the samples' estimates.
        samples: How many arrived under both models.
    """

    value: float
    std_error: float
    solver_error: float
    samples: int


class LogRatio(NamedTuple):
    """log p_a - log p_b of a batch. All (B,) float64 nats unless said otherwise.

    Attributes:
        value: The difference; NaN where either did not arrive.
        std_error: Of the difference, from the probes; see the module.
        solver_error: Estimate of the integrations' error, mostly above it: the sum of both.
        a: The first model's LogLikelihood.
        b: The second model's.
    """

    value: Tensor
    std_error: Tensor
    solver_error: Tensor
    a: LogLikelihood
    b: LogLikelihood

    def margin(self, level: float = 0.95) -> Tensor:
        """(B,) float64 nats to either side of `value` that cover what the probes left, at a level of confidence.

        `std_error` times Student's quantile where it is the spread of K probes, fixed or fresh, else the normal law's.

        Args:
            level: Between 0 and 1.

        Raises:
            ValueError: A level that is none.
        """
        a, b = self.a.by_probe, self.b.by_probe
        return quantile(None if a is None or b is None else a.shape[1] - 1, level) * self.std_error

    def mean(self) -> MeanRatio:
        """The mean over the samples that arrived, with the standard error of paired differences."""
        kept = ~self.value.isnan()
        count = int(kept.sum())
        value, error = self.value[kept], self.solver_error[kept]
        spread = float(value.std() / math.sqrt(count)) if count > 1 else math.nan
        return MeanRatio(float(value.mean()), spread, float(error.mean()), count)

    def bits_per_dim(self) -> Tensor:
        """(B,) bits per dimension that a spends more than b, -(log p_a - log p_b)/(D log 2): whatever the bins."""
        return -self.value / (self.a.latent.shape[1:].numel() * math.log(2.0))


def log_ratio(
    model_a: ScoreModel,
    model_b: ScoreModel,
    x: Tensor,
    *,
    divergence: Divergence | None = None,
    tolerance: float = 1e-2,
    nodes: int | None = None,
    t: Tensor | float | None = None,
    data_moments: Gaussian | None = None,
    transforms: tuple[Affine | None, Affine | None] = (None, None),
    seed: int = 0,
    indices: Tensor | None = None,
    max_evaluations: int = 10_000,
    progress: bool = False,
    throw: bool = True,
    runtime: Runtime = "auto",
    slots: int | None = None,
) -> LogRatio:
    """Log density ratios of two models, log p_a(x) - log p_b(x), from common random numbers.

    The two may be one model under two conditions: `log_ratio(model.condition(label=y), model.condition(label=z), x)`.
    Each density is that of its own model at its own t_min (or at `t`): where the noise levels there differ, so does
    what is asked of the two.

    Args:
        model_a: The first model.
        model_b: The second; any SDE, parameterization and network.
        x: Data, (B, *event), floating, on the models' device.
        divergence: How the traces are had. None: Exact() up to 128 dimensions, else Hutchinson(probes=4); at least two
            probes, for an error bar that is not a mere bound.
        tolerance: Nats per sample and model, by the solver's own estimate.
        nodes: That many evaluations on a fixed grid instead. Of two models of one SDE and data_std both then have the
            same nodes; with a tolerance each takes its own steps, which for neighbouring models are nearly the same.
        t: Noise level whose densities are asked, a number or (B,); default each model's t_min.
        data_moments: Gaussian of the data: both terminal laws are then its p_T. For models that share their units.
        transforms: Maps x into the first and the second model's units; densities stay in the units of x.
        seed: Of the probes.
        indices: (B,) global sample numbers that key the probes; default 0..B-1.
        max_evaluations: Network evaluations a sample and model at most.
        progress: Show progress bars.
        throw: Raise SolveError if a sample fails under either model (its `.solution` is that model's LogLikelihood).
        runtime: How a step runs, see `log_likelihood`.
        slots: Samples in work at a time, the next entering when one is done; None: all.

    Returns:
        A LogRatio; `.mean()` for the mean over the data with its standard error.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        SolveError: A sample failed and `throw`.
    """
    require_batch("x", x)
    if not isinstance(transforms, tuple) or len(transforms) != 2:
        raise TypeError(f"transforms={transforms!r}; a pair is needed, one for each model, as in (None, Affine(2.0)).")
    if divergence is None:
        divergence = Exact() if x.shape[1:].numel() <= EXACT_UP_TO else Hutchinson(probes=_PROBES)

    def solved(model: ScoreModel, transform: Affine | None) -> LogLikelihood:
        return log_likelihood(
            model,
            x,
            divergence=divergence,
            tolerance=tolerance,
            nodes=nodes,
            t=t,
            data_moments=data_moments,
            transform=transform,
            seed=seed,
            indices=indices,
            max_evaluations=max_evaluations,
            progress=progress,
            throw=throw,
            runtime=runtime,
            slots=slots,
        )

    a = solved(model_a, transforms[0])
    if bool((a.status == Status.INTERRUPTED).any()):  # Ctrl-C ends both
        warnings.warn(
            "interrupted before the second model: there is no difference.", PartialResultWarning, stacklevel=2
        )
        return _ratio(a, _stopped(a))
    return _ratio(a, solved(model_b, transforms[1]))


def _ratio(a: LogLikelihood, b: LogLikelihood) -> LogRatio:
    value = a.log_prob - b.log_prob
    if a.by_probe is None or b.by_probe is None:
        error = a.std_error + b.std_error
    else:
        error = (a.by_probe - b.by_probe).std(1) / math.sqrt(a.by_probe.shape[1])
    return LogRatio(value, error, a.solver_error + b.solver_error, a, b)


def _stopped(like: LogLikelihood) -> LogLikelihood:
    """What a solve leaves that was never begun."""
    nothing = torch.full_like(like.log_prob, math.nan)
    none = torch.zeros_like(like.stats.evaluations)
    return like._replace(
        log_prob=nothing,
        std_error=nothing,
        solver_error=nothing,
        log_prior=nothing,
        log_det=nothing,
        t=nothing,
        latent=torch.full_like(like.latent, math.nan),
        status=torch.full_like(like.status, int(Status.INTERRUPTED)),
        stats=like.stats._replace(evaluations=none, accepted=none, rejected=none, calls=0, paid=0),
        by_probe=None if like.by_probe is None else torch.full_like(like.by_probe, math.nan),
        rounding=nothing,
        ends=None,
        reach=nothing,
    )

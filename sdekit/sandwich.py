"""log p by five roads: the probability flow's value, two bounds, and two estimates without a solve.

    log_likelihood      log p_{t_min} of the probability flow's model
    sde_bound           at most log p_{t_min} of the reverse SDE's model
    path_integral       the same mean, from plain network calls
    variational_bound   at most log p_0 of the reverse SDE's model behind its decoder
    i_mmse              log p_0 of smooth data

For the exact score and the true terminal law all five agree, the last two up to order sigma(t_min)^2. For a learned one
how far they are apart says how far the network is from a score: no more than that, since none of them is the data's.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from torch import Tensor

from .bounds import Estimate, VariationalBound, sde_bound, variational_bound
from .divergence import Divergence
from .likelihood import log_likelihood
from .loss import Times
from .model.score_model import ScoreModel
from .pointwise import i_mmse, path_integral
from .runtime import Runtime
from .solution import LogLikelihood, Status
from .targets import Gaussian


class _Keywords(TypedDict):
    """What the four estimators take alike."""

    draws: int
    times: Times | None
    data_moments: Gaussian | None
    seed: int
    indices: Tensor | None
    batch: int


class Sandwich(NamedTuple):
    """The five values of the same samples."""

    flow: LogLikelihood
    sde_bound: Estimate
    path_integral: Estimate
    variational_bound: VariationalBound
    i_mmse: Estimate

    def table(self) -> str:
        """The means over the batch in nats, each with its standard error, and how far each is from the flow's.

        The four estimates share their noise levels, so they lean to one side together: their distances from one
        another are less, or more, certain than their errors added in squares.

        Samples whose solve failed are left out of all rows. The errors are those of the estimates, not of the choice
        of samples.
        """
        good = self.flow.log_prob.isfinite()
        count = int(good.sum())
        head = f"{count} samples: mean log p, nats"
        lines = [f"{head:<32}{'value':>11}{'std error':>11}{'- flow':>11}{'std error':>11}{'evaluations':>13}"]
        if not count:
            return lines[0]
        value, error = self.flow.log_prob[good], self.flow.std_error[good]
        rows: list[tuple[str, Tensor, Tensor, Tensor]] = [
            ("probability flow", self.flow.log_prob, self.flow.std_error, self.flow.stats.evaluations),
            ("SDE's bound", *self.sde_bound),
            ("path integral", *self.path_integral),
            ("variational bound (log p_0)", *self.variational_bound[:3]),
            ("I-MMSE (log p_0)", *self.i_mmse),
        ]
        for number, (name, mine, own, evaluations) in enumerate(rows):
            mean, spread = float(mine[good].mean()), float(own[good].square().sum().sqrt()) / count
            cells = f"{name:<32}{mean:>11.3f}{spread:>11.3f}"
            if number:
                apart = (mine[good] - value).mean()
                joint = (own[good].square() + error.square()).sum().sqrt() / count
                cells += f"{float(apart):>11.3f}{float(joint):>11.3f}"
            else:
                cells += f"{'':>22}"
            lines.append(f"{cells}{float(evaluations[good].double().mean()):>13.1f}")
        lines.append(f"solver error of the flow at most {float(self.flow.solver_error[good].max()):.2g} nats a sample")
        return "\n".join(lines)


def sandwich(
    model: ScoreModel,
    x: Tensor,
    *,
    tolerance: float = 1e-2,
    divergence: Divergence | None = None,
    draws: int = 256,
    times: Times | None = None,
    data_moments: Gaussian | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    batch: int = 1024,
    runtime: Runtime = "auto",
) -> Sandwich:
    """The probability flow's log p of `x` beside the bounds and the estimates that need no solve.

    Args:
        model: The score model, in eval mode.
        x: Data, (B, *event), floating, on the model's device.
        tolerance: Of the flow's solve, nats per sample.
        divergence: Of the solve and of `sde_bound`. None: Exact() up to 128 dimensions, else Hutchinson(probes=1).
        draws: Noise levels a sample of each of the others, even, >= 2.
        times: The law of the levels; None: the default of the estimators.
        data_moments: Gaussian of the *data*: its p_T is then the terminal law of all, not the SDE's prior.
        seed: 0 <= seed < 2^63.
        indices: (B,) global sample numbers that key the draws; default 0..B-1.
        batch: Rows of a network call of the estimators, >= 1.
        runtime: How a step of the flow's solve runs, see `log_likelihood`.

    Returns:
        A Sandwich; print its `table()`.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        SolveError: A sample's solve failed.
        NetworkError: The network cannot be used.
    """
    keywords: _Keywords = {
        "draws": draws,
        "times": times,
        "data_moments": data_moments,
        "seed": seed,
        "indices": indices,
        "batch": batch,
    }
    bound = sde_bound(model, x, divergence=divergence, **keywords)
    flow = log_likelihood(
        model,
        x,
        divergence=divergence,
        tolerance=tolerance,
        data_moments=data_moments,
        seed=seed,
        indices=indices,
        runtime=runtime,
    )
    if bool((flow.status == Status.INTERRUPTED).any()):
        raise KeyboardInterrupt
    return Sandwich(
        flow,
        bound,
        path_integral(model, x, **keywords),
        variational_bound(model, x, **keywords),
        i_mmse(model, x, **keywords),
    )

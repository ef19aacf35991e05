"""Bounds on log p of the reverse SDE's model.

The model is the reverse SDE driven by the network from its prior pi at t_max to t_min. Its density has no closed form,
but a Girsanov argument bounds it, at every x and for every network (lambda = log alpha/sigma, eps = -sigma score):

    log p_{t_min}(x) >= E[log pi(x_T)] + int (f D - g^2 div s - g^2/2 |s|^2) dt,     x_{t_min} = x       (sde_bound)

with the forward process started at x. Its gap is the divergence of the forward paths from the model's, given x.
Averaged over x_{t_min} ~ N(alpha x, sigma^2 I) the same number is the variational bound of the data point x,

    E[log p_{t_min}(x_{t_min})] >= -KL(q(x_T | x) || pi) - int E|z - eps|^2 d lambda - D/2 log(2 pi e sigma^2),

which with the decoder x | x_{t_min} ~ N(x_{t_min}/alpha, (sigma/alpha)^2 I) bounds log p_0(x) of the model so decoded:
add D log alpha (variational_bound). For the exact score of data with marginals p_t,

    sde_bound(x)   = log p_{t_min}(x) + E[log (pi/p_T)(x_T) | x]        point by point; on average KL(p_T || pi) below
    and the variational bound of x is the mean of that over x_{t_min}, plus D log alpha.

So against the *data's* density both hold on average only; against the model's own they hold at every x. The density of
the probability flow (`log_likelihood`) is another model's: with a learned score it may lie on either side.

Source: Song et al. 2021, maximum likelihood training of score-based diffusion models; Kingma et al. 2021, variational
diffusion models; Huang et al. 2021, a variational perspective on diffusion-based generative models.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ._checks import require_model
from ._levels import Integral, Plan, Question
from ._method import check_forward_mode
from .divergence import Divergence, Hutchinson, default_divergence
from .loss import CauchyLogSigma, Times
from .model.score_model import ScoreModel
from .sde.base import as_time
from .targets import Gaussian

# Where levels are drawn by default. On mixtures in 2 and 16 dimensions, a learned network and digits, standard errors
# were 0.63 to 0.90 of those with levels uniform in half_log_snr (0.73 on average; the best law for each has 0.62).
_CENTER, _SCALE = -1.5, 1.5
_LOG_2PI_E = math.log(2.0 * math.pi) + 1.0


class Estimate(NamedTuple):
    """An estimate without a solve, per sample.

    Attributes:
        value: (B,) float64 nats; NaN or infinite where the network's answer was.
        std_error: (B,) float64 nats, standard error from the draws.
        evaluations: (B,) int64 network evaluations.
    """

    value: Tensor
    std_error: Tensor
    evaluations: Tensor


class VariationalBound(NamedTuple):
    """value = reconstruction - prior - diffusion; (B,) float64 nats unless said otherwise.

    Attributes:
        value: Lower bound on log p_0 of the decoded model; less D log alpha(t_min) one on E[log p_{t_min}(x_{t_min})].
        std_error: Standard error from the draws; that of `diffusion` too.
        evaluations: (B,) int64 network evaluations.
        prior: KL(q(x_T | x) || terminal law), exact.
        diffusion: The integral of E|z - eps|^2 over half_log_snr.
        reconstruction: E[log p(x | x_{t_min})] of the decoder, exact and the same for every x.
    """

    value: Tensor
    std_error: Tensor
    evaluations: Tensor
    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor


def variational_bound(
    model: ScoreModel,
    x: Tensor,
    *,
    draws: int = 256,
    times: Times | None = None,
    data_moments: Gaussian | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    batch: int = 1024,
) -> VariationalBound:
    """Variational lower bounds on log p_0(x) of the reverse SDE's model, with their parts and standard errors.

    p_0 is the model's density at t_min behind the decoder N(x/alpha, (sigma/alpha)^2 I): that of x/alpha, blurred by
    the noise of t_min. The bound holds at every x; its *estimate* does within its standard error.

    Args:
        model: The score model, in eval mode.
        x: Data, (B, *event), floating, on the model's device.
        draws: Noise levels a sample, even, >= 2, with one network evaluation each.
        times: The law of the levels, divided out again; None: CauchyLogSigma, 1.5 below log(data_std) and 1.5 wide.
        data_moments: Gaussian of the *data*: its p_T is then the model's terminal law, not the SDE's prior; and it
            takes more variance away than the default N(0, data_std^2 I) does.
        seed: 0 <= seed < 2^63.
        indices: (B,) global sample numbers that key the draws; default 0..B-1: pass them when you shuffle or split.
        batch: Rows of a network call, each a sample at one level, >= 1; no result depends on it.

    Returns:
        A VariationalBound.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        NetworkError: The network cannot be used.
    """
    question = ask(model, x, draws, times, data_moments, seed, indices, batch)
    sde, size = model.sde, x.shape[1:].numel()
    found = question.denoising(from_data=True)
    ends = [question.spread(t, True) for t in (sde.t_min, sde.t_max)]
    entropy = [0.5 * size * (_LOG_2PI_E + spread.variance.log()).to(x.device) for spread in ends]
    kl = [-entropy[i] - question.mean_log_reference(t, ends[i]) for i, t in enumerate((sde.t_min, sde.t_max))]
    prior = -entropy[1] - question.mean_log_terminal(ends[1])
    diffusion = kl[0] - kl[1] + found.value
    reconstruction = (size * sde.log_alpha(sde.t_min).to(x.device) - entropy[0]).expand_as(prior)
    value = reconstruction - prior - diffusion
    return VariationalBound(value, found.variance.sqrt(), found.evaluations, prior, diffusion, reconstruction)


def sde_bound(
    model: ScoreModel,
    x: Tensor,
    *,
    divergence: Divergence | None = None,
    draws: int = 256,
    times: Times | None = None,
    data_moments: Gaussian | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    batch: int = 1024,
) -> Estimate:
    """Lower bounds on log p_{t_min}(x) of the reverse SDE's model, with standard errors.

    The bound holds at every x and for every network; its *estimate* does within its standard error. For the exact
    score it is log p_{t_min}(x) up to the terminal law.

    Args:
        model: The score model, in eval mode.
        x: States at t_min, (B, *event), floating, on the model's device.
        divergence: How the trace is had. None: Exact() up to 128 dimensions, else Hutchinson(probes=1).
        draws: Noise levels a sample, even, >= 2, with one network evaluation and divergence each.
        times: The law of the levels, divided out again; None: CauchyLogSigma, 1.5 below log(data_std) and 1.5 wide.
        data_moments: Gaussian of the *data*: its p_T is then the model's terminal law, not the SDE's prior; and it
            takes more variance away than the default N(0, data_std^2 I) does.
        seed: 0 <= seed < 2^63.
        indices: (B,) global sample numbers that key the draws; default 0..B-1: pass them when you shuffle or split.
        batch: Rows of a network call, each a sample at one level, >= 1; no result depends on it.

    Returns:
        An Estimate.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        NetworkError: The network cannot be used.

    Source: Song et al. 2021, maximum likelihood training of score-based diffusion models.
    """
    question = ask(model, x, draws, times, data_moments, seed, indices, batch)
    chosen = default_divergence(x.shape[1:].numel()) if divergence is None else divergence
    if not isinstance(chosen, Divergence):
        raise TypeError(f"divergence={divergence!r}; sdekit.Exact() or sdekit.Hutchinson(...) is needed.")
    if isinstance(chosen, Hutchinson) and (chosen.control or not chosen.fresh):
        raise ValueError(f"{chosen}; every draw has probes of its own here: leave out fresh=False and control=True.")
    check_forward_mode(chosen, model, x, as_time(model.sde.t_min).to(x.device).expand(x.shape[0]))
    return from_t_min(question, question.diverging(chosen, from_data=False))


def from_t_min(question: Question, found: Integral) -> Estimate:
    """The estimate of log p_{t_min}(x) whose integral from t_min is `found`."""
    at_x = question.reference.marginal_log_prob(question.sde, question.x, question.sde.t_min)
    value = at_x + question.terminal_gain(from_data=False) - found.value
    return Estimate(value, found.variance.sqrt(), found.evaluations)


def ask(
    model: ScoreModel,
    x: Tensor,
    draws: int,
    times: Times | None,
    data_moments: Gaussian | None,
    seed: int,
    indices: Tensor | None,
    batch: int,
) -> Question:
    """The question that the arguments of an estimator put, checked."""
    require_model(model)
    levels = CauchyLogSigma(center=math.log(model.data_std) + _CENTER, scale=_SCALE) if times is None else times
    plan = Plan(draws, levels, seed, batch)
    return Question(model, x, plan, data_moments, indices)

"""log p at a point without a solve: expectations over the forward process, by plain network calls.

Two identities hold for the exact denoiser, at every x (lambda = log alpha/sigma, eps = -sigma score):

    path integral   log p_{t_min}(x) = E[log p_T(x_T)] + int (f D - g^2 E[div s + 1/2 |s|^2]) dt,    x_{t_min} = x
    I-MMSE          d/d lambda KL(q(x_t | x_0 = x) || p_t) = E|z - eps(x_t)|^2

The first is the mean of d log p_t(x_t) along the forward process, from the log Fokker-Planck equation

    d log p_t/dt = -f D - f x . s + g^2/2 (div s + |s|^2),

and with x_t = a x + b z Stein's identity turns its divergence into z . s/b, so that the network is called and not
differentiated. Of the second take the difference to a Gaussian g, for which it holds too, and integrate over levels:

    log p_0(x) = log g_0(x) - int E[|z - eps|^2 - |z - eps_g|^2] d lambda + E[log (p_T/g_T)(x_T)]

What lies above lambda(t_min) is left out: of order sigma(t_min)^2 for a smooth density. p_T is the SDE's prior, or that
of `data_moments`, which is g then and leaves no last term.

They agree with the probability flow's value (`log_likelihood`) for the exact denoiser only: a learned one is no
gradient of a log density that obeys the equation. For any network `path_integral` has the mean of `sde_bound`, and
`i_mmse` that of `variational_bound` up to order sigma(t_min)^2: what they estimate then is those bounds.

Source: Kong et al. 2023, information-theoretic diffusion; Premkumar 2024, diffusion density estimators.
"""

from __future__ import annotations

from torch import Tensor

from .bounds import Estimate, ask, from_t_min
from .loss import Times
from .model.score_model import ScoreModel
from .targets import Gaussian


def path_integral(
    model: ScoreModel,
    x: Tensor,
    *,
    draws: int = 256,
    times: Times | None = None,
    data_moments: Gaussian | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    batch: int = 1024,
) -> Estimate:
    """Estimates of log p_{t_min}(x) as a mean over the forward process, with standard errors; no divergence.

    Args:
        model: The score model, in eval mode.
        x: States at t_min, (B, *event), floating, on the model's device.
        draws: Noise levels a sample, even, >= 2, with one network evaluation each; one more is made at x itself.
        times: The law of the levels, divided out again; None: CauchyLogSigma, 1.5 below log(data_std) and 1.5 wide.
        data_moments: Gaussian of the *data*: its p_T is then the terminal law, not the SDE's prior; and it takes more
            variance away than the default N(0, data_std^2 I) does.
        seed: 0 <= seed < 2^63.
        indices: (B,) global sample numbers that key the draws; default 0..B-1: pass them when you shuffle or split.
        batch: Rows of a network call, each a sample at one level, >= 1; no result depends on it.

    Returns:
        An Estimate.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        NetworkError: The network cannot be used.

    Source: Premkumar 2024, diffusion density estimators.
    """
    question = ask(model, x, draws, times, data_moments, seed, indices, batch)
    return from_t_min(question, question.denoising(from_data=False))


def i_mmse(
    model: ScoreModel,
    x: Tensor,
    *,
    draws: int = 256,
    times: Times | None = None,
    data_moments: Gaussian | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    batch: int = 1024,
) -> Estimate:
    """Estimates of log p_0(x) from the denoiser's error at all levels against a Gaussian's, with standard errors.

    For smooth densities: with edges, what lies above lambda(t_min) is of first order in sigma(t_min).

    Args:
        model: The score model, in eval mode.
        x: Data, (B, *event), floating, on the model's device.
        draws: Noise levels a sample, even, >= 2, with one network evaluation each.
        times: The law of the levels, divided out again; None: CauchyLogSigma, 1.5 below log(data_std) and 1.5 wide.
        data_moments: Gaussian of the *data* that the error is compared with, and its p_T the terminal law. None:
            N(0, data_std^2 I), and the SDE's prior.
        seed: 0 <= seed < 2^63.
        indices: (B,) global sample numbers that key the draws; default 0..B-1: pass them when you shuffle or split.
        batch: Rows of a network call, each a sample at one level, >= 1; no result depends on it.

    Returns:
        An Estimate.

    Raises:
        ValueError, TypeError: Arguments that do not fit.
        NetworkError: The network cannot be used.

    Source: Kong et al. 2023, information-theoretic diffusion.
    """
    question = ask(model, x, draws, times, data_moments, seed, indices, batch)
    found = question.denoising(from_data=True)
    value = question.reference.log_prob(question.x) + question.terminal_gain(from_data=True) - found.value
    return Estimate(value, found.variance.sqrt(), found.evaluations)

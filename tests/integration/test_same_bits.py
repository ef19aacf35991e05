"""A sample's results are the same to the bit in any batch and any order, where its network's are.

A network of matrix products answers with other bits in other batches: which kernel a product takes depends on its size.
This one is elementwise, so that whatever differs is this package's.
"""

import pytest
import torch
from helpers import draw
from torch import nn

import sdekit

N, D = 33, 5
ORDERS = [torch.arange(0, 1), torch.arange(1, 6), torch.arange(6, N).flip(0)]


class Elementwise(nn.Module):
    """Nearly the noise of Gaussian data of spread 0.5, a neighbour's coordinate mixed in."""

    def forward(self, x, label):
        decay = -0.5 * label * (0.1 + 9.95 * label)  # log alpha^2 of the default VPSDE
        alpha2, sigma2 = (part.to(x.dtype)[:, None] for part in (decay.exp(), -torch.expm1(decay)))
        bend = 0.1 * torch.sin(2.0 * x + torch.roll(x, 1, -1))
        return sigma2.sqrt() * (x / (0.25 * alpha2 + sigma2) + bend)


def model(scale=1.0):
    return sdekit.ScoreModel(Elementwise().eval(), sdekit.VPSDE(), sdekit.noise(sdekit.TimeLabel(scale)))


def leaves(value, name=""):
    if isinstance(value, torch.Tensor):
        return {name: value}
    parts = [(f".{key}", getattr(value, key)) for key in getattr(value, "_fields", ())]
    return {key: leaf for more, part in parts for key, leaf in leaves(part, name + more).items()}


def by_sample(value):
    sizes = (N, *map(len, ORDERS))
    return {name: leaf for name, leaf in leaves(value).items() if leaf.dim() and len(leaf) in sizes}


def compare(ask):
    whole = by_sample(ask(torch.arange(N)))
    assert whole
    for rows in ORDERS:
        part = by_sample(ask(rows))
        assert part.keys() == whole.keys()
        for name, leaf in part.items():
            torch.testing.assert_close(leaf, whole[name][rows], rtol=0, atol=0, equal_nan=True, msg=f"{name} of {rows}")


DIVERGENCES = {
    "exact": sdekit.Exact(),
    "exact, in chunks": sdekit.Exact(chunk=2),
    "fresh": sdekit.Hutchinson(),
    "five fresh": sdekit.Hutchinson(probes=5),
    "control": sdekit.Hutchinson(probes=2, control=True),
    "fixed": sdekit.Hutchinson(fresh=False),
    "six fixed": sdekit.Hutchinson(probes=6, fresh=False),
    "sphere": sdekit.Hutchinson(probes=3, law="sphere"),
    "gaussian": sdekit.Hutchinson(probes=3, law="gaussian"),
}


HOW = {"adaptive": {}, "nodes": {"nodes": 20}, "corrected": {"nodes": 8, "end": "extrapolate", "budget": True}}


@pytest.mark.parametrize(
    ("divergence", "how", "dtype", "size"),
    [
        *((divergence, how, torch.float64, D) for divergence in DIVERGENCES for how in HOW),
        *((divergence, how, torch.float32, D) for divergence in ("exact", "fresh", "six fixed") for how in HOW),
        *(("control", how, torch.float64, 3) for how in HOW),  # the control is then the exact trace
    ],
)
@pytest.mark.filterwarnings("ignore::sdekit.SmoothnessWarning")
def test_a_density(divergence, how, dtype, size):
    x, asked = 0.5 * draw(0, N, size).to(dtype), DIVERGENCES[divergence]
    compare(lambda rows: sdekit.log_likelihood(model(), x[rows], divergence=asked, indices=rows, seed=2, **HOW[how]))


def test_chunks_are_not_seen_in_an_exact_trace():
    x = 0.5 * draw(0, N, D)
    one, two = (sdekit.log_likelihood(model(), x, divergence=sdekit.Exact(chunk)) for chunk in (D, 2))
    assert torch.equal(one.log_prob, two.log_prob)


SAMPLERS = {
    "default": {},
    "reverse SDE": {"eta": 1.0},
    "adaptive": {"solver": sdekit.Dopri5(), "controller": sdekit.PID(1e-4, 1e-4)},
    "adaptive SDE": {"eta": lambda t: 0.5 + 0.5 * t, "controller": sdekit.PID(1e-2, 1e-2)},
    "corrected": {"solver": sdekit.PredictorCorrector(sdekit.EulerMaruyama(), sdekit.SNRLangevin()), "steps": 10},
    "corrected Adams": {"solver": sdekit.PredictorCorrector(sdekit.Adams(5), sdekit.Langevin()), "steps": 10},
    "corrected DEIS": {"solver": sdekit.PredictorCorrector(sdekit.DEIS(3), sdekit.Langevin()), "steps": 10},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", SAMPLERS)
def test_a_draw(how, dtype):
    compare(lambda rows: sdekit.sample(model(), (len(rows), D), indices=rows, dtype=dtype, **SAMPLERS[how]))


@pytest.mark.parametrize("name", ["VPSDE", "CosineVPSDE", "RectifiedFlow", "SubVPSDE", "VESDE", "KarrasSDE"])
def test_the_time_at_a_noise_level(name):
    sde = getattr(sdekit, name)()
    first, last = (float(sde.half_log_snr(t)) for t in (sde.t_max, sde.t_min))
    levels = torch.linspace(first, last, 1003, dtype=torch.float64)
    alone = torch.cat([sde.time_at(levels[k : k + 1]) for k in range(1003)])
    assert torch.equal(sde.time_at(levels), alone)


FRESH = sdekit.Hutchinson()
OTHERS = {
    "encode": lambda x, rows: sdekit.encode(model(), x),
    "decode": lambda x, rows: sdekit.decode(model(), x),
    "variational bound": lambda x, rows: sdekit.variational_bound(model(), x, indices=rows),
    "bound of the SDE": lambda x, rows: sdekit.sde_bound(model(), x, indices=rows),
    "path integral": lambda x, rows: sdekit.path_integral(model(), x, indices=rows),
    "I-MMSE": lambda x, rows: sdekit.i_mmse(model(), x, indices=rows),
    "sandwich": lambda x, rows: sdekit.sandwich(model(), x, indices=rows),
    "ratio": lambda x, rows: sdekit.log_ratio(model(), model(0.9), x, indices=rows, divergence=FRESH),
    "Ito": lambda x, rows: sdekit.ito_log_density(model(), tuple(x.shape), indices=rows),
    "of draws": lambda x, rows: sdekit.sample_log_prob(model(), tuple(x.shape), indices=rows, divergence=FRESH),
    "integers": lambda x, rows: sdekit.discrete_log_likelihood(
        model(), (4.0 * x.clamp(-1, 0.9) + 4.0).long(), levels=8, samples=3, indices=rows, divergence=FRESH
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_else_is_of_one_sample(what):
    x = 0.5 * draw(0, N, D)
    compare(lambda rows: OTHERS[what](x[rows], rows))

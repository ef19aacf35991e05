"""What every entry point makes of a wrong argument, and of a network that writes into what it is given."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from helpers import SDES, draw, gaussian, mixture
from torch import nn

import sdekit

SDE = SDES["vp"]
TARGET = mixture(2, 1, count=3)
X = draw(1, 3, 2)
LEVELS = torch.tensor([[0, 3], [16, 2], [5, 5]])

ENTRIES = {
    "log_likelihood": lambda model, **how: sdekit.log_likelihood(model, X, **how),
    "sample": lambda model, **how: sdekit.sample(model, (3, 2), dtype=torch.float64, **how),
    "encode": lambda model, **how: sdekit.encode(model, X, **how),
    "decode": lambda model, **how: sdekit.decode(model, X, **how),
    "sample_log_prob": lambda model, **how: sdekit.sample_log_prob(model, (3, 2), dtype=torch.float64, **how),
    "sampler_log_density": lambda model, **how: sdekit.sampler_log_density(model, (3, 2), **how),
    "log_ratio": lambda model, **how: sdekit.log_ratio(model, model, X, **how),
    "discrete_log_likelihood": lambda model, **how: sdekit.discrete_log_likelihood(model, LEVELS, levels=17, **how),
    "sandwich": lambda model, **how: sdekit.sandwich(model, X, **how),
    "variational_bound": lambda model, **how: sdekit.variational_bound(model, X, **how),
    "sde_bound": lambda model, **how: sdekit.sde_bound(model, X, **how),
    "log_prob": lambda model, **how: sdekit.log_prob(model, X, **how),
    "plan_sampling": lambda model, **how: sdekit.plan_sampling(model, (2,), **{"steps": 4, **how}),
    "i_mmse": lambda model, **how: sdekit.i_mmse(model, X, **how),
    "path_integral": lambda model, **how: sdekit.path_integral(model, X, **how),
    "ito_log_density": lambda model, **how: sdekit.ito_log_density(model, (3, 2), **how),
}
BAD = {
    "solver": ("heun", sdekit.Heun, sdekit.Adams, 3),
    "controller": ("pid", 0.1, sdekit.PID),
    "transform": (2.0, sdekit.Affine),
    "transforms": (None, sdekit.Affine(2.0)),
    "divergence": ("exact", sdekit.Exact),
    "device": ("foo", object()),
    "steps": ("3", 2.5),
    "eta": ("a",),
    "tolerance": ("a", None),
    "seed": (0.5, "a"),
}
CASES = [
    (name, argument, value)
    for name in ENTRIES
    for argument, values in BAD.items()
    if argument in inspect.signature(getattr(sdekit, name)).parameters
    for value in values
]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, sdekit.ScoreModel], ids=["network", "none", "class"])
@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_no_score_model_is_refused(name, model):
    with pytest.raises(TypeError, match=r"ScoreModel is needed"):
        ENTRIES[name](model)


@pytest.mark.parametrize(("name", "argument", "value"), CASES, ids=[f"{n}-{a}-{v!r:.12}" for n, a, v in CASES])
def test_a_wrong_argument_is_named_with_what_is_needed(name, argument, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}=.* needed"):
        ENTRIES[name](TARGET.score_model(SDE), **{argument: value})


@pytest.mark.parametrize("dtype", ["float32", torch.int32])
@pytest.mark.parametrize("name", ["sample", "sample_log_prob"])
def test_a_wrong_dtype_is_named(name, dtype):
    with pytest.raises(TypeError, match=r"^dtype=.* floating torch.dtype is needed"):
        getattr(sdekit, name)(TARGET.score_model(SDE), (3, 2), dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="finds no CUDA"):
        sdekit.sample(TARGET.score_model(SDE), (3, 2), device="cuda")


@pytest.mark.parametrize("shape", [4, (True, 2), (3,), (-1, 2), "ab"])
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"^shape=.* is needed"):
        sdekit.sample(TARGET.score_model(SDE), shape)


def test_data_that_are_not_dense_are_refused():
    with pytest.raises(TypeError, match="to_dense"):
        sdekit.log_likelihood(TARGET.score_model(SDE), X.to_sparse())


@pytest.mark.parametrize("make", [sdekit.noise, sdekit.edm, sdekit.v])
def test_a_label_that_is_no_function_is_refused(make):
    with pytest.raises(TypeError, match=r"^label="):
        make(label=1000)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16])
def test_levels_of_any_integer_type_are_taken(dtype):
    model = TARGET.score_model(SDE)
    found = sdekit.discrete_log_likelihood(model, LEVELS.to(dtype), levels=17)
    assert torch.equal(found.log_prob, sdekit.discrete_log_likelihood(model, LEVELS, levels=17).log_prob)


class Silu(nn.Module):
    """A network, out of place or writing into its input, always or after some calls."""

    def __init__(self, writes_from=None):
        super().__init__()
        self.writes_from, self.calls = writes_from, 0

    def forward(self, x, label):
        self.calls += 1
        writes = self.writes_from is not None and self.calls > self.writes_from
        return nn.functional.silu(x, inplace=writes)


TIGHT = {"controller": sdekit.PID(1e-4, 1e-4)}
WRITTEN = {
    "sample": {},
    "encode": TIGHT,
    "decode": TIGHT,
    "variational_bound": {},
    "i_mmse": {},
    "path_integral": {},
    "ito_log_density": {},
    "plan_sampling": {},
}


def numbers(found):
    return found.value if hasattr(found, "value") else getattr(found, "x", getattr(found, "times", found))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_network_may_write_into_what_it_is_given(name):
    one, other = (
        numbers(ENTRIES[name](sdekit.ScoreModel(Silu(writes), SDE, data_std=0.7), **WRITTEN[name]))
        for writes in (None, 0)
    )
    assert torch.equal(one, other)


def test_a_state_of_the_caller_is_not_written_to():
    x = X.clone()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            model = sdekit.ScoreModel(Silu(0), SDE)
            first = model.score(x, 0.5)
            assert torch.equal(model.score(x, 0.5), first)
            assert torch.equal(x, X)


@pytest.mark.parametrize("how", [{"steps": 12, "denoise": False}, TIGHT])
def test_a_network_that_begins_to_write_later_is_refused(how):
    model = sdekit.ScoreModel(Silu(5), SDE, data_std=0.7)
    with pytest.raises(sdekit.SolveError, match="writes into its input"):
        sdekit.sample(model, (3, 2), **how)


@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        (torch.zeros(3, 0), ValueError, "at least one number a sample"),
        (torch.zeros(2, 3, device="meta"), ValueError, "on the meta device"),
        (torch.zeros(2, 3).to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn; float64, float32, float16 or bfloat16"),
    ],
    ids=["no numbers", "meta", "float8"],
)
def test_tensors_without_numbers_of_their_own_are_refused(x, kind, words):
    model = gaussian(3).score_model(sdekit.VPSDE())
    for ask in (sdekit.log_likelihood, sdekit.encode, sdekit.variational_bound, sdekit.log_prob):
        with pytest.raises(kind, match=words):
            ask(model, x)


def test_numpy_s_numbers_are_numbers():
    model, x = gaussian(2).score_model(sdekit.VPSDE()), draw(0, 3, 2)
    found = sdekit.sample(model, (np.int64(4), np.int32(2)), steps=4).x
    assert torch.equal(found, sdekit.sample(model, (4, 2), steps=4).x)
    loose = sdekit.log_likelihood(model, x, tolerance=np.float32(0.125)).log_prob
    assert torch.equal(loose, sdekit.log_likelihood(model, x, tolerance=0.125).log_prob)
    for shape in ((4, True), (4, 0), (-1, 2), (4.0, 2)):
        with pytest.raises(ValueError, match="shape="):
            sdekit.sample(model, shape, steps=4)

"""Networks as people have them: what writes, answers in its own buffers, is random, of other types, or compiled."""

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from helpers import draw
from torch import nn

import sdekit
from sdekit import _tensor
from sdekit.model import _seen, nets


class Plain(nn.Module):
    """Nearly the noise of Gaussian data of spread 0.5, by a smooth function of its input and its condition."""

    def forward(self, x, label, shift=None):
        moved = x if shift is None else x + shift
        return 0.7 * x + 0.1 * torch.tanh(moved) * (1.0 + label[:, None])


def model_of(net, **rest):
    return sdekit.ScoreModel(net.eval(), sdekit.VPSDE(), **rest)


X = 0.5 * draw(0, 4, 2)


class WritesCondition(Plain):
    def forward(self, x, label, shift):
        shift += 0.1
        return super().forward(x, label, shift)


class WritesLabel(Plain):
    def forward(self, x, label):
        return super().forward(x, label.mul_(0.5))


WAYS = {
    "adaptive": lambda model: sdekit.log_likelihood(model, X, throw=False).log_prob,
    "nodes": lambda model: sdekit.log_likelihood(model, X, nodes=12).log_prob,
    "sample": lambda model: sdekit.sample(model, (4, 2), steps=8, dtype=torch.float64).x,
    "encode": lambda model: sdekit.encode(model, X).x,
    "bound": lambda model: sdekit.variational_bound(model, X, draws=4).value,
    "score": lambda model: model.score(X, torch.full((4,), 0.3, dtype=torch.float64)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_network_that_writes_into_its_condition_gets_a_copy(way):
    kept, given = torch.full((4, 2), 0.3, dtype=torch.float64), torch.full((4, 2), 0.2, dtype=torch.float64)
    plain = WAYS[way](model_of(Plain()).condition(shift=kept))
    found = WAYS[way](model_of(WritesCondition()).condition(shift=given))
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    assert (given == 0.2).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_network_that_writes_into_its_label_gets_a_copy(way):
    meaning = sdekit.noise(lambda sde, t: t)  # the solver's own times, where the network computes in double precision
    plain = WAYS[way](model_of(Plain(), parameterization=sdekit.noise(lambda sde, t: 0.5 * t)))
    torch.testing.assert_close(WAYS[way](model_of(WritesLabel(), parameterization=meaning)), plain)


def test_a_network_that_begins_to_write_later_is_refused():
    class Later(Plain):
        calls = 0

        def forward(self, x, label, shift):
            Later.calls += 1
            if Later.calls > 6:
                shift += 1.0
            return super().forward(x, label, shift)

    model = model_of(Later()).condition(shift=torch.zeros(4, 2, dtype=torch.float64))
    with pytest.raises(sdekit.SolveError, match="writes into its input, label or condition"):
        sdekit.log_likelihood(model, X)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_answers_in_buffers_that_are_used_again_are_copied(count):
    class Ring(Plain):
        def __init__(self):
            super().__init__()
            self.rings, self.calls = [torch.empty(6, 2, dtype=torch.float64) for _ in range(count)], 0

        def forward(self, x, label):
            self.calls += 1
            window = self.rings[self.calls % count][1 : 1 + len(x)]
            return window.copy_(super().forward(x, label))

    for ask in (
        lambda net: sdekit.sample(model_of(net), (4, 2), steps=8, solver=sdekit.DPMSolverPP(3), dtype=torch.float64).x,
        lambda net: sdekit.sample(model_of(net), (4, 2), steps=8, eta=1.0, dtype=torch.float64).x,
    ):
        torch.testing.assert_close(ask(Ring()), ask(Plain()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "value",
    [
        {"text": torch.zeros(4, 2)},
        {"deep": {"text": [torch.zeros(4)]}},
        (torch.zeros(4),),
        (np.zeros(4),),
        np.zeros((4, 2)),
    ],
)
def test_conditions_whose_rows_cannot_follow_are_refused_however_they_are_given(value):
    with pytest.raises(TypeError, match="condition shift is a"):
        model_of(Plain()).condition(shift=value)
    with pytest.raises(TypeError, match="condition shift is a"):
        sdekit.ScoreModel(Plain(), sdekit.VPSDE(), condition={"shift": value})


def test_a_list_is_refused_and_a_tuple_is_for_all_samples():
    class Sized(Plain):
        def forward(self, x, label, size):
            return super().forward(x, label)

    for size in ([1, 2, 3, 4], [], ["a", "b"]):
        with pytest.raises(TypeError, match=r"condition size is a list.*or a tuple, if all of it"):
            model_of(Sized()).condition(size=size)
    for size in ((1, 2), (1, 2, 3, 4), "four", None, 4):
        sdekit.log_likelihood(model_of(Sized()).condition(size=size), X, nodes=4)


def test_conditions_made_in_inference_mode_are_taken():
    with torch.inference_mode():
        made = torch.full((4, 2), 0.3, dtype=torch.float64)
    usual = model_of(Plain()).condition(shift=torch.full((4, 2), 0.3, dtype=torch.float64))
    wanted = sdekit.log_likelihood(usual, X).log_prob
    found = sdekit.log_likelihood(model_of(Plain()).condition(shift=made), X).log_prob
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    with torch.inference_mode():
        inside = sdekit.log_likelihood(model_of(Plain()).condition(shift=made), X).log_prob
    torch.testing.assert_close(inside.clone(), wanted, rtol=0, atol=0)
    model = model_of(Plain()).condition(shift=made)
    first, second = (sdekit.log_likelihood(model, X, nodes=8).log_prob for _ in range(2))  # the network is known then
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Weighed(nn.Module):
    """Two linear layers around a sine; its labels may be of any type."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 16), nn.Linear(16, 2)

    def forward(self, x, label):
        return self.second(torch.sin(self.first(x) + label[:, None].to(x.dtype)))


def test_a_type_that_only_stores_weights_is_not_computed_in():
    class Stored(Weighed):
        def __init__(self):
            super().__init__()
            self.a_first = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn), requires_grad=False)

        def named_parameters(self, *args, **kwargs):
            yield "a_first", self.a_first
            yield from super().named_parameters(*args, **kwargs)

    assert model_of(Stored()).network_dtype(X) is torch.float32
    found = sdekit.sample(model_of(Stored()), (4, 2), steps=6).x
    assert torch.equal(found, sdekit.sample(model_of(Weighed()), (4, 2), steps=6).x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_round_labels(dtype):
    class Watched(Weighed):
        def forward(self, x, label):
            labels.append(label)
            return super().forward(x, label)

    table = sdekit.TableVPSDE.linear(1000)
    for ask in (lambda model: model.score(X, table.t_max), lambda model: sdekit.sample(model, (4, 2), steps=4)):
        net, labels = Watched().to(dtype), []
        ask(sdekit.ScoreModel(net.eval(), table, sdekit.noise(sdekit.table_label(1000))))
        assert {label.dtype for label in labels} == {torch.float32}
        assert float(labels[0].max()) == 999.0
    features = nets.LabelFeatures(4, 1000.0)
    exact = features(torch.tensor([999.0]))
    assert torch.equal(features.to(dtype)(torch.tensor([999.0])), exact)


@pytest.mark.parametrize("way", ["around", "within"])
@pytest.mark.parametrize("nodes", [None, 24])
def test_autocast_is_booked_as_rounding(way, nodes):
    class Cast(Weighed):
        def forward(self, x, label):
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "within"):
                return super().forward(x, label)

    x, how = X.float().repeat(8, 1), {"divergence": sdekit.Exact(), "nodes": nodes, "throw": False, "tolerance": 0.1}
    exact = sdekit.log_likelihood(model_of(Weighed()), x, **how)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "around"):
        found = sdekit.log_likelihood(model_of(Cast()), x, **how)
    off = (found.log_prob - exact.log_prob).abs()
    assert off.max() > 20 * exact.rounding.max()  # so that there is something to be seen
    room = found.rounding + found.solver_error + exact.solver_error
    assert (off <= room).double().mean() >= 0.9


@pytest.mark.parametrize("divergence", [sdekit.Exact(), sdekit.Hutchinson()], ids=["exact", "probes"])
def test_autocast_rounds_the_network_and_not_the_steps_sums(divergence):
    model, x = model_of(Plain()), X.float()  # no operation of which autocast rounds
    wanted, latent = sdekit.log_likelihood(model, x, divergence=divergence), sdekit.encode(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found, carried = sdekit.log_likelihood(model, x, divergence=divergence, throw=False), sdekit.encode(model, x)
    torch.testing.assert_close(found.log_prob, wanted.log_prob, rtol=0.0, atol=1e-4)
    assert torch.equal(found.stats.evaluations, wanted.stats.evaluations)
    torch.testing.assert_close(carried.x, latent.x, rtol=1e-5, atol=1e-5)


ANSWERS = {
    "diffusers' way": (lambda out: {"sample": out}, "returned a dict.*return_dict=False"),
    "learned sigma": (lambda out: torch.cat((out, out), 1), r"shape \(4, 4\).*out.chunk\(2, 1\)"),
    "a broadcast": (lambda out: out[:, :1], "broadcasting it would mix samples"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_other_answers_are_named_with_what_to_do(answer):
    change, words = ANSWERS[answer]

    class Other(Plain):
        def forward(self, x, label):
            return change(super().forward(x, label))

    with pytest.raises(sdekit.NetworkError, match=words):
        model_of(Other()).score(X, 0.5)


def test_a_network_that_differentiates_is_told_of_no_grad():
    class Energy(nn.Module):
        def forward(self, x, label):
            return torch.autograd.grad(x.square().sum(), x, create_graph=True)[0]

    with pytest.raises(sdekit.SolveError, match=r"called under torch.no_grad\(\) here"):
        sdekit.sample(model_of(Energy()), (4, 2), steps=4)


TRAINED = {
    "attention": (lambda: nn.MultiheadAttention(4, 2, dropout=0.2), "has dropout=0.2"),
    "recurrent": (lambda: nn.GRU(3, 3, 2, dropout=0.1), "has dropout=0.1"),
    "functional": (lambda: type("Own", (nn.Module,), {"drop_prob": None})(), "has drop_prob=0.3"),
    "random slope": (nn.RReLU, "is random"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), "has a spectral norm"),
    "instance norm": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), "tracks running statistics"),
    "dropout": (lambda: nn.Dropout(0.1), r"is dropout \(p=0.1\)"),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_random_or_changes_in_train_mode_is_refused_there_only(kind):
    make, words = TRAINED[kind]

    class Around(Plain):
        def __init__(self):
            super().__init__()
            self.part = make()

    net = Around()
    if kind == "functional":
        net.part.drop_prob = 0.3
    with pytest.raises(ValueError, match=rf"the network's \S+ {words}.*net.eval\(\)"):
        sdekit.log_likelihood(sdekit.ScoreModel(net.train(), sdekit.VPSDE()), X, nodes=4)
    sdekit.log_likelihood(model_of(net), X, nodes=4)


@pytest.mark.parametrize("part", [nn.Dropout(0.0), nn.MultiheadAttention(4, 2), nn.InstanceNorm1d(3), nn.GRU(3, 3)])
def test_train_mode_alone_is_no_reason(part):
    class Around(Plain):
        def __init__(self):
            super().__init__()
            self.part = part

    sdekit.log_likelihood(sdekit.ScoreModel(Around().train(), sdekit.VPSDE()), X, nodes=4)


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, label, words):
        ctx.fails, ctx.words = bool(label.max() > 0.5), words
        return x * 1.0

    @staticmethod
    def backward(ctx, given):
        if ctx.fails:
            raise RuntimeError(ctx.words)
        return given * 1.0, None, None


@pytest.mark.parametrize("how", [{}, {"nodes": 16}, {"divergence": sdekit.Hutchinson()}])
@pytest.mark.parametrize(
    ("words", "said"),
    [("out of luck", "backward pass raised RuntimeError: out of luck"), ("non-empty donated buffers", "torch.compile")],
)
def test_what_was_solved_before_a_backward_pass_failed_is_kept(how, words, said):
    class Net(Plain):
        def forward(self, x, label):
            return super().forward(Raises.apply(x, label, words), label)

    with pytest.raises(sdekit.SolveError, match=said) as caught:
        sdekit.log_likelihood(model_of(Net()), X, **how)
    assert caught.value.solution.log_prob.shape == (4,)
    assert caught.value.solution.stats.evaluations.min() > 0


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch's own tracing
@pytest.mark.filterwarnings("ignore:the network was compiled by torch.compile and its weights")
def test_a_compiled_network_has_no_second_derivative(frozen):
    net = Weighed().double().requires_grad_(not frozen)
    compiled = torch.compile(net, backend="aot_eager")
    x = X.clone().requires_grad_()
    wanted = sdekit.log_likelihood(model_of(net), X, nodes=12).log_prob
    found = sdekit.log_prob(model_of(compiled), x, nodes=12)
    torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=1e-9)
    with pytest.raises(sdekit.NetworkError, match=r"compiled by torch.compile, which has no second derivative"):
        found.sum().backward()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch's own tracing
def test_a_compiled_network_whose_weights_have_gradients_made_too_is_told_once(wrapped):
    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, label):
            return self.net(x, label)

    def compiled(net):
        made = torch.compile(net.double(), backend="aot_eager")
        return model_of(Wrapped(made) if wrapped else made)

    model = compiled(Weighed())
    with pytest.warns(
        sdekit.errors.SdekitWarning, match=r"1.4 to 2.4 times the time .* Call net.requires_grad_\(False\)"
    ):
        sdekit.log_likelihood(model, X, nodes=6)
    sdekit.log_likelihood(model, X, nodes=6)  # warnings are errors here
    sdekit.log_likelihood(compiled(Weighed().requires_grad_(False)), X, nodes=6)
    sdekit.sample(compiled(Weighed()), (2, 2), steps=4)  # no products, no gradients


def test_a_compiled_network_is_saved_as_the_one_it_was_made_from(tmp_path):
    net, other = Weighed(), Weighed()
    with torch.no_grad():
        net.first.bias.fill_(0.5)
    model_of(torch.compile(net, backend="eager")).save(tmp_path / "model.safetensors")
    found = sdekit.ScoreModel.load(tmp_path / "model.safetensors", torch.compile(other, backend="eager"))
    assert torch.equal(other.first.bias, net.first.bias)
    assert isinstance(found, sdekit.ScoreModel)


def test_a_state_that_is_no_tensor_cannot_be_saved(tmp_path):
    class Extra(Weighed):
        def get_extra_state(self):
            return {"steps": 3}

    with pytest.raises(ValueError, match="the network's state '_extra_state' is a dict"):
        model_of(Extra()).save(tmp_path / "model.safetensors")


def test_precision_is_that_of_the_call_and_not_of_calls_before():
    net, x = Weighed(), X.float().repeat(8, 1)
    model, how = model_of(net), {"divergence": sdekit.Exact(), "nodes": 24}
    fine = sdekit.log_likelihood(model, x, **how)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = sdekit.log_likelihood(model, x, **how)
    again = sdekit.log_likelihood(model, x, **how)
    assert coarse.rounding.max() > 20 * fine.rounding.max()
    assert torch.equal(again.rounding, fine.rounding)
    assert torch.equal(again.log_prob, fine.log_prob)
    single = sdekit.log_likelihood(model, x.double(), **how)  # a float32 network under float64 states
    double = sdekit.log_likelihood(model.double(), x.double(), **how)
    assert double.rounding.max() < 1e-5 * single.rounding.max()
    with torch.autocast("cpu", torch.bfloat16):  # leaves float64 alone
        assert torch.equal(sdekit.log_likelihood(model, x.double(), **how).rounding, double.rounding)


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
def test_frozen_scripts_are_taken():
    frozen = torch.jit.freeze(torch.jit.script(Weighed().double().eval()))
    found = sdekit.log_likelihood(sdekit.ScoreModel(frozen, sdekit.VPSDE()), X, nodes=8)
    wanted = sdekit.log_likelihood(model_of(Weighed().double()), X, nodes=8)
    torch.testing.assert_close(found.log_prob, wanted.log_prob, rtol=0, atol=1e-9)


@pytest.mark.parametrize("part", ["backdrop", "raindrop_radius", "drop_last_scale", "droplet_size", "dropped"])
def test_attributes_that_only_sound_like_it_are_not_taken_for_dropout(part):
    class Named(Plain):
        def __init__(self):
            super().__init__()
            setattr(self, part, 0.5)

    sdekit.log_likelihood(sdekit.ScoreModel(Named().train(), sdekit.VPSDE()), X, nodes=4)


@pytest.mark.parametrize(
    "name", ["drop", "attn_drop", "dropout_p", "label_dropout_prob", "drop_path_rate", "drop_prob"]
)
@pytest.mark.parametrize("share", [0.1, np.float32(0.1), 1, 0.0, False, True])
def test_attributes_that_are_a_probability_of_dropping_are(name, share):
    class Named(Plain):
        def __init__(self):
            super().__init__()
            setattr(self, name, share)

    model = sdekit.ScoreModel(Named().train(), sdekit.VPSDE())
    if share and share is not True:
        with pytest.raises(ValueError, match=f"has {name}="):
            sdekit.log_likelihood(model, X, nodes=4)
    else:
        sdekit.log_likelihood(model, X, nodes=4)


def test_classes_that_drop_by_name_are_refused_unless_they_drop_nothing():
    for kind in ("StochasticDepth", "SpatialDropout", "DropPath"):
        for attribute in ("p", "drop_prob"):
            for share in (0.0, 0.2):
                net = Plain()
                net.part = type(kind, (nn.Module,), {})()
                setattr(net.part, attribute, share)
                model = sdekit.ScoreModel(net.train(), sdekit.VPSDE())
                if share:
                    with pytest.raises(ValueError, match=r"the network's \S*part is dropout"):
                        sdekit.log_likelihood(model, X, nodes=4)
                else:
                    sdekit.log_likelihood(model, X, nodes=4)


def test_a_compiled_part_that_the_state_does_not_go_through_has_gradients():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.body = nn.Linear(1, 8), nn.Linear(2, 8)
            self.out = nn.Linear(8, 2)

        def forward(self, x, label):
            return self.out(torch.tanh(self.body(x)) * self.embed(label[:, None]))

    def gradients(net):
        net = net.double()
        sdekit.log_prob(model_of(net), X, nodes=8).sum().backward()
        return [part.grad for part in (net.body.weight, net.out.weight)]

    wanted, net = gradients(Embedded()), Embedded()
    net.embed = torch.compile(net.embed, backend="aot_eager")
    torch.testing.assert_close(gradients(net), wanted, rtol=1e-9, atol=1e-9)


def test_products_that_a_backward_pass_puts_into_one_buffer_are_copied():
    buffer = torch.zeros(4, 2, dtype=torch.float64)

    class Reuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * torch.tensor([1.0, 2.0], dtype=x.dtype)

        @staticmethod
        def backward(ctx, given):
            return buffer.copy_(given * torch.tensor([1.0, 2.0], dtype=given.dtype))

    class Net(nn.Module):
        def forward(self, x, label):
            return Reuses.apply(x)

    class Same(nn.Module):
        def forward(self, x, label):
            return x * torch.tensor([1.0, 2.0], dtype=x.dtype)

    found, wanted = (sdekit.log_likelihood(model_of(net), X, nodes=12).log_prob for net in (Net(), Same()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_label_features_may_begin_on_no_device():
    with torch.device("meta"):
        made = nets.MLP((2,), width=8)
    made = made.to_empty(device="cpu")
    made.load_state_dict(nets.MLP((2,), width=8).state_dict())
    assert made.conditioning.features.frequencies.dtype is torch.float32


@pytest.mark.filterwarnings("ignore")  # torch's own, of quantisation
def test_quantised_networks_of_ours_can_be_asked():
    quantised = torch.ao.quantization.quantize_dynamic(nets.MLP((2,), width=16).eval(), {nn.Linear})
    assert torch.isfinite(quantised(torch.zeros(3, 2), torch.zeros(3))).all()


class CastsBack(nn.Module):
    """Half precision within, and nothing of it outside: as EDM's networks and those under autocast in `forward` are."""

    def __init__(self, kind, how):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.kind, self.how = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 2)), kind, how

    def forward(self, x, label):
        if self.how == "autocast":
            with torch.autocast("cpu", self.kind, enabled=self.kind is not torch.float32):
                return x + self.body(x).to(x.dtype)
        hidden = nn.functional.silu(nn.functional.linear(x.to(self.kind), self.body[0].weight.to(self.kind)))
        return x + nn.functional.linear(hidden, self.body[2].weight.to(self.kind)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("how", ["autocast", "casts"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_within_is_seen_though_the_answer_is_cast_back(kind, how, mode, dtype):
    divergence = sdekit.Hutchinson(probes=1, fresh=False, mode=mode)
    model = model_of(CastsBack(kind, how))
    found = sdekit.log_likelihood(model, X.to(dtype), divergence=divergence, tolerance=0.1, throw=False)
    plain = model_of(CastsBack(torch.float32, how))
    exact = sdekit.log_likelihood(plain, X.to(dtype), divergence=divergence, tolerance=1e-4, throw=False)
    assert ((found.log_prob - exact.log_prob).abs() <= found.rounding + found.solver_error).all()
    assert (found.rounding > 10 * exact.rounding).all()
    assert model.precision(X.to(dtype)) is kind
    again = sdekit.log_likelihood(model, X.to(dtype), divergence=divergence, tolerance=0.1, throw=False)
    assert torch.equal(found.log_prob, again.log_prob)
    assert (again.rounding <= 1.5 * found.rounding).all()
    assert (found.rounding <= 1.5 * again.rounding).all()


class ShortFactors(nn.Module):
    """What TF32 makes of a float32 network: products of numbers with 10 bits behind the first, summed in float32."""

    def __init__(self, convolves, short):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.short = nn.Linear(2, 32), nn.Linear(32, 2), short
        self.convolves = convolves

    def rounded(self, x):
        bits = (x.detach().view(torch.int32) + 0x1000) & ~0x1FFF
        return x + (bits.view(torch.float32) - x.detach()) if self.short else x

    def layer(self, x, layer):
        x, weight = self.rounded(x), self.rounded(layer.weight)
        if self.convolves:
            return nn.functional.conv1d(x[:, :, None], weight[:, :, None])[:, :, 0] + layer.bias
        return x @ weight.T + layer.bias

    def forward(self, x, label):
        return x + self.layer(nn.functional.silu(self.layer(x, self.first)), self.last)


def test_the_switches_of_tf32_are_read_where_a_device_has_it(monkeypatch):
    assert _tensor.tf32(torch.device("cpu")) is None
    monkeypatch.setattr(_tensor, "has_tf32", lambda device: True)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        for convolutions in (True, False):
            for products in (True, False):
                torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
                assert _tensor.tf32(torch.device("cpu")) == (convolutions, products)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("how", [{"tolerance": 0.1}, {"nodes": 24}])
@pytest.mark.parametrize("convolves", [False, True])
def test_products_rounded_to_tf32_are_booked(convolves, how, monkeypatch):
    exact = sdekit.log_likelihood(model_of(ShortFactors(convolves, False)), X.float(), tolerance=1e-4, throw=False)
    switches = [convolves, not convolves]
    monkeypatch.setattr(_seen, "tf32", lambda device: tuple(switches))
    model = model_of(ShortFactors(convolves, True))
    found = sdekit.log_likelihood(model, X.float(), throw=False, **how)
    assert model.precision(X.float()) is torch.float16  # rounds to as many bits
    assert (found.rounding > 10 * exact.rounding).all()
    assert ((found.log_prob - exact.log_prob).abs() <= found.rounding + found.solver_error).all()
    switches.reverse()  # what the network does not use says nothing of it
    assert model.precision(X.float()) is torch.float32
    assert (sdekit.log_likelihood(model, X.float(), throw=False, **how).rounding < 0.1 * found.rounding).all()
    monkeypatch.setattr(_seen, "tf32", lambda device: (True, True))
    sdekit.log_likelihood(model, X, throw=False, **how)
    double = model_of(ShortFactors(convolves, False).double())
    sdekit.log_likelihood(double, X, throw=False, **how)
    assert double.precision(X) is torch.float64


def test_looking_into_a_network_changes_no_bit_and_happens_once():
    seen = []

    class Counting(nn.Linear):
        def forward(self, x):
            seen.append(len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()))
            return super().forward(x)

    torch.manual_seed(0)
    net = nets.MLP((2,), 16, 1)
    model = model_of(net)
    t = torch.full((4,), 0.3, dtype=torch.float64)
    first = model.score(X, t)
    assert torch.equal(first, model.score(X, t))
    counted = Counting(2, 2)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = counted

        def forward(self, x, label):
            return self.body(x)

    model = model_of(Wrapped())
    for _ in range(3):
        model.score(X.float(), t)
        model.condition().score(X.float(), t)
    assert [bool(depth) for depth in seen] == [True] + 5 * [False]
    compiled = CastsBack(torch.bfloat16, "casts")
    compiled.compile(backend="eager")
    model = model_of(compiled)
    assert torch.equal(model.score(X, t), model.score(X, t))
    assert model.precision(X) is torch.float32  # of compiled parts nothing is seen

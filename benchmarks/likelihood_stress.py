"""The likelihood solver where nothing is as it was measured: what holds, what warns, what fails, at what cost.

    off the data    noise, constant images, data times 3 and times 10, on learned networks
    other times     networks used under VE and in EDM's own time
    low precision   bfloat16 and float16 inside of the network, against the float64 network's truth (U-Net: float32's)
    no gradient     a learned noise plus s A x, A antisymmetric: the flow turns, and its field is no longer minus the
                    gradient of anything, so the control's gradient is not that of the flow's own density
    between         samples between two that tight, far components generate: their paths run along separatrices
    guidance        classifier-free guidance of exact scores, whose field is the gradient of nothing where w is not 1
    says nothing    a network whose answer is 0, as before its first step of training: the score tells no sensitivity
    high dimension  D = 12,288: a mixture with exact scores, in float64 and float32
    fresh probes    the control that the default has on images (norms of error and gradient), its value taken from a
                    probe that stays the same, so that the equation and its truth are those of one fixed probe

Truth is a reference solution of the same equation; for the U-Net, in float32, sdekit's own at 1e-3 nats. One fixed
probe wherever D > 2. `within` and `covered` are shares of all samples; the columns that begin with "beyond" are counts
among those whose error exceeds the tolerance.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sdekit
from sdekit.targets import GaussianMixture

from .common import Report, arguments, quantile, share_within
from .patches import held_out, trained
from .peers import fixed_probe
from .problems import digits, learned, ring
from .reference import reference

TOLERANCES = (1e-1, 1e-2, 1e-3)
COLUMNS = ["case", "D", "n", "tolerance", "within", "worst / tol", "median / tol", "covered", "worst estimate / tol"]
COLUMNS += ["loose", "failed", "warned", "evaluations", "most", "own error"]
COLUMNS += ["beyond, covered", "beyond, unmarked", "beyond, least reach"]
_SELF = 1e-3  # nats: U-Nets are too dear for a reference, their truth is sdekit's own solve at this tolerance


@dataclass(frozen=True)
class StillFresh(sdekit.Hutchinson):
    """Controlled as fresh probes are, but the probe stays: its value is that of one fixed probe."""

    def draw(self, keys: Tensor, node: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        return super().draw(keys, torch.zeros_like(node), size, dtype)


class Turned(nn.Module):
    """A network's output plus strength times A x, with A antisymmetric in pairs of neighbouring coordinates.

    Args:
        net: Called net(x, label).
        strength: Radians that the flow turns by per unit of log(sigma/alpha), where noise prevails.
    """

    strength: Tensor

    def __init__(self, net: nn.Module, strength: float) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("strength", torch.tensor(strength, dtype=torch.float64))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        pairs = x.flatten(1).unflatten(1, (-1, 2))
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), 2).reshape(x.shape)
        out: Tensor = self.net(x, label) + self.strength.to(x.dtype) * turned
        return out


class Lowered(nn.Module):
    """A network in low precision: float32 weights under autocast, its answer in the state's own type.

    Args:
        net: Called net(x, label).
        dtype: torch.bfloat16 or torch.float16; torch.float32 for none.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.low = net, dtype

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=self.low, enabled=self.low != torch.float32):
            out: Tensor = self.net(x.float(), label.float())
        return out.to(x.dtype)


class Exploding(nn.Module):
    """A network trained under VP with log(sigma/alpha)/4 as its label, for states that alpha has not shrunk."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        alpha = torch.rsqrt(1.0 + torch.exp(8.0 * label)).reshape(-1, *[1] * (x.dim() - 1))
        out: Tensor = self.net(alpha * x, label)
        return out


class Case(NamedTuple):
    """An equation: model, samples, divergence.

    Attributes:
        of: The model whose reference is the truth, if not its own.
        itself: Truth is sdekit's own solve, with one fixed probe.
        known: False: no truth is within reach; the row tells cost and marks.
    """

    name: str
    model: sdekit.ScoreModel
    x: Tensor
    divergence: sdekit.Divergence
    of: sdekit.ScoreModel | None = None
    itself: bool = False
    known: bool = True


FIXED = sdekit.Hutchinson(probes=1, fresh=False)


def with_net(model: sdekit.ScoreModel, net: nn.Module, sde: sdekit.SDE | None = None) -> sdekit.ScoreModel:
    """The model with another network, and another SDE if one is given."""
    made = sdekit.ScoreModel(net, model.sde if sde is None else sde, model.parameterization, model.data_std)
    return made.eval()


def unet(quick: bool) -> sdekit.ScoreModel:
    """The U-Net in float32."""
    model = trained(quick)
    return with_net(model, model.net.float())


def strange(x: Tensor, seed: int) -> dict[str, Tensor]:
    """What no network was trained on, from data `x`: by name, each the shape of `x`."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return {"data x3": 3.0 * x, "data x10": 10.0 * x, "noise": x.std() * noise, "constant": torch.full_like(x, 0.5)}


def off_data(quick: bool, seed: int) -> Iterator[Case]:
    """Noise, constants and scaled data, on a 2-D network, the digits network and the U-Net."""
    x = ring().target().sample(16 if quick else 32, generator=torch.Generator().manual_seed(600 + seed))
    for kind in ("noise", "edm"):
        for name, rows in strange(x, seed).items():
            rows = rows[:1] if name == "constant" else rows
            yield Case(f"2-D {kind} net, VP: {name}", learned(kind, seed, quick), rows, sdekit.Exact())
    images = digits(2 if quick else 6, seed)
    for name, rows in strange(images.x, seed).items():
        yield Case(f"digits: {name}", images.model, rows, FIXED)


def off_data_unet(quick: bool, seed: int) -> Iterator[Case]:
    """The same of the U-Net."""
    model = unet(quick)
    for name, rows in strange(held_out(1 if quick else 2, seed).float(), seed).items():
        if name == "data x10":
            continue  # dear
        yield Case(f"U-Net, VP: {name}", model, rows, FIXED, itself=True)


def between(quick: bool, seed: int) -> Iterator[Case]:
    """Points between two samples, of mixtures with exact scores."""
    generator = torch.Generator().manual_seed(605 + seed)
    count = 12 if quick else 60
    pair = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    means = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    for name, centers, std in (("2 components, 2-D", pair, 0.1), ("8 components, 16-D", means, 0.15)):
        target = GaussianMixture(torch.ones(len(centers)), centers, torch.full((len(centers),), std))
        ends = target.sample(2 * count, generator=generator).reshape(2, count, -1)
        share = 0.3 + 0.4 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
        yield Case(name, target.score_model(sdekit.VPSDE()), torch.lerp(ends[0], ends[1], share), sdekit.Exact())
    near = 10.0 ** torch.linspace(-6.0, -1.0, count // 2, dtype=torch.float64)[:, None]
    turn = torch.randn(count // 2, 2, generator=generator, dtype=torch.float64)
    target = GaussianMixture(torch.ones(2), pair, torch.full((2,), 0.1))
    x = near * turn / turn.norm(dim=1, keepdim=True)
    yield Case("1e-6 to 0.1 from their middle", target.score_model(sdekit.VPSDE()), x, sdekit.Exact())


def guidance(quick: bool, seed: int) -> Iterator[Case]:
    """A guided mixture: from six components to two of them, at samples of these."""
    generator = torch.Generator().manual_seed(606 + seed)
    means = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    whole, part = (GaussianMixture(torch.ones(k), means[:k], torch.full((k,), 0.2)) for k in (6, 2))
    x = part.sample(16 if quick else 64, generator=generator)
    for scale in (1.5, 3.0, 7.5):
        models = [law.score_model(sdekit.VPSDE()) for law in (part, whole)]
        model = sdekit.guided(models[0], models[1], scale)
        known = Known(model.net, torch.cat((means.flatten(), torch.tensor([scale]))))
        yield Case(f"w = {scale:g}", with_net(model, known), x, sdekit.Exact())


class Known(nn.Module):
    """A network without weights, with the numbers `facts` that its reference solutions are kept under."""

    facts: Tensor

    def __init__(self, net: nn.Module, facts: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("facts", facts)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        out: Tensor = self.net(x, label)
        return out


class Silent(nn.Module):
    """A network that answers 0."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return 0.0 * x


def says_nothing(quick: bool, seed: int) -> Iterator[Case]:
    """Noise networks that answer 0."""
    for dim in (2, 64):
        x = torch.randn(8 if quick else 32, dim, generator=torch.Generator().manual_seed(607 + seed)).double()
        for sde in (sdekit.VPSDE(), sdekit.RectifiedFlow()):
            model = sdekit.ScoreModel(Known(Silent(), torch.zeros(1)).eval(), sde, data_std=1.0)
            yield Case(f"{type(sde).__name__}, {dim}-D", model, x, sdekit.Exact())


def other_times(quick: bool, seed: int) -> Iterator[Case]:
    """The 2-D EDM network and the U-Net under VE and in EDM's own time."""
    x = ring().target().sample(16 if quick else 64, generator=torch.Generator().manual_seed(601 + seed))
    model, rows = unet(quick), held_out(1 if quick else 4, seed).float()
    for name, sde in {"VE": sdekit.VESDE(), "Karras": sdekit.KarrasSDE()}.items():
        yield Case(f"2-D EDM net, {name}", learned("edm", seed, quick, sde), x, sdekit.Exact())
        yield Case(f"U-Net, {name}", with_net(model, Exploding(model.net), sde), rows, FIXED, itself=True)


def low_precision(quick: bool, seed: int) -> Iterator[Case]:
    """bfloat16 and float16 within a 2-D network and the digits network, float32 for comparison; a U-Net's bfloat16."""
    x = ring().target().sample(8 if quick else 32, generator=torch.Generator().manual_seed(602 + seed))
    images = digits(2 if quick else 6, seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        exact = learned("noise", seed, quick)
        low = with_net(exact, Lowered(learned("noise", seed, quick).net.float(), dtype))
        yield Case(f"2-D noise net, {name}", low, x, sdekit.Exact(), of=exact)
        low = with_net(images.model, Lowered(digits(1, seed).model.net.float(), dtype))
        yield Case(f"digits, {name}", low, images.x, FIXED, of=images.model)
    network, rows = unet(quick), held_out(1 if quick else 2, seed).float()
    low = with_net(network, Lowered(network.net, torch.bfloat16))
    yield Case("U-Net, bfloat16", low, rows, FIXED, of=network, itself=True)


def no_gradient(quick: bool, seed: int) -> Iterator[Case]:
    """Learned networks with an antisymmetric part."""
    x = ring().target().sample(16 if quick else 64, generator=torch.Generator().manual_seed(603 + seed))
    images = digits(2 if quick else 6, seed)
    for strength in (0.1, 1.0, 10.0):
        model = learned("noise", seed, quick)
        turned = with_net(model, Turned(model.net, strength))
        yield Case(f"2-D noise net + {strength:g} A x", turned, x, sdekit.Exact())
        turned = with_net(images.model, Turned(images.model.net, strength))
        yield Case(f"digits + {strength:g} A x", turned, images.x, FIXED)


def high_dimension(quick: bool, seed: int) -> Iterator[Case]:
    """12,288 dimensions: a mixture with exact scores in float64 and float32."""
    generator = torch.Generator().manual_seed(604 + seed)
    event = (3, 16, 16) if quick else (3, 64, 64)
    parts, size = 4, math.prod(event)
    means = 0.3 * torch.randn(parts, size, generator=generator, dtype=torch.float64)
    stds = 0.05 + 0.95 * torch.rand(parts, size, generator=generator, dtype=torch.float64)
    target = GaussianMixture(torch.ones(parts, dtype=torch.float64), means, stds)
    x, near = target.sample(4, generator=generator), 0.5 * (means[:1] + means[1:2])
    model = target.score_model(sdekit.VPSDE())
    yield Case("mixture: samples", model, x, FIXED)
    yield Case("mixture: midpoint of two means", model, near, FIXED, known=quick)
    yield Case("mixture: samples, float32", model, x.float(), FIXED, of=model)


def fresh_probes(quick: bool, seed: int) -> Iterator[Case]:
    """The control of fresh probes, without and with a control probe, on digits and the U-Net."""
    images, rows = digits(2 if quick else 6, seed), held_out(1 if quick else 4, seed).float()
    network = unet(quick)
    for name, divergence in {"": StillFresh(), ", control probe": StillFresh(control=True)}.items():
        yield Case(f"digits, fresh{name}", images.model, images.x, divergence)
        yield Case(f"U-Net, VP, fresh{name}", network, rows, divergence, itself=True)


def truth(case: Case) -> tuple[Tensor, float]:
    """(B,) log p, and what it may be wrong by."""
    model = case.model if case.of is None else case.of
    if not case.known:
        return torch.full((len(case.x),), math.nan, dtype=torch.float64), math.nan
    if case.itself:
        found = sdekit.log_likelihood(model, case.x, divergence=FIXED, tolerance=_SELF, throw=False)
        return found.log_prob, quantile(found.solver_error, 1.0)
    x = case.x.double()
    probe = None if isinstance(case.divergence, sdekit.Exact) else fixed_probe(x)
    known = reference(model, x, probe)
    return known.log_prob, quantile(known.error, 1.0)


def rows_of(case: Case) -> list[list[str | float | int]]:
    """A row of the table for each tolerance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known, own = truth(case)
    made: list[list[str | float | int]] = []
    for tolerance in TOLERANCES[:2] if case.itself or not case.known else TOLERANCES:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = sdekit.log_likelihood(
                *(case.model, case.x), divergence=case.divergence, tolerance=tolerance, throw=False
            )
        error, size = (found.log_prob - known).abs(), case.x.shape[1:].numel()
        warned = any(issubclass(warning.category, sdekit.ToleranceWarning) for warning in heard)
        failed = int((~torch.isfinite(found.log_prob)).sum())
        row: list[str | float | int] = [case.name, size, len(error), tolerance]
        facts = [share_within(error, tolerance), quantile(error, 1.0) / tolerance, quantile(error, 0.5) / tolerance]
        facts += [share_within(error, found.solver_error), quantile(found.solver_error, 1.0) / tolerance]
        row += [
            *(facts if case.known else [*[math.nan] * 4, facts[-1]]),
            int((found.status == sdekit.Status.LOOSE).sum()),
            failed,
        ]
        cost = found.stats.evaluations
        row += ["yes" if warned else "no", float(cost.double().mean()), int(cost.max()), own]
        made.append([*row, *(beyond(found, error, tolerance) if case.known else [math.nan] * 3)])
    return made


def beyond(found: sdekit.LogLikelihood, error: Tensor, tolerance: float) -> list[str | float | int]:
    """Of the samples whose error exceeds the tolerance: how many `solver_error` covers, how many are unmarked, reach.

    Reach is the least of them, NaN where there is none.
    """
    missed = ~(error <= tolerance)
    covered = missed & (error <= found.solver_error)
    unmarked = missed & (found.status != sdekit.Status.LOOSE)
    reach = torch.full_like(error, math.nan) if found.reach is None else found.reach
    return [int(covered.sum()), int(unmarked.sum()), quantile(reach[missed], 0.0)]


GROUPS: dict[str, Callable[[bool, int], Iterator[Case]]] = {
    "high dimension": high_dimension,
    "off the data": off_data,
    "U-Net: off the data": off_data_unet,
    "between": between,
    "guidance": guidance,
    "says nothing": says_nothing,
    "fresh probes' control": fresh_probes,
    "other times": other_times,
    "no gradient": no_gradient,
    "low precision, against the truth of float64": low_precision,
}


def main() -> None:
    """Runs the benchmark."""
    chosen = arguments(
        __doc__, lambda parser: parser.add_argument("--only", default="", help="the group whose title begins so")
    )
    name = chosen.only.replace(" ", "_")
    report = Report(f"likelihood_stress{'_' if name else ''}{name}", chosen)
    for title, cases in GROUPS.items():
        if not title.startswith(chosen.only):
            continue
        table = report.table(title, COLUMNS)
        for case in tqdm(cases(chosen.quick, chosen.seed), desc=title):
            table.rows += rows_of(case)
            report.save(final=False)
    report.save()


if __name__ == "__main__":
    main()

"""A second network that predicts the divergence of the digits network: does it pay, training included?

It sees x_t, the noise predicted in it and the mixed variable s, and is trained on images of the training split, noised,
to predict pixel by pixel what one probe v says of the diagonal of the noise prediction's Jacobian J:

    target  sigma v_i (J' v)_i,     whose mean over v is sigma J_ii

in the norm in which dl/ds, what log p is integrated from, sees it. It is used in two ways along the path:

    instead      the sum of its pixels is the trace: no product with J at all, and a bias
    corrected    at a random share of the nodes a fresh probe corrects it, weighed by 1/share: no bias, more noise

Beside it stand fresh probes without it, and exact traces. Equal total cost: the CPU seconds of training and of N
evaluations are spent on probes instead, as many a node as that allows, or on exact traces where these are no dearer.
The costs of K probes are interpolated between those measured, their standard deviation goes as 1/sqrt(K).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sdekit
from sdekit import _random
from sdekit.controller import Nats
from sdekit.divergence import Exact, Hutchinson
from sdekit.driver import Limits, drive
from sdekit.grid import MixedTime, mixed_time
from sdekit.ledger import Note
from sdekit.likelihood import density
from sdekit.likelihood_flow import LikelihoodFlow
from sdekit.loop import Problem, begin
from sdekit.model.nets import MLP
from sdekit.solver.adams import Adams
from sdekit.zoo import digits as zoo

from .common import Goal, Report, arguments, cached, digest, quantile
from .problems import digits

_SIZE = 64
_BATCH = 128
_STEPS = 9000
_TOLERANCE = 1e-2
SHARES = (1.0, 0.5)
PROBES = (1, 8, 32)
NUMBERS = (360, 10_000)


class TraceNet(nn.Module):
    """Predicts sigma J_ii of the noise prediction, pixel by pixel: (B, 64), (B, 64), (B,) -> (B, 64).

    A Gaussian of the data's standard deviation sd would have rho^2 / (rho^2 + sd^2), rho = sigma/alpha; the network
    predicts the rest of it, in units of sd^2 / (rho^2 + sd^2): at high noise its error is scaled down as it must be.
    """

    def __init__(self, mixed: MixedTime, width: int = 256) -> None:
        super().__init__()
        self.net = MLP((2, _SIZE), width, 3, residual=True, period=2.0)
        self.mixed = mixed

    def forward(self, x: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        out: Tensor = self.net(torch.stack((x, noise), 1), s.to(x.dtype)).sum(1)
        share = torch.sigmoid(2.0 * (math.log(self.mixed.data_std) - self.mixed.log_ratio(s)[0])).to(x.dtype)[:, None]
        return 1.0 - share + share * out


class Trained(NamedTuple):
    """The network, the CPU seconds it took, and the mean loss of every hundredth of the steps."""

    net: TraceNet
    seconds: float
    losses: list[float]


def train(model: sdekit.ScoreModel, steps: int, seed: int) -> Trained:
    """The network trained for so many steps on one-probe values at noised training images."""
    torch.manual_seed(seed)  # of the initial weights
    mixed, generator = mixed_time(model.sde, model.data_std), torch.Generator().manual_seed(seed)
    net = TraceNet(mixed)
    average, levels, sde = copy.deepcopy(net), zoo.load_split().train, model.sde
    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses, recent, began = [], 0.0, time.process_time()
    for step in tqdm(range(steps), desc="train"):
        chosen = torch.randint(len(levels), (_BATCH,), generator=generator)
        x0 = zoo.dequantise(levels[chosen], generator)
        even = torch.arange(_BATCH, dtype=torch.float64)
        s = (even + torch.rand(_BATCH, generator=generator, dtype=torch.float64)) / _BATCH
        t = mixed.time(s)
        x = sde.perturb(x0, t, torch.randn(x0.shape, generator=generator))
        probe = 2.0 * torch.randint(2, x.shape, generator=generator).to(x.dtype) - 1.0
        leaf = x.requires_grad_()
        noise = model.output(leaf, t)
        (product,) = torch.autograd.grad(noise, leaf, probe)
        target = (probe * product).flatten(1) * sde.sigma(t).to(x.dtype)[:, None]
        off = net(x.detach().flatten(1), noise.detach().flatten(1), s) - target
        weight = mixed.log_ratio(s)[1].square().to(x.dtype) / _SIZE  # dl/ds = dq/ds sigma tr J + a known part
        loss = (weight * (off.square().sum(1) + off.sum(1).square())).mean()
        adam.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (1.0 - step / steps)
        adam.step()
        with torch.no_grad():
            for mean, new in zip(average.parameters(), net.parameters(), strict=True):
                mean.lerp_(new, 1.0 - min(0.999, (step + 1) / (step + 10)))
        recent += float(loss.detach())
        if (step + 1) % max(1, steps // 100) == 0:
            losses.append(recent / max(1, steps // 100))
            recent = 0.0
    return Trained(average.eval(), time.process_time() - began, losses)


def trained(model: sdekit.ScoreModel, steps: int, seed: int) -> Trained:
    """`train`, cached: no solver has a part in it."""

    def make() -> dict[str, Tensor]:
        found = train(model, steps, seed)
        facts = torch.tensor([found.seconds, *found.losses], dtype=torch.float64)
        return {**found.net.state_dict(), "facts": facts}

    untrained = TraceNet(mixed_time(model.sde, model.data_std))
    kept = cached(f"amortised-{digest(*model.state_dict().values(), repr(untrained), steps, seed)}", make)
    seconds, *losses = kept.pop("facts").tolist()
    untrained.load_state_dict(kept)
    return Trained(untrained.eval(), seconds, losses)


class AmortisedFlow(LikelihoodFlow):
    """The flow with the trace predicted by a network, corrected by a probe at a share of the nodes (None: nowhere)."""

    def __init__(self, model: sdekit.ScoreModel, event: torch.Size, keys: Tensor, net: TraceNet, share: float | None):
        super().__init__(model, Exact() if share is None else Hutchinson(), event, keys)
        self.net, self.share = net, share

    def take(self, rows: Tensor) -> AmortisedFlow:
        return AmortisedFlow(self.model.take(rows), self.event, self.keys[rows], self.net, self.share)

    def _network(
        self, x: Tensor, t: Tensor, node: Tensor, jacobian: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Note | None]:
        def field(state: Tensor, time_of: Tensor) -> Tensor:
            return self.model.output(state.reshape(-1, *self.event), time_of).flatten(1)

        asked = torch.zeros_like(node, dtype=torch.bool)
        if self.share is not None:
            asked = _random.uniform(self.keys[:, 1], node) <= self.share
        rows, rest = asked.nonzero().squeeze(1), (~asked).nonzero().squeeze(1)
        out, probed = torch.empty_like(x), torch.zeros(x.shape[0], dtype=torch.float64)
        if rest.numel():
            out[rest] = field(x[rest], t[rest])
        if rows.numel():
            probe = Hutchinson()
            drawn = probe.draw(self.keys[rows], node[rows], x.shape[1], x.dtype)
            found = probe.evaluate(lambda state: field(state, t[rows]), x[rows], drawn)
            out[rows], probed[rows] = found.value, found.traces[:, 0]
        predicted = self.net(x, out, self.coordinate(t)).sum(1).double() / self.model.sde.sigma(t)
        if self.share is not None:
            predicted = predicted + asked * (probed - predicted) / self.share
        return out, (predicted * jacobian)[:, None], None, None


class Draws(NamedTuple):
    """(images, draws) log p, mean network evaluations, CPU seconds a sample."""

    log_prob: Tensor
    evaluations: float
    seconds: float


def amortised(model: sdekit.ScoreModel, x: Tensor, draws: int, net: TraceNet, share: float | None) -> Draws:
    """log p with the predicted trace."""
    every = x.repeat_interleave(draws, 0)
    keys = Hutchinson.keys(0, torch.arange(every.shape[0]))
    began = time.process_time()
    with torch.no_grad():
        term = AmortisedFlow(model, x.shape[1:], keys, net, share)
        start = torch.full((every.shape[0],), model.sde.t_min, dtype=torch.float64)
        s0 = term.coordinate(start)
        problem = Problem(term, Adams(5), Nats(_TOLERANCE), torch.ones_like(s0), None, 10_000)
        carry = drive(problem, begin(problem, s0, term.enter(every, s0)), Limits()).carry
        prior, log_det, _ = density(term, carry.z, start, carry.s, None, None)
    seconds = (time.process_time() - began) / every.shape[0]
    return Draws((prior + log_det).reshape(-1, draws), float(carry.evaluations.double().mean()), seconds)


def plain(model: sdekit.ScoreModel, x: Tensor, draws: int, divergence: sdekit.Divergence, tolerance: float) -> Draws:
    """log p as sdekit has it."""
    every = x.repeat_interleave(draws, 0)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sdekit.log_likelihood(model, every, divergence=divergence, tolerance=tolerance, throw=False)
    seconds = (time.process_time() - began) / every.shape[0]
    return Draws(found.log_prob.reshape(-1, draws), float(found.stats.evaluations.double().mean()), seconds)


def at_equal_cost(report: Report, runs: dict[str, Draws], errors: dict[str, float], training: float) -> None:
    """What fresh probes or exact traces make of the CPU seconds that training and N evaluations took."""
    table = report.table(
        "the same CPU seconds, training included",
        ["N", "seconds", "amortised, rms error", "what they buy else", "its rms error", "amortised / it"],
        f"Training took {training:.0f} CPU s. Exact traces are at the tolerance 0.1.",
    )
    few, many = PROBES[0], PROBES[-1]
    low, high = runs[f"{few} fresh"].seconds, runs[f"{many} fresh"].seconds
    for number in NUMBERS:
        each = training / number + runs["instead"].seconds
        probes = few + (many - few) * (each - low) / (high - low)
        if runs["exact"].seconds <= each:
            what, theirs = "exact traces", errors["exact"]
        else:
            what, theirs = f"{probes:.0f} fresh probes", errors[f"{many} fresh"] * (many / probes) ** 0.5
        ratio = errors["instead"] / theirs
        table.rows.append([number, each * number, errors["instead"], what, theirs, ratio])
        report.goals.append(Goal(f"rms error, amortised / the alternative, N = {number}", ratio, high=1.0))


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=_STEPS, help="of training, 128 images each")
    parser.add_argument("--images", type=int, default=12, help="held out, to evaluate")


def main() -> None:
    chosen = arguments(__doc__, _more)
    report = Report("amortised", chosen)
    count, draws, steps = (6, 2, 200) if chosen.quick else (chosen.images, 3, chosen.steps)
    images = digits(count, chosen.seed)
    model, x = zoo.load().float().eval(), images.x.float()
    net, training, losses = trained(model, steps, chosen.seed)
    truth = plain(images.model, x.double(), 1, Exact(), 1e-1 if chosen.quick else 1e-3).log_prob
    runs = {"instead": amortised(model, x, draws, net, None)}
    runs |= {f"corrected at {share:g} of nodes": amortised(model, x, draws, net, share) for share in SHARES}
    runs |= {f"{k} fresh": plain(model, x, draws, Hutchinson(k), _TOLERANCE) for k in PROBES}
    runs["exact"] = plain(model, x, draws, Exact(), 1e-1)
    table = report.table(
        "log p of held-out digits",
        ["trace", "evaluations", "CPU ms a sample", "rms error", "bias", "its standard error", "largest error"],
        f"{count} images, float32, {draws} draws of the probes each, all solved together; the truth by exact traces in "
        "float64 at 1e-3.",
    )
    errors = {}
    for name, run in runs.items():
        off = run.log_prob - truth
        errors[name] = float(off.square().mean().sqrt())
        spread = float(off.mean(1).std() / count**0.5)
        facts = [errors[name], float(off.mean()), spread, quantile(off.abs().flatten(), 1.0)]
        table.rows.append([name, run.evaluations, 1e3 * run.seconds, *facts])
    at_equal_cost(report, runs, errors, training)
    shown = report.table("training loss", ["of the steps", "mean squared error"])
    shown.rows += [[f"{k + 1}%", losses[k]] for k in (0, 9, 24, 49, 74, 99) if k < len(losses)]
    report.save()


if __name__ == "__main__":
    main()

"""Ideas for a less conservative control in nats, on problems it was not tuned on; docs/decisions/0009 says what came.

The estimate is the sum of |g . e_u| + |e_l| over the steps, 10 to 30 times the true error at the median of smooth
problems. Three reasons are possible, and each idea goes after one:

    looser      every step may spend twice as much: the tolerance is shared too cautiously
    range       besides, the bound is min(sum, 4 (max - min of the partial sums of g . e_u + e_l)): signs cancel
    next order  the cost is min(d, max(0.3 d, 1.5 d')), d' of the corrector's own error (one node more): the error
                estimated is that of one order less than what is kept

and each of these spends less on what is estimated well:

    order 6, 7  one or two nodes more: the same control, longer steps where the path is smooth
    ceiling 2x  steps up to 1/10 of the way (coarse tolerances only: finer ones do not come near it)
    doubt 0     coarse steps' costs are not multiplied (likewise)

In many dimensions (three patches by the U-Net, and digits) besides, how much of the two parts' cancelling is trusted:
the cost is max(|g . e_u + e_l|, k (|g . e_u| + |e_l|)) with

    8, decided  k = max(1/4, min(1, 8/sqrt(D)))
    4           k = max(1/4, min(1, 4/sqrt(D)))
    k = 1       none of it (up to 64 dimensions that is what is decided)

All with order 5 for every sample, the default when this was asked: since then each sample chooses (adaptive_order.py).
What counts: no sample lost (error above the tolerance, or above the estimate) that is not lost today.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import sdekit
from sdekit._tensor import dot, select, tree_map
from sdekit.controller import Controller, NatsState, Step, Verdict
from sdekit.solver.adams import Memory
from sdekit.solver.base import Proposal, Solver
from sdekit.solver.newton import Formula, stacked
from sdekit.terms import Term

from .common import Report, arguments, quantile
from .patches import held_out, trained
from .peers import fixed_probe
from .problems import SDES, digits, learned, near_separatrix, random_mixture, ring
from .reference import Reference, reference
from .solver_error import Case

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
_DIGITS, _KNOWN = 30, 120  # of so many with a reference: likelihood_images solves that many together, and keeps it
COLUMNS = ["problem", "tolerance", "idea", "evaluations", "worst / tol", "n", "above tol", "above estimate", "loose"]
COLUMNS += ["median estimate / error"]


class Spending(NamedTuple):
    """The state of `Nats`; (B,) the sum of costs, the signed sum, and its least and largest partial sums."""

    base: NatsState
    total: Tensor
    signed: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Booked:
    """Stands for the term where `Nats` asks what an error costs."""

    cost: Tensor

    def nats(self, error: Any, aux: Any) -> Tensor:
        return self.cost

    def rounding(self, length: Any, before: Any, after: Any, aux: Any) -> Tensor:
        return self.cost.new_zeros(len(self.cost), 2)


@dataclass(frozen=True)
class Idea(Controller):
    """`Nats` with steps that may spend `looser` times as much, and the bound by the range of the signed sum.

    Args:
        inner: What is varied.
        looser: How much more a step may spend.
        times_range: The bound is min(sum of costs, times_range * range); 0 for the sum alone.
        next_order: Whether the solver is `NextOrder`, and its second error counts.
        cancels: In place of the 8 over sqrt(D); None: as decided.
    """

    inner: sdekit.Nats
    looser: float = 1.0
    times_range: float = 0.0
    next_order: bool = False
    cancels: float | None = None

    def start(self, term: Term, s0: Tensor, s_end: Tensor) -> Spending:
        none = torch.zeros_like(s0)
        return Spending(self.inner.start(term, s0, s_end), none, none, none, none)

    def target(self, s: Tensor, s_end: Tensor, state: Spending) -> Tensor:
        return self.inner.target(s, s_end, state.base)

    def judge(
        self, term: Term, solver: Solver, proposal: Proposal, step: Step, s_end: Tensor, state: Spending
    ) -> Verdict:
        first, second = proposal.error if self.next_order else (proposal.error, proposal.error)
        cost = term.nats(first, proposal.aux)
        in_u, in_l = dot(proposal.aux.gradient, first.u), first.log_det.mean(1)
        if self.cancels is not None:
            k = max(0.25, min(1.0, self.cancels / math.sqrt(first.u.shape[1])))
            cost = torch.maximum((in_u + in_l).abs(), k * (in_u.abs() + in_l.abs()))
        if self.next_order:
            better = torch.maximum(0.3 * cost, 1.5 * term.nats(second, proposal.aux))
            cost = torch.where(proposal.settled, torch.minimum(cost, better), cost)
        found = self.inner.judge(Booked(cost / self.looser), solver, proposal, step, s_end, state.base)  # type: ignore[arg-type]
        share = torch.where(proposal.settled, 1.0, 0.1) * (1.0 + min(1.5, self.inner.doubt * self.inner.tolerance))
        total = torch.where(found.accept, state.total + share * cost, state.total)
        signed = torch.where(found.accept, state.signed + share * (in_u + in_l), state.signed)
        low, high = torch.minimum(state.low, signed), torch.maximum(state.high, signed)
        bound = torch.minimum(total, self.times_range * (high - low)) if self.times_range else total
        return Verdict(
            found.accept, Spending(found.state._replace(spent=bound), total, signed, low, high), found.failed
        )

    def spent(self, state: Spending) -> tuple[Tensor, Tensor]:
        return self.inner.spent(state.base)


@dataclass(frozen=True)
class NextOrder(sdekit.Adams):
    """The default with one node more: it keeps the same value, and besides its error gives that of the next order."""

    order: int = 6

    def propose(self, term: Term, s0: Tensor, s1: Tensor, z: Any, memory: Memory, path: Any) -> Proposal:
        depth, kept = self.error_order, self.error_order - 1
        begun, count = memory.entered > 0, memory.entered.clamp(max=depth)
        s1, used = torch.where(begun, s1, s0), count.clamp(max=kept)
        nodes = torch.cat((s1[:, None], memory.nodes), 1)
        backward = stacked(memory.nodes[:, :kept], Formula(used, used, False, begun), s0, s1).predict
        forward, _, last, beyond = stacked(memory.nodes, Formula(count, used, True, begun), s0, s1).correct.unbind(1)

        def total(weights: Tensor, past: Tensor) -> Tensor:
            return torch.einsum("bk,bk...->b...", weights, past)

        predicted = tree_map(lambda state, past: state + total(backward, past[:, :kept]), z, memory.slopes)
        fresh, aux = term.evaluate(s1, predicted, memory.entered)
        slopes = tree_map(lambda rate, past: torch.cat((rate[:, None], past), 1), fresh, memory.slopes)
        moved = tree_map(lambda state, past: state + total(forward, past), z, slopes)
        rows = (last, torch.where((count > kept)[:, None], beyond, last))
        errors = tuple(tree_map(lambda past, row=row: total(row, past), slopes) for row in rows)
        entered = tree_map(lambda past: past[:, :depth], (nodes, slopes))
        moved = select(memory.entered > 0, moved, z)
        return Proposal(moved, errors, aux, Memory(memory.entered + 1, *entered, None), memory.entered >= kept)


Method = Callable[[float], tuple[Controller, Solver]]
IDEAS: dict[str, Method] = {
    "as decided": lambda tolerance: (sdekit.Nats(tolerance), sdekit.Adams()),
    "looser": lambda tolerance: (Idea(sdekit.Nats(tolerance), 2.0), sdekit.Adams()),
    "range": lambda tolerance: (Idea(sdekit.Nats(tolerance), 2.0, 4.0), sdekit.Adams()),
    "next order": lambda tolerance: (Idea(sdekit.Nats(tolerance), next_order=True), NextOrder()),
    "order 6": lambda tolerance: (sdekit.Nats(tolerance), sdekit.Adams(6)),
    "order 7": lambda tolerance: (sdekit.Nats(tolerance), sdekit.Adams(7)),
    "ceiling 2x": lambda tolerance: (sdekit.Nats(tolerance, ceiling=0.1), sdekit.Adams()),
    "doubt 0": lambda tolerance: (sdekit.Nats(tolerance, doubt=0.0), sdekit.Adams()),
}
COARSE = ("ceiling 2x", "doubt 0")
MANY: dict[str, Method] = {
    "8, decided": IDEAS["as decided"],
    "4": lambda tolerance: (Idea(sdekit.Nats(tolerance), cancels=4.0), sdekit.Adams()),
    "k = 1": lambda tolerance: (Idea(sdekit.Nats(tolerance), cancels=math.inf), sdekit.Adams()),
    "order 6": IDEAS["order 6"],
    "order 7": IDEAS["order 7"],
}
OF_DIGITS = ("8, decided", "4")  # the others are the same there, or among the ideas


def cases(seed: int, quick: bool) -> list[Case]:
    """Learned networks, mixtures and points near separatrices, float64; the trace exact, of digits by a fixed probe."""
    generator = torch.Generator().manual_seed(300 + seed)
    made, count = [], 16 if quick else 128
    for name, kind in (("noise net, VP", "noise"), ("EDM net, VP", "edm")):
        model, x = learned(kind, seed, quick), ring().target().sample(count, generator=generator)
        made.append(Case(name, model, x, reference(model, x)))
    model, x = learned("noise", seed, quick), near_separatrix(ring(), count * 3 // 8, generator)
    made.append(Case("noise net, VP, near separatrices", model, x, reference(model, x)))
    for sde_name, dim, kind in (("VE", 2, "full"), ("VP", 16, "diagonal")):
        law = random_mixture(dim, kind, generator)
        target = law.target()
        rows = {"": target.sample(count, generator=generator)}
        rows[", near separatrices"] = near_separatrix(law, count // 4, generator)
        for name, x in rows.items():
            made.append(Case(f"{sde_name} {dim}-D{name}", target.score_model(SDES[sde_name]), x, None, target))
    return [*made, of_digits(seed, quick)]


def of_digits(seed: int, quick: bool) -> Case:
    """Held-out digits with one fixed probe."""
    images = digits(6 if quick else 360, seed)
    x = images.x[:_KNOWN]
    known = reference(images.model, x, fixed_probe(x), **({"tight": 1e-7} if quick else {}))
    return Case("digits", images.model, x[:_DIGITS], Reference(*(part[:_DIGITS] for part in known)))


def of_patches(seed: int, quick: bool) -> Case:
    """Held-out patches with one fixed probe."""
    model, x = trained(quick), held_out(1 if quick else 3, 300 + seed)
    return Case("U-Net", model, x, reference(model, x, fixed_probe(x), tight=1e-6 if quick else 1e-9))


def solved(case: Case, method: tuple[Controller, Solver]) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) errors, estimates and evaluations."""
    controller, solver = method
    divergence = sdekit.Exact() if case.x.dim() == 2 else sdekit.Hutchinson(probes=1, fresh=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sdekit.log_likelihood(
            case.model, case.x, divergence=divergence, solver=solver, controller=controller, throw=False
        )
    return case.error(found), found.solver_error, found.stats.evaluations.double()


def main() -> None:
    """Runs the benchmark."""
    chosen = arguments(__doc__)
    report = Report("control_ideas", chosen)
    whole = report.table("all problems together", COLUMNS)
    many = report.table("many dimensions, one fixed probe: how much of the cancelling is trusted", COLUMNS)
    table = report.table("problem by problem", COLUMNS)
    large = [of_patches(chosen.seed, chosen.quick), of_digits(chosen.seed, chosen.quick)]
    for tolerance in tqdm(TOLERANCES, desc="many dimensions"):
        for name, method in MANY.items():
            for case in large if name in OF_DIGITS else large[:1]:
                many.rows.append([case.name, tolerance, name, *facts(tolerance, *solved(case, method(tolerance)))])
        report.save(final=False)
    problems = cases(chosen.seed, chosen.quick)
    for tolerance in tqdm(TOLERANCES, desc="ideas"):
        for name, method in IDEAS.items():
            if name in COARSE and tolerance < 1e-2:
                continue
            parts = [solved(case, method(tolerance)) for case in problems]
            for case, part in zip(problems, parts, strict=True):
                table.rows.append([case.name, tolerance, name, *facts(tolerance, *part)])
            merged = (torch.cat(column) for column in zip(*parts, strict=True))
            whole.rows.append(["all", tolerance, name, *facts(tolerance, *merged)])
            report.save(final=False)
    report.save()


def facts(tolerance: float, error: Tensor, estimate: Tensor, evaluations: Tensor) -> list[float | int]:
    """The rest of a row."""
    return [
        float(evaluations.mean()),
        quantile(error, 1.0) / tolerance,
        error.numel(),
        int((~(error <= tolerance)).sum()),
        int((~(error <= estimate)).sum()),
        int((estimate > tolerance).sum()),
        quantile(estimate, 0.5) / quantile(error, 0.5),
    ]


if __name__ == "__main__":
    main()

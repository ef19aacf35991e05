"""A compiled step that stays in its memory gives what the step gives, to the bit, or is not used."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import SDES, draw, mixture, perceptron, watched

import sdekit
from sdekit import Status, fusing, resident, runtime

TARGET = mixture(3, 5)
EXACT = TARGET.score_model(SDES["vp"])
LEARNED = sdekit.ScoreModel(perceptron(3, 2), SDES["karras"], sdekit.edm(0.7))
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="needs a C++ compiler")


@pytest.fixture
def made(monkeypatch):
    """The steps that stay, as they are made; the calls after which one does are set by `after`."""

    class Made(list):
        def after(self, steps):
            monkeypatch.setattr(runtime, "_STAYS", steps)

    found = Made()

    class Watched(resident.Resident):
        def __init__(self, *given):
            super().__init__(*given)
            found.append(self)

    monkeypatch.setattr(runtime, "Resident", Watched)
    return found


def both(made, model, x, **options):
    """A density by a step that stays, and by one that does not."""
    kept = []
    for after in (2, 10**9):
        made.after(after)
        kept.append(sdekit.log_likelihood(model, x, runtime="compile", throw=False, **options))
    return kept


def equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert ours.stats.calls == theirs.stats.calls
    assert torch.equal(ours.stats.evaluations, theirs.stats.evaluations)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_it_gives_the_same_bits_while_samples_leave(count, made):
    sdekit.log_likelihood(EXACT, TARGET.sample(3), runtime="compile")  # the first is compared with what torch returns
    equal(*both(made, EXACT, TARGET.sample(count)))
    assert len(made) >= (2 if count == 40 else 1)
    assert all(step.stays for step in made)


def test_it_does_with_fresh_probes_and_with_slots(made):
    divergence = sdekit.Hutchinson(2, control=True)
    for options in ({}, {"slots": 4}):
        equal(*both(made, LEARNED, draw(1, 9, 3), divergence=divergence, tolerance=1e-3, **options))
    assert made


def test_failures_and_errors_find_the_carry_before(made):
    def act(call, x, label, answer):
        bad = (torch.arange(len(x)) == 1) & (call > 12 and len(x) == 3)
        return torch.where(bad[:, None], torch.nan, answer())

    def shapeless(call, x, label, answer):
        return answer()[:, :1] if call > 12 else answer()

    found = []
    for after in (2, 10**9):
        made.after(after)
        model, _ = watched(EXACT, act)
        ours = sdekit.log_likelihood(model, TARGET.sample(3), runtime="compile", throw=False)
        assert ours.status.tolist() == [Status.DONE, Status.NOT_FINITE, Status.DONE]
        model, _ = watched(EXACT, shapeless)
        with pytest.raises(sdekit.SolveError, match=r"returned shape \(3, 1\)") as caught:
            sdekit.log_likelihood(model, TARGET.sample(3), runtime="compile")
        assert (caught.value.solution.stats.evaluations == 12).all()
        found.append((ours, caught.value.solution))
    for ours, theirs in zip(*found, strict=True):
        equal(ours, theirs)


class Memo(torch.nn.Module):
    """It makes its features of the label again only where that has changed, by the tensor it was given last."""

    def __init__(self):
        super().__init__()
        self.net, self.last = perceptron(3, 2), None

    def forward(self, x, label):
        if self.last is None or self.last[0].shape != label.shape or not torch.equal(self.last[0], label):
            self.last = (label, torch.sin(3.0 * label))
        return self.net(x, self.last[1])


def test_a_network_may_keep_what_it_is_shown(made):
    model = sdekit.ScoreModel(Memo(), SDES["karras"], sdekit.edm(0.7))
    divergence = sdekit.Hutchinson(2, control=True)
    equal(*both(made, model, draw(1, 3, 3), divergence=divergence, tolerance=1e-3))
    assert made


def test_on_a_grid_what_no_step_changes_stays_where_it_is(made):
    found = []
    for after in (2, 10**9):
        made.after(after)
        options = {"solver": sdekit.Heun(), "steps": 12, "dtype": torch.float64, "runtime": "compile", "slots": 2}
        found.append(sdekit.sample(LEARNED, (5, 3), **options))
    assert torch.equal(found[0].x, found[1].x)
    assert made
    assert all(step.stays for step in made)


def test_a_recording_that_is_not_the_step_is_not_used(made, monkeypatch):
    recorded = fusing.Fused.recorded

    def short(piece, *given):
        calls, results = recorded(piece, *given)
        return calls[:-1], results

    sdekit.log_likelihood(EXACT, TARGET.sample(2), runtime="compile")
    monkeypatch.setattr(fusing.Fused, "recorded", short)
    for cut in (cut for step in (made[-1],) for way in step._ways for cut in way):
        if cut.run is not None:
            monkeypatch.setattr(cut.run, "proved", False)
    x = TARGET.sample(4)
    made.clear()
    equal(*both(made, EXACT, x))
    assert made
    assert not any(step.stays for step in made)


def test_only_pieces_of_kernels_alone_are_recorded():
    def call(args):
        return torch.ops.aten.sort(args[0])

    piece = fusing.Fused(call, call)
    piece._call = piece._direct
    assert not piece.recordable

    def plain(args):
        (given,) = args
        args.clear()
        return (empty_strided_cpu((given.size()[0],), (1,), torch.float64),)  # noqa: F821

    piece = fusing.Fused(plain, plain)
    assert not piece.recordable  # not known to be right yet
    piece._call = piece._direct
    assert piece.recordable

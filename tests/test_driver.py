"""Who is in work when, and what it costs: no result depends on it."""

from __future__ import annotations

import pytest
import torch
from helpers import SDES, draw, mixture, watched

import sdekit
from sdekit import Status
from sdekit._memory import counted

SDE = SDES["vp"]
TARGET = mixture(4, 6, count=5)
MODEL = TARGET.score_model(SDE)


def spread(count, seed=1):
    """Samples whose solves differ much in length: by where they start."""
    x = TARGET.sample(count, generator=torch.Generator().manual_seed(seed))
    return x, torch.linspace(SDE.t_min, 0.9, count, dtype=torch.float64)


def same(ours, theirs):
    torch.testing.assert_close(ours.log_prob, theirs.log_prob, rtol=0.0, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(ours.latent, theirs.latent, rtol=1e-9, atol=1e-10)
    assert torch.equal(ours.status, theirs.status)
    for name in ("evaluations", "accepted", "rejected"):
        assert torch.equal(getattr(ours.stats, name), getattr(theirs.stats, name))


@pytest.mark.parametrize("slots", [1, 2, 7, 24, 100])
@pytest.mark.parametrize("divergence", [sdekit.Exact(), sdekit.Hutchinson()], ids=["exact", "probes"])
def test_densities_do_not_depend_on_the_slots(slots, divergence):
    x, t = spread(24)
    model, watch = watched(MODEL)
    ours = sdekit.log_likelihood(model, x, t=t, divergence=divergence, slots=slots)
    same(ours, sdekit.log_likelihood(MODEL, x, t=t, divergence=divergence))
    assert watch.rows == ours.stats.paid, "what is said to be paid is not what was asked of the network"
    assert watch.calls == ours.stats.calls


def test_slots_waste_little_where_solves_differ_much():
    x, t = spread(320)
    whole = sdekit.log_likelihood(MODEL, x, t=t)
    lock_step = float(whole.stats.evaluations.sum()) / (320 * int(whole.stats.evaluations.max()))
    slotted = sdekit.log_likelihood(MODEL, x, t=t, slots=32)
    assert lock_step < 0.75
    assert slotted.stats.useful > 0.93 > lock_step
    assert slotted.stats.useful == float(slotted.stats.evaluations.sum()) / slotted.stats.paid <= 1.0


def test_samples_that_fail_leave_their_slot_and_say_so():
    x, t = spread(20)
    x[[3, 11]] = torch.nan
    with pytest.raises(sdekit.SolveError, match="2 of 20") as caught:
        sdekit.log_likelihood(MODEL, x, t=t, slots=4)
    assert (caught.value.solution.status == Status.NOT_FINITE).nonzero().flatten().tolist() == [3, 11]
    good = torch.tensor([row for row in range(20) if row not in (3, 11)])
    alone = sdekit.log_likelihood(MODEL, x[good], t=t[good])
    torch.testing.assert_close(caught.value.solution.log_prob[good], alone.log_prob, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("call", [5, 30, 60])
def test_an_interrupt_keeps_who_is_done_and_names_who_is_not(call):
    x, t = spread(20)

    def act(number, x, label, answer):
        if number == call:
            raise KeyboardInterrupt
        return answer()

    model, _ = watched(MODEL, act)
    with pytest.warns(sdekit.PartialResultWarning, match="interrupted"):
        ours = sdekit.log_likelihood(model, x, t=t, slots=4)
    done = ours.status == Status.DONE
    whole = sdekit.log_likelihood(MODEL, x, t=t)
    assert (ours.status[~done] == Status.INTERRUPTED).all()
    assert int(done.sum()) < 20
    torch.testing.assert_close(ours.log_prob[done], whole.log_prob[done], rtol=0.0, atol=1e-9)
    assert (ours.t[~done] < SDE.t_max).all()
    if call == 60:
        assert int(done.sum()) >= 4, "nobody had left a slot"


def test_encode_and_adaptive_sampling_take_turns_too():
    x, _ = spread(15)
    whole, slotted = (sdekit.encode(MODEL, x, slots=slots) for slots in (None, 4))
    torch.testing.assert_close(slotted.x, whole.x, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(sdekit.decode(MODEL, whole.x, slots=4).x, x, rtol=0.0, atol=1e-3)
    options = {"eta": 1.0, "controller": sdekit.PID(1e-2, 1e-2), "dtype": torch.float64, "seed": 3}
    whole, slotted = (sdekit.sample(MODEL, (12, 4), slots=slots, **options) for slots in (None, 5))
    torch.testing.assert_close(slotted.x, whole.x, rtol=1e-9, atol=1e-10)
    assert torch.equal(slotted.stats.evaluations, whole.stats.evaluations)


def test_conditions_take_turns_with_their_samples():
    class Shifted(torch.nn.Module):
        def forward(self, x, label, shift):
            return MODEL.net(x - shift, label)

    model = sdekit.ScoreModel(Shifted(), SDE, MODEL.parameterization, MODEL.data_std)
    (x, t), shift = spread(13), 0.2 * draw(4, 13, 4)
    whole, slotted = (sdekit.log_likelihood(model.condition(shift=shift), x, t=t, slots=slots) for slots in (None, 3))
    same(slotted, whole)


def test_the_path_and_the_bar_show_all_samples(capsys):
    x, _ = spread(6)
    whole, slotted = (
        sdekit.integrate(
            *(sdekit.ProbabilityFlow(MODEL), sdekit.Tsit5(), sdekit.PID(1e-3, 1e-3), x, 0.2, SDE.t_max),
            return_path=True,
            slots=slots,
            progress=slots is not None,
        )
        for slots in (None, 2)
    )
    assert "100%" in capsys.readouterr().err
    torch.testing.assert_close(slotted.path.x, whole.path.x, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(slotted.path.t, whole.path.t, rtol=1e-12, atol=0.0)


def test_a_path_takes_no_more_memory_with_slots():
    def taken(count, slots):
        options = {"controller": sdekit.PID(1e-2, 1e-2), "return_path": True, "denoise": False}
        return counted(lambda: sdekit.sample(MODEL, (count, 4), slots=slots, **options))[1]

    assert taken(256, 8) < 1.5 * taken(256, None)
    assert taken(512, 8) < 2.5 * taken(256, 8)


def test_the_callers_samples_are_not_written_to():
    x, t = spread(12)
    kept = x.clone()
    sdekit.integrate(sdekit.ProbabilityFlow(MODEL), sdekit.Tsit5(), sdekit.PID(), x, t, SDE.t_max, slots=3)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("slots", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_slots_that_are_none_are_refused(slots, error):
    with pytest.raises(error, match="slots"):
        sdekit.log_likelihood(MODEL, TARGET.sample(3), slots=slots)


def test_a_sample_that_can_go_no_further_ends_at_once():
    # Steps at the floor are rounded: told from longer ones all the same, or the whole budget goes into asking again.
    def act(number, x, label, answer):
        return answer() * torch.where(label < 0.3, 1.0, torch.nan)[:, None]

    model, watch = watched(MODEL, act)
    found = sdekit.log_likelihood(model, TARGET.sample(5), throw=False)
    assert (found.status == Status.NOT_FINITE).all()
    assert watch.calls < 100

"""Who accepts and how far the next step goes: the formulas, on steps that the test makes up."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Given, draw, times
from hypothesis import given
from hypothesis import strategies as st

import sdekit
from sdekit.controller import NatsState, Step
from sdekit.pid import PIDState
from sdekit.solver.base import Proposal
from sdekit.terms import NO_AUX


class Priced(Given):
    """A term with a density whose local errors cost what the error's first column says."""

    has_density = True

    def __init__(self):
        super().__init__(lambda s, z: 0.0 * z)

    def nats(self, error, aux):
        return error[:, 0]


ADAMS = sdekit.Adams(5)  # error order 4: steps go with the power -1/4.5


def proposed(z, error, settled=None):
    ready = torch.ones(z.shape[0], dtype=torch.bool) if settled is None else settled
    return Proposal(z, error, NO_AUX, None, ready)


def judged(controller, cost, s0, s1, s_end, state, settled=True, finite=True):
    """One sample's verdict on a step that costs `cost` nats."""
    z = torch.zeros(1, 1, dtype=torch.float64)
    step = Step(times(s0), times(s1), z, torch.tensor([finite]))
    proposal = proposed(z, times(cost)[:, None], torch.tensor([settled]))
    return controller.judge(Priced(), ADAMS, proposal, step, times(s_end), state)


def on_lattice_below(step, wanted):
    """Whether `step` is 2^(k/64) for a whole k (rounding apart) and the largest such not above `wanted`."""
    place = 64.0 * math.log2(abs(step))
    just_below = 2.0 ** (-1.0 / 64.0) * (1.0 - 1e-6) <= step / wanted <= 1.0 + 1e-6
    return just_below and abs(place - round(place)) < 1e-6


def state_of(step, spent=0.0, calls=0, rejected=0, over=0):
    return NatsState(
        times(step), times(spent), *(torch.tensor([count]) for count in (calls, rejected, over)), times(0.0)
    )


def nats_by_hand(controller, cost, length, rest, spent, calls, rejected, over, settled):
    """The rules of `Nats` on plain numbers: (accept, next step before the lattice, spent)."""
    beyond = calls > (controller.cap if rejected >= 16 else 8 * controller.cap)
    cost = cost * (1.0 + min(1.5, controller.doubt * controller.tolerance))
    ratio = cost / (
        max(controller.tolerance - spent, 0.1 * controller.tolerance) * math.sqrt(min(1.0, length / rest) / 40.0)
    )
    if not settled:
        ratio *= 0.01
    ratio /= 4.0 ** ((over + beyond) // 64)
    accept = ratio <= 2.0 or length <= 1e-5
    factor = 0.8 * ratio ** (-1.0 / 4.5) if ratio > 0 else math.inf
    factor = min(max(factor, 0.3), controller.growth) if accept else min(max(factor, 0.1), 0.7)
    following = min(max(length * factor, 1e-5), controller.ceiling)
    booked = cost * (1.0 if settled else 0.1) * (3.0 if beyond else 1.0)
    return accept, following, spent + booked if accept else spent


@given(
    tolerance=st.floats(1e-5, 1.0),
    cost=st.floats(1e-9, 10.0),
    length=st.floats(2e-5, 0.05),
    rest=st.floats(0.05, 1.0),
    share=st.floats(0.0, 2.0),
    calls=st.one_of(st.integers(0, 900), st.integers(4000, 5000)),
    rejected=st.integers(0, 40),
    over=st.integers(0, 400),
    settled=st.booleans(),
)
def test_nats_follows_its_formulas(tolerance, cost, length, rest, share, calls, rejected, over, settled):
    controller = sdekit.Nats(tolerance)
    state = state_of(length, share * tolerance, calls, rejected, over)
    s0 = 1.0 - rest
    verdict = judged(controller, cost, s0, s0 + length, 1.0, state, settled)
    # Close to the threshold rounding decides.
    accept, following, spent = nats_by_hand(
        controller, cost, (s0 + length) - s0, 1.0 - s0, share * tolerance, calls + 1, rejected, over, settled
    )
    assert bool(verdict.accept) == accept
    step = float(verdict.state.step)
    if following > 1.02e-5 and following < controller.ceiling:
        assert on_lattice_below(step, following)
    else:  # at the floor or at the ceiling
        assert max(1e-5, following * 0.98) <= step * (1.0 + 1e-9) <= following * (1.0 + 1e-6)
    assert float(verdict.state.spent) == pytest.approx(spent, rel=1e-7)
    assert int(verdict.state.calls) == calls + 1
    assert not bool(verdict.failed)


def fresh(**counts):
    return state_of(0.01, **counts)


def test_nats_accepts_up_to_twice_a_steps_share():
    controller = sdekit.Nats(1e-3, doubt=0.0)
    share = 1e-3 * math.sqrt(0.01 / 40.0)
    assert bool(judged(controller, 1.99 * share, 0.0, 0.01, 1.0, fresh()).accept)
    assert not bool(judged(controller, 2.01 * share, 0.0, 0.01, 1.0, fresh()).accept)


def test_nats_at_its_floor_accepts_what_is_finite_and_fails_what_is_not():
    controller = sdekit.Nats(1e-3)
    assert bool(judged(controller, 1e3, 0.5, 0.50001, 1.0, fresh()).accept)
    for cost, finite in ((math.nan, True), (1e-9, False), (math.inf, True)):
        at_floor = judged(controller, cost, 0.5, 0.50001, 1.0, fresh(), finite=finite)
        assert not bool(at_floor.accept)
        assert bool(at_floor.failed)
        above = judged(controller, cost, 0.5, 0.51, 1.0, fresh(), finite=finite)
        assert not bool(above.accept)
        assert not bool(above.failed)
        assert on_lattice_below(float(above.state.step), 0.001)  # 0.1 of it, and no NaN
        assert float(above.state.spent) == 0.0


def test_beyond_its_cap_nats_asks_less_and_less():
    controller = sdekit.Nats(1e-3, cap=100, doubt=0.0)
    cost = 1e-3 * math.sqrt(0.01 / 40.0) * 2.0 * 4.0**3 * 0.99
    for calls, rejected in ((500, 16), (900, 0)):
        early, late = (fresh(calls=calls, rejected=rejected, over=over) for over in (3 * 64 - 2, 3 * 64 - 1))
        assert not bool(judged(controller, cost, 0.0, 0.01, 1.0, early).accept)
        assert bool(judged(controller, cost, 0.0, 0.01, 1.0, late).accept)


def test_a_rough_path_is_over_the_cap_eight_times_earlier_than_a_smooth_one():
    controller = sdekit.Nats(1e-3, cap=100, doubt=0.0)
    for calls, rejected, over in ((99, 16, 0), (100, 16, 1), (100, 15, 0), (799, 0, 0), (800, 0, 1)):
        found = judged(controller, 1e-12, 0.0, 0.01, 1.0, fresh(calls=calls, rejected=rejected))
        assert int(found.state.over) == over
        assert float(found.state.spent) == pytest.approx(1e-12 * (3.0 if over else 1.0))
    refused = judged(controller, 1.0, 0.0, 0.01, 1.0, fresh(rejected=3))
    assert int(refused.state.rejected) == 4


def test_while_a_method_starts_up_a_hundredth_counts_and_a_tenth_is_booked():
    controller = sdekit.Nats(1e-3, doubt=0.0)
    cost = 1e-3 * math.sqrt(0.01 / 40.0) * 199.0
    ramp = judged(controller, cost, 0.0, 0.01, 1.0, fresh(), settled=False)
    assert bool(ramp.accept)
    assert float(ramp.state.spent) == pytest.approx(0.1 * cost)
    assert not bool(judged(controller, cost, 0.0, 0.01, 1.0, fresh()).accept)


def test_nats_doubts_its_estimate_where_the_tolerance_is_coarse():
    for tolerance in (1e-4, 1e-2, 1.0):
        controller = sdekit.Nats(tolerance)
        verdict = judged(controller, 1e-9, 0.0, 0.01, 1.0, fresh())
        assert float(verdict.state.spent) == pytest.approx(1e-9 * (1.0 + min(1.5, 20.0 * tolerance)))


@pytest.mark.parametrize(
    ("step", "rest", "goes"), [(0.01, 0.5, 0.01), (0.3, 0.5, 0.25), (0.26, 0.5, 0.25), (0.5, 0.5, 0.5), (0.9, 0.5, 0.5)]
)
def test_nats_and_pid_never_leave_a_sliver_at_the_end(step, rest, goes):
    # All of what remains, or half of it, or the step: at the end exactly, not to rounding.
    state = state_of(step)
    end = 1.0
    start = end - rest
    target = sdekit.Nats().target(times(start), times(end), state)
    assert float(target) == (end if goes == rest else start + goes)
    for sign in (1.0, -1.0):
        target = sdekit.PID().target(times(sign * start), times(sign * end), PIDState(times(sign * step), times(1.0)))
        assert float(target) == sign * (end if goes == rest else start + goes)


def test_nats_starts_with_a_step_for_its_tolerance():
    for tolerance, first in ((1.0, 1 / 80), (0.1, 1 / 80), (1e-5, 1 / 800)):
        state = sdekit.Nats(tolerance).start(Priced(), times(0.0, 0.3), times(1.0, 1.0))
        torch.testing.assert_close(state.step, times(first, first), rtol=1e-12, atol=0)
        assert state.spent.tolist() == [0.0, 0.0]


def test_no_samples_verdict_looks_at_another_sample():
    cost, lengths = times(1e-9, 5.0, math.nan, 1e-4), times(0.01, 0.02, 0.03, 1e-5)
    s0 = times(0.1, 0.2, 0.3, 0.4)
    z, ends = torch.zeros(4, 2, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    ready, finite = torch.tensor([True, True, True, False]), torch.tensor([True, True, True, True])
    for controller in (sdekit.Nats(1e-3), sdekit.PID(1e-3, 1e-3), sdekit.FixedGrid(times(0.0, 0.4, 1.0))):
        error = cost[:, None].expand(4, 2)
        state = controller.start(Priced(), s0, ends)
        whole = controller.judge(
            Priced(), ADAMS, proposed(z, error, ready), Step(s0, s0 + lengths, z, finite), ends, state
        )
        for i in range(4):
            one = slice(i, i + 1)
            part = controller.judge(
                *(Priced(), ADAMS, proposed(z[one], error[one], ready[one])),
                Step(s0[one], (s0 + lengths)[one], z[one], finite[one]),
                ends[one],
                type(state)(*(leaf[one] for leaf in state)),
            )
            assert torch.equal(part.accept, whole.accept[one])
            assert torch.equal(part.failed, whole.failed[one])
            for mine, all_ in zip(part.state, whole.state, strict=True):
                torch.testing.assert_close(mine, all_[one], rtol=0, atol=0, equal_nan=True)


def test_a_fixed_grid_visits_its_nodes_and_ends_exactly():
    inner, term = times(0.9, 0.61, 0.4), Given(lambda s, z: z)
    grid = sdekit.FixedGrid(torch.cat((times(1.0), inner, times(0.1 + 0.2))))
    s, end = times(1.0), times(0.1 + 0.2)
    state, visited = grid.start(term, s, end), []
    z = torch.zeros(1, 1, dtype=torch.float64)
    while float(s) != float(end):
        s1 = grid.target(s, end, state)
        verdict = grid.judge(term, sdekit.Euler(), proposed(z, None), Step(s, s1, z, torch.tensor([True])), end, state)
        assert bool(verdict.accept)
        s, state = s1, verdict.state
        visited.append(float(s))
    assert visited == [0.9, 0.61, 0.4, 0.1 + 0.2]
    assert not grid.needs_error


def test_a_fixed_grid_fails_a_sample_that_is_not_finite_where_it_stands():
    grid, term = sdekit.FixedGrid(times(0.0, 0.5, 1.0)), Given(lambda s, z: z)
    s, z = times(0.0, 0.0), torch.zeros(2, 1, dtype=torch.float64)
    state = grid.start(term, s, times(1.0, 1.0))
    step = Step(s, s + 0.5, z, torch.tensor([True, False]))
    verdict = grid.judge(term, sdekit.Euler(), proposed(z, None), step, times(1.0, 1.0), state)
    assert verdict.accept.tolist() == [True, False]
    assert verdict.failed.tolist() == [False, True]
    assert verdict.state.place.tolist() == [1, 0]


BAD_GRIDS = {
    "one time": lambda: times(1.0),
    "two axes": lambda: times(1.0, 0.5)[None],
    "repeated": lambda: times(1.0, 0.5, 0.5, 0.1),
    "turning": lambda: times(1.0, 0.5, 0.7),
    "not finite": lambda: times(1.0, math.nan, 0.5),
    "a list": lambda: [1.0, 0.5],
}


@pytest.mark.parametrize("make", BAD_GRIDS.values(), ids=BAD_GRIDS.keys())
def test_grids_that_go_nowhere_are_refused(make):
    with pytest.raises(ValueError, match="times"):
        sdekit.FixedGrid(make())


def pid_verdict(controller, error, length, state, z0=1.0, z1=1.0, finite=True):
    old, new = times(z0, z0)[None], times(z1, z1)[None]
    step = Step(times(0.5), times(0.5 + length), old, torch.tensor([finite]))
    end = times(1.0 if length > 0 else 0.0)
    return controller.judge(Given(None), sdekit.Dopri5(), proposed(new, times(error, error)[None]), step, end, state)


@given(
    error=st.floats(1e-12, 1.0),
    length=st.floats(1e-4, 0.2),
    before=st.floats(1e-6, 1.0),
    forward=st.booleans(),
    sizes=st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 10.0)),
)
def test_pid_follows_its_formula_in_both_directions_of_time(error, length, before, forward, sizes):
    controller, sign = sdekit.PID(1e-4, 1e-5), 1.0 if forward else -1.0
    state = PIDState(times(sign * length), times(before))
    verdict = pid_verdict(controller, error, sign * length, state, *sizes)
    ratio = error / (1e-5 + 1e-4 * max(sizes))
    factor = 0.9 * max(ratio, 1e-10) ** (-0.8 / 5.0) * before ** (0.2 / 5.0)
    factor = min(max(factor, 0.2), 5.0) if ratio <= 1.0 else min(max(factor, 0.1), 0.9)
    if abs(ratio - 1.0) < 1e-9:
        return
    assert bool(verdict.accept) == (ratio <= 1.0)
    assert on_lattice_below(float(verdict.state.step), sign * length * factor)
    assert float(verdict.state.ratio) == pytest.approx(max(ratio, 1e-10) if ratio <= 1.0 else before, rel=1e-9)


def test_pid_shrinks_after_a_rejection_until_it_fails_at_its_floor():
    controller = sdekit.PID(1e-6, 1e-6, floor=1e-4)
    state, length, tries = PIDState(times(-0.2), times(1.0)), -0.2, 0
    while True:
        verdict = pid_verdict(controller, 1e3, length, state)
        assert not bool(verdict.accept)
        assert abs(float(verdict.state.step)) <= 0.9 * abs(length)
        length, state, tries = float(verdict.state.step), verdict.state, tries + 1
        if bool(verdict.failed):
            break
        assert tries < 10
    assert 1e-5 < abs(length) < 1e-4


def test_pid_rejects_what_is_not_finite_without_passing_it_on():
    for error, finite in ((math.nan, True), (math.inf, True), (1e-9, False)):
        verdict = pid_verdict(sdekit.PID(), error, 0.1, PIDState(times(0.1), times(0.5)), finite=finite)
        assert not bool(verdict.accept)
        assert on_lattice_below(float(verdict.state.step), 0.01)
        assert float(verdict.state.ratio) == 0.5


def test_pid_looks_at_each_number_of_the_state_on_its_own_scale():
    controller, z = sdekit.PID(rtol=1e-3, atol=1e-6), times(1e6, 1e-3)[None]
    small, large = times(500.0, 5e-7)[None], times(500.0, 500.0)[None]
    step = Step(times(0.0), times(0.1), z, torch.tensor([True]))
    state = PIDState(times(0.1), times(1.0))
    for error, accept in ((small, True), (large, False)):
        assert (
            bool(controller.judge(Given(None), sdekit.Dopri5(), proposed(z, error), step, times(1.0), state).accept)
            == accept
        )


@pytest.mark.parametrize(
    "make",
    [
        *(lambda: sdekit.PID(-1e-3, 1e-3), lambda: sdekit.PID(0.0, 0.0), lambda: sdekit.PID(math.nan, 1.0)),
        *(lambda: sdekit.PID(first=0.0), lambda: sdekit.PID(first=1e-11), lambda: sdekit.PID(first=2.0)),
        *(lambda: sdekit.Nats(0.0), lambda: sdekit.Nats(-1.0), lambda: sdekit.Nats(math.inf)),
    ],
)
def test_tolerances_that_cannot_be_met_are_refused(make):
    with pytest.raises(ValueError, match=r"needed|must be above 0"):
        make()


def test_terms_without_a_density_have_no_price():
    with pytest.raises(TypeError, match="carries no density"):
        Given(None).nats(draw(1, 2, 3), NO_AUX)

"""Ctrl-C between steps: asked for once, and left alone where it is ignored."""

from __future__ import annotations

import signal

import pytest

from sdekit._interrupt import finish_step


def test_the_first_ctrl_c_is_a_question_and_the_second_stops():
    before = signal.getsignal(signal.SIGINT)
    with finish_step() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_ctrl_c_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with finish_step() as asked:
            signal.raise_signal(signal.SIGINT)
            assert not asked()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

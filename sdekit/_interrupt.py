"""Ctrl-C between steps, not within one, and SIGTERM as Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def finish_step() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a question the loop asks between steps: stopping within one would tear the state.

    Where Ctrl-C is ignored (`command &` in a shell's script) or handled outside of Python, it stays so.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Takes SIGTERM, which batch systems and containers send before they kill, for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: Any) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # Ctrl-C is ignored, as it is for a shell's background jobs
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

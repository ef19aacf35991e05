"""What can go wrong, and what is kept when it does.

Bad input is a `ValueError` or `TypeError` at the door. What goes wrong later, inside a solve, is recorded per sample
and raised at the next stop test as a `SolveError`, which carries everything computed so far.
"""

from __future__ import annotations

from typing import Any


class SdekitError(Exception):
    """The base of every error that sdekit raises by itself."""


class NetworkError(SdekitError, ValueError):
    """A network answered in a way that cannot be used: wrong shape, detached, not floating."""


class SolveError(SdekitError, RuntimeError):
    """A solve in which some samples did not succeed.

    Attributes:
        solution: The partial result, of the type the call would have returned (`Solution` or `LogLikelihood`);
            its `status` tells which samples are good. None where nothing had been computed.
    """

    def __init__(self, message: str, solution: Any = None) -> None:
        super().__init__(message)
        self.solution = solution


class SdekitWarning(UserWarning):
    """The base of every warning that sdekit gives."""


class ToleranceWarning(SdekitWarning):
    """Some samples arrived, but by their own error estimate not within the tolerance."""


class PartialResultWarning(SdekitWarning):
    """The solve was stopped (Ctrl-C, a wall-time limit) and returned what there was."""


class SmoothnessWarning(SdekitWarning):
    """A correction was asked that holds for smooth densities only."""

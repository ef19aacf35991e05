"""Settings that every test runs under."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings

# The default draws the same examples on every run and machine: a red test is red for everybody. `thorough` draws new
# ones each time, and many: --hypothesis-profile=thorough, or HYPOTHESIS_PROFILE=thorough.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "fast", max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=_SLOW
)
settings.register_profile("thorough", max_examples=500, deadline=None, suppress_health_check=_SLOW, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

torch.set_num_threads(1)  # the networks are small and the workers are the parallelism: more threads only wait


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --emulate-cuda."""
    parser.addoption("--emulate-cuda", action="store_true", help="run the tests marked gpu with the host as the device")


def pytest_configure(config: pytest.Config) -> None:
    """Puts the host in the place of a CUDA device, where that is asked."""
    if config.getoption("--emulate-cuda"):
        import emulated_cuda

        emulated_cuda.install()


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no CUDA device, and where it is played those that need a real one."""
    emulated = config.getoption("--emulate-cuda")
    if torch.cuda.is_available() and not emulated:
        return
    for item in items:
        marks = list(item.iter_markers("gpu"))
        if marks and not emulated:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif any(not mark.kwargs.get("emulated", True) for mark in marks):
            item.add_marker(pytest.mark.skip(reason="needs a real CUDA device"))

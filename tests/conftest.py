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


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

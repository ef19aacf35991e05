"""Traces on CUDA: the CPU's numbers, no waiting for the device, and fewer products where memory runs out."""

from __future__ import annotations

import pytest
import torch
from helpers import draw, drawn, perceptron

from sdekit.divergence import Exact, Hutchinson

pytestmark = pytest.mark.gpu


def field_on(device, dim=24):
    net = perceptron(dim, 1).to(device)
    return lambda x: net(x, torch.full((x.shape[0],), 0.4, dtype=x.dtype, device=x.device))


def test_exact_traces_agree():
    x = draw(1, 50, 24)
    ours, theirs = (Exact().evaluate(field_on(d), x.to(d), None).traces.cpu() for d in ("cpu", "cuda"))
    torch.testing.assert_close(theirs, ours, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("divergence", [Exact(), Exact(5), Hutchinson(3), Hutchinson(mode="auto")], ids=repr)
def test_once_a_shape_is_known_nothing_waits_for_the_device(divergence):
    x, field = draw(1, 50, 24).cuda(), field_on("cuda")
    probes = drawn(divergence, 50, 24).cuda() if divergence.probe_count else None
    divergence.evaluate(field, x, probes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        divergence.evaluate(field, x, probes)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu(emulated=False)
def test_where_the_device_runs_out_fewer_products_give_the_same_trace():
    x, field = draw(1, 256, 24).cuda(), field_on("cuda")
    expected = Exact(4).evaluate(field, x, None).traces
    torch.cuda.empty_cache()
    all_at_once = 24 * 256 * 32 * 8  # bytes of one hidden layer
    room = torch.cuda.memory_allocated() + all_at_once // 2 + 2**22
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = Exact(24).evaluate(field, x, None).traces
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)

"""Taking the detours out of a trace leaves what it computes as it was, to the bit."""

from __future__ import annotations

import torch
from helpers import draw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sdekit.folding import fold


def folded(function, *given):
    """The names of the operations that are left in its trace, and what they make of the same tensors."""
    with FakeTensorMode() as mode:
        graph = make_fx(function)(*(mode.from_tensor(part) for part in given))
    before = [node.name for node in graph.graph.nodes]
    fold(graph.graph)
    graph.recompile()
    wanted, found = function(*given), graph(*given)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"], len(before)


def test_what_is_stacked_and_selected_is_not_stacked():
    def function(x, y):
        pair = torch.stack((x, 2.0 * y), 1)
        wide = torch.cat((x[:, None], pair), 1)
        return pair[:, 0] + pair[:, 1], wide[:, 2], wide[:, 0]

    left, _ = folded(function, draw(1, 5, 3), draw(2, 5, 3))
    assert not any("cat" in name or "stack" in name or "slice" in name for name in left)


def test_a_history_is_pushed_in_place():
    def function(takes, new, old):
        full = torch.cat((new[:, None], old), 1)
        return torch.where(takes[:, None, None], full[:, :4], old), full[:, 1] + full[:, 0]

    takes = torch.tensor([True, False, True])
    left, _ = folded(function, takes, draw(1, 3, 2), draw(2, 3, 4, 2))
    assert sum("cat" in name for name in left) == 1
    assert sum("where" in name for name in left) == 2


def test_what_only_looks_like_it_stays():
    def function(takes, new, old):
        full = torch.cat((new[:, None], old), 1)
        shorter = torch.where(takes[:, None, None], full[:, :3], old[:, :3])
        later = torch.where(takes[:, None, None], full[:, 1:5], old)
        each = torch.where(takes[:, None, None].expand(3, 4, 2), full[:, :4], old)
        other = torch.where(takes[:, None, None], full[:, :4], 2.0 * old)
        last = torch.stack((new, old[:, 0]), 1)[:, -1]
        along = torch.cat((new, old[:, 0]), 0)[4]
        crossed = torch.stack((new, old[:, 0]), 1)[1]
        stepped = old[:, ::2]
        return shorter, later, each, other, last, along, crossed, stepped

    folded(function, torch.tensor([True, False, True]), draw(1, 3, 2), draw(2, 3, 4, 2))


def test_types_stay():
    def function(x, y):
        return torch.stack((x, y), 1)[:, 0], torch.cat((x[:, None], y[:, None]), 1)[:, 0]

    x, y = draw(1, 4, 3).float(), draw(2, 4, 3)
    folded(function, x, y)  # compares types too

"""A trace without the detours of its own making, before it is compiled.

A compiler makes memory for whatever is put together, and reads it back for whatever is taken out of it. So a part that
is taken out of tensors put together is that part itself; and a history to which a new entry is put in front, where a
sample takes it, is put together of what stays and what is new, not made whole first and chosen from then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

_SLICE, _SELECT = torch.ops.aten.slice.Tensor, torch.ops.aten.select.int
_STACK, _CAT, _WHERE = torch.ops.aten.stack.default, torch.ops.aten.cat.default, torch.ops.aten.where.self
_END = 1 << 62  # at least this much stands for the end


def fold(graph: fx.Graph) -> None:
    """Takes the detours out of a graph; what it computes stays the same to the bit."""
    for node in list(graph.nodes):
        found = _whole(node) or _selected(graph, node) or _pushed(graph, node)
        if found is not None:
            node.replace_all_uses_with(found)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _whole(node: fx.Node) -> fx.Node | None:
    """What a slice is of, where it is all of it."""
    if node.target is not _SLICE or len(node.args) < 4:
        return None
    of, _, first, last, *step = node.args
    whole = first in (0, None) and (last is None or (isinstance(last, int) and last >= _END)) and step in ([], [1])
    return of if whole and isinstance(of, fx.Node) else None


def _selected(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The part that is selected, where it is one of those put together."""
    if node.target is not _SELECT:
        return None
    of, axis, index = node.args
    parts, along = _together(of)
    if along != axis or not isinstance(index, int) or index < 0:
        return None
    if any(part.meta["val"].dtype is not node.meta["val"].dtype for part in parts):
        return None  # what is put together has one type
    if isinstance(of, fx.Node) and of.target is _STACK:
        return parts[index]
    for part in parts:
        size = _size(part, axis)
        if size is None:
            return None
        if index < size:
            inner = _call(graph, node, _SELECT, part, axis, index)
            return _selected(graph, inner) or inner
        index -= size
    return None


def _pushed(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """where(takes, [new, *old][:n], old) along axis 1, for an old of n entries and a new of one, entry by entry."""
    if node.target is not _WHERE:
        return None
    takes, shifted, old = node.args
    if not (isinstance(shifted, fx.Node) and shifted.target is _SLICE and isinstance(old, fx.Node)):
        return None
    parts, along = _together(shifted.args[0])
    count = _size(old, 1)
    if along != 1 or len(parts) != 2 or parts[1] is not old or tuple(shifted.args[1:]) != (1, 0, count):
        return None
    if parts[0].meta["val"].dtype is not old.meta["val"].dtype:
        return None
    if count is None or count < 2 or _size(parts[0], 1) != 1 or _size(takes, 1) != 1 or _axes(takes) != _axes(old):
        return None
    newest, before, after = (_call(graph, node, _SLICE, old, 1, *ends) for ends in ((0, 1), (0, count - 1), (1, count)))
    first = _call(graph, node, _WHERE, takes, parts[0], newest)
    others = _call(graph, node, _WHERE, takes, before, after)
    return _call(graph, node, _CAT, [first, others], 1)


def _together(node: Any) -> tuple[list[fx.Node], Any]:
    """What a tensor is put together of, and along which axis; nothing where it is not."""
    if not isinstance(node, fx.Node) or node.target not in (_STACK, _CAT):
        return [], None
    parts: Any = node.args[0]
    return list(parts), node.args[1] if len(node.args) > 1 else 0


def _axes(node: Any) -> int:
    return len(node.meta["val"].shape)


def _size(node: Any, axis: Any) -> int | None:
    """How many entries there are along an axis, where that is a number."""
    size = node.meta["val"].shape[axis]
    return size if type(size) is int else None


def _call(graph: fx.Graph, before: fx.Node, target: Any, *given: Any) -> fx.Node:
    """A new operation in front of another, with a result without contents, as the others have."""
    with graph.inserting_before(before):
        made = graph.call_function(target, given)
    values = tree_map_only(fx.Node, lambda part: part.meta["val"], given)
    with before.meta["val"].fake_mode:
        made.meta["val"] = target(*values)
    return made

"""Two fingerprints are equal where nothing has changed that a call depends on, and only there."""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from sdekit._fingerprint import fingerprint


class Slotted:
    __slots__ = ("kind",)

    def __init__(self, kind):
        self.kind = kind


@dataclass
class Settings:
    scale: float
    widths: list[int]


def times(amount):
    return lambda x, most=1.0: amount * x


class Scaled(nn.Module):
    factor = 1.0

    def forward(self, x):
        return self.factor * x


def network():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))
    net.scale, net.act, net.settings = 1.5, times(2.0), Settings(1.0, [1, 2])
    net.table, net.array, net.slotted = torch.arange(3.0), np.arange(3.0), Slotted("a")
    net.part, net.me, net.lost = functools.partial(torch.add, 1.0), net.forward, float("nan")
    net.append(Scaled())
    return net


@pytest.fixture(autouse=True)
def _class_as_it_is():
    before = dict(vars(Scaled))
    yield
    Scaled.factor, Scaled.forward = before["factor"], before["forward"]


CHANGES = {
    "a mode": lambda net: net[2].eval(),
    "a number": lambda net: setattr(net, "scale", 1.25),
    "a number of another type": lambda net: setattr(net, "scale", True),
    "a function": lambda net: setattr(net, "act", times(2.0)),
    "a default": lambda net: setattr(net.act, "__defaults__", (2.0,)),
    "a number in an object": lambda net: setattr(net.settings, "scale", 2.0),
    "a list in an object": lambda net: net.settings.widths.append(3),
    "a slot": lambda net: setattr(net.slotted, "kind", "b"),
    "a tensor of the host": lambda net: net.table.add_(1.0),
    "a tensor of the host, unseen by versions": lambda net: net.table.data.add_(1.0),
    "an array": lambda net: net.array.__setitem__(0, 5.0),
    "a layer": lambda net: net.__setitem__(1, nn.SiLU()),
    "a layer like the one before": lambda net: net.__setitem__(1, nn.Tanh()),
    "a hook": lambda net: net[0].register_forward_hook(lambda *given: None),
    "a method": lambda net: setattr(net, "forward", lambda x: x),
    "a number of a class": lambda net: setattr(Scaled, "factor", 2.0),
    "a method of a class": lambda net: setattr(Scaled, "forward", lambda self, x: x),
    "a keyword": lambda net: setattr(net, "part", functools.partial(torch.add, 2.0)),
    "the precision": lambda net: net.half(),
    "whether it is trained": lambda net: net.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change):
    net = network()
    before = fingerprint(net)
    assert fingerprint(net) == before
    assert hash(fingerprint(net)) == hash(before)
    CHANGES[change](net)
    assert fingerprint(net) != before


def test_a_closure_is_told_by_what_it_holds():
    amounts = [2.0]
    net = nn.Tanh()
    net.act = lambda x: amounts[0] * x
    before = fingerprint(net)
    amounts[0] = 3.0
    assert fingerprint(net) != before


def test_what_is_gone_is_nothing_elses_equal():
    net = nn.Tanh()
    prints = []
    for _ in range(20):  # functions made and dropped in turn lie at the same few addresses
        net.act = times(1.0)
        found = fingerprint(net)
        assert found not in prints
        prints.append(found)
        gc.collect()


def test_networks_alike_are_two_and_cycles_end():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) != fingerprint(other)
    one.around = [one]
    assert fingerprint(one) == fingerprint(one)


def test_what_torch_is_told_is_part_of_it():
    net = nn.Tanh()
    torch.set_float32_matmul_precision("highest")
    before = fingerprint(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert fingerprint(net) != before
    torch.set_float32_matmul_precision("high")
    try:
        assert fingerprint(net) != before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert fingerprint(net) == before


class Chain:
    def __init__(self, after):
        self.after = after


class Sealed:
    __slots__ = ("inside",)

    def __getattribute__(self, name):
        if name == "inside":
            raise RuntimeError("nobody looks at this")
        return super().__getattribute__(name)


def test_what_cannot_be_compared_equals_nothing():
    long = None
    for _ in range(5_000):  # deeper than Python recurses
        long = Chain(long)
    for value in (long, Sealed(), iter([1, 2])):
        net = nn.Tanh()
        net.more = value
        assert fingerprint(net) != fingerprint(net)

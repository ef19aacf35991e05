"""Trees of tensors: rows by mask, and nothing copied that did not change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from helpers import draw

from sdekit._memory import counted
from sdekit._tensor import digest, select


class Pair(NamedTuple):
    value: torch.Tensor
    constant: torch.Tensor | None


def test_select_takes_new_rows_where_the_mask_holds_and_keeps_the_dtype_of_the_old():
    mask, new, old = torch.tensor([True, False, True]), draw(1, 3, 2, 2), draw(2, 3, 2, 2)
    found = select(mask, Pair(new, None), Pair(old, None))
    assert torch.equal(found.value[mask], new[mask])
    assert torch.equal(found.value[~mask], old[~mask])
    assert found.constant is None


def test_what_did_not_change_is_not_copied():
    mask, constant = torch.tensor([True, False, True]), draw(3, 3, 1000)
    before, after = Pair(draw(1, 3, 2), constant), Pair(draw(2, 3, 2), constant)
    found, taken = counted(lambda: select(mask, after, before))
    assert found.constant is constant
    assert taken == before.value.nbytes


def test_a_digest_tells_types_shapes_signs_and_orders_apart_but_not_layouts():
    x = draw(1, 4, 2)
    others = [x, -x, x.flip(0), x.flatten(), x.to(torch.float32), x[:3], x[:0]]
    assert len({digest(other) for other in others}) == len(others)
    assert digest(x.T.contiguous().T) == digest(x.clone())

"""The labels that a network is given on a fixed grid, kept between solves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock

import torch
from torch import Tensor

from .._tensor import sent

_labels: OrderedDict[Hashable, tuple[int, tuple[Tensor, ...]]] = OrderedDict()  # with the version they were made at
_LABELS_KEPT, _LABELS_LARGEST = 16, 1 << 14
_lock = Lock()


def label_rows(labels: tuple[float, ...], batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """For each label a tensor (B,) of it; made anew where a network has written into those kept."""
    key = (labels, batch, dtype, device)
    with _lock:
        version, rows = _labels.get(key, (0, ()))
    if rows and rows[0]._version == version:
        return rows
    rows = sent(labels, dtype, device)[:, None].repeat(1, batch).unbind(0)
    if rows and rows[0].numel() * len(rows) <= _LABELS_LARGEST and not rows[0].is_inference():
        with _lock:
            _labels[key] = (rows[0]._version, rows)
            while len(_labels) > _LABELS_KEPT:
                _labels.popitem(last=False)
    return rows


def label_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a network that computes in `dtype` is given its label in: half precision has no step 999 of 1000."""
    return dtype if dtype.itemsize >= 4 else torch.float32

"""A flow as scipy.integrate.solve_ivp takes it.

scipy solves for one flat float64 numpy vector: the whole batch is one vector here, so its error norm couples the
samples. That is scipy's way; sdekit's own solvers keep every sample apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import require_batch

Array: TypeAlias = NDArray[np.float64]


def right_hand_side(
    flow: Callable[[float, Tensor], Tensor], x: Tensor
) -> tuple[Callable[[float, Array], Array], Array]:
    """The function f(t, y) and the initial vector y0 for `scipy.integrate.solve_ivp(f, (t0, t1), y0)`.

    Args:
        flow: dx/dt as a function of (t, x), for example an sdekit.ProbabilityFlow.
        x: (B, *event) initial states; each call of `flow` gets this shape, dtype and device.

    Returns:
        f, and y0 of shape (B * D,) float64; a solution's column `y` is `x` again by y.reshape(x.shape).
    """
    require_batch("x", x)

    def function(t: float, y: Array) -> Array:
        state = torch.as_tensor(y, dtype=x.dtype, device=x.device).reshape(x.shape)
        with torch.no_grad():
            slope: Any = flow(t, state).double().cpu().numpy()
        return np.asarray(slope, dtype=np.float64).ravel()

    return function, x.detach().double().cpu().numpy().ravel()

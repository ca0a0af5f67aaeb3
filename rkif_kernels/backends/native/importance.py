"""Importance of parameters, smoothed over steps."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from rkif_kernels.backends.native.library import Lists
from rkif_kernels.contiguous import in_place
from rkif_kernels.numerics import float32
from rkif_kernels.types import ImportanceInputs, Order


def update_importance_(
    inputs: ImportanceInputs,
    *,
    beta1: float,
    beta2: float,
    order: Order,
    nonfinite: Tensor,
) -> None:
    """See :func:`rkif_kernels.ops.update_importance_`."""
    with in_place(inputs.sensitivity) as s, in_place(inputs.uncertainty or ()) as u:
        nonfinite += Lists((inputs.params, inputs.grads, s, u or None)).call(
            "rkif_update_importance",
            float32(beta1),
            float32(1 - beta1),
            float32(beta2),
            float32(1 - beta2),
            get_args(Order).index(order),
        )

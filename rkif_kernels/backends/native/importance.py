"""Importance of parameters, smoothed over steps."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from rkif_kernels.backends.native.library import Lists
from rkif_kernels.contiguous import in_place
from rkif_kernels.types import ImportanceInputs, Order, Smoothing

ORDERS = get_args(Order)  # the index is the library's enum value


def update_importance_(inputs: ImportanceInputs, smoothing: Smoothing, nonfinite: Tensor) -> None:
    """See :func:`rkif_kernels.ops.update_importance_`."""
    with in_place(inputs.sensitivity) as s, in_place(inputs.uncertainty or ()) as u:
        nonfinite += Lists((inputs.params, inputs.grads, s, u or None)).call(
            "rkif_update_importance", *smoothing.factors, ORDERS.index(smoothing.order)
        )

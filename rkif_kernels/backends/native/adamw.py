"""AdamW, with the importance of the parameters updated in the same pass over memory."""

from __future__ import annotations

from contextlib import ExitStack
from typing import get_args

from torch import Tensor

from rkif_kernels.backends.native.library import Lists
from rkif_kernels.contiguous import in_place
from rkif_kernels.numerics import float32
from rkif_kernels.types import AdamWConstants, AdamWInputs, Order


def adamw_(
    inputs: AdamWInputs,
    constants: AdamWConstants,
    *,
    beta1: float,
    beta2: float,
    order: Order,
    nonfinite: Tensor,
) -> None:
    """See :func:`rkif_kernels.ops.adamw_`."""
    written = (inputs.params, inputs.exp_avg, inputs.exp_avg_sq)
    states = (inputs.sensitivity or (), inputs.uncertainty or ())
    with ExitStack() as stack:
        w, m, v, s, u = (stack.enter_context(in_place(tensors)) for tensors in (*written, *states))
        nonfinite += Lists((w, inputs.grads, m, v, s or None, u or None)).call(
            "rkif_adamw",
            *constants,
            float32(beta1),
            float32(1 - beta1),
            float32(beta2),
            float32(1 - beta2),
            get_args(Order).index(order),
        )

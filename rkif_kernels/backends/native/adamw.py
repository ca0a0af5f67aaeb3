"""AdamW, with the importance of the parameters updated in the same pass over memory."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

from rkif_kernels.backends.native.importance import ORDERS
from rkif_kernels.backends.native.library import Lists
from rkif_kernels.contiguous import in_place
from rkif_kernels.types import AdamWConstants, AdamWInputs, Smoothing


def adamw_(inputs: AdamWInputs, constants: AdamWConstants, smoothing: Smoothing, nonfinite: Tensor) -> None:
    """See :func:`rkif_kernels.ops.adamw_`."""
    written = (inputs.params, inputs.exp_avg, inputs.exp_avg_sq)
    states = (inputs.sensitivity or (), inputs.uncertainty or ())
    with ExitStack() as stack:
        w, m, v, s, u = (stack.enter_context(in_place(tensors)) for tensors in (*written, *states))
        nonfinite += Lists((w, inputs.grads, m, v, s or None, u or None)).call(
            "rkif_adamw", *constants, *smoothing.factors, ORDERS.index(smoothing.order)
        )

"""AdamW, with the importance of the parameters updated in the same pass over memory."""

from __future__ import annotations

from torch import Tensor

from rkif_kernels.backends.reference.importance import update_importance_
from rkif_kernels.types import AdamWConstants, AdamWInputs, Smoothing


def adamw_(inputs: AdamWInputs, constants: AdamWConstants, smoothing: Smoothing, nonfinite: Tensor) -> None:
    """See :func:`rkif_kernels.ops.adamw_`."""
    if inputs.importance is not None:
        update_importance_(inputs.importance, smoothing, nonfinite)
    rows = zip(inputs.params, inputs.grads, inputs.exp_avg, inputs.exp_avg_sq, strict=True)
    for param, grad, exp_avg, exp_avg_sq in rows:
        w, g, m, v = (tensor.float() for tensor in (param, grad, exp_avg, exp_avg_sq))
        m = m + constants.take1 * (g - m)
        v = constants.keep2 * v + constants.take2 * g * g
        # PyTorch's float32 root is not always correctly rounded; that of float64 rounds to the correct one.
        root = v.double().sqrt().float()
        w = constants.decay * w - constants.step_size * m / (root * constants.unbias2 + constants.eps)
        param.copy_(w)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)

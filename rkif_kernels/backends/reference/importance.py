"""Importance of parameters, smoothed over steps."""

from __future__ import annotations

import torch
from torch import Tensor

from rkif_kernels.types import ImportanceInputs, Smoothing


def update_importance_(inputs: ImportanceInputs, smoothing: Smoothing, nonfinite: Tensor) -> None:
    """See :func:`rkif_kernels.ops.update_importance_`."""
    keep1, take1, keep2, take2 = smoothing.factors
    rows = zip(inputs.params, inputs.grads, inputs.sensitivity, strict=True)
    for index, (param, grad, s) in enumerate(rows):
        product = param.float() * (torch.zeros_like(param) if grad is None else grad).float()
        if smoothing.order == "first":
            importance = product.abs()
        elif smoothing.order == "second":
            importance = product * product
        else:
            importance = (product - product * product / 2).abs()
        finite = importance.isfinite()
        nonfinite += (~finite).sum()

        new_s = keep1 * s.float() + take1 * importance
        s.copy_(torch.where(finite, new_s.to(s.dtype), s))
        if inputs.uncertainty is not None:
            u = inputs.uncertainty[index]
            new_u = keep2 * u.float() + take2 * (importance - new_s).abs()
            u.copy_(torch.where(finite, new_u.to(u.dtype), u))

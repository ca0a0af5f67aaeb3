"""Importance of parameters, smoothed over steps."""

from __future__ import annotations

import torch
from torch import Tensor

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
    rows = zip(inputs.params, inputs.grads, inputs.sensitivity, strict=True)
    for index, (param, grad, s) in enumerate(rows):
        product = param.float() * (torch.zeros_like(param) if grad is None else grad).float()
        if order == "first":
            importance = product.abs()
        elif order == "second":
            importance = product * product
        else:
            importance = (product - product * product / 2).abs()
        finite = importance.isfinite()
        nonfinite += (~finite).sum()

        new_s = float32(beta1) * s.float() + float32(1 - beta1) * importance
        s.copy_(torch.where(finite, new_s.to(s.dtype), s))
        if inputs.uncertainty is not None:
            u = inputs.uncertainty[index]
            new_u = float32(beta2) * u.float() + float32(1 - beta2) * (importance - new_s).abs()
            u.copy_(torch.where(finite, new_u.to(u.dtype), u))

"""Importance of parameters, smoothed over steps."""

from __future__ import annotations

import torch
from torch import Tensor

from rkif_kernels.backends.torch.blocks import Scratch, blocks
from rkif_kernels.types import ImportanceInputs, Smoothing


def update_importance_(inputs: ImportanceInputs, smoothing: Smoothing, nonfinite: Tensor) -> None:
    """See :func:`rkif_kernels.ops.update_importance_`."""
    scratch = Scratch(nonfinite.device)
    for _, (w, g, s, u) in blocks(*inputs.lists):
        assert w is not None
        assert s is not None
        update_block(w, g, s, u, scratch, smoothing, nonfinite)


def update_block(
    w: Tensor,
    g: Tensor | None,
    s: Tensor,
    u: Tensor | None,
    scratch: Scratch,
    smoothing: Smoothing,
    nonfinite: Tensor,
) -> None:
    """Update the states of one block, in slots 0 to 5 of ``scratch``."""
    keep1, take1, keep2, take2 = smoothing.factors
    size = w.numel()
    importance = scratch(0, size)
    # Separate products and sums, because addcmul and add(alpha=...) contract to a fused multiply-add.
    torch.mul(
        scratch.float32(w, 1),
        scratch.float32(g, 2) if g is not None else scratch(2, size).zero_(),
        out=importance,
    )
    if smoothing.order == "second":
        importance.mul_(importance)
    elif smoothing.order == "mixed":
        importance.sub_(torch.mul(importance, importance, out=scratch(3, size)).div_(2))
    importance.abs_()

    # If a term is not finite, the sum is not finite, so the mask is computed only then. A sum of finite terms
    # may also overflow; then the mask is empty.
    kept = None
    if not importance.sum().isfinite():
        kept = importance.isfinite().logical_not_()
        nonfinite += kept.sum()

    new_s = torch.mul(scratch.float32(s, 1), keep1, out=scratch(4, size))
    new_s.add_(torch.mul(importance, take1, out=scratch(5, size)))
    if u is not None:
        deviation = importance.sub_(new_s).abs_().mul_(take2)
        new_u = torch.mul(scratch.float32(u, 1), keep2, out=scratch(5, size)).add_(deviation)
        _store(u, new_u, kept)
    _store(s, new_s, kept)


def _store(state: Tensor, value: Tensor, kept: Tensor | None) -> None:
    """Round ``value`` into ``state``, except for the elements in the mask ``kept``."""
    if kept is None:
        state.copy_(value)
    else:
        state.copy_(torch.where(kept, state, value.to(state.dtype)))

"""Masks with one bit per element."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rkif_kernels import Scores


def packed_masks(scores: Scores, thresholds: Tensor) -> list[Tensor]:
    """The masks ``score > threshold``: uint8 [ceil(numel / 8)] for each tensor.

    Args:
        scores: importance of some tensors.
        thresholds: float32 [1], or one for each tensor; -inf selects everything, even NaN.
    """
    limits = thresholds.expand(len(scores.sensitivity)).tolist()
    return [_packed(scores, index, limit) for index, limit in enumerate(limits)]


def _packed(scores: Scores, index: int, limit: float) -> Tensor:
    s = scores.sensitivity[index]
    packed = torch.empty(-(-s.numel() // 8), dtype=torch.uint8, device=s.device)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=s.device)
    for start in range(0, s.numel(), _BLOCK):
        mask = scores.values(index, slice(start, start + _BLOCK)) > limit
        if limit == -math.inf:
            mask = torch.ones_like(mask)
        whole = torch.zeros(-(-mask.numel() // 8) * 8, dtype=torch.uint8, device=s.device)
        whole[: mask.numel()] = mask
        block = (whole.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
        packed[start // 8 : start // 8 + block.numel()] = block
    return packed


_BLOCK = 1 << 20  # elements unpacked at a time, a multiple of 8


def unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    """The mask as scores of the given shape: bfloat16 0 and 1, for a threshold of 0.5."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> shifts) & 1
    return bits.view(-1)[: shape.numel()].view(shape).to(torch.bfloat16)


def repacked(mask: Tensor) -> Tensor:
    """Pack a mask of 0 and 1, of any dtype."""
    return _packed(Scores([mask]), 0, 0.5)

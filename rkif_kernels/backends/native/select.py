"""Exact order statistics of scores that are spread over many tensors, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rkif_kernels.backends.native.library import Lists
from rkif_kernels.selection import sampled as order_statistics
from rkif_kernels.types import Scores


def score_thresholds(scores: Scores, *, ks: Sequence[int], per_tensor: bool) -> Tensor:
    """See :func:`rkif_kernels.ops.score_thresholds`; one ``k`` for each group, from 0."""
    return order_statistics.score_thresholds(scores, ks=ks, per_tensor=per_tensor, read=_NativeReader())


def count_scores_(counts: Tensor, scores: Scores, *, low: int, shift: int) -> None:
    """See :func:`rkif_kernels.ops.count_scores_`."""
    lists = Lists((scores.sensitivity, scores.uncertainty))
    lists.call("rkif_count", scores.distance, low, shift, counts.numel() - 3, counts.data_ptr())


class _NativeReader:
    def sample(self, scores: Scores, step: int) -> Tensor:
        numel = sum(tensor.numel() for tensor in scores.sensitivity)
        picked = np.empty(-(-numel // step), np.float32)
        lists = Lists((scores.sensitivity, scores.uncertainty))
        lists.call("rkif_sample", scores.distance, step, picked.ctypes.data)
        return torch.from_numpy(picked)

    def split(self, scores: Scores, lower: float, upper: float, capacity: int) -> order_statistics.Split:
        between = np.empty(capacity, np.float32)
        counts = np.empty(3, np.int64)
        Lists((scores.sensitivity, scores.uncertainty)).call(
            "rkif_split",
            scores.distance,
            lower,
            upper,
            between.ctypes.data,
            capacity,
            counts.ctypes.data,
        )
        above, reached, found = counts.tolist()
        collected = torch.from_numpy(between[:found]) if found <= capacity else None
        return order_statistics.Split(above, reached, collected)

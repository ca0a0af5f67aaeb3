"""Exact order statistics of the scores of many tensors, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rkif_kernels.backends.native.library import Lists
from rkif_kernels.selection import sampled as order_statistics
from rkif_kernels.selection.bracket import Floats
from rkif_kernels.types import Scores

LINE = 16  # number of neighbouring scores that are sampled together: a cache line of float32


def score_thresholds(scores: Scores, *, ks: Sequence[int], per_tensor: bool) -> Tensor:
    """See :func:`rkif_kernels.ops.score_thresholds`; one ``k`` for each group, from 0."""
    return order_statistics.score_thresholds(scores, ks=ks, per_tensor=per_tensor, read=NativeReader())


def count_scores_(counts: Tensor, scores: Scores, *, low: int, shift: int) -> None:
    """See :func:`rkif_kernels.ops.count_scores_`."""
    lists = Lists((scores.sensitivity, scores.uncertainty))
    lists.call("rkif_count", scores.distance, low, shift, counts.numel() - 3, counts.data_ptr())


def sample_lists(scores: Lists, distance: bool, size: int) -> Floats:
    """A sample of about ``size`` scores, or all scores if there are no more.

    Args:
        scores: the lists S and U.
    """
    numel = scores.numel
    lines = 0 if numel <= size else -(-size // LINE)
    picked = np.empty(lines * LINE or numel, np.float32)
    scores.call("rkif_sample", distance, lines, picked.ctypes.data)
    return picked


class NativeReader:
    run = LINE

    def sample(self, scores: Scores, size: int) -> Floats:
        return sample_lists(Lists((scores.sensitivity, scores.uncertainty)), scores.distance, size)

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
        above, reached, inside = counts.tolist()
        return order_statistics.Split(above, reached, between[:inside] if inside <= capacity else None)

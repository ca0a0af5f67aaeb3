"""Exact order statistics of the scores of many tensors, in constant memory.

To find the k-th smallest score:

1. A sample gives a bracket: two scores, between which the k-th very probably lies.
2. A pass over all scores counts those on each side of the bracket, and collects those inside.
3. If the counts show that the k-th score is inside, it is selected from the collected ones. Otherwise they
   show its side, and the search continues there, with a new bracket or at last by bisection of the bit
   patterns.

So a bad sample costs a pass, and the result stays exact.

:mod:`rkif_kernels.selection.counting` finds the same value, also if the scores are never in memory together.
But it is slower, because it sums half a million bins, and counts in them the scores that this search copies:
2.2 times as long for 2^26 scores, 2.4 times for 2^24 and 5 times for the 6.6 million of an adapter (same
bracket, medians of nine alternating calls, native backend, AMD EPYC, two threads).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rkif_kernels.selection.bracket import Floats, bracket, positive
from rkif_kernels.types import Scores

SHORT = 1 << 22  # scores that are collected for a direct selection: 16 MiB
SMALL = 1 << 17  # scores up to which no sample is needed
SAMPLE_SHIFT, SAMPLE_LEAST, SAMPLE_MOST = 8, 1 << 12, 1 << 20  # one score per 256, within limits
SAMPLED_PASSES = 3  # maximum; then bisection, which is independent of the sample

# Positive floats are ordered like their bit patterns, so the pattern is the key. Values that are not positive
# have key 0.
LOWEST, HIGHEST = -1, 0x7F800001  # open bounds: below zero's key, above infinity's


class Split(NamedTuple):
    """Result of one pass over all scores.

    Attributes:
        above: number of scores greater than the lower bound.
        reached: number of scores greater than or equal to the upper bound.
        between: the scores strictly between the bounds, in any order; None if there are too many.
    """

    above: int
    reached: int
    between: Floats | None


class Reader(Protocol):
    """How a backend reads scores.

    Attributes:
        run: number of neighbouring scores that are sampled together.
    """

    run: int

    def sample(self, scores: Scores, size: int) -> Floats:
        """About ``size`` scores distributed over the tensors; if there are no more, all of them in order."""
        ...

    def split(self, scores: Scores, lower: float, upper: float, capacity: int) -> Split:
        """One pass over all scores; at most ``capacity`` are collected. No score reaches a NaN ``upper``."""
        ...


def score_thresholds(scores: Scores, *, ks: Sequence[int], per_tensor: bool, read: Reader) -> Tensor:
    """One order statistic for each group of scores; one ``k`` per group, from 0."""
    groups = [scores.subset([index]) for index in range(len(ks))] if per_tensor else [scores]
    found = [_order_statistic(group, k, read) for group, k in zip(groups, ks, strict=True)]
    return torch.tensor(found, dtype=torch.float32, device=scores.device)


def sample_scores(scores: Scores, step: int) -> Tensor:
    """Every ``step``-th score in float32, counted through all tensors; read by PyTorch."""
    picked, offset = [torch.empty(0, dtype=torch.float32, device=scores.device)], 0
    for index, s in enumerate(scores.sensitivity):
        picked.append(scores.values(index, slice(offset, None, step)))
        offset = (offset - s.numel()) % step
    return torch.cat(picked)


def sample_size(numel: int) -> int:
    """Number of scores that are sampled from ``numel``."""
    return min(max(numel >> SAMPLE_SHIFT, SAMPLE_LEAST), SAMPLE_MOST)


def kth(values: Floats, k: int) -> float:
    """The ``k``-th smallest of the values, from 0; values that are not positive count as zero."""
    # NumPy's partition is several times faster than PyTorch's kthvalue.
    return float(np.partition(positive(values), k)[k])


def _order_statistic(scores: Scores, k: int, read: Reader) -> float:
    numel = scores.numel
    if numel <= SMALL:
        return kth(read.sample(scores, numel), k)

    sample = positive(read.sample(scores, sample_size(numel)))
    # The answer's key lies strictly between low and high; `below` keys are <= low, `before` are < high.
    low, high, below, before, passes = LOWEST, HIGHEST, 0, numel, 0
    while high - low > 2:
        if low >= 0 and before - below <= SHORT:
            lo, hi = low, high
        elif passes < SAMPLED_PASSES:
            run = read.run if passes == 0 else 1
            lo, hi = _bracket(sample, low, high, (k - below) / (before - below), run)
        else:
            lo = hi = _middle(low, high)
        above, reached, between = read.split(scores, _value(lo), _value(hi), SHORT)
        up_to_lo, before_hi = numel - above, numel - reached
        passes += 1
        # Each case leaves fewer keys: lo and hi are inside the interval, and a single key is excluded.
        if lo == hi and before_hi <= k < up_to_lo:
            return _value(lo)
        if lo == hi and k < before_hi:
            high, before = lo, before_hi
        elif lo == hi:
            low, below = hi, up_to_lo
        elif k < up_to_lo:
            high, before = lo + 1, up_to_lo
        elif k >= before_hi:
            low, below = hi - 1, before_hi
        elif between is not None:
            return kth(between, k - up_to_lo)
        else:
            low, high, below, before = lo, hi, up_to_lo, before_hi
    return _value(low + 1)


def _bracket(sample: Floats, low: int, high: int, quantile: float, run: int) -> tuple[int, int]:
    """Two keys in (low, high), between which the quantile of the scores in (low, high) very probably lies."""
    keys = sample.view(np.int32)
    part = sample[(keys > low) & (keys < high)]
    if part.size == 0:
        return (_middle(low, high),) * 2
    lo, hi = (int(np.float32(value).view(np.int32)) for value in bracket(part, quantile, run))
    return max(lo, low + 1), min(hi, high - 1)


def _middle(low: int, high: int) -> int:
    return (low + high) // 2


def _value(key: int) -> float:
    return float(np.int32(key).view(np.float32))

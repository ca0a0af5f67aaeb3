"""Exact order statistics of the scores of many tensors, in constant memory.

A sample proposes a narrow bracket around the k-th score. One pass counts what lies on either side of it
and collects what lies inside; the counts prove whether the bracket was right. If it was, the answer is an
order statistic of the few collected scores. If not, the search goes on in the part that the counts point to,
at worst by bisection of the float's bit pattern: a bad sample costs a pass, never exactness.

Counting windows (:mod:`rkif_kernels.selection.counting`) finds the same value, and serves scores that are
never in memory together. Given the same bracket it takes 2.2 times as long for 2^26 scores, 2.4 times for
2^24 and 5 times for the 6.6 million of an adapter (medians of nine calls in turn, native backend, AMD EPYC,
two threads): it counts what this search copies, and half a million bins must be summed.
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
SAMPLE_SHIFT, SAMPLE_LEAST, SAMPLE_MOST = 8, 1 << 12, 1 << 20  # one score in 256, within these limits
SAMPLED_PASSES = 3  # then bisection, which does not depend on the sample

# Positive floats order like their bit patterns, so a key is the pattern, and 0 for what is not positive.
LOWEST, HIGHEST = -1, 0x7F800001  # open bounds: below zero's key, above infinity's


class Split(NamedTuple):
    """Outcome of one pass over all scores.

    Attributes:
        above: how many scores are greater than the lower bound.
        reached: how many are at least the upper bound.
        between: the scores strictly between the bounds, in any order; None if there are too many.
    """

    above: int
    reached: int
    between: Floats | None


class Reader(Protocol):
    """How an implementation reads scores.

    Attributes:
        run: number of neighbouring scores that are sampled together.
    """

    run: int

    def sample(self, scores: Scores, size: int) -> Floats:
        """About ``size`` scores spread over the tensors; all of them, in order, if there are no more."""
        ...

    def split(self, scores: Scores, lower: float, upper: float, capacity: int) -> Split:
        """One pass over all scores; at most ``capacity`` are collected. Nothing reaches an upper NaN."""
        ...


def score_thresholds(scores: Scores, *, ks: Sequence[int], per_tensor: bool, read: Reader) -> Tensor:
    """One order statistic for each group of scores; one ``k`` a group, from 0."""
    groups = [scores.subset([index]) for index in range(len(ks))] if per_tensor else [scores]
    found = [_order_statistic(group, k, read) for group, k in zip(groups, ks, strict=True)]
    return torch.tensor(found, dtype=torch.float32, device=scores.device)


def sample_scores(scores: Scores, step: int) -> Tensor:
    """Every ``step``-th score in float32, counted through all tensors; read by PyTorch."""
    picked, offset = [], 0
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
        # Each outcome leaves fewer keys: lo and hi lie inside, and where they are one key it is excluded.
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
    """Two keys inside (low, high) between which the quantile of the scores in there very probably lies."""
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

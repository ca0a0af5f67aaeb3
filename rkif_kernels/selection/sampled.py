"""Exact order statistics of scores that are spread over many tensors, in constant memory.

A sample proposes a narrow bracket around the k-th score. One pass counts what lies on either side of it
and collects what lies inside; the counts prove whether the bracket was right. If it was, the answer is an
order statistic of the few collected scores. If not, the search goes on in the part that the counts point to,
at worst by bisection of the float's bit pattern: a bad sample costs a pass, never exactness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rkif_kernels.types import Scores

SHORT = 1 << 22  # scores that are collected for a direct selection: 16 MiB
SMALL = 1 << 17  # so few that no sample is needed
SAMPLE_SHIFT, SAMPLE_LEAST, SAMPLE_MOST = 8, 1 << 12, 1 << 20  # one score in 256, within these limits
SIGMAS = 4.5  # half-width of a bracket, in standard deviations of a sample quantile
SAMPLED_PASSES = 3  # then bisection, which needs no luck

# Positive floats order like their bit patterns, so a key is the pattern, and 0 for what is not positive.
LOWEST, HIGHEST = -1, 0x7F800001  # open bounds: below zero's key, above infinity's


class Split(NamedTuple):
    """Outcome of one pass over all scores.

    Attributes:
        above: how many scores are greater than the lower bound.
        reached: how many are at least the upper bound.
        between: the scores strictly between the bounds, in any order; None where they are too many.
    """

    above: int
    reached: int
    between: Tensor | None


class Reader(Protocol):
    """How an implementation reads scores."""

    def sample(self, scores: Scores, step: int) -> Tensor:
        """Every ``step``-th score in float32, counted through all tensors."""
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


def _order_statistic(scores: Scores, k: int, read: Reader) -> float:
    numel = scores.numel
    if numel <= SMALL:
        return _kth(read.sample(scores, 1), k)

    size = min(max(numel >> SAMPLE_SHIFT, SAMPLE_LEAST), SAMPLE_MOST)
    sample = _positive(read.sample(scores, -(-numel // size))).view(torch.int32).sort().values
    # The answer's key lies strictly between low and high; `below` keys are <= low, `before` are < high.
    low, high, below, before, passes = LOWEST, HIGHEST, 0, numel, 0
    while high - low > 2:
        if low >= 0 and before - below <= SHORT:
            lo, hi = low, high
        elif passes < SAMPLED_PASSES:
            lo, hi = _bracket(sample, low, high, (k - below) / (before - below))
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
            return _kth(between, k - up_to_lo)
        else:
            low, high, below, before = lo, hi, up_to_lo, before_hi
    return _value(low + 1)


def _bracket(sample: Tensor, low: int, high: int, quantile: float) -> tuple[int, int]:
    """Two keys inside (low, high) between which the quantile of the scores in there very probably lies."""
    part = sample[(sample > low) & (sample < high)]
    if part.numel() == 0:
        return (_middle(low, high),) * 2
    center = quantile * (part.numel() - 1)
    margin = SIGMAS * (quantile * (1 - quantile) * part.numel()) ** 0.5 + 1
    last = part.numel() - 1
    return int(part[max(int(center - margin), 0)]), int(part[min(int(center + margin) + 1, last)])


def _middle(low: int, high: int) -> int:
    return (low + high) // 2


def _kth(values: Tensor, k: int) -> float:
    # NumPy's partition is several times faster than PyTorch's kthvalue.
    return float(np.partition(_positive(values).cpu().numpy(), k)[k])


def _positive(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 0.0)


def _value(key: int) -> float:
    return float(np.int32(key).view(np.float32))

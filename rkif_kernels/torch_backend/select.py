"""Exact order statistics of scores that are spread over many tensors, in constant memory.

A sample proposes a narrow bracket around the wanted rank. One pass counts what lies on either side of it
and collects what lies inside; the counts prove whether the bracket was right. If it was, the answer is an
order statistic of the few collected scores. If not, the search goes on in the part that the counts point to,
at worst by bisection of the float's bit pattern: a bad sample costs a pass, never exactness.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rkif_kernels.torch_backend.blocks import Scratch, blocks
from rkif_kernels.types import Scores

SHORT = 1 << 20  # scores that are selected from directly: 4 MiB, and three times that for kthvalue
SAMPLE = 1 << 16
SIGMAS = 4.5  # half-width of a bracket, in standard deviations of a sample quantile
SAMPLED_PASSES = 3  # then bisection, which needs no luck

# Positive floats order like their bit patterns, so a key is the pattern, and 0 for what is not positive.
LOWEST, HIGHEST = -1, 0x7F800001  # open bounds: below zero's key, above infinity's


def score_thresholds(scores: Scores, *, ranks: Sequence[int], per_tensor: bool) -> Tensor:
    """See :func:`rkif_kernels.ops.score_thresholds`; ``ranks`` holds one rank for each group, from 0."""
    groups = _per_tensor(scores) if per_tensor else [scores]
    device = scores.sensitivity[0].device
    scratch = Scratch(device)
    found = [_order_statistic(group, rank, scratch) for group, rank in zip(groups, ranks, strict=True)]
    return torch.tensor(found, dtype=torch.float32, device=device)


def _per_tensor(scores: Scores) -> Iterator[Scores]:
    for index, s in enumerate(scores.sensitivity):
        yield Scores([s], None if scores.uncertainty is None else [scores.uncertainty[index]])


def _order_statistic(scores: Scores, rank: int, scratch: Scratch) -> float:
    numel = sum(s.numel() for s in scores.sensitivity)
    if numel <= SHORT:
        return _kth(torch.cat([block.clone() for block in _score_blocks(scores, scratch)]), rank)

    sample = _sample(scores, numel)
    # The answer's key lies strictly between low and high; `below` keys are <= low, `before` are < high.
    low, high, below, before, passes = LOWEST, HIGHEST, 0, numel, 0
    while high - low > 2:
        if low >= 0 and before - below <= SHORT:
            lo, hi = low, high
        elif passes < SAMPLED_PASSES:
            lo, hi = _bracket(sample, low, high, (rank - below) / (before - below))
        else:
            lo = hi = _middle(low, high)
        up_to_lo, before_hi, collected = _split(scores, lo, hi, numel, scratch)
        passes += 1
        # Each outcome leaves fewer keys: lo and hi lie inside, and where they are one key it is excluded.
        if lo == hi and before_hi <= rank < up_to_lo:
            return _value(lo)
        if lo == hi and rank < before_hi:
            high, before = lo, before_hi
        elif lo == hi:
            low, below = hi, up_to_lo
        elif rank < up_to_lo:
            high, before = lo + 1, up_to_lo
        elif rank >= before_hi:
            low, below = hi - 1, before_hi
        elif collected is not None:
            return _kth(collected, rank - up_to_lo)
        else:
            low, high, below, before = lo, hi, up_to_lo, before_hi
    return _value(low + 1)


def _split(scores: Scores, lo: int, hi: int, numel: int, scratch: Scratch) -> tuple[int, int, Tensor | None]:
    """One pass: how many keys are <= lo, how many < hi, and the scores between them (None: too many)."""
    lower, upper = _value(lo), _value(hi)
    above_lo = from_hi = 0
    collected: list[Tensor] = []
    for block in _score_blocks(scores, scratch):
        # Masks of 0 and 1 in float32: PyTorch's comparisons into bool are several times slower on CPUs.
        over = torch.gt(block, lower, out=scratch(3, block.numel()))
        reached = torch.ge(block, upper, out=scratch(4, block.numel()))
        n_over, n_reached = int(over.sum()), int(reached.sum())
        above_lo += n_over
        from_hi += n_reached
        if 0 <= above_lo - from_hi <= SHORT and n_over > n_reached:
            collected.append(block[over.sub_(reached).bool()])
    complete = 0 <= above_lo - from_hi <= SHORT
    return numel - above_lo, numel - from_hi, torch.cat(collected) if complete and collected else None


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


def _sample(scores: Scores, numel: int) -> Tensor:
    """The sorted keys of about SAMPLE scores, at equal distances over all tensors."""
    step = -(-numel // SAMPLE)
    picked, offset = [], 0
    for group in _per_tensor(scores):
        (s,) = group.sensitivity
        part = s.detach().reshape(-1)[offset::step].float()
        if group.uncertainty is not None:
            part = part * group.uncertainty[0].detach().reshape(-1)[offset::step].float()
        picked.append(part)
        offset = (offset - s.numel()) % step
    return _positive(torch.cat(picked)).view(torch.int32).sort().values


def _score_blocks(scores: Scores, scratch: Scratch) -> Iterator[Tensor]:
    """float32 scores, block by block; each is valid until the next one is asked for, and read only."""
    for _, (s, u) in blocks(scores.sensitivity, scores.uncertainty):
        assert s is not None
        score = scratch.float32(s, 0)
        if u is not None:
            score = torch.mul(score, scratch.float32(u, 1), out=scratch(2, s.numel()))
        yield score


def _kth(values: Tensor, rank: int) -> float:
    return _positive(values).kthvalue(rank + 1).values.item()


def _positive(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 0.0)


def _value(key: int) -> float:
    return float(np.int32(key).view(np.float32))

"""Exact order statistics of the scores of many tensors, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rkif_kernels.backends.torch.blocks import Scratch, blocks
from rkif_kernels.selection import sampled as order_statistics
from rkif_kernels.selection.bracket import Floats
from rkif_kernels.types import Scores


def score_thresholds(scores: Scores, *, ks: Sequence[int], per_tensor: bool) -> Tensor:
    """See :func:`rkif_kernels.ops.score_thresholds`; one ``k`` for each group, from 0."""
    return order_statistics.score_thresholds(scores, ks=ks, per_tensor=per_tensor, read=_BlockReader())


def all_valid(tensors: Sequence[Tensor]) -> bool:
    """See :func:`rkif_kernels.ops.all_valid_scores`."""
    filled = [tensor.detach().min().float() for tensor in tensors if tensor.numel()]
    # The minimum of values with a NaN is NaN, which is not >= 0.
    return not filled or bool((torch.stack(filled) >= 0).all())


def count_scores_(counts: Tensor, scores: Scores, *, low: int, shift: int) -> None:
    """See :func:`rkif_kernels.ops.count_scores_`."""
    bins = counts.numel() - 3
    one = torch.ones((), dtype=torch.int64, device=counts.device)
    for score in _score_blocks(scores, Scratch(counts.device)):
        counts[-1] += score.numel() - ((score >= 0) & (score < torch.inf)).sum()
        distance = torch.where(score > 0, score, 0.0).view(torch.int32) - low
        place = torch.where(distance < 0, 0, (distance >> shift).clamp_(max=bins) + 1)
        counts.index_add_(0, place, one.expand(place.numel()))


class _BlockReader:
    run = 1

    def sample(self, scores: Scores, size: int) -> Floats:
        picked: Floats = order_statistics.sample_scores(scores, -(-scores.numel // size)).cpu().numpy()
        return picked

    def split(self, scores: Scores, lower: float, upper: float, capacity: int) -> order_statistics.Split:
        scratch = Scratch(scores.sensitivity[0].device)
        above = reached = 0
        between: list[Tensor] = []
        for block in _score_blocks(scores, scratch):
            # Masks of 0 and 1 in float32, because comparisons into bool are several times slower on CPUs.
            over = torch.gt(block, lower, out=scratch(3, block.numel()))
            beyond = torch.ge(block, upper, out=scratch(4, block.numel()))
            n_over, n_beyond = int(over.sum()), int(beyond.sum())
            above += n_over
            reached += n_beyond
            if 0 <= above - reached <= capacity and n_over > n_beyond:
                between.append(block[over.sub_(beyond).bool()])
        complete = 0 <= above - reached <= capacity and between
        return order_statistics.Split(above, reached, torch.cat(between).cpu().numpy() if complete else None)


def _score_blocks(scores: Scores, scratch: Scratch) -> Iterator[Tensor]:
    """Yield float32 scores block by block; a block is read-only, and valid until the next one."""
    for _, (s, u) in blocks(scores.sensitivity, scores.uncertainty):
        assert s is not None
        yield block_score(s, u, scores.distance, scratch, (0, 1, 2))


def block_score(
    s: Tensor, u: Tensor | None, distance: bool, scratch: Scratch, slots: tuple[int, int, int]
) -> Tensor:
    """float32 scores of a block; read-only."""
    score = scratch.float32(s, slots[0])
    if u is None:
        return score
    other, out = scratch.float32(u, slots[1]), scratch(slots[2], s.numel())
    return torch.sub(score, other, out=out).abs_() if distance else torch.mul(score, other, out=out)

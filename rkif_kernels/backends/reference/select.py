"""Exact order statistics of the scores of many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rkif_kernels.types import Scores


def score_thresholds(scores: Scores, *, ks: Sequence[int], per_tensor: bool) -> Tensor:
    """See :func:`rkif_kernels.ops.score_thresholds`; one ``k`` for each group, from 0."""
    values = [score.reshape(-1) for score in score_values(scores)]
    groups = values if per_tensor else [torch.cat(values)]
    return torch.stack([group.sort().values[k] for group, k in zip(groups, ks, strict=True)])


def count_scores_(counts: Tensor, scores: Scores, *, low: int, shift: int) -> None:
    """See :func:`rkif_kernels.ops.count_scores_`."""
    bins = counts.numel() - 3
    edges = low + (torch.arange(bins + 1) << shift)
    for score in score_values(scores):
        keys = score.reshape(-1).view(torch.int32).long()
        counts[:-1] += torch.bincount(torch.searchsorted(edges, keys, right=True), minlength=bins + 2)
    for score in raw_values(scores):
        counts[-1] += (~((score >= 0) & (score < torch.inf))).sum()


def score_values(scores: Scores) -> list[Tensor]:
    """The float32 scores. Those that are not positive, and a product that is NaN (inf * 0), count as zero."""
    return [torch.where(score > 0, score, 0.0) for score in raw_values(scores)]


def raw_values(scores: Scores) -> list[Tensor]:
    """The float32 scores, negative and NaN scores included."""
    return [scores.values(index) for index in range(len(scores.sensitivity))]

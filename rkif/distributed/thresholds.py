"""Exact thresholds of scores that are sharded over processes.

A sample from all ranks gives two scores between which the threshold probably lies. Then every rank counts its
scores in that window, and the counts are summed. Counts are integers, so the thresholds have the same bits as
on one process, for every splitting of the scores. The bytes sent do not grow with the number of scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import rkif_kernels
from rkif.distributed.process_group import ProcessGroup
from rkif_kernels import CountingSearch, CountingSearches, Scope, Scores, bracket, order_statistic_k

# Number of scores that all ranks together send as a sample; if there are fewer, all are sent. The standard
# error of a sample quantile's level is then at most 0.001.
SAMPLE = 1 << 18
TENSOR_BINS = 1 << 11  # bins of a window under scope="tensor": each tensor has a search of its own


def sharded_thresholds(
    scores: Scores, sizes: Sequence[int], *, density: float, scope: Scope, processes: ProcessGroup
) -> Tensor:
    """:func:`rkif_kernels.score_thresholds` of scores that are sharded over processes.

    Args:
        scores: of the parts that this process counts; some or all tensors may be empty.
        sizes: number of elements of each tensor on all ranks together.
        density, scope: as for that function.
        processes: the ranks; all must call it.

    Returns:
        float32 [1], or [len(sizes)] under scope="tensor" (inf for an empty tensor), the same on every rank.
    """
    device = scores.device
    groups = len(sizes) if scope == "tensor" else 1
    if density in (0, 1):
        return torch.full((groups,), -math.inf if density == 1 else math.inf, device=device)
    search = _of_tensors if scope == "tensor" else _global
    return torch.tensor(search(scores, sizes, density, processes), dtype=torch.float32, device=device)


def _global(scores: Scores, sizes: Sequence[int], density: float, processes: ProcessGroup) -> list[float]:
    numel = sum(sizes)
    k = order_statistic_k(numel, density)
    sample = _gathered_sample(scores, -(-numel // SAMPLE), processes)
    if numel <= SAMPLE:
        return [float(np.partition(sample, k)[k])]
    searches = CountingSearches([CountingSearch(k, bracket(sample, k / (numel - 1)))])
    while not searches.done:
        searches.count(0, scores)
        searches.narrow(processes.all_reduce_sum)
    return searches.values


def _of_tensors(scores: Scores, sizes: Sequence[int], density: float, processes: ProcessGroup) -> list[float]:
    filled = [index for index, size in enumerate(sizes) if size]
    searches = CountingSearches(
        CountingSearch(order_statistic_k(sizes[index], density), bins=TENSOR_BINS) for index in filled
    )
    while not searches.done:
        for position, index in enumerate(filled):
            searches.count(position, scores.subset([index]))
        searches.narrow(processes.all_reduce_sum)
    values = iter(searches.values)
    return [next(values) if size else math.inf for size in sizes]


def _gathered_sample(
    scores: Scores, step: int, processes: ProcessGroup
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Every ``step``-th score of each rank; scores that are not positive become 0, as in the counts."""
    sample = processes.all_gather(rkif_kernels.sample_scores(scores, step))
    return torch.where(sample > 0, sample, 0.0).cpu().numpy()

"""The masked, weighted merge of two task vectors, with given thresholds or with their selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rkif_kernels.backends.native.library import Lists, call
from rkif_kernels.backends.native.select import LINE, sample_lists, score_thresholds
from rkif_kernels.contiguous import all_contiguous, in_place, same_tensors
from rkif_kernels.selection.bracket import Floats, bracket
from rkif_kernels.selection.sampled import SMALL, kth, sample_size
from rkif_kernels.types import ROLES, FuseStats, FusionInputs, MergeRule

INNER_S, OUTER_S = ROLES.index("INNER_S"), ROLES.index("OUTER_S")  # each followed by its U
# Maximum of undecided elements per thread, of 24 bytes each. There are more if many scores are equal. Then a
# separate pass for the thresholds takes less time.
MAX_UNDECIDED = 1 << 22
LIST_PADDING = 15  # elements that the library may overwrite after those that it gathers


def fuse_(inputs: FusionInputs, thresholds: tuple[Tensor, Tensor], rule: MergeRule) -> FuseStats:
    """See :func:`rkif_kernels.ops.fuse_`."""
    limits = [np.ascontiguousarray(threshold.expand(len(inputs.out)).numpy()) for threshold in thresholds]
    setup = _Call(inputs, rule)
    with in_place(inputs.out) as targets:
        Lists((targets, *inputs.lists[1:])).call(
            "rkif_fuse", *(limit.ctypes.data for limit in limits), *setup.settings, *setup.results
        )
    return setup.stats(thresholds)


def select_and_fuse_(inputs: FusionInputs, k: int, rule: MergeRule) -> FuseStats:
    """See :func:`rkif_kernels.ops.select_and_fuse_`; ``k`` is that of both thresholds, from 0.

    ``out`` shares no memory with the inputs. A sample gives a bracket of each side's threshold. One pass
    fuses the elements that the brackets decide, and lists the others with their scores and parameters. The
    thresholds are order statistics of the listed scores; then the listed elements are fused. If a bracket
    missed, or very many scores are equal, a separate pass finds the thresholds first.
    """
    if inputs.numel > SMALL:
        with in_place(inputs.out) as targets:
            stats = _fuse_in_one_pass(Lists((targets, *inputs.lists[1:])), inputs, k, rule)
        if stats is not None:
            return stats
    return _fuse_in_two_steps(inputs, k, rule)


def prepared_fusion(
    inputs: FusionInputs, k: int, rule: MergeRule
) -> Callable[[FusionInputs], FuseStats] | None:
    """:func:`select_and_fuse_` for tensors with fixed addresses; None if it would copy some of them."""
    rows = [row for row in inputs.lists if row is not None]
    if inputs.numel <= SMALL or not all(same_tensors(all_contiguous(row), row) for row in rows):
        return None
    lists = Lists(inputs.lists).of_addresses()

    def launch(inputs: FusionInputs) -> FuseStats:
        stats = _fuse_in_one_pass(lists, inputs, k, rule)
        return _fuse_in_two_steps(inputs, k, rule) if stats is None else stats

    return launch


def _fuse_in_two_steps(inputs: FusionInputs, k: int, rule: MergeRule) -> FuseStats:
    sides = (inputs.inner_scores, inputs.outer_scores)
    inner, outer = (score_thresholds(side, ks=[k], per_tensor=False) for side in sides)
    return fuse_(inputs, (inner, outer), rule)


def _fuse_in_one_pass(lists: Lists, inputs: FusionInputs, k: int, rule: MergeRule) -> FuseStats | None:
    """Fuse with brackets; None if that failed: ``out`` then holds a part of the result."""
    numel = inputs.numel
    quantile, size = k / (numel - 1), sample_size(numel)
    samples = [sample_lists(lists.part(slice(s, s + 2)), False, size) for s in (INNER_S, OUTER_S)]
    brackets = [bracket(sample, quantile, LINE) for sample in samples]
    setup = _Call(inputs, rule)
    thresholds = _fuse_bracketed(lists, setup, brackets, k)
    return None if thresholds is None else setup.stats(thresholds)


def _fuse_bracketed(
    lists: Lists, setup: _Call, brackets: list[tuple[float, float]], k: int
) -> tuple[Tensor, Tensor] | None:
    """Fuse, and return the thresholds; None if a bracket missed or too many elements were undecided."""
    ends = np.array(brackets, np.float32)
    numbers = np.empty(5, np.int64)  # of each side: scores < lo, scores <= lo; then of listed elements
    fusion = lists.call("rkif_begin", ends.ctypes.data, *setup.settings, MAX_UNDECIDED, numbers.ctypes.data)
    if fusion is None:
        return None
    thresholds = np.empty(2, np.float32)
    decided = False
    try:
        listed = np.empty(int(numbers[4]) + LIST_PADDING, np.float32)
        for side, (lo, hi) in enumerate(ends):
            below, up_to = numbers[2 * side : 2 * side + 2].tolist()
            if below <= k < up_to:
                thresholds[side] = lo
                continue
            inside = call("rkif_gather_undecided", fusion, side, lo, hi, listed.ctypes.data)
            if not up_to <= k < up_to + inside:
                return None
            thresholds[side] = kth(listed[:inside], k - up_to)
        decided = True
    finally:
        call("rkif_finish", fusion, thresholds.ctypes.data if decided else None, *setup.results)
    both = torch.from_numpy(thresholds)
    return both[:1], both[1:]


class _Call:
    """The arguments that both fusions pass to the library, and the results."""

    def __init__(self, inputs: FusionInputs, rule: MergeRule) -> None:
        self._numel = inputs.numel
        self._selected = np.empty(3, np.int64)
        self._squared_norms = np.empty(3, np.float64)
        self._weights: list[Floats] = [np.array(rule.factors[side::2], np.float32) for side in range(2)]
        distances = (inputs.inner_scores.distance, inputs.outer_scores.distance)
        self.settings = (*_addresses(self._weights), rule.outer_from == "inner", *distances)
        self.results = _addresses([self._selected, self._squared_norms])

    def stats(self, thresholds: tuple[Tensor, Tensor]) -> FuseStats:
        inner, outer, both = self._selected.tolist()
        counts = [inner - both, outer - both, both, self._numel - inner - outer + both]
        return FuseStats(
            torch.tensor(counts, device="cpu"), torch.from_numpy(self._squared_norms), thresholds
        )


def _addresses(arrays: Sequence[npt.NDArray[Any]]) -> tuple[int, ...]:
    return tuple(array.ctypes.data for array in arrays)

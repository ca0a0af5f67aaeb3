"""The masked, weighted merge of two task vectors, with thresholds that are given or found on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rkif_kernels.backends.native.library import Lists, call
from rkif_kernels.backends.native.select import NativeReader, score_thresholds
from rkif_kernels.contiguous import in_place
from rkif_kernels.selection.bracket import Floats, bracket
from rkif_kernels.selection.sampled import SMALL, kth, sample_size
from rkif_kernels.types import FuseStats, FusionInputs, MergeRule

# Undecided elements a thread, of 24 bytes each: more mean that many scores are equal, and that a pass for the
# thresholds alone costs less.
MOST_UNDECIDED = 1 << 22
ROOM = 15  # elements beyond what is gathered, that a gathering may overwrite


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

    ``out`` shares no memory with the inputs. A sample gives each side a bracket of its threshold. One pass
    fuses what the brackets decide, and lists the other elements with all that decides them: their scores and
    parameters. The thresholds are order statistics of the listed scores, after which the listed elements are
    fused. Where a bracket missed, or very many scores are equal, the thresholds are found first.
    """
    sides = (inputs.inner_scores, inputs.outer_scores)
    if inputs.numel > SMALL:
        quantile = k / (inputs.numel - 1)
        size = sample_size(inputs.numel)
        brackets = [bracket(NativeReader().sample(side, size), quantile, NativeReader.run) for side in sides]
        setup = _Call(inputs, rule)
        with in_place(inputs.out) as targets:
            thresholds = _fuse_bracketed(Lists((targets, *inputs.lists[1:])), setup, brackets, k)
        if thresholds is not None:
            return setup.stats(thresholds)
    found = [score_thresholds(side, ks=[k], per_tensor=False) for side in sides]
    return fuse_(inputs, (found[0], found[1]), rule)


def _fuse_bracketed(
    lists: Lists, setup: _Call, brackets: list[tuple[float, float]], k: int
) -> tuple[Tensor, Tensor] | None:
    """The thresholds, after everything is fused; None where that failed, and ``out`` holds part of it."""
    ends = np.array(brackets, np.float32)
    found = np.empty(5, np.int64)
    fusion = lists.call("rkif_begin", ends.ctypes.data, *setup.settings, MOST_UNDECIDED, found.ctypes.data)
    if fusion is None:
        return None
    thresholds = np.empty(2, np.float32)
    decided = False
    try:
        listed = np.empty(int(found[4]) + ROOM, np.float32)
        for side, (lo, hi) in enumerate(ends):
            below, up_to = found[2 * side : 2 * side + 2].tolist()
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
    """What both ways to fuse hand to the library, and what they get back."""

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

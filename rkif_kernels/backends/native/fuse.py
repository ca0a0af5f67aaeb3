"""The masked, weighted merge of two task vectors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rkif_kernels.backends.native.library import Lists
from rkif_kernels.contiguous import in_place
from rkif_kernels.numerics import float32
from rkif_kernels.types import CaseWeights, FuseStats, FusionInputs, OuterFrom


def fuse_(
    inputs: FusionInputs,
    *,
    thresholds: tuple[Tensor, Tensor],
    weights: CaseWeights,
    outer_from: OuterFrom,
) -> FuseStats:
    """See :func:`rkif_kernels.ops.fuse_`."""
    selected = np.empty(3, np.int64)
    squared_norms = np.empty(3, np.float64)
    limits = [np.ascontiguousarray(threshold.expand(len(inputs.out)).numpy()) for threshold in thresholds]
    by_side = [
        np.array([float32(weight) for weight in side], np.float32) for side in zip(*weights, strict=True)
    ]
    with in_place(inputs.out) as targets:
        Lists((targets, *inputs.lists[1:])).call(
            "rkif_fuse",
            *(array.ctypes.data for array in (*limits, *by_side)),
            outer_from == "inner",
            inputs.inner_scores.distance,
            inputs.outer_scores.distance,
            selected.ctypes.data,
            squared_norms.ctypes.data,
        )
    inner_all, outer_all, both = selected.tolist()
    neither = inputs.numel - inner_all - outer_all + both
    counts = [inner_all - both, outer_all - both, both, neither]
    return FuseStats(torch.tensor(counts, device="cpu"), torch.from_numpy(squared_norms), thresholds)

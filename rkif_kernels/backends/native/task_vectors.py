"""Task arithmetic: the weighted sum of two sparsified task vectors, with or without sign election."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rkif_kernels.backends.native.library import Lists
from rkif_kernels.contiguous import in_place
from rkif_kernels.selection.draws import Draws
from rkif_kernels.types import FuseStats, TaskVectorInputs, TaskVectorRule


def merge_task_vectors_(
    inputs: TaskVectorInputs, rule: TaskVectorRule, thresholds: Tensor, scales: Tensor, draws: Draws | None
) -> FuseStats:
    """See :func:`rkif_kernels.ops.merge_task_vectors_`; thresholds and scales are float32 [2, tensors]."""
    selected = np.empty(3, np.int64)
    squared_norms = np.empty(3, np.float64)
    starts = None if draws is None else np.array(draws.starts, np.int64)
    with in_place(inputs.out) as targets:
        Lists((targets, *inputs.lists[1:])).call(
            "rkif_merge",
            thresholds.data_ptr(),
            scales.data_ptr(),
            None if draws is None else draws.keys.ctypes.data,
            None if starts is None else starts.ctypes.data,
            0.0 if draws is None else draws.density,
            *rule.weight,
            rule.factor,
            rule.consensus,
            rule.normalize,
            selected.ctypes.data,
            squared_norms.ctypes.data,
        )
    inner, outer, both = selected.tolist()
    numel = sum(map(Tensor.numel, inputs.base))
    counts = torch.tensor([inner - both, outer - both, both, numel - inner - outer + both], device="cpu")
    return FuseStats(counts, torch.from_numpy(squared_norms), (thresholds[0], thresholds[1]))


def absolute_sums(
    base: Sequence[Tensor], inner: Sequence[Tensor], outer: Sequence[Tensor], draws: Draws
) -> Tensor:
    """See :func:`rkif_kernels.ops.absolute_sums`."""
    sums = np.empty((2, 2, len(base)), np.float64)
    starts = np.array(draws.starts, np.int64)
    Lists((base, inner, outer)).call(
        "rkif_absolute_sums", draws.keys.ctypes.data, starts.ctypes.data, draws.density, sums.ctypes.data
    )
    return torch.from_numpy(sums)

"""Task arithmetic: the weighted sum of two sparsified task vectors, with or without sign election."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rkif_kernels.backends.torch.blocks import blocks
from rkif_kernels.contiguous import in_place
from rkif_kernels.selection.draws import Draws
from rkif_kernels.selection.signs import elect_signs
from rkif_kernels.types import FuseStats, TaskVectorInputs, TaskVectorRule


def merge_task_vectors_(
    inputs: TaskVectorInputs, rule: TaskVectorRule, thresholds: Tensor, scales: Tensor, draws: Draws | None
) -> FuseStats:
    """See :func:`rkif_kernels.ops.merge_task_vectors_`; thresholds and scales are float32 [2, tensors]."""
    counts = torch.zeros(4, dtype=torch.int64, device=inputs.device)
    squared_norms = torch.zeros(3, dtype=torch.float64, device=inputs.device)
    with in_place(inputs.out) as targets:
        for index, start, (out, base, *ends) in _blocks(targets, inputs.base, inputs.inner, inputs.outer):
            vectors = [end.float() - base.float() for end in ends]
            masks = [
                vector.abs() > float(thresholds[side, index])
                if draws is None
                else draws.keeps(side, index, start, vector.numel()).to(vector.device)
                for side, vector in enumerate(vectors)
            ]
            weighted = [
                torch.where(mask, vector, 0.0).mul_(float(scales[side, index])).mul_(rule.weight[side])
                for side, (vector, mask) in enumerate(zip(vectors, masks, strict=True))
            ]
            fused = base.float() + _merged(weighted, rule)
            vectors.append(fused.to(out.dtype).float() - base.float())  # as stored; `base` may be `out`
            out.copy_(fused)
            first, second = masks
            cases = (first & ~second, second & ~first, first & second, ~(first | second))
            counts += torch.stack([case.sum() for case in cases])
            squared_norms += torch.stack([vector.double().square().sum() for vector in vectors])
    return FuseStats(counts, squared_norms, (thresholds[0], thresholds[1]))


def absolute_sums(
    base: Sequence[Tensor], inner: Sequence[Tensor], outer: Sequence[Tensor], draws: Draws
) -> Tensor:
    """See :func:`rkif_kernels.ops.absolute_sums`."""
    sums = torch.zeros(2, 2, len(base), dtype=torch.float64, device="cpu")
    for index, start, (origin, *ends) in _blocks(base, inner, outer):
        for side, end in enumerate(ends):
            distance = (end.float() - origin.float()).abs_()
            sums[0, side, index] += distance.double().sum().cpu()
            distance *= draws.keeps(side, index, start, distance.numel()).to(distance.device)
            sums[1, side, index] += distance.double().sum().cpu()
    return sums


def _blocks(*roles: Sequence[Tensor]) -> Iterator[tuple[int, int, list[Tensor]]]:
    """Yield (tensor index, first element of the block, the block of every role)."""
    last, start = -1, 0
    for index, parts in blocks(*roles):
        block = [part for part in parts if part is not None]
        start = start if index == last else 0
        yield index, start, block
        last, start = index, start + block[0].numel()


def _merged(weighted: Sequence[Tensor], rule: TaskVectorRule) -> Tensor:
    if not rule.consensus:
        return (weighted[0] + weighted[1]).mul_(rule.factor)
    first, second = elect_signs(*weighted)
    merged = torch.where(first, weighted[0], 0.0) + torch.where(second, weighted[1], 0.0)
    if rule.normalize:
        divisors = first * rule.weight[0] + second * rule.weight[1]
        merged /= torch.where(divisors == 0, 1.0, divisors)
    return merged.mul_(rule.factor)

"""The masked, weighted merge of two task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rkif_kernels.backends.torch.blocks import Scratch, blocks
from rkif_kernels.backends.torch.select import block_score
from rkif_kernels.contiguous import in_place
from rkif_kernels.types import FuseStats, FusionInputs, MergeRule


def fuse_(inputs: FusionInputs, thresholds: tuple[Tensor, Tensor], rule: MergeRule) -> FuseStats:
    """See :func:`rkif_kernels.ops.fuse_`."""
    device = thresholds[0].device
    scratch = Scratch(device)
    inner_weights, outer_weights = rule.factors[::2], rule.factors[1::2]
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    squared_norms = torch.zeros(3, dtype=torch.float64, device=device)
    limits = [threshold.expand(len(inputs.out)).tolist() for threshold in thresholds]
    distances = inputs.inner_scores.distance, inputs.outer_scores.distance
    with in_place(inputs.out) as targets:
        for index, block in blocks(targets, *inputs.lists[1:]):
            target, b, i, o, *scores = block
            assert target is not None
            size = target.numel()
            m_in = _mask(scores[0], scores[1], distances[0], limits[0][index], scratch, 8)
            m_out = _mask(scores[2], scores[3], distances[1], limits[1][index], scratch, 9)
            cases = _cases(m_in, m_out, scratch)
            counts += torch.stack([mask.sum() for mask in cases]).long()

            b, i, o = (scratch.float32(t, slot) for slot, t in enumerate((b, i, o)) if t is not None)
            tau_in = torch.sub(i, b, out=scratch(3, size))
            tau_out = torch.sub(o, i if rule.outer_from == "inner" else b, out=scratch(4, size))
            squared_norms[0] += _squared_norm(tau_in, scratch)
            squared_norms[1] += _squared_norm(tau_out, scratch)
            tau_in.mul_(_choose(cases, inner_weights, scratch))
            tau_out.mul_(_choose(cases, outer_weights, scratch))
            fused = tau_in.add_(b).add_(tau_out)
            # The update is measured after rounding, and before the store, because `b` may be the target.
            stored = scratch.float32(fused.to(target.dtype), 5)
            squared_norms[2] += _squared_norm(torch.sub(stored, b, out=scratch(4, size)), scratch)
            target.copy_(fused)
    return FuseStats(counts, squared_norms, thresholds)


def _mask(
    s: Tensor | None, u: Tensor | None, distance: bool, threshold: float, scratch: Scratch, slot: int
) -> Tensor:
    assert s is not None
    if threshold == -torch.inf:  # selects everything, including NaN
        return scratch(slot, s.numel()).fill_(1)
    score = block_score(s, u, distance, scratch, (5, 6, 7))
    # 0 and 1 in float32, because comparisons into bool, and torch.where, are several times slower on CPUs.
    return torch.gt(score, threshold, out=scratch(slot, s.numel()))


def _cases(m_in: Tensor, m_out: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks of 0 and 1 for inner only, outer only, both, neither; overwrites ``m_in`` and ``m_out``."""
    both = torch.mul(m_in, m_out, out=scratch(10, m_in.numel()))
    neither = torch.add(m_in, m_out, out=scratch(11, m_in.numel())).sub_(both).neg_().add_(1)
    return m_in.sub_(both), m_out.sub_(both), both, neither


def _choose(cases: Sequence[Tensor], weights: Sequence[float], scratch: Scratch) -> Tensor:
    """One weight per element: an exact sum, because all terms but one are zero."""
    chosen = scratch(5, cases[0].numel()).zero_()
    for mask, weight in zip(cases, weights, strict=True):
        if weight == 1:
            chosen.add_(mask)
        elif weight != 0:
            chosen.add_(torch.mul(mask, weight, out=scratch(6, mask.numel())))
    return chosen


def _squared_norm(vector: Tensor, scratch: Scratch) -> Tensor:
    wide = scratch(0, vector.numel(), torch.float64).copy_(vector)
    return torch.dot(wide, wide)

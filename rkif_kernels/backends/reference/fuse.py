"""The masked, weighted merge of two task vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from rkif_kernels.backends.reference.select import score_values
from rkif_kernels.numerics import float32
from rkif_kernels.types import FuseStats, FusionInputs, MergeRule


def fuse_(inputs: FusionInputs, thresholds: tuple[Tensor, Tensor], rule: MergeRule) -> FuseStats:
    """See :func:`rkif_kernels.ops.fuse_`."""
    counts = torch.zeros(4, dtype=torch.int64)
    squared_norms = torch.zeros(3, dtype=torch.float64)
    inner_values, outer_values = score_values(inputs.inner_scores), score_values(inputs.outer_scores)
    for index, target in enumerate(inputs.out):
        b, i, o = (row[index].float() for row in (inputs.base, inputs.inner, inputs.outer))
        t_in, t_out = (t[index if t.numel() > 1 else 0] for t in thresholds)
        m_in, m_out = inner_values[index] > t_in, outer_values[index] > t_out

        w_in, w_out = torch.empty_like(b), torch.empty_like(b)
        cases = (m_in & ~m_out, ~m_in & m_out, m_in & m_out, ~m_in & ~m_out)
        for case, (mask, (weight_in, weight_out)) in enumerate(zip(cases, rule.weights, strict=True)):
            w_in[mask], w_out[mask] = float32(weight_in), float32(weight_out)
            counts[case] += mask.sum()

        tau_in = i - b
        tau_out = o - (i if rule.outer_from == "inner" else b)
        fused = ((b + w_in * tau_in) + w_out * tau_out).to(target.dtype)
        update = fused.float() - b
        target.copy_(fused)
        squared_norms += torch.stack([v.double().square().sum() for v in (tau_in, tau_out, update)])
    return FuseStats(counts, squared_norms, thresholds)

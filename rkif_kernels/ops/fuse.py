"""The masked, weighted merge of two task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from rkif_kernels.backend import implementation, on_device
from rkif_kernels.checks import Arguments, require_choice, require_disjoint, require_weights
from rkif_kernels.types import CASES, Backend, CaseWeights, FuseStats, OuterFrom, Scores


def fuse_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    inner: Sequence[Tensor],
    outer: Sequence[Tensor],
    inner_scores: Scores,
    outer_scores: Scores,
    *,
    thresholds: tuple[Tensor, Tensor],
    weights: CaseWeights,
    outer_from: OuterFrom = "inner",
    names: Sequence[str] | None = None,
    backend: Backend = "auto",
) -> FuseStats:
    """Write ``(base + w_in*(inner - base)) + w_out*(outer - inner)`` into ``out``.

    The weights of an element follow from its two mask bits, ``score > threshold`` of either side. The
    arithmetic is float32, left to right as written, without fused multiply-add, and rounded once.

    Args:
        out: where the result goes; mutated. May be the very tensors of ``base``, ``inner`` or ``outer``.
        base, inner, outer: parameters before the round, after the inner and after the outer learner, of
            the same shapes; float32, bfloat16 or float16, also mixed.
        inner_scores, outer_scores: importance, of the same shapes.
        thresholds: (inner, outer) from :func:`score_thresholds`: float32 [1], or [len(out)] for one a tensor.
        weights: (w_in, w_out) for the cases inner only, outer only, both, neither.
        outer_from: "inner", or "base" for ``outer - base`` as the second task vector.
        names: parameter names, for error messages.
        backend: "auto", "triton" or "torch"; all give the same bits in ``out`` and in the counts.

    Returns:
        Counts of the four cases and the squared norms of the two task vectors and of ``out - base``.

    Raises:
        TypeError, ValueError: for tensors that do not fit together, or outputs that overlap each other or
            another parameter's input; nothing has been written then.
    """
    arguments = Arguments(names)
    inputs: dict[str, Sequence[Tensor]] = {
        "base": base,
        "inner": inner,
        "outer": outer,
        "inner_scores": inner_scores.sensitivity,
        "inner_scores.uncertainty": inner_scores.uncertainty or (),
        "outer_scores": outer_scores.sensitivity,
        "outer_scores.uncertainty": outer_scores.uncertainty or (),
    }
    arguments.add("out", out)
    for argument, tensors in inputs.items():
        if tensors or not argument.endswith("uncertainty"):
            arguments.add(argument, tensors)
    require_disjoint(arguments, out, inputs)
    for side, threshold in zip(("inner", "outer"), thresholds, strict=True):
        if threshold.dtype != torch.float32 or threshold.shape not in ((1,), (len(out),)):
            raise ValueError(
                f"the {side} threshold must be float32 [1] or [{len(out)}]; "
                f"got {threshold.dtype} {tuple(threshold.shape)}"
            )
    for case, pair in zip(CASES, weights, strict=True):
        require_weights(f"weights for {case!r}", pair)
    require_choice("outer_from", outer_from, get_args(OuterFrom))
    with torch.no_grad(), on_device(arguments.device):
        stats: FuseStats = implementation(arguments.device, backend).fuse_(
            out,
            base,
            inner,
            outer,
            inner_scores,
            outer_scores,
            thresholds=thresholds,
            weights=weights,
            outer_from=outer_from,
        )
    return stats

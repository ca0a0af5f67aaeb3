"""The masked, weighted merge of two task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from rkif_kernels.backends.choose import implementation, on_device
from rkif_kernels.checks import (
    Arguments,
    ValidatedLists,
    require_choice,
    require_disjoint,
    require_fraction,
    require_weights,
    require_writable,
)
from rkif_kernels.ops.select import order_statistic_k, thresholds_of
from rkif_kernels.profiling import profiled
from rkif_kernels.types import (
    CASES,
    Backend,
    CaseWeights,
    FuseStats,
    FusionInputs,
    MergeRule,
    OuterFrom,
    Scope,
    Scores,
)

_validated = ValidatedLists()


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

    An element's two mask bits, ``score > threshold`` of each learner, select its weights. The arithmetic is
    float32, from left to right, without fused multiply-add; the result is rounded once to the dtype of
    ``out``.

    Args:
        out: the result; mutated. May be the tensors of ``base``, ``inner`` or ``outer`` themselves.
        base, inner, outer: parameters before the round, after the inner and after the outer learner, of
            the same shapes; float32, bfloat16 or float16, also mixed.
        inner_scores, outer_scores: importance, of the same shapes.
        thresholds: (inner, outer) from :func:`score_thresholds`: float32 [1], or [len(out)], one per tensor.
        weights: (w_in, w_out) for the cases inner only, outer only, both, neither.
        outer_from: "inner", or "base" for ``outer - base`` as the second task vector.
        names: parameter names, for error messages.
        backend: "auto", "triton", "native" or "torch"; all give the same bits in ``out`` and in the counts.

    Returns:
        Counts of the four cases, the squared norms of the two task vectors and of ``out - base``, and the
        thresholds.

    Raises:
        TypeError, ValueError: for tensors that do not fit together, or outputs that overlap each other or
            another parameter's input; nothing has been written.
    """
    inputs = FusionInputs(out, base, inner, outer, inner_scores, outer_scores)
    rule = MergeRule(weights, outer_from)
    require_fusion(inputs, rule, names)
    device = inputs.device
    for side, threshold in zip(("inner", "outer"), thresholds, strict=True):
        right = threshold.dtype == torch.float32 and threshold.shape in ((1,), (len(out),))
        if not right or threshold.device != device:
            raise ValueError(
                f"the {side} threshold must be float32 [1] or [{len(out)}] on {device}; "
                f"got {threshold.dtype} {tuple(threshold.shape)} on {threshold.device}"
            )
    with profiled("rkif.fuse", device):
        return _fuse(inputs, thresholds, rule, backend)


def select_and_fuse_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    inner: Sequence[Tensor],
    outer: Sequence[Tensor],
    inner_scores: Scores,
    outer_scores: Scores,
    *,
    density: float,
    scope: Scope = "global",
    weights: CaseWeights,
    outer_from: OuterFrom = "inner",
    names: Sequence[str] | None = None,
    backend: Backend = "auto",
) -> FuseStats:
    """:func:`score_thresholds` for both learners and :func:`fuse_`, with fewer passes over memory.

    The Triton and native backends use one pass if each learner has one threshold, ``out`` shares no memory
    with the inputs, no scores are distances, and there are enough elements. Otherwise a separate pass finds
    the thresholds first.

    Args and Raises:
        As for the two functions. A call without elements raises ValueError.

    Returns:
        As :func:`fuse_`, with the thresholds that were found.
    """
    if torch.compiler.is_compiling():
        counts, squared_norms, *thresholds = torch.ops.rkif.select_and_fuse_(
            out, base, inner, outer,
            inner_scores.sensitivity, inner_scores.uncertainty or [], inner_scores.distance,
            outer_scores.sensitivity, outer_scores.uncertainty or [], outer_scores.distance,
            density, scope, [weight for pair in weights for weight in pair], outer_from, backend,
        )  # fmt: skip
        return FuseStats(counts, squared_norms, (thresholds[0], thresholds[1]))
    inputs = FusionInputs(out, base, inner, outer, inner_scores, outer_scores)
    rule = MergeRule(weights, outer_from)
    require_fusion(inputs, rule, names)
    require_selection(density, scope)
    with profiled("rkif.fuse", inputs.device):
        return select_and_fuse(inputs, rule, density, scope, backend)


def select_and_fuse(
    inputs: FusionInputs, rule: MergeRule, density: float, scope: Scope, backend: Backend
) -> FuseStats:
    """:func:`select_and_fuse_` with arguments that have been checked."""
    module = implementation(inputs.device, backend)
    if hasattr(module, "select_and_fuse_") and fits_one_pass(inputs, density, scope):
        with torch.no_grad(), on_device(inputs.device):
            stats: FuseStats = module.select_and_fuse_(inputs, order_statistic_k(inputs.numel, density), rule)
        return stats
    sides = (inputs.inner_scores, inputs.outer_scores)
    inner, outer = thresholds_of(sides, density, scope, backend)
    return _fuse(inputs, (inner, outer), rule, backend)


def fits_one_pass(inputs: FusionInputs, density: float, scope: Scope) -> bool:
    """Whether one pass can select and fuse. The pass may be repeated, so it must not overwrite an input."""
    if inputs.inner_scores.distance or inputs.outer_scores.distance or not 0 < density < 1:
        return False
    if scope != "global" or not inputs.numel:
        return False
    read = {tensor.data_ptr() for tensors in inputs.read.values() for tensor in tensors if tensor.numel()}
    return all(tensor.data_ptr() not in read for tensor in inputs.out)


def _fuse(
    inputs: FusionInputs, thresholds: tuple[Tensor, Tensor], rule: MergeRule, backend: Backend
) -> FuseStats:
    with torch.no_grad(), on_device(inputs.device):
        stats: FuseStats = implementation(inputs.device, backend).fuse_(
            inputs, (thresholds[0].contiguous(), thresholds[1].contiguous()), rule
        )
    return stats


def require_fusion(inputs: FusionInputs, rule: MergeRule, names: Sequence[str] | None) -> None:
    """Check the arguments that both fusions share."""
    arguments = Arguments(names)
    key = _validated.key(out=inputs.out, **inputs.read)
    if key not in _validated:
        arguments.add("out", inputs.out)
        for argument, tensors in inputs.read.items():
            arguments.add(argument, tensors)
        require_disjoint(arguments, inputs.out, inputs.read)
        require_writable(arguments, "out", inputs.out)
        _validated.add(key)
    for case, pair in zip(CASES, rule.weights, strict=True):
        require_weights(f"weights for {case!r}", pair)
    require_choice("outer_from", rule.outer_from, get_args(OuterFrom))


def require_selection(density: float, scope: Scope) -> None:
    """Check the settings of a selection."""
    require_fraction("density", density)
    require_choice("scope", scope, get_args(Scope))

"""Exact thresholds: the order statistic for a density, over all tensors or for each tensor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import get_args

import torch
from torch import Tensor

from rkif_kernels.backends.choose import implementation, on_device
from rkif_kernels.checks import (
    Arguments,
    ValidatedLists,
    require_choice,
    require_fraction,
    require_whole_number,
)
from rkif_kernels.profiling import profiled
from rkif_kernels.selection import sampled as order_statistics
from rkif_kernels.types import Backend, Scope, Scores

_validated = ValidatedLists()


@functools.lru_cache(maxsize=4096)  # computing a Fraction for each of hundreds of tensors takes long
def order_statistic_k(numel: int, density: float) -> int:
    """``floor((1 - density) * (numel - 1))``, exact for the decimal value of the density.

    The threshold is the ``k``-th smallest score, counted from 0. The density is read as a decimal fraction,
    because its float value has a rounding error, which could change the result of ``floor``.
    """
    return int((1 - Fraction(str(density))) * (numel - 1))


def all_valid_scores(
    tensors: Sequence[Tensor], *, names: Sequence[str] | None = None, backend: Backend = "auto"
) -> bool:
    """Whether no score is negative or NaN. Waits for the device, once.

    Raises:
        TypeError, ValueError: for tensors that do not fit together.
    """
    key = _validated.key(sensitivity=tensors)
    if key not in _validated:
        Arguments(names).add("scores", tensors)
        _validated.add(key)
    if not tensors:
        return True
    with torch.no_grad(), on_device(tensors[0].device):
        valid: bool = implementation(tensors[0].device, backend).all_valid(tensors)
    return valid


def count_scores_(
    counts: Tensor,
    scores: Scores,
    *,
    low: int,
    shift: int,
    names: Sequence[str] | None = None,
    backend: Backend = "auto",
) -> None:
    """Count scores in a window of keys, to select from more scores than fit on one device.

    A score's key is the bit pattern of its float32 value; keys are ordered like scores. A negative or NaN
    score counts as zero, with key 0. Counts of several calls add up, in any order.

    Args:
        counts: int64 [bins + 3], contiguous, on the scores' device; mutated. ``counts[0]`` counts the keys
            below ``low``, ``counts[1 + j]`` the ``1 << shift`` keys from ``low + (j << shift)`` on, and
            ``counts[1 + bins]`` the keys above the window. The last element counts invalid scores (negative,
            NaN or infinite), in addition to the other counts.
        scores: non-negative; float32, bfloat16 or float16, formed in float32.
        low: first key of the window, in [0, 2^31).
        shift: log2 of the keys in a bin, in [0, 31).
        names: parameter names, for error messages.
        backend: "auto", "triton", "native" or "torch"; all count the same.

    Raises:
        TypeError, ValueError: for arguments that do not fit together; nothing has been counted.
    """
    device = _require_scores(scores, names)
    if not scores.sensitivity:
        return
    right = counts.dtype == torch.int64 and counts.dim() == 1 and counts.numel() >= 4
    if not right or not counts.is_contiguous() or counts.device != device:
        raise ValueError(
            f"counts must be contiguous int64 of at least 4 elements on {device}; "
            f"got {counts.dtype} {tuple(counts.shape)} on {counts.device}"
        )
    if not 0 <= low < 2**31 or not 0 <= shift < 31:
        raise ValueError(f"low must be in [0, 2^31) and shift in [0, 31); got {low!r} and {shift!r}")
    with torch.no_grad(), on_device(device):
        implementation(device, backend).count_scores_(counts, scores, low=low, shift=shift)


def sample_scores(scores: Scores, step: int, *, names: Sequence[str] | None = None) -> Tensor:
    """Every ``step``-th score, counted through all tensors.

    Returns:
        float32 on the scores' device, empty without tensors; negative and NaN scores are not replaced.

    Raises:
        TypeError, ValueError: for tensors that do not fit together, or a step that is not a positive integer.
    """
    _require_scores(scores, names)
    require_whole_number("step", step, minimum=1)
    with torch.no_grad():
        return order_statistics.sample_scores(scores, step)


def score_thresholds(
    scores: Scores,
    *,
    density: float,
    scope: Scope = "global",
    names: Sequence[str] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The exact threshold above which the fraction ``density`` of the scores lies.

    The threshold of n scores is the ``k``-th smallest, counted from 0, with ``k = floor((1-density)*(n-1))``.
    The mask is ``score > threshold``. It excludes ties at the threshold, so it does not depend on the order
    or the splitting of the tensors. ``density=1`` gives -inf and ``density=0`` gives inf, without reading the
    scores.

    Args:
        scores: non-negative; float32, bfloat16 or float16, formed in float32. This is not checked: a negative
            or NaN score counts as zero.
        density: fraction to keep, in [0, 1].
        scope: "global" for one threshold over all tensors, "tensor" for one per tensor.
        names: parameter names, for error messages.
        backend: "auto", "triton", "native" or "torch"; all give the same bits.

    Returns:
        float32 [1], or [len(scores.sensitivity)] under scope="tensor" (inf for an empty tensor), on the
        device of the scores.

    Raises:
        TypeError, ValueError: for tensors that do not fit together, or if there is no score.
    """
    if torch.compiler.is_compiling():
        threshold: Tensor = torch.ops.rkif.score_thresholds(
            scores.sensitivity, scores.uncertainty or [], scores.distance, density, scope, backend
        )
        return threshold
    _require_scores(scores, names)
    require_fraction("density", density)
    require_choice("scope", scope, get_args(Scope))
    (threshold,) = thresholds_of([scores], density, scope, backend)
    return threshold


def thresholds_of(sides: Sequence[Scores], density: float, scope: Scope, backend: Backend) -> list[Tensor]:
    """:func:`score_thresholds` of one or two scores of the same tensors; all arguments were checked."""
    device = sides[0].device
    per_tensor = scope == "tensor"
    sizes = [tensor.numel() for tensor in sides[0].sensitivity]
    if sum(sizes) == 0:
        raise ValueError("sensitivity is empty: there is no threshold to find")

    groups = len(sizes) if per_tensor else 1
    thresholds = torch.full((groups,), torch.inf, dtype=torch.float32, device=device)
    if density in (0, 1):
        return [thresholds.clone().neg_() if density == 1 else thresholds.clone() for _ in sides]
    # An empty tensor has no order statistic, so it is left out.
    filled = [index for index, size in enumerate(sizes) if size > 0]
    ks = [
        order_statistic_k(numel, density)
        for numel in ([sizes[index] for index in filled] if per_tensor else [sum(sizes)])
    ]
    kth = _kth_scores([scores.subset(filled) for scores in sides], ks, scope, None, backend)
    if per_tensor and len(filled) < len(sizes):
        # Indexing would upload an index tensor, which a capture of a CUDA graph forbids.
        rests = [iter(torch.split(limits, 1)) for limits in kth]
        return [torch.cat([next(rest) if size else thresholds[:1] for size in sizes]) for rest in rests]
    return kth


def kth_scores(
    scores: Scores,
    *,
    ks: Sequence[int],
    scope: Scope = "global",
    names: Sequence[str] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The k-th smallest score, counted from 0: one of all scores, or one of each tensor.

    Args:
        scores, scope, names, backend: as for :func:`score_thresholds`; no tensor may be empty.
        ks: one ``k`` below the number of scores, or one for each tensor under scope="tensor".

    Returns:
        float32 [len(ks)] on the device of the scores.

    Raises:
        TypeError, ValueError: for tensors that do not fit together, or a ``k`` that is out of range.
    """
    require_choice("scope", scope, get_args(Scope))
    (kth,) = _kth_scores([scores], ks, scope, names, backend)
    return kth


def _kth_scores(
    sides: Sequence[Scores],
    ks: Sequence[int],
    scope: Scope,
    names: Sequence[str] | None,
    backend: Backend,
) -> list[Tensor]:
    """:func:`kth_scores` of one or two scores of the same tensors."""
    for scores in sides:
        _require_scores(scores, names)
    device, per_tensor = sides[0].device, scope == "tensor"
    sizes = [tensor.numel() for tensor in sides[0].sensitivity]
    groups = sizes if per_tensor else [sum(sizes)]
    if len(ks) != len(groups) or not all(0 <= r < size for r, size in zip(ks, groups, strict=True)):
        raise ValueError(f"ks must be {len(groups)}, each from 0 to below {groups[:3]}...; got {ks}")
    with torch.no_grad(), on_device(device), profiled("rkif.threshold", device):
        module = implementation(device, backend)
        if len(sides) == 2 and hasattr(module, "both_thresholds"):
            kth: list[Tensor] = module.both_thresholds(*sides, ks=ks, per_tensor=per_tensor)
        else:
            kth = [module.score_thresholds(scores, ks=ks, per_tensor=per_tensor) for scores in sides]
    return kth


def _require_scores(scores: Scores, names: Sequence[str] | None) -> torch.device:
    """Check that the tensors fit together; returns their device."""
    key = _validated.key(sensitivity=scores.sensitivity, uncertainty=scores.uncertainty)
    if key not in _validated:
        arguments = Arguments(names)
        arguments.add("sensitivity", scores.sensitivity)
        if scores.uncertainty is not None:
            arguments.add("uncertainty", scores.uncertainty)
        _validated.add(key)
    if scores.distance and scores.uncertainty is None:
        raise ValueError("scores that are distances need two lists")
    return scores.device

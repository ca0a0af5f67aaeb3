"""Baselines in PyTorch: the released arithmetic, as it is and accelerated, and other selection algorithms.

The release observes and fuses tensor by tensor, with a temporary for every step of a formula, a test for
NaN per tensor (on a GPU: a synchronisation) and a quantile of the concatenated scores. :func:`observe` and
:func:`fuse` do the same; the other versions use horizontally fused ``torch._foreach`` operations or
torch.compile. All compute in float32, as rkif's operations do; other storage dtypes are converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rkif_kernels import FusionInputs, Scores, order_statistic_k
from rkif_kernels.types import CaseWeights

T = TypeVar("T")
QUANTILE_LIMIT = 2**24  # elements: torch.quantile refuses more


def observe(*lists: list[Tensor], beta1: float, beta2: float) -> None:
    """The release's importance update: new state tensors replace the old ones in the lists."""
    params, grads, sensitivity, uncertainty = lists
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        importance = (param.float() * grad.float()).abs()
        if torch.isnan(importance).any():
            continue
        s, u = sensitivity[index], uncertainty[index]
        smoothed, spread = _smoothed(importance, s, u, beta1, beta2)
        sensitivity[index], uncertainty[index] = smoothed.to(s.dtype), spread.to(u.dtype)


def observe_foreach(*lists: list[Tensor], beta1: float, beta2: float) -> None:
    """One fused operation per step of the formula over all tensors, in place, without a test for NaN."""
    params, grads, sensitivity, uncertainty = lists
    s, u = _floats(sensitivity), _floats(uncertainty)
    importance = torch._foreach_mul(_floats(params), _floats(grads))
    torch._foreach_abs_(importance)
    torch._foreach_mul_(s, beta1)
    torch._foreach_add_(s, importance, alpha=1 - beta1)
    torch._foreach_sub_(importance, s)
    torch._foreach_abs_(importance)
    torch._foreach_mul_(u, beta2)
    torch._foreach_add_(u, importance, alpha=1 - beta2)
    _store(sensitivity, s)
    _store(uncertainty, u)


def fuse(*lists: Any, density: float, weights: CaseWeights) -> None:
    """The release's fusion: a quantile of each learner's scores, masks as floats, weights by case.

    ``lists`` are out, base, inner, outer, and the scores of each learner, as in every fusion here.
    """
    limits = [released_threshold(scores, density) for scores in lists[-2:]]
    for tensors in _by_tensor(FusionInputs(*lists)):
        _merge_one(*tensors, limits=limits, weights=weights)


def fuse_foreach(*lists: Any, density: float, weights: CaseWeights) -> None:
    """:func:`fuse` with one fused operation per step of the formula over all tensors."""
    out, base, inner, outer, inner_scores, outer_scores = lists
    m_in, m_out = (_masks_foreach(scores, density) for scores in (inner_scores, outer_scores))
    both = torch._foreach_mul(m_in, m_out)
    in_only, out_only = torch._foreach_sub(m_in, both), torch._foreach_sub(m_out, both)
    neither = torch._foreach_add(in_only, m_out)
    torch._foreach_neg_(neither)
    torch._foreach_add_(neither, 1.0)
    before, between, after = _floats(base), _floats(inner), _floats(outer)
    fused: tuple[Tensor, ...] | list[Tensor] = before
    for learner, vectors in enumerate(
        (torch._foreach_sub(between, before), torch._foreach_sub(after, between))
    ):
        (first, weight), *others = _needed((in_only, out_only, both, neither), weights, learner)
        total = torch._foreach_mul(first, weight)
        for masks, weight in others:
            torch._foreach_add_(total, masks, alpha=weight)
        fused = torch._foreach_add(fused, torch._foreach_mul(total, vectors))
    torch._foreach_copy_(list(out), fused)


def compiled_observe() -> Callable[..., None]:
    """The formulas of :func:`observe` through torch.compile, tensor by tensor, without the test for NaN.

    One compilation over all 160 tensors of an adapter would take most of a minute for each dtype.
    """
    observe_one = torch.compile(_observe_one, fullgraph=True, dynamic=False)

    def run(*lists: Sequence[Tensor], beta1: float, beta2: float) -> None:
        for tensors in zip(*lists, strict=True):
            observe_one(*tensors, beta1=beta1, beta2=beta2)

    return run


def compiled_fuse() -> Callable[..., None]:
    """:func:`fuse` with everything but the thresholds through torch.compile, tensor by tensor."""
    merge_one = torch.compile(_merge_one, fullgraph=True, dynamic=False)

    def run(*lists: Any, density: float, weights: CaseWeights) -> None:
        limits = [released_threshold(scores, density) for scores in lists[-2:]]
        for tensors in _by_tensor(FusionInputs(*lists)):
            merge_one(*tensors, limits=limits, weights=weights)

    return run


def released_threshold(scores: Scores, density: float) -> Tensor:
    """torch.quantile up to ``QUANTILE_LIMIT`` elements; beyond, the order statistic below the quantile."""
    values = all_scores(scores)
    if values.numel() <= QUANTILE_LIMIT:
        return torch.quantile(values, 1 - density)
    return values.kthvalue(order_statistic_k(values.numel(), density) + 1).values


def quantile(scores: Scores, density: float) -> Tensor:
    return torch.quantile(all_scores(scores), 1 - density)


def kthvalue(scores: Scores, density: float) -> Tensor:
    values = all_scores(scores)
    return values.kthvalue(order_statistic_k(values.numel(), density) + 1).values


def topk(scores: Scores, density: float) -> Tensor:
    values = all_scores(scores)
    above = values.numel() - order_statistic_k(values.numel(), density)
    return values.topk(above, sorted=False).values.min()


def sort(scores: Scores, density: float) -> Tensor:
    values = all_scores(scores)
    return values.sort().values[order_statistic_k(values.numel(), density)]


def numpy_partition(scores: Scores, density: float) -> Tensor:
    values = all_scores(scores).numpy()
    k = order_statistic_k(values.size, density)
    return torch.tensor(np.partition(values, k)[k])


def peft_merge(method: str) -> Callable[..., None]:
    """A merge of PEFT over the same two task vectors; it selects by magnitude in each tensor."""
    from peft.utils import merge_utils

    merge = getattr(merge_utils, method)

    def fuse_peft(
        out: Sequence[Tensor],
        base: Sequence[Tensor],
        inner: Sequence[Tensor],
        outer: Sequence[Tensor],
        *_: Scores,
        density: float,
        weights: CaseWeights,
    ) -> None:
        pair = torch.tensor(weights[2], device=base[0].device)
        for target, b, i, o in zip(out, base, inner, outer, strict=True):
            target.copy_(b.float() + merge([i.float() - b.float(), o.float() - i.float()], pair, density))

    return fuse_peft


def score_list(scores: Scores) -> list[Tensor]:
    """S*U of every tensor."""
    assert scores.uncertainty is not None
    return [s.float() * u.float() for s, u in zip(scores.sensitivity, scores.uncertainty, strict=True)]


def all_scores(scores: Scores) -> Tensor:
    """S*U of all tensors, concatenated."""
    return torch.cat([values.flatten() for values in score_list(scores)])


def _smoothed(importance: Tensor, s: Tensor, u: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    smoothed = beta1 * s.float() + (1 - beta1) * importance
    return smoothed, beta2 * u.float() + (1 - beta2) * (importance - smoothed).abs()


def _observe_one(param: Tensor, grad: Tensor, s: Tensor, u: Tensor, *, beta1: float, beta2: float) -> None:
    smoothed, spread = _smoothed((param.float() * grad.float()).abs(), s, u, beta1, beta2)
    s.copy_(smoothed)
    u.copy_(spread)


def _merge_one(
    target: Tensor,
    base: Tensor,
    inner: Tensor,
    outer: Tensor,
    inner_s: Tensor,
    inner_u: Tensor,
    outer_s: Tensor,
    outer_u: Tensor,
    *,
    limits: Sequence[Tensor],
    weights: CaseWeights,
) -> None:
    m_in = (inner_s.float() * inner_u.float() > limits[0]).float()
    m_out = (outer_s.float() * outer_u.float() > limits[1]).float()
    cases = (m_in * (1 - m_out), (1 - m_in) * m_out, m_in * m_out, (1 - m_in) * (1 - m_out))
    w_in, w_out = _weighted(cases, weights, 0), _weighted(cases, weights, 1)
    before, between, after = base.float(), inner.float(), outer.float()
    target.copy_(before + w_in * (between - before) + w_out * (after - between))


def _by_tensor(inputs: FusionInputs) -> Iterator[tuple[Tensor, ...]]:
    """Yield each parameter's tensors: out, base, inner, outer, and S and U of each learner."""
    rows: list[Any] = [row or () for row in inputs.lists]
    return zip(*rows, strict=True)


def _masks_foreach(scores: Scores, density: float) -> list[Tensor]:
    limit = released_threshold(scores, density)
    return [(values > limit).float() for values in score_list(scores)]


def _weighted(cases: Sequence[Tensor], weights: CaseWeights, learner: int) -> Tensor:
    """A learner's weight for every element."""
    (first, weight), *others = _needed(cases, weights, learner)
    total = first * weight
    for mask, weight in others:
        total = total + mask * weight
    return total


def _needed(cases: Sequence[T], weights: CaseWeights, learner: int) -> list[tuple[T, float]]:
    """The cases in which a learner's weight is not zero."""
    return [(case, pair[learner]) for case, pair in zip(cases, weights, strict=True) if pair[learner]]


def _floats(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Float32 tensors: themselves, or converted copies."""
    return [tensor.float() for tensor in tensors]


def _store(targets: list[Tensor], values: list[Tensor]) -> None:
    """Round into storage of another dtype; float32 tensors were updated in place."""
    if targets[0].dtype != torch.float32:
        torch._foreach_copy_(targets, values)

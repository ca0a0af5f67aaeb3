"""Task arithmetic: the weighted sum of two sparsified task vectors, with or without sign election."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rkif_kernels.backends.choose import implementation, on_device
from rkif_kernels.checks import (
    Arguments,
    require_disjoint,
    require_float32,
    require_weights,
    require_writable,
)
from rkif_kernels.profiling import profiled
from rkif_kernels.selection.draws import Draws
from rkif_kernels.types import Backend, FuseStats, TaskVectorInputs, TaskVectorRule


def merge_task_vectors_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    inner: Sequence[Tensor],
    outer: Sequence[Tensor],
    rule: TaskVectorRule,
    *,
    thresholds: Tensor | None = None,
    draws: Draws | None = None,
    scales: Tensor | None = None,
    names: Sequence[str] | None = None,
    backend: Backend = "auto",
) -> FuseStats:
    """Write ``base + factor * (w_in*tau_in + w_out*tau_out)`` into ``out``; ``tau = end - base``, sparsified.

    An element of a task vector is kept if its magnitude exceeds the threshold, or if it is drawn. A kept
    element is multiplied by the scale, then by the weight. With ``rule.consensus`` only elements that have
    the sign of the weighted sum are added; the sign of 0 is positive. The arithmetic is float32, from left to
    right, without fused multiply-add; the result is rounded once to the dtype of ``out``.

    Args:
        out: the result; mutated. May be the tensors of ``base``, ``inner`` or ``outer`` themselves.
        base, inner, outer: of the same shapes; float32, bfloat16 or float16, also mixed.
        rule: weights and factor, finite in float32, and whether signs are elected.
        thresholds: of inner and outer: float32 [2, 1], or [2, len(out)] with one per tensor. None keeps
            every element.
        draws: random drops of the tensors of ``out``, in order, which replace the thresholds.
        scales: of inner and outer: [2, len(out)]; 1 by default.
        names: parameter names, for error messages.
        backend: "auto", "native" or "torch"; "triton" runs the code of "torch". All give the same bits in
            ``out`` and in the counts.

    Returns:
        Counts of the elements that only inner, only outer, both or neither keeps, the squared norms of the
        two task vectors and of ``out - base``, and the thresholds.

    Raises:
        TypeError, ValueError: for tensors that do not fit together, a rule or draws that are not as
            described, or outputs that overlap each other or another parameter's input; nothing has been
            written.
    """
    arguments = Arguments(names)
    inputs = TaskVectorInputs(out, base, inner, outer)
    read = {"base": base, "inner": inner, "outer": outer}
    arguments.add("out", out)
    for argument, tensors in read.items():
        arguments.add(argument, tensors)
    require_disjoint(arguments, out, read)
    require_writable(arguments, "out", out)
    require_weights("rule.weight", rule.weight)
    require_float32("rule.factor", rule.factor)
    if draws is not None:
        _require_draws(draws, "out", out)
    limits = _rows("thresholds", thresholds, -torch.inf, len(out))
    factors = _rows("scales", scales, 1.0, len(out))
    device = inputs.device
    with torch.no_grad(), on_device(device), profiled("rkif.merge_task_vectors", device):
        stats: FuseStats = implementation(device, backend).merge_task_vectors_(
            inputs, rule, limits, factors, draws
        )
    return stats


def absolute_sums(
    base: Sequence[Tensor],
    inner: Sequence[Tensor],
    outer: Sequence[Tensor],
    draws: Draws,
    *,
    names: Sequence[str] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The L1 norms of task vectors, of all elements and of those that are drawn.

    Args:
        base, inner, outer, names, backend: as for :func:`merge_task_vectors_`.
        draws: the random drops of the tensors of ``base``, in order.

    Returns:
        float64 [2 (all, drawn), 2 (inner, outer), len(base)] on the CPU. The last bits depend on the backend.

    Raises:
        TypeError, ValueError: for tensors that do not fit together, or not one draw per tensor.
    """
    arguments = Arguments(names)
    for argument, tensors in {"base": base, "inner": inner, "outer": outer}.items():
        arguments.add(argument, tensors)
    _require_draws(draws, "base", base)
    device = arguments.device
    with torch.no_grad(), on_device(device):
        sums: Tensor = implementation(device, backend).absolute_sums(base, inner, outer, draws)
    return sums


def _require_draws(draws: Draws, argument: str, tensors: Sequence[Tensor]) -> None:
    if len(draws.names) != len(tensors):
        raise ValueError(f"draws has {len(draws.names)} names, {argument} has {len(tensors)} tensors")


def _rows(argument: str, rows: Tensor | None, default: float, tensors: int) -> Tensor:
    """float32 [2, tensors] on the CPU, contiguous."""
    if rows is None:
        return torch.full((2, tensors), default, dtype=torch.float32, device="cpu")
    if rows.shape not in ((2, 1), (2, tensors)):
        raise ValueError(f"{argument} must be [2, 1] or [2, {tensors}]; got {tuple(rows.shape)}")
    return rows.to("cpu", torch.float32).expand(2, tensors).contiguous()

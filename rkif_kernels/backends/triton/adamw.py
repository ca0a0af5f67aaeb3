"""AdamW, with the importance of the parameters updated in the same pass over memory."""

from __future__ import annotations

from contextlib import ExitStack

import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.choose import interpreting
from rkif_kernels.backends.triton.elements import kernel, lane_sums, load_float32, load_row, round_to
from rkif_kernels.backends.triton.importance import importance_of
from rkif_kernels.backends.triton.launch import STREAM, LaunchConfig
from rkif_kernels.backends.triton.table import ALIGNMENT, aligned, tables
from rkif_kernels.contiguous import in_place
from rkif_kernels.numerics import float32
from rkif_kernels.types import AdamWConstants, AdamWInputs, Order


@triton.jit
def _adamw_tile(
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    s_ptr,
    u_ptr,
    offsets,
    mask,
    decay,
    take1,
    keep2,
    take2,
    unbias2,
    eps,
    step_size,
    importance_keep1,
    importance_take1,
    importance_keep2,
    importance_take2,
    PARAM: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARE: tl.constexpr,
    SENSITIVITY: tl.constexpr,
    UNCERTAINTY: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Step one block; returns how many of its elements have a non-finite importance, in lanes."""
    # Loads before stores: a compiler does not move loads over stores that might alias.
    w = load_float32(w_ptr, offsets, mask)
    g = load_float32(g_ptr, offsets, mask)
    m = load_float32(m_ptr, offsets, mask)
    v = load_float32(v_ptr, offsets, mask)
    bad = tl.zeros((BLOCK // 4,), tl.int32)
    if SENSITIVITY is not None:
        s = load_float32(s_ptr, offsets, mask)
        importance = importance_of(w * g, ORDER)
        finite = importance < float("inf")
        new_s = importance_keep1 * s + importance_take1 * importance
        if UNCERTAINTY is not None:
            u = load_float32(u_ptr, offsets, mask)
            new_u = importance_keep2 * u + importance_take2 * tl.abs(importance - new_s)
            new_u = round_to(tl.where(finite, new_u, u), UNCERTAINTY, ROUND_BF16)
            tl.store(u_ptr + offsets, new_u, mask=mask)
        tl.store(s_ptr + offsets, round_to(tl.where(finite, new_s, s), SENSITIVITY, ROUND_BF16), mask=mask)
        bad = lane_sums((mask & (finite == 0)).to(tl.int32), BLOCK)

    m = m + take1 * (g - m)
    v = keep2 * v + take2 * g * g
    # The correctly rounded root and quotient: tl.sqrt and `/` are approximations on a GPU.
    w = decay * w - tl.div_rn(step_size * m, tl.sqrt_rn(v) * unbias2 + eps)
    tl.store(w_ptr + offsets, round_to(w, PARAM, ROUND_BF16), mask=mask)
    tl.store(m_ptr + offsets, round_to(m, MEAN, ROUND_BF16), mask=mask)
    tl.store(v_ptr + offsets, round_to(v, SQUARE, ROUND_BF16), mask=mask)
    return bad


@kernel
def _adamw_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    nonfinite_ptr,
    # Scalars
    n_tensors,
    decay,
    take1,
    keep2,
    take2,
    unbias2,
    eps,
    step_size,
    importance_keep1,
    importance_take1,
    importance_keep2,
    importance_take2,
    # Constexprs
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARE: tl.constexpr,
    SENSITIVITY: tl.constexpr,
    UNCERTAINTY: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Importance as in ``_update_importance_kernel``, then an AdamW step on the same w and g.

    SENSITIVITY and UNCERTAINTY are None where there is none. A program owns one chunk of one tensor. Float32:
    reads 24 bytes an element (w, g, m, v, S, U), writes 20 (w, m, v, S, U).
    """
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensors_ptr + program)
    start = tl.multiple_of(tl.load(chunk_starts_ptr + program), BLOCK)
    numel = tl.load(numels_ptr + tensor)
    w_ptr = load_row(pointers_ptr, 0, tensor, n_tensors, PARAM)
    g_ptr = load_row(pointers_ptr, 1, tensor, n_tensors, GRAD)
    m_ptr = load_row(pointers_ptr, 2, tensor, n_tensors, MEAN)
    v_ptr = load_row(pointers_ptr, 3, tensor, n_tensors, SQUARE)
    s_ptr = load_row(pointers_ptr, 4, tensor, n_tensors, SENSITIVITY)
    u_ptr = load_row(pointers_ptr, 5, tensor, n_tensors, UNCERTAINTY)

    bad = tl.zeros((BLOCK // 4,), tl.int32)
    for tile in range(TILES):
        first = start + tile * BLOCK
        offsets = first + tl.arange(0, BLOCK)
        # A mask that depends on the size would narrow every access to one element; only the tail has one.
        if first + BLOCK <= numel:
            mask = tl.zeros((BLOCK,), tl.int1) == 0
            bad += _adamw_tile(
                w_ptr, g_ptr, m_ptr, v_ptr, s_ptr, u_ptr, offsets, mask,
                decay, take1, keep2, take2, unbias2, eps, step_size,
                importance_keep1, importance_take1, importance_keep2, importance_take2,
                PARAM, MEAN, SQUARE, SENSITIVITY, UNCERTAINTY, ORDER, BLOCK, ROUND_BF16,
            )  # fmt: skip
        elif first < numel:
            bad += _adamw_tile(
                w_ptr, g_ptr, m_ptr, v_ptr, s_ptr, u_ptr, offsets, offsets < numel,
                decay, take1, keep2, take2, unbias2, eps, step_size,
                importance_keep1, importance_take1, importance_keep2, importance_take2,
                PARAM, MEAN, SQUARE, SENSITIVITY, UNCERTAINTY, ORDER, BLOCK, ROUND_BF16,
            )  # fmt: skip
    total = tl.sum(bad)
    if total > 0:
        tl.atomic_add(nonfinite_ptr, total.to(tl.int64), sem="relaxed")


def adamw_(
    inputs: AdamWInputs,
    constants: AdamWConstants,
    *,
    beta1: float,
    beta2: float,
    order: Order,
    nonfinite: Tensor,
    config: LaunchConfig = STREAM,
) -> None:
    """See :func:`rkif_kernels.ops.adamw_`."""
    written = (inputs.params, inputs.exp_avg, inputs.exp_avg_sq)
    states = (inputs.sensitivity or (), inputs.uncertainty or ())
    with ExitStack() as stack:
        w, m, v, s, u = (stack.enter_context(in_place(tensors, ALIGNMENT)) for tensors in (*written, *states))
        rows = aligned((w, inputs.grads, m, v, s or None, u or None))
        for table in tables(rows, config.chunk):
            _adamw_kernel[(table.programs,)](
                # Tensors
                **table.arguments,
                nonfinite_ptr=nonfinite,
                # Scalars
                **constants._asdict(),
                importance_keep1=float32(beta1),
                importance_take1=float32(1 - beta1),
                importance_keep2=float32(beta2),
                importance_take2=float32(1 - beta2),
                # Constexprs
                PARAM=table.dtypes[0],
                GRAD=table.dtypes[1],
                MEAN=table.dtypes[2],
                SQUARE=table.dtypes[3],
                SENSITIVITY=table.dtypes[4],
                UNCERTAINTY=table.dtypes[5],
                ORDER=order,
                BLOCK=config.block,
                TILES=config.tiles,
                ROUND_BF16=interpreting(),
                **config.options,
            )

"""AdamW, with the importance of the parameters updated in the same pass over memory."""

from __future__ import annotations

from contextlib import ExitStack

import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.choose import interpreting
from rkif_kernels.backends.triton.elements import (
    kernel,
    lane_sums,
    load_chunk,
    load_float32,
    load_row,
    round_to,
    tile_mask,
)
from rkif_kernels.backends.triton.importance import importance_of, smoothing
from rkif_kernels.backends.triton.launch import STREAM, LaunchConfig
from rkif_kernels.backends.triton.table import ALIGNMENT, aligned, tables
from rkif_kernels.contiguous import in_place
from rkif_kernels.types import AdamWConstants, AdamWInputs, Order


@triton.jit
def _adamw_tile(
    lists,
    first,
    numel,
    constants,
    averaging,
    FULL: tl.constexpr,
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
    w_ptr, g_ptr, m_ptr, v_ptr, s_ptr, u_ptr = lists
    decay, take1, keep2, take2, unbias2, eps, step_size = constants
    importance_keep1, importance_take1, importance_keep2, importance_take2 = averaging
    offsets = first + tl.arange(0, BLOCK)
    mask = tile_mask(offsets, numel, FULL)
    # All loads come before the first store, or the later ones would wait for memory once more.
    w = load_float32(w_ptr, offsets, mask)
    g = load_float32(g_ptr, offsets, mask)
    m = load_float32(m_ptr, offsets, mask)
    v = load_float32(v_ptr, offsets, mask)
    if SENSITIVITY is not None:
        s = load_float32(s_ptr, offsets, mask)
    if UNCERTAINTY is not None:
        u = load_float32(u_ptr, offsets, mask)

    bad = tl.zeros((BLOCK // 4,), tl.int32)
    if SENSITIVITY is not None:
        importance = importance_of(w * g, ORDER)
        finite = importance < float("inf")
        new_s = importance_keep1 * s + importance_take1 * importance
        tl.store(s_ptr + offsets, round_to(tl.where(finite, new_s, s), SENSITIVITY, ROUND_BF16), mask=mask)
        if UNCERTAINTY is not None:
            new_u = importance_keep2 * u + importance_take2 * tl.abs(importance - new_s)
            new_u = round_to(tl.where(finite, new_u, u), UNCERTAINTY, ROUND_BF16)
            tl.store(u_ptr + offsets, new_u, mask=mask)
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
    chunk = tl.program_id(0)
    tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK)
    lists = (
        load_row(pointers_ptr, 0, tensor, n_tensors, PARAM),
        load_row(pointers_ptr, 1, tensor, n_tensors, GRAD),
        load_row(pointers_ptr, 2, tensor, n_tensors, MEAN),
        load_row(pointers_ptr, 3, tensor, n_tensors, SQUARE),
        load_row(pointers_ptr, 4, tensor, n_tensors, SENSITIVITY),
        load_row(pointers_ptr, 5, tensor, n_tensors, UNCERTAINTY),
    )
    constants = (decay, take1, keep2, take2, unbias2, eps, step_size)
    averaging = (importance_keep1, importance_take1, importance_keep2, importance_take2)
    bad = tl.zeros((BLOCK // 4,), tl.int32)
    for tile in range(TILES):
        first = start + tile * BLOCK
        if first + BLOCK <= numel:
            bad += _adamw_tile(
                lists, first, numel, constants, averaging,
                True, PARAM, MEAN, SQUARE, SENSITIVITY, UNCERTAINTY, ORDER, BLOCK, ROUND_BF16,
            )  # fmt: skip
        elif first < numel:
            bad += _adamw_tile(
                lists, first, numel, constants, averaging,
                False, PARAM, MEAN, SQUARE, SENSITIVITY, UNCERTAINTY, ORDER, BLOCK, ROUND_BF16,
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
                **{f"importance_{name}": value for name, value in smoothing(beta1, beta2).items()},
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

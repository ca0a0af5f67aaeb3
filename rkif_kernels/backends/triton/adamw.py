"""AdamW, with the importance of the parameters updated in the same pass over memory."""

from __future__ import annotations

from contextlib import ExitStack

import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.triton.elements import (
    kernel,
    load_chunk,
    load_float32,
    load_row,
    round_to,
    tile_mask,
)
from rkif_kernels.backends.triton.importance import store_importance, update_arguments
from rkif_kernels.backends.triton.launch import LaunchConfig
from rkif_kernels.backends.triton.launches import chosen
from rkif_kernels.backends.triton.table import ALIGNMENT, aligned, tables
from rkif_kernels.contiguous import in_place
from rkif_kernels.types import AdamWConstants, AdamWInputs, Smoothing


@triton.jit
def _adamw_tile(
    lists,
    first,
    numel,
    constants,
    smoothing,
    FULL: tl.constexpr,
    DTYPES: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Step one block; returns how many of its elements have a non-finite importance, in lanes."""
    w_ptr, g_ptr, m_ptr, v_ptr, s_ptr, u_ptr = lists
    decay, take1, keep2, take2, unbias2, eps, step_size = constants
    offsets = first + tl.arange(0, BLOCK)
    mask = tile_mask(offsets, numel, FULL)
    # All loads precede the first store, because loads after it would wait for memory again.
    w = load_float32(w_ptr, offsets, mask)
    g = load_float32(g_ptr, offsets, mask)
    m = load_float32(m_ptr, offsets, mask)
    v = load_float32(v_ptr, offsets, mask)
    s = w
    if DTYPES[4] is not None:
        s = load_float32(s_ptr, offsets, mask)
    u = s
    if DTYPES[5] is not None:
        u = load_float32(u_ptr, offsets, mask)

    bad = tl.zeros((BLOCK // 4,), tl.int32)
    if DTYPES[4] is not None:
        bad = store_importance(
            w * g, s, u, s_ptr + offsets, u_ptr + offsets, mask, smoothing,
            DTYPES, 4, ORDER, BLOCK, ROUND_BF16,
        )  # fmt: skip

    m = m + take1 * (g - m)
    v = keep2 * v + take2 * g * g
    # The correctly rounded root and quotient: tl.sqrt and `/` are approximations on a GPU.
    w = decay * w - tl.div_rn(step_size * m, tl.sqrt_rn(v) * unbias2 + eps)
    tl.store(w_ptr + offsets, round_to(w, DTYPES, 0, ROUND_BF16), mask=mask)
    tl.store(m_ptr + offsets, round_to(m, DTYPES, 2, ROUND_BF16), mask=mask)
    tl.store(v_ptr + offsets, round_to(v, DTYPES, 3, ROUND_BF16), mask=mask)
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
    constants,
    smoothing,
    # Constexprs
    DTYPES: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Importance as in ``_update_importance_kernel``, then an AdamW step on the same w and g.

    DTYPES are those of w, g, m, v, S and U; None for a missing S or U. A program owns one chunk of one
    tensor. Float32: reads 24 bytes per element (w, g, m, v, S, U), writes 20 (w, m, v, S, U).
    """
    chunk = tl.program_id(0)
    tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK)
    lists = (
        load_row(pointers_ptr, 0, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 1, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 2, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 3, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 4, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 5, tensor, n_tensors, DTYPES),
    )
    bad = tl.zeros((BLOCK // 4,), tl.int32)
    for tile in range(TILES):
        first = start + tile * BLOCK
        if first + BLOCK <= numel:
            bad += _adamw_tile(
                lists, first, numel, constants, smoothing, True, DTYPES, ORDER, BLOCK, ROUND_BF16
            )  # fmt: skip
        elif first < numel:
            bad += _adamw_tile(
                lists, first, numel, constants, smoothing, False, DTYPES, ORDER, BLOCK, ROUND_BF16
            )  # fmt: skip
    total = tl.sum(bad)
    if total > 0:
        tl.atomic_add(nonfinite_ptr, total.to(tl.int64), sem="relaxed")


def adamw_(
    inputs: AdamWInputs,
    constants: AdamWConstants,
    smoothing: Smoothing,
    nonfinite: Tensor,
    config: LaunchConfig | None = None,
) -> None:
    """See :func:`rkif_kernels.ops.adamw_`."""
    config = config or chosen("adamw", inputs.lists, inputs.numel).launch
    written = (inputs.params, inputs.exp_avg, inputs.exp_avg_sq)
    states = (inputs.sensitivity or (), inputs.uncertainty or ())
    with ExitStack() as stack:
        w, m, v, s, u = (stack.enter_context(in_place(tensors, ALIGNMENT)) for tensors in (*written, *states))
        rows = aligned((w, inputs.grads, m, v, s or None, u or None))
        for table in tables(rows, config.chunk):
            _adamw_kernel[(table.programs,)](
                **update_arguments(table, smoothing.order, nonfinite, config),
                constants=tuple(constants),
                smoothing=smoothing.factors,
                **config.options,
            )

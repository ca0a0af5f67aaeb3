"""Importance of parameters, smoothed over steps."""

from __future__ import annotations

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
from rkif_kernels.backends.triton.launch import LaunchConfig, PreparedLaunch
from rkif_kernels.backends.triton.launches import chosen
from rkif_kernels.backends.triton.table import ALIGNMENT, Table, aligned, tables
from rkif_kernels.contiguous import in_place
from rkif_kernels.types import ImportanceInputs, Order, Smoothing


@triton.jit
def store_importance(
    product,
    s,
    u,
    s_ptr,
    u_ptr,
    mask,
    smoothing,
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Smooth the importance of ``product``, w*g, into S and U of a block: roles ROLE and ROLE + 1.

    Returns the number of elements whose importance is not finite, in lanes.
    """
    keep1, take1, keep2, take2 = smoothing
    if ORDER == "first":
        importance = tl.abs(product)
    elif ORDER == "second":
        importance = product * product
    else:
        importance = tl.abs(product - product * product * 0.5)
    finite = importance < float("inf")
    # If the importance is not finite, the old value is stored again, because a mask would narrow the store.
    new_s = keep1 * s + take1 * importance
    tl.store(s_ptr, round_to(tl.where(finite, new_s, s), DTYPES, ROLE, ROUND_BF16), mask=mask)
    if DTYPES[ROLE + 1] is not None:
        new_u = keep2 * u + take2 * tl.abs(importance - new_s)
        tl.store(u_ptr, round_to(tl.where(finite, new_u, u), DTYPES, ROLE + 1, ROUND_BF16), mask=mask)
    return lane_sums((mask & (finite == 0)).to(tl.int32), BLOCK)


@triton.jit
def _update_tile(
    lists,
    first,
    numel,
    smoothing,
    FULL: tl.constexpr,
    DTYPES: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Update one block; returns how many of its elements have a non-finite importance, in lanes."""
    w_ptr, g_ptr, s_ptr, u_ptr = lists
    offsets = first + tl.arange(0, BLOCK)
    mask = tile_mask(offsets, numel, FULL)
    # All loads precede the first store, because loads after it would wait for memory again.
    product = load_float32(w_ptr, offsets, mask)
    if DTYPES[1] is None:
        product *= 0.0
    else:
        product *= load_float32(g_ptr, offsets, mask)
    s = load_float32(s_ptr, offsets, mask)
    u = s
    if DTYPES[3] is not None:
        u = load_float32(u_ptr, offsets, mask)
    return store_importance(
        product, s, u, s_ptr + offsets, u_ptr + offsets, mask, smoothing,
        DTYPES, 2, ORDER, BLOCK, ROUND_BF16,
    )  # fmt: skip


@kernel
def _update_importance_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    nonfinite_ptr,
    # Scalars
    n_tensors,
    smoothing,
    # Constexprs
    DTYPES: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """I = |w*g| (or a second-order form); S <- b1*S + (1-b1)*I; U <- b2*U + (1-b2)*|I - S|.

    DTYPES are those of w, g, S and U; None for a missing g, which counts as zero, or a missing U. A program
    owns one chunk of one tensor. Float32: reads 16 bytes per element (w, g, S, U), writes 8 (S, U).
    """
    chunk = tl.program_id(0)
    tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK)
    lists = (
        load_row(pointers_ptr, 0, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 1, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 2, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 3, tensor, n_tensors, DTYPES),
    )
    bad = tl.zeros((BLOCK // 4,), tl.int32)
    for tile in range(TILES):
        first = start + tile * BLOCK
        if first + BLOCK <= numel:
            bad += _update_tile(
                lists, first, numel, smoothing, True, DTYPES, ORDER, BLOCK, ROUND_BF16
            )  # fmt: skip
        elif first < numel:
            bad += _update_tile(
                lists, first, numel, smoothing, False, DTYPES, ORDER, BLOCK, ROUND_BF16
            )  # fmt: skip
    total = tl.sum(bad)
    if total > 0:
        tl.atomic_add(nonfinite_ptr, total.to(tl.int64), sem="relaxed")


def update_importance_(
    inputs: ImportanceInputs, smoothing: Smoothing, nonfinite: Tensor, config: LaunchConfig | None = None
) -> None:
    """See :func:`rkif_kernels.ops.update_importance_`."""
    config = config or chosen("observe", inputs.lists, inputs.numel).launch
    written = in_place(inputs.sensitivity, ALIGNMENT), in_place(inputs.uncertainty or (), ALIGNMENT)
    with written[0] as s, written[1] as u:
        rows = aligned((inputs.params, inputs.grads, s, u or None))
        for table in tables(rows, config.chunk):
            _update_importance_kernel[(table.programs,)](
                **update_arguments(table, smoothing.order, nonfinite, config),
                smoothing=smoothing.factors,
                **config.options,
            )


def prepare_update(table: Table, order: Order, nonfinite: Tensor, config: LaunchConfig) -> PreparedLaunch:
    """The launch for one table; each call passes the factors as ``smoothing``."""
    arguments = update_arguments(table, order, nonfinite, config)
    return PreparedLaunch(_update_importance_kernel, table.programs, arguments, config.options)


def update_arguments(
    table: Table, order: Order, nonfinite: Tensor, config: LaunchConfig
) -> dict[str, object]:
    """The arguments for one table without ``smoothing``; the kernel of AdamW has them, too."""
    return {
        # Tensors
        **table.arguments,
        "nonfinite_ptr": nonfinite,
        # Constexprs
        "DTYPES": table.dtypes,
        "ORDER": order,
        "BLOCK": config.block,
        "TILES": config.tiles,
        "ROUND_BF16": interpreting(),
    }

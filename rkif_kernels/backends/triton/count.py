"""Counting scores in a window of keys, and counting invalid scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.triton.elements import (
    kernel,
    lane_sums,
    load_chunk,
    load_float32,
    load_raw_score,
    load_row,
    tile_mask,
)
from rkif_kernels.backends.triton.launch import LaunchConfig
from rkif_kernels.backends.triton.launches import chosen
from rkif_kernels.backends.triton.table import aligned, tables
from rkif_kernels.types import Scores


@kernel
def _count_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    counts_ptr,
    # Scalars
    n_tensors,
    low,
    shift,
    bins,
    # Constexprs
    DTYPES: tl.constexpr,
    DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Count the scores below a window of keys, in each of its bins, above it, and the invalid scores.

    A program owns one chunk of one tensor. Float32: reads 8 bytes per element (S, U). Only scores inside the
    window, a few per cent, need an atomic addition each.
    """
    chunk = tl.program_id(0)
    tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK)
    s_ptr = load_row(pointers_ptr, 0, tensor, n_tensors, DTYPES)
    u_ptr = load_row(pointers_ptr, 1, tensor, n_tensors, DTYPES)
    below = tl.zeros((BLOCK // 4,), tl.int32)
    beyond = tl.zeros((BLOCK // 4,), tl.int32)
    invalid = tl.zeros((BLOCK // 4,), tl.int32)
    for tile in range(TILES):
        first = start + tile * BLOCK
        offsets = first + tl.arange(0, BLOCK)
        if first < numel:
            mask = tile_mask(offsets, numel, False)
            if first + BLOCK <= numel:
                full = tile_mask(offsets, numel, True)
                score = load_raw_score(s_ptr, u_ptr, offsets, full, DTYPES[1] is not None, DISTANCE)
            else:
                score = load_raw_score(s_ptr, u_ptr, offsets, mask, DTYPES[1] is not None, DISTANCE)
            valid = (score >= 0) & (score < float("inf"))
            invalid += lane_sums((mask & (valid == 0)).to(tl.int32), BLOCK)
            score = tl.where(score > 0, score, 0.0)
            distance = score.to(tl.int32, bitcast=True) - low
            place = distance >> shift
            inside = mask & (distance >= 0) & (place < bins)
            tl.atomic_add(counts_ptr + 1 + place, (place * 0 + 1).to(tl.int64), mask=inside, sem="relaxed")
            below += lane_sums((mask & (distance < 0)).to(tl.int32), BLOCK)
            beyond += lane_sums((mask & (place >= bins)).to(tl.int32), BLOCK)
    tl.atomic_add(counts_ptr, tl.sum(below).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + bins + 1, tl.sum(beyond).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + bins + 2, tl.sum(invalid).to(tl.int64), sem="relaxed")


def count_scores_(
    counts: Tensor, scores: Scores, *, low: int, shift: int, config: LaunchConfig | None = None
) -> None:
    """See :func:`rkif_kernels.ops.count_scores_`."""
    lists = scores.sensitivity, scores.uncertainty
    config = config or chosen("count", lists, scores.numel).launch
    rows = aligned(lists)
    for table in tables(rows, config.chunk):
        _count_kernel[(table.programs,)](
            # Tensors
            **table.arguments,
            counts_ptr=counts,
            # Scalars
            low=low,
            shift=shift,
            bins=counts.numel() - 3,
            # Constexprs
            DTYPES=table.dtypes,
            DISTANCE=scores.distance,
            BLOCK=config.block,
            TILES=config.tiles,
            **config.options,
        )


@kernel
def _invalid_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    invalid_ptr,
    # Scalars
    n_tensors,
    # Constexprs
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Count the values that are negative or NaN. Float32: reads 4 bytes per element."""
    chunk = tl.program_id(0)
    tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK)
    row_ptr = load_row(pointers_ptr, 0, tensor, n_tensors, DTYPES)
    invalid = tl.zeros((BLOCK // 4,), tl.int32)
    for tile in range(TILES):
        first = start + tile * BLOCK
        offsets = first + tl.arange(0, BLOCK)
        if first + BLOCK <= numel:
            values = load_float32(row_ptr, offsets, tile_mask(offsets, numel, True))
            invalid += lane_sums((values >= 0).to(tl.int32) ^ 1, BLOCK)
        elif first < numel:
            values = load_float32(row_ptr, offsets, tile_mask(offsets, numel, False))
            invalid += lane_sums((values >= 0).to(tl.int32) ^ 1, BLOCK)
    total = tl.sum(invalid)
    if total > 0:
        tl.atomic_add(invalid_ptr, total.to(tl.int64), sem="relaxed")


def all_valid(tensors: Sequence[Tensor], config: LaunchConfig | None = None) -> bool:
    """See :func:`rkif_kernels.ops.all_valid_scores`."""
    config = config or chosen("valid", (tensors,), sum(map(Tensor.numel, tensors))).launch
    invalid = torch.zeros(1, dtype=torch.int64, device=tensors[0].device)
    rows = aligned((tensors,))
    for table in tables(rows, config.chunk):
        _invalid_kernel[(table.programs,)](
            # Tensors
            **table.arguments,
            invalid_ptr=invalid,
            # Constexprs
            DTYPES=table.dtypes,
            BLOCK=config.block,
            TILES=config.tiles,
            **config.options,
        )
    return int(invalid) == 0

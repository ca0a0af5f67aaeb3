"""An exact order statistic by radix selection on the bit pattern: four histogram passes, no sorting.

A positive float32 has 31 significant bits, and patterns are ordered like values. The digits are 8, 8, 8 and 7
bits wide. Each pass counts one digit of the scores that share the digits found so far, and picks the next
digit. The host does not wait for a result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.triton.elements import (
    kernel,
    load_chunk,
    load_row,
    load_score,
    tile_mask,
)
from rkif_kernels.backends.triton.launch import LaunchConfig
from rkif_kernels.backends.triton.launches import chosen
from rkif_kernels.backends.triton.table import aligned, constant, keep_for_graph, tables
from rkif_kernels.types import Scores

# (shift, bits), most significant first. For a histogram of 2,048 bins Triton emits 512 population counts and
# 64 additions to shared memory per thread and tile, which take much longer than the reads. 256 bins need an
# eighth of that, about the time of the reads, so four passes with 256 bins cost less than three with 2,048.
DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))


@triton.jit
def _count_digits(score, mask, prefix, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The histogram of a digit of the scores whose higher bits equal the prefix."""
    key = score.to(tl.int32, bitcast=True)
    wanted = mask & ((key >> (SHIFT + BITS)) == prefix)
    digit = (key >> SHIFT) & ((1 << BITS) - 1)
    return tl.histogram(digit, 1 << BITS, mask=wanted)


@kernel
def _histogram_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    prefix_ptr,
    histogram_ptr,
    # Scalars
    n_tensors,
    # Constexprs
    DTYPES: tl.constexpr,
    DISTANCE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Count the digit at SHIFT of all scores whose higher bits equal the prefix.

    A program owns one chunk of one tensor. Float32: reads 8 bytes per element (S, U).
    """
    tensor, start, numel = load_chunk(
        numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, tl.program_id(0), BLOCK
    )
    prefix = tl.load(prefix_ptr)
    s_ptr = load_row(pointers_ptr, 0, tensor, n_tensors, DTYPES)
    u_ptr = load_row(pointers_ptr, 1, tensor, n_tensors, DTYPES)

    BINS: tl.constexpr = 1 << BITS
    histogram = tl.zeros((BINS,), tl.int32)
    for tile in range(TILES):
        first = start + tile * BLOCK
        offsets = first + tl.arange(0, BLOCK)
        if first + BLOCK <= numel:
            mask = tile_mask(offsets, numel, True)
            score = load_score(s_ptr, u_ptr, offsets, mask, DTYPES[1] is not None, DISTANCE)
            histogram += _count_digits(score, mask, prefix, SHIFT, BITS)
        elif first < numel:
            mask = tile_mask(offsets, numel, False)
            score = load_score(s_ptr, u_ptr, offsets, mask, DTYPES[1] is not None, DISTANCE)
            histogram += _count_digits(score, mask, prefix, SHIFT, BITS)
    bins = histogram_ptr + tl.arange(0, BINS)
    tl.atomic_add(bins, histogram.to(tl.int64), mask=histogram > 0, sem="relaxed")


@kernel
def _pick_kernel(
    # Tensors
    histogram_ptr,
    remaining_ptr,
    prefix_ptr,
    found_ptr,
    # Constexprs
    BITS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Pick the digit of the k-th remaining score; after the last, store it. One program."""
    remaining = tl.load(remaining_ptr)
    BINS: tl.constexpr = 1 << BITS
    bins = tl.arange(0, BINS)
    histogram = tl.load(histogram_ptr + bins)
    digit = tl.sum((tl.cumsum(histogram) <= remaining).to(tl.int32))
    prefix = (tl.load(prefix_ptr) << BITS) | digit
    tl.store(remaining_ptr, remaining - tl.sum(tl.where(bins < digit, histogram, 0)))
    tl.store(prefix_ptr, prefix)
    if LAST:
        tl.store(found_ptr, prefix.to(tl.float32, bitcast=True))


def radix_threshold(scores: Scores, k: int, config: LaunchConfig | None = None) -> Tensor:
    """The ``k``-th smallest score of all tensors, counted from 0; float32 [1]."""
    lists = scores.sensitivity, scores.uncertainty
    config = config or chosen("radix", lists, scores.numel).launch
    device = scores.sensitivity[0].device
    rows = aligned(lists)  # keeps copies until the last launch
    grouped = tables(rows, config.chunk)
    start = constant(device, (k,), torch.int64)
    keep_for_graph(start, [[grouped[0].pointers]])
    remaining = start.clone()
    prefix = torch.zeros(1, dtype=torch.int32, device=device)
    threshold = torch.empty(1, dtype=torch.float32, device=device)
    sizes = [1 << bits for _, bits in DIGITS]
    memory = torch.zeros(sum(sizes), dtype=torch.int64, device=device).split(sizes)
    for (shift, bits), histogram in zip(DIGITS, memory, strict=True):
        for table in grouped:
            _histogram_kernel[(table.programs,)](
                # Tensors
                **table.arguments,
                prefix_ptr=prefix,
                histogram_ptr=histogram,
                # Constexprs
                DTYPES=table.dtypes,
                DISTANCE=scores.distance,
                SHIFT=shift,
                BITS=bits,
                BLOCK=config.block,
                TILES=config.tiles,
                **config.options,
            )
        _pick_kernel[(1,)](
            histogram_ptr=histogram,
            remaining_ptr=remaining,
            prefix_ptr=prefix,
            found_ptr=threshold,
            BITS=bits,
            LAST=shift == 0,
            **config.options,
        )
    return threshold

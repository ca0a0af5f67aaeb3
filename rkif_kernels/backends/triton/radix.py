"""Exact order statistics by radix selection on the bit pattern: four histogram passes, no sorting.

A positive float32 has 31 significant bits, and patterns order like values. The digits are 8, 8, 8 and 7 bits
wide. Each pass counts one digit of the scores that share the digits found so far, and picks the next digit.
The host does not wait for a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.triton.elements import (
    kernel,
    load_row,
    load_score,
    tile_mask,
)
from rkif_kernels.backends.triton.launch import LaunchConfig
from rkif_kernels.backends.triton.launches import chosen
from rkif_kernels.backends.triton.table import aligned, constant, tables
from rkif_kernels.types import Scores

# (shift, bits), most significant first. For a histogram of 2,048 bins Triton emits 512 population counts and
# 64 additions to shared memory per thread and tile, which take much longer than the reads. 256 bins need an
# eighth of that, about the time of the reads, so four passes with 256 bins cost less than three with 2,048.
DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))


@triton.jit
def _count_digits(score, mask, prefix, SHIFT: tl.constexpr, BITS: tl.constexpr):
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
    indices_ptr,
    remaining_ptr,
    prefixes_ptr,
    histograms_ptr,
    # Scalars
    n_tensors,
    groups_a_tensor,
    # Constexprs
    DTYPES: tl.constexpr,
    DISTANCE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Count the digit at SHIFT of all scores whose higher bits equal their group's prefix.

    A program owns one chunk of one tensor. Float32: reads 8 bytes per element (S, U). A group with a negative
    remaining k is done, and reads nothing.
    """
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensors_ptr + program)
    group = groups_a_tensor * tl.load(indices_ptr + tensor)
    if tl.load(remaining_ptr + group) >= 0:
        start = tl.multiple_of(tl.load(chunk_starts_ptr + program), BLOCK)
        numel = tl.load(numels_ptr + tensor)
        prefix = tl.load(prefixes_ptr + group)
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
        bins = histograms_ptr + group.to(tl.int64) * BINS + tl.arange(0, BINS)
        tl.atomic_add(bins, histogram.to(tl.int64), mask=histogram > 0, sem="relaxed")


@kernel
def _pick_kernel(
    # Tensors
    histograms_ptr,
    remaining_ptr,
    prefixes_ptr,
    found_ptr,
    # Constexprs
    BITS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Pick the digit of the k-th remaining score; after the last, store it. One program per group."""
    group = tl.program_id(0)
    remaining = tl.load(remaining_ptr + group)
    if remaining >= 0:
        BINS: tl.constexpr = 1 << BITS
        bins = tl.arange(0, BINS)
        histogram = tl.load(histograms_ptr + group.to(tl.int64) * BINS + bins)
        digit = tl.sum((tl.cumsum(histogram) <= remaining).to(tl.int32))
        prefix = (tl.load(prefixes_ptr + group) << BITS) | digit
        tl.store(remaining_ptr + group, remaining - tl.sum(tl.where(bins < digit, histogram, 0)))
        tl.store(prefixes_ptr + group, prefix)
        if LAST:
            tl.store(found_ptr + group, prefix.to(tl.float32, bitcast=True))


def _radix_select(remaining: Tensor, found: Tensor, config: LaunchConfig, count: Callable[..., None]) -> None:
    """Find one order statistic per group.

    Args:
        remaining: int64 [groups], k of each group, from 0; mutated. Groups with a negative k are skipped.
        found: float32 [groups], the order statistics; mutated.
        count: launches the histogram kernels of one digit.
    """
    groups = remaining.numel()
    prefixes = torch.zeros_like(remaining, dtype=torch.int32)
    bins = sum(1 << bits for _, bits in DIGITS)
    memory = torch.zeros(groups * bins, dtype=torch.int64, device=remaining.device)
    for (shift, bits), histograms in zip(
        DIGITS, memory.split([groups << bits for _, bits in DIGITS]), strict=True
    ):
        count(remaining, prefixes, histograms, SHIFT=shift, BITS=bits)
        _pick_kernel[(groups,)](
            histograms_ptr=histograms,
            remaining_ptr=remaining,
            prefixes_ptr=prefixes,
            found_ptr=found,
            BITS=bits,
            LAST=shift == 0,
            **config.options,
        )


def radix_thresholds(
    scores: Scores, *, ks: Sequence[int], per_tensor: bool, config: LaunchConfig | None = None
) -> Tensor:
    """See :func:`rkif_kernels.ops.score_thresholds`; one ``k`` for each group, from 0."""
    lists = scores.sensitivity, scores.uncertainty
    config = config or chosen("radix", lists, scores.numel).launch
    device = scores.sensitivity[0].device
    rows = aligned(lists)
    grouped = tables(rows, config.chunk)

    def count(remaining: Tensor, prefixes: Tensor, histograms: Tensor, **digit: int) -> None:
        for table in grouped:
            _histogram_kernel[(table.programs,)](
                # Tensors
                **table.arguments,
                indices_ptr=table.indices,
                remaining_ptr=remaining,
                prefixes_ptr=prefixes,
                histograms_ptr=histograms,
                # Scalars
                groups_a_tensor=int(per_tensor),
                # Constexprs
                DTYPES=table.dtypes,
                DISTANCE=scores.distance,
                BLOCK=config.block,
                TILES=config.tiles,
                **digit,
                **config.options,
            )

    thresholds = torch.empty(len(ks), dtype=torch.float32, device=device)
    _radix_select(constant(device, tuple(ks), torch.int64).clone(), thresholds, config, count)
    return thresholds

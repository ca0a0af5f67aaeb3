"""Brackets around an order statistic, from a sample: two launches that do not wait for the host.

A first sample of a few thousand scores gives a window of keys around the order statistic. A second sample, of
up to millions of scores, is only counted: below the window, and in the window's bins. The bracket consists of
the bins in which the order statistic very probably lies. Each end of the window is counted separately, so
that many ties there (mostly zeros) are decided exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl

from rkif_kernels.backends.triton.elements import find_tensor, gather_float32, kernel
from rkif_kernels.backends.triton.launch import Bracketing, LaunchConfig, PreparedLaunch, capped_grid
from rkif_kernels.backends.triton.table import Table
from rkif_kernels.backends.triton.windows import (
    ALL_BINS,
    BINS,
    BRACKETS,
    COUNT_STEP,
    LARGEST_KEY,
    SAMPLE_STEP,
    SAMPLED,
    SEARCHES,
    bin_bits,
    last_program,
)


@triton.jit
def _hashed(cells):
    """32 pseudo-random bits per cell; equal distances could coincide with a pattern in the scores."""
    bits = cells.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return (bits ^ (bits >> 16)).to(tl.int64)


@triton.jit
def _gather_key(
    pointers_ptr,
    tensors,
    n_tensors,
    offsets,
    mask,
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    DISTANCE: tl.constexpr,
):
    """The keys of single scores of many tensors."""
    score = gather_float32(pointers_ptr, ROLE, tensors, n_tensors, offsets, mask, DTYPES)
    if DTYPES[ROLE + 1] is not None:
        other = gather_float32(pointers_ptr, ROLE + 1, tensors, n_tensors, offsets, mask, DTYPES)
        score = tl.abs(score - other) if DISTANCE else score * other
    return tl.where(score > 0, score, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _cell_elements(firsts_ptr, n_tensors, start, numel, stride, first_cell, cells, places, RUN: tl.constexpr):
    """The sampled elements (tensors, offsets, mask): RUN neighbours from each cell of ``stride`` elements.

    A run starts at a hashed place in its cell, at a multiple of RUN in its tensor: one access to memory.
    """
    cell = places // RUN
    mask = cell < cells
    begin = cell.to(tl.int64) * stride
    width = tl.minimum(numel - begin, stride)
    positions = start + begin + ((_hashed(first_cell + cell) * width) >> 32)
    tensors = find_tensor(firsts_ptr, n_tensors, positions, mask)
    tensor_start = tl.load(firsts_ptr + tensors, mask=mask, other=0)
    tensor_end = tl.load(firsts_ptr + tensors + 1, mask=mask, other=0)
    offsets = (positions - tensor_start) // RUN * RUN + places % RUN
    return tensors, offsets, mask & (offsets < tensor_end - tensor_start)


@triton.jit
def _key_of_k(keys, mask, k):
    """The ``k``-th smallest of ``keys``, by radix selection; the smallest if k is negative."""
    key = k.to(tl.int32) * 0
    remaining = tl.maximum(k, 0)
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        wanted = mask & (((keys >> shift) >> 8) == key)
        histogram = tl.histogram((keys >> shift) & 0xFF, 256, mask=wanted)
        found = tl.sum((tl.cumsum(histogram) <= remaining).to(tl.int32))
        remaining -= tl.sum(tl.where(tl.arange(0, 256) < found, histogram, 0))
        key = (key << 8) | found
    return key


@kernel
def _sample_kernel(
    # Tensors
    pointers_ptr,
    firsts_ptr,
    samples_ptr,
    fields_ptr,
    # Scalars
    n_tensors,
    start,
    numel,
    stride,
    cells,
    first_cell,
    all_cells,
    low_k,
    high_k,
    all_programs,
    # Constexprs
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    SIDES: tl.constexpr,
    DISTANCE: tl.constexpr,
    STEP: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sample one score of each cell; the last program stores the windows.

    A window extends from the ``low_k``-th to the ``high_k``-th sampled score. ``low_k`` -1 and ``high_k``
    ``all_cells`` stand for ends beyond the sample.
    """
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tensors, offsets, mask = _cell_elements(
        firsts_ptr, n_tensors, start, numel, stride, first_cell, cells, places, 1
    )
    for side in tl.static_range(SIDES):
        key = _gather_key(pointers_ptr, tensors, n_tensors, offsets, mask, DTYPES, ROLE + 2 * side, DISTANCE)
        tl.store(samples_ptr + side * all_cells + first_cell + places, key, mask=mask)
    if last_program(fields_ptr, STEP, all_programs):
        samples = tl.arange(0, SAMPLES)
        there = samples < all_cells
        for side in tl.static_range(SIDES):
            sampled = tl.load(samples_ptr + side * all_cells + samples, mask=there, other=0)
            low = tl.where(low_k < 0, 0, _key_of_k(sampled, there, low_k))
            high = tl.where(high_k >= all_cells, LARGEST_KEY, _key_of_k(sampled, there, high_k))
            tl.store(fields_ptr + BRACKETS + 2 * side, low.to(tl.int64))
            tl.store(fields_ptr + BRACKETS + 2 * side + 1, high.to(tl.int64))
            keys = tl.maximum(high - low, 1).to(tl.int64)
            tl.store(fields_ptr + SEARCHES + 4 * side, bin_bits(keys, BINS - 1))


@triton.jit
def _count_key(fields_ptr, side, key, mask):
    """Count sampled keys: below the window's lower end, up to it, all, and in the bins above it."""
    low = tl.load(fields_ptr + BRACKETS + 2 * side).to(tl.int32)
    high = tl.load(fields_ptr + BRACKETS + 2 * side + 1).to(tl.int32)
    shift = tl.load(fields_ptr + SEARCHES + 4 * side).to(tl.int32)
    at = fields_ptr + SAMPLED + 4 * side
    tl.atomic_add(at, tl.sum((mask & (key < low)).to(tl.int32)).to(tl.int64), sem="relaxed")
    tl.atomic_add(at + 1, tl.sum((mask & (key <= low)).to(tl.int32)).to(tl.int64), sem="relaxed")
    tl.atomic_add(at + 2, tl.sum(mask.to(tl.int32)).to(tl.int64), sem="relaxed")
    place = tl.where(key == high, BINS - 1, (key - low - 1) >> shift)
    inside = mask & (key > low) & (key <= high)
    bins_ptr = fields_ptr + ALL_BINS + side * BINS
    tl.atomic_add(bins_ptr + place, (place * 0 + 1).to(tl.int64), mask=inside, sem="relaxed")


@triton.jit
def _bracket_side(fields_ptr, side, fraction, spread):
    """Replace a side's window by its bracket, and set its bins to zero."""
    low = tl.load(fields_ptr + BRACKETS + 2 * side)
    high = tl.load(fields_ptr + BRACKETS + 2 * side + 1)
    shift = tl.load(fields_ptr + SEARCHES + 4 * side)
    below = tl.load(fields_ptr + SAMPLED + 4 * side)
    upto = tl.load(fields_ptr + SAMPLED + 4 * side + 1)
    sampled = tl.load(fields_ptr + SAMPLED + 4 * side + 2).to(tl.float64)
    centre = fraction * (sampled - 1)
    margin = (spread * tl.sqrt(sampled.to(tl.float32))).to(tl.float64) + 1
    low_k = tl.floor(centre - margin).to(tl.int64)
    high_k = tl.ceil(centre + margin).to(tl.int64)
    bins = tl.arange(0, BINS)
    at = fields_ptr + ALL_BINS + side * BINS + bins
    sums = tl.cumsum(tl.load(at)) + upto
    low_bin = tl.sum((sums <= low_k).to(tl.int64))
    high_bin = tl.sum((sums <= high_k).to(tl.int64))
    tl.debug_barrier()
    tl.store(at, tl.zeros_like(sums))
    above = tl.where(low_bin >= BINS - 1, high, low + (low_bin << shift))
    lo = tl.where(low_k < below, 0, tl.where(low_k < upto, low, above))
    upper = tl.minimum(low + ((high_bin + 1) << shift), high - 1)
    upper = tl.where(high_bin >= BINS, LARGEST_KEY, tl.where(high_bin == BINS - 1, high, upper))
    hi = tl.where(high_k < upto, low, upper)
    tl.store(fields_ptr + BRACKETS + 2 * side, lo)
    tl.store(fields_ptr + BRACKETS + 2 * side + 1, tl.maximum(hi, lo))


@kernel
def _count_sample_kernel(
    # Tensors
    pointers_ptr,
    firsts_ptr,
    fields_ptr,
    # Scalars
    n_tensors,
    start,
    numel,
    stride,
    cells,
    first_cell,
    all_programs,
    fraction,
    spread,
    # Constexprs
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    SIDES: tl.constexpr,
    DISTANCE: tl.constexpr,
    STEP: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count RUN neighbours of each cell in the windows; the last program stores the brackets.

    A bracket extends ``spread * sqrt(sampled) + 1`` sampled scores to each side of the quantile ``fraction``.
    """
    block = tl.program_id(0)
    while block * BLOCK < cells * RUN:
        places = block * BLOCK + tl.arange(0, BLOCK)
        tensors, offsets, mask = _cell_elements(
            firsts_ptr, n_tensors, start, numel, stride, first_cell, cells, places, RUN
        )
        for side in tl.static_range(SIDES):
            key = _gather_key(
                pointers_ptr, tensors, n_tensors, offsets, mask, DTYPES, ROLE + 2 * side, DISTANCE
            )
            _count_key(fields_ptr, side, key, mask)
        block += tl.num_programs(0)
    if last_program(fields_ptr, STEP, all_programs):
        for side in tl.static_range(SIDES):
            _bracket_side(fields_ptr, side, fraction, spread)


def find_brackets(
    grouped: Sequence[Table],
    scores: Mapping[str, object],
    fraction: float,
    bracketing: Bracketing,
    config: LaunchConfig,
) -> tuple[list[PreparedLaunch], int]:
    """The launches that write the brackets' keys into the workspace.

    Args:
        scores: the kernels' constants ROLE, SIDES and DISTANCE, which say where a table has the scores.
        fraction: the quantile of the order statistic, in [0, 1].

    Returns:
        The launches, and the number of int32 in their ``samples_ptr``.
    """
    numel = sum(table.numel for table in grouped)
    tables = _cell_arguments(grouped, max(1, -(-numel // bracketing.first_samples)))
    all_cells = sum(table["cells"] for table in tables)
    low_k, high_k = bracketing.sample_ks(fraction, all_cells, numel)
    programs = [triton.cdiv(table["cells"], config.block) for table in tables]
    arguments: dict[str, object] = {
        # Scalars
        "all_cells": all_cells,
        "low_k": low_k,
        "high_k": high_k,
        "all_programs": sum(programs),
        # Constexprs
        "STEP": SAMPLE_STEP,
        # Independent of the number of scores, so that nothing is recompiled; each table rounds its cells up.
        "SAMPLES": triton.next_power_of_2(bracketing.first_samples + len(grouped) - 1),
        "BLOCK": config.block,
        **scores,
    }
    launches = [
        PreparedLaunch(_sample_kernel, size, arguments | table, config.options)
        for table, size in zip(tables, programs, strict=True)
    ]
    tables = _cell_arguments(grouped, bracketing.stride(numel))
    device = grouped[0].pointers.device
    programs = [
        capped_grid(triton.cdiv(table["cells"] * bracketing.run, config.block), device) for table in tables
    ]
    arguments = {
        # Scalars
        "all_programs": sum(programs),
        "fraction": fraction,
        "spread": bracketing.sigmas * math.sqrt(fraction * (1 - fraction) * bracketing.design_effect),
        # Constexprs
        "STEP": COUNT_STEP,
        "RUN": bracketing.run,
        "BLOCK": config.block,
        **scores,
    }
    launches += [
        PreparedLaunch(_count_sample_kernel, size, arguments | table, config.options)
        for table, size in zip(tables, programs, strict=True)
    ]
    return launches, 2 * all_cells


def _cell_arguments(grouped: Sequence[Table], stride: int) -> list[dict[str, Any]]:
    """The kernels' arguments for sampling cells of ``stride`` elements, one dict per table."""
    cells = [triton.cdiv(table.numel, stride) for table in grouped]
    return [
        {
            "pointers_ptr": table.pointers,
            "firsts_ptr": table.firsts,
            "n_tensors": table.tensors,
            "start": table.start,
            "numel": table.numel,
            "stride": stride,
            "cells": cells[index],
            "first_cell": sum(cells[:index]),
            "DTYPES": table.dtypes,
        }
        for index, table in enumerate(grouped)
    ]

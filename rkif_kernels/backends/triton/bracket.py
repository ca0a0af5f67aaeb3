"""Brackets around the order statistics of groups of scores, from samples: two launches.

A first sample of a few thousand scores of each group gives a window of keys around the order statistic. A
second sample, of up to millions of scores, is only counted: below the window, and in the window's bins. The
bracket consists of the bins in which the order statistic very probably lies. Each end of the window is
counted separately, because many scores may tie there (mostly zeros).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import triton
import triton.language as tl

from rkif_kernels.backends.triton.elements import find_tensor, gather_float32, kernel, load_chunk
from rkif_kernels.backends.triton.groups import (
    COUNTED_BLOCKS,
    FIRST_SAMPLED,
    FIRST_STRIDE,
    HIGH_K,
    LOW_K,
    MARGIN,
    PROGRAMS,
    SHARE,
    STRIDE,
    Groups,
    group_of,
    number_of,
)
from rkif_kernels.backends.triton.launch import Bracketing, LaunchConfig, PreparedLaunch
from rkif_kernels.backends.triton.table import Table
from rkif_kernels.backends.triton.whole import key_of_k
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
    fields_of,
    last_program,
)


@triton.jit
def _hashed(cells):
    """32 pseudo-random bits per cell, because equal distances could coincide with a pattern in the scores."""
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
def _cell_elements(firsts_ptr, first_tensor, span, stride, first_place, places, mask, RUN: tl.constexpr):
    """The sampled elements (tensors, offsets, mask) of ``span`` tensors.

    They are RUN neighbours from each cell of ``stride`` elements. A run starts at a hashed place in its cell,
    rounded down to a multiple of RUN in its tensor, so that it takes one access to memory.
    """
    firsts_ptr += first_tensor
    start = tl.load(firsts_ptr)
    begin = (places // RUN).to(tl.int64) * stride
    width = tl.minimum(tl.load(firsts_ptr + span) - start - begin, stride)
    positions = start + begin + ((_hashed((first_place + places) // RUN) * width) >> 32)
    tensors = find_tensor(firsts_ptr, span, positions, mask)
    tensor_start = tl.load(firsts_ptr + tensors, mask=mask, other=0)
    tensor_end = tl.load(firsts_ptr + tensors + 1, mask=mask, other=0)
    offsets = (positions - tensor_start) // RUN * RUN + places % RUN
    return first_tensor + tensors, offsets, mask & (offsets < tensor_end - tensor_start)


@kernel
def _sample_kernel(
    # Tensors
    pointers_ptr,
    firsts_ptr,
    indices_ptr,
    groups_ptr,
    part_places_ptr,
    block_parts_ptr,
    block_starts_ptr,
    samples_ptr,
    fields_ptr,
    # Scalars
    n_tensors,
    span,
    groups_a_tensor,
    first_place,
    # Constexprs
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    SIDES: tl.constexpr,
    DISTANCE: tl.constexpr,
    STEP: tl.constexpr,
    RUN: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sample RUN neighbours of each cell; a group's last program stores its windows.

    A window extends from the LOW_K-th to the HIGH_K-th sampled score. LOW_K = -1 and HIGH_K = FIRST_SAMPLED
    mean that the window extends beyond the sample.
    """
    part, start, sampled = load_chunk(
        part_places_ptr, block_parts_ptr, block_starts_ptr, tl.program_id(0), BLOCK
    )
    group = group_of(indices_ptr, part * span, groups_a_tensor)
    places = start + tl.arange(0, BLOCK)
    there = places < sampled
    tensors, offsets, mask = _cell_elements(
        firsts_ptr,
        part * span,
        span,
        number_of(groups_ptr, group, FIRST_STRIDE),
        first_place,
        places,
        there,
        RUN,
    )
    samples_ptr += group * (SIDES * SAMPLES)
    for side in tl.static_range(SIDES):
        # A run that ends beyond its tensor adds a few zeros to the sample.
        key = _gather_key(pointers_ptr, tensors, n_tensors, offsets, mask, DTYPES, ROLE + 2 * side, DISTANCE)
        tl.store(samples_ptr + side * SAMPLES + first_place + places, key, mask=there)
    own_ptr = fields_of(fields_ptr, group, SIDES)
    if last_program(own_ptr, STEP, number_of(groups_ptr, group, PROGRAMS + STEP)):
        all_sampled = number_of(groups_ptr, group, FIRST_SAMPLED)
        low_k = number_of(groups_ptr, group, LOW_K)
        high_k = number_of(groups_ptr, group, HIGH_K)
        samples = tl.arange(0, SAMPLES)
        known = samples < all_sampled
        # Loops that are not unrolled, and parts of the bins: otherwise registers spill.
        for last_side in range(SIDES):
            keys = tl.load(samples_ptr + last_side * SAMPLES + samples, mask=known, other=0)
            low = all_sampled * 0
            high = low
            for end in range(2):
                low = high
                high = key_of_k(keys, known, tl.where(end == 0, low_k, high_k)).to(tl.int64)
            low = tl.where(low_k < 0, 0, low)
            high = tl.where(high_k >= all_sampled, LARGEST_KEY, high)
            tl.store(own_ptr + BRACKETS + 2 * last_side, low)
            tl.store(own_ptr + BRACKETS + 2 * last_side + 1, high)
            tl.store(own_ptr + SEARCHES + 4 * last_side, bin_bits(tl.maximum(high - low, 1), BINS - 1))
            for first in range(0, BINS, BLOCK):
                bins = first + tl.arange(0, BLOCK)
                tl.store(own_ptr + ALL_BINS + last_side * BINS + bins, tl.zeros((BLOCK,), tl.int64))


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
def _bracket_side(fields_ptr, side, share, margin):
    """Replace a side's window by its bracket, and set its bins to zero.

    The bracket extends ``margin`` sampled scores to each side of the order statistic.
    """
    low = tl.load(fields_ptr + BRACKETS + 2 * side)
    high = tl.load(fields_ptr + BRACKETS + 2 * side + 1)
    shift = tl.load(fields_ptr + SEARCHES + 4 * side)
    below = tl.load(fields_ptr + SAMPLED + 4 * side)
    upto = tl.load(fields_ptr + SAMPLED + 4 * side + 1)
    sampled = tl.load(fields_ptr + SAMPLED + 4 * side + 2)
    centre = (share * (sampled - 1)) >> 32
    low_k = centre - margin
    high_k = centre + 1 + margin
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
    indices_ptr,
    groups_ptr,
    part_places_ptr,
    block_parts_ptr,
    block_starts_ptr,
    fields_ptr,
    # Scalars
    n_tensors,
    span,
    groups_a_tensor,
    first_place,
    # Constexprs
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    SIDES: tl.constexpr,
    DISTANCE: tl.constexpr,
    STEP: tl.constexpr,
    RUN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count RUN neighbours of each cell in the windows; a group's last program stores its brackets."""
    part, start, sampled = load_chunk(
        part_places_ptr, block_parts_ptr, block_starts_ptr, tl.program_id(0), BLOCK
    )
    group = group_of(indices_ptr, part * span, groups_a_tensor)
    own_ptr = fields_of(fields_ptr, group, SIDES)
    stride = number_of(groups_ptr, group, STRIDE)
    for block in range(BLOCKS):
        if start + block * BLOCK < sampled:
            places = start + block * BLOCK + tl.arange(0, BLOCK)
            tensors, offsets, mask = _cell_elements(
                firsts_ptr, part * span, span, stride, first_place, places, places < sampled, RUN
            )
            for side in tl.static_range(SIDES):
                key = _gather_key(
                    pointers_ptr, tensors, n_tensors, offsets, mask, DTYPES, ROLE + 2 * side, DISTANCE
                )
                _count_key(own_ptr, side, key, mask)
    if last_program(own_ptr, STEP, number_of(groups_ptr, group, PROGRAMS + STEP)):
        share = number_of(groups_ptr, group, SHARE)
        margin = number_of(groups_ptr, group, MARGIN)
        for last_side in range(SIDES):
            _bracket_side(own_ptr, last_side, share, margin)


def find_brackets(
    grouped: Sequence[Table],
    groups: Groups,
    scores: Mapping[str, object],
    bracketing: Bracketing,
    config: LaunchConfig,
) -> tuple[list[PreparedLaunch], int]:
    """The launches that write the brackets' keys into the workspace.

    Args:
        scores: the kernels' constants ROLE, SIDES and DISTANCE, which say where a table has the scores.

    Returns:
        The launches, and the number of int32 per group and side in their ``samples_ptr``.
    """
    # Independent of the number of scores, so that nothing is recompiled; each table rounds its cells up.
    samples = triton.next_power_of_2(bracketing.first_samples + len(grouped) - 1)
    first = {"STEP": SAMPLE_STEP, "RUN": groups.run, "SAMPLES": samples}
    second = {"STEP": COUNT_STEP, "RUN": bracketing.run, "BLOCKS": COUNTED_BLOCKS}
    launches = []
    for sample, constants, layouts, places in (
        (_sample_kernel, first, groups.samples, [work.sampled for work in groups.firsts]),
        (_count_sample_kernel, second, groups.counts, [work.counted for work in groups.firsts]),
    ):
        for table, arguments, layout, place in zip(grouped, groups.arguments, layouts, places, strict=True):
            arguments = arguments | scores | constants
            arguments |= {
                "pointers_ptr": table.pointers,
                "firsts_ptr": table.firsts,
                "n_tensors": table.tensors,
                "part_places_ptr": layout.numels,
                "block_parts_ptr": layout.chunk_tensors,
                "block_starts_ptr": layout.chunk_starts,
                "first_place": place,
                "DTYPES": table.dtypes,
                "BLOCK": config.block,
            }
            if layout.programs:
                launches.append(PreparedLaunch(sample, layout.programs, arguments, config.options))
    return launches, samples

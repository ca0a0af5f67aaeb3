"""Order statistics by counting keys in narrowing windows; the state of a search is on the device.

A score's key is the bit pattern of its float32 value; keys are ordered like scores. The state of a search is
the window of keys that contains its order statistic. A launch counts the keys of the window in equal bins.
The last program of the launch picks the bin that contains the order statistic as the next window. Three
launches with 2,048 bins resolve the 31 bits of any key.

No program waits for another. The last program is the one whose addition to an atomic counter shows that all
others are done.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.triton.elements import load_row, load_score, tile_mask

BITS = tl.constexpr(11)
BINS = tl.constexpr(1 << 11)
LARGEST_KEY = tl.constexpr(0x7F800000)  # of infinity

# Offsets of the fields of a group of scores in the workspace:
# 0: counts of the four cases.
# COUNTS, four per side (the scores of one learner): number of scores below lo, up to lo, in the bracket; one
#     unused.
# BRACKETS, two per side: keys of lo and hi.
# SEARCHES, four per side: first key of the window, log2 of the keys per bin, number of the window's keys
#     before the order statistic (-1 once it is found); one unused.
# SAMPLED, four per side: sampled scores below the window's lower end, up to it, all; one unused.
# FAILED: whether the brackets failed. DONE: number of finished programs of each launch.
# ALL_BINS: the bins of each side.
COUNTS, BRACKETS, SEARCHES, SAMPLED = (tl.constexpr(place) for place in (4, 12, 16, 24))
FAILED, DONE, ALL_BINS = (tl.constexpr(place) for place in (32, 33, 40))
SAMPLE_STEP, COUNT_STEP, PASS_STEP, LIST_STEP, SECOND_STEP, THIRD_STEP, FINISH_STEP = range(7)


def padded(groups: int) -> int:
    """A multiple of four, so that the thresholds of each side are aligned; otherwise kernels recompile."""
    return -(-groups // 4) * 4


def workspace(groups: int, sides: int, device: torch.device) -> dict[str, Tensor]:
    """The memory that the launches of one call share, by the names of the kernels' parameters.

    ``fields_ptr`` is int64 [groups, ...], with the fields above, initially zero except for the bins;
    ``thresholds_ptr`` is float32 [sides, padded groups], which holds the thresholds once they are found.
    """
    fields = torch.empty((groups, ALL_BINS.value + sides * BINS.value), dtype=torch.int64, device=device)
    fields[:, : ALL_BINS.value].zero_()
    return {
        "fields_ptr": fields,
        "thresholds_ptr": torch.empty((sides, padded(groups)), dtype=torch.float32, device=device),
    }


@triton.jit
def fields_of(fields_ptr, group, SIDES: tl.constexpr):
    """The fields of a group."""
    return fields_ptr + group * (ALL_BINS + SIDES * BINS)


@triton.jit
def searching(fields_ptr, SIDES: tl.constexpr):
    """Whether the threshold of a side is not found yet."""
    left = tl.load(fields_ptr + SEARCHES + 2)
    for side in tl.static_range(1, SIDES):
        left = tl.maximum(left, tl.load(fields_ptr + SEARCHES + 4 * side + 2))
    return left >= 0


@triton.jit
def last_program(fields_ptr, step, programs):
    """Whether all other programs of the launch are done, so that their writes are visible."""
    tl.debug_barrier()  # orders all writes of this program before the addition
    return tl.atomic_add(fields_ptr + DONE + step, 1, sem="acq_rel") == programs - 1


@triton.jit
def bin_bits(keys, bins):
    """log2 of the smallest bin size with which ``bins`` bins cover ``keys`` keys."""
    return tl.sum((((keys - 1) >> tl.arange(0, 32).to(tl.int64)) >= bins).to(tl.int64))


@triton.jit
def load_search(fields_ptr, side):
    """The window's first key, log2 of the keys per bin, and the number of keys before the order statistic."""
    at = fields_ptr + SEARCHES + 4 * side
    return tl.load(at).to(tl.int32), tl.load(at + 1).to(tl.int32), tl.load(at + 2)


@triton.jit
def store_search(fields_ptr, threshold_ptr, side, low, shift, remaining):
    """Store the state of a search, and the lowest score of its window as the threshold so far."""
    at = fields_ptr + SEARCHES + 4 * side
    tl.store(at, low)
    tl.store(at + 1, shift)
    tl.store(at + 2, remaining)
    tl.store(threshold_ptr, low.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def add_to_bins(fields_ptr, side, score, mask):
    """Count the scores in a search's window, by one atomic addition each, because they are few."""
    low, shift, remaining = load_search(fields_ptr, side)
    low = tl.where(remaining < 0, 0x7FFFFFFF, low)  # a finished search counts no key
    distance = score.to(tl.int32, bitcast=True) - low
    place = distance >> shift
    inside = mask & (distance >= 0) & (place < BINS)
    bins_ptr = fields_ptr + ALL_BINS + side * BINS
    tl.atomic_add(bins_ptr + place, (place * 0 + 1).to(tl.int64), mask=inside, sem="relaxed")


@triton.jit
def narrow_search(fields_ptr, threshold_ptr, side):
    """Narrow the window to the bin that contains the order statistic; called by the last program only."""
    low, shift, remaining = load_search(fields_ptr, side)
    if remaining >= 0:
        bins = tl.arange(0, BINS)
        at = fields_ptr + ALL_BINS + side * BINS + bins
        counts = tl.load(at)
        found = tl.sum((tl.cumsum(counts) <= remaining).to(tl.int32))
        before = tl.sum(tl.where(bins < found, counts, 0))
        tl.debug_barrier()
        tl.store(at, tl.zeros_like(counts))
        key = low.to(tl.int64) + (found.to(tl.int64) << shift.to(tl.int64))
        left = tl.where(shift == 0, -1, remaining - before)
        store_search(fields_ptr, threshold_ptr, side, key, tl.maximum(shift - BITS, 0), left)


@triton.jit
def narrow_searches(fields_ptr, thresholds_ptr, padded_groups, SIDES: tl.constexpr):
    """:func:`narrow_search` of each side. The loop is not unrolled, because registers would spill."""
    for side in range(SIDES):
        narrow_search(fields_ptr, thresholds_ptr + side * padded_groups, side)


@triton.jit
def count_chunk(
    pointers_ptr,
    fields_ptr,
    n_tensors,
    tensor,
    start,
    numel,
    side,
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Count a chunk's scores in a search's window."""
    if tl.load(fields_ptr + SEARCHES + 4 * side + 2) >= 0:
        U: tl.constexpr = DTYPES[ROLE + 1] is not None
        s_ptr = load_row(pointers_ptr, ROLE, tensor, n_tensors, DTYPES)
        u_ptr = load_row(pointers_ptr, ROLE + 1, tensor, n_tensors, DTYPES)
        for tile in range(TILES):
            first = start + tile * BLOCK
            offsets = first + tl.arange(0, BLOCK)
            if first + BLOCK <= numel:
                mask = tile_mask(offsets, numel, True)
                add_to_bins(fields_ptr, side, load_score(s_ptr, u_ptr, offsets, mask, U, DISTANCE), mask)
            elif first < numel:
                mask = tile_mask(offsets, numel, False)
                add_to_bins(fields_ptr, side, load_score(s_ptr, u_ptr, offsets, mask, U, DISTANCE), mask)

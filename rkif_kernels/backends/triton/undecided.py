"""The elements that brackets leave undecided: bits from the pass, then a list in the order of the elements.

The pass stores a word of bits per lane and a count per program. Its last program computes prefix sums of the
counts, which give every program a fixed part of the list, independent of timing. One launch gathers the
undecided elements with their values; two more search the thresholds in the list. If the brackets failed, the
same launches search all scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.triton.elements import (
    kernel,
    load_chunk,
    load_float32,
    load_row,
    load_score,
)
from rkif_kernels.backends.triton.launch import LaunchConfig, PreparedLaunch, capped_grid
from rkif_kernels.backends.triton.table import Table
from rkif_kernels.backends.triton.windows import (
    BINS,
    BITS,
    BRACKETS,
    COUNTS,
    FAILED,
    LIST_STEP,
    LISTED,
    SECOND_STEP,
    THIRD_STEP,
    add_to_bins,
    bin_bits,
    count_chunk,
    last_program,
    narrow_search,
    store_search,
)

MAX_TILES = 16  # four bits per tile in a word of 64


@dataclass(frozen=True)
class Undecided:
    """The memory for the undecided elements of a pass over some tables.

    Attributes:
        rows: index of the first program of each table; at the end, the number of programs.
        lanes: number of words of bits that a program stores.
        capacity: maximum number of listed elements.
        values: number of values per listed element, its scores first.
    """

    rows: list[int]
    lanes: int
    capacity: int
    values: int

    @staticmethod
    def of(grouped: Sequence[Table], capacity: int, values: int, config: LaunchConfig) -> Undecided:
        assert config.tiles <= MAX_TILES
        rows = [0, *accumulate(table.programs for table in grouped)]
        return Undecided(rows, config.block // 4, capacity, values)

    def allocate(self, device: torch.device) -> dict[str, Tensor]:
        """The memory, by the names of the kernels' parameters.

        ``bits_ptr`` is int64 [programs, lanes], bit ``4 * tile + element`` of a lane; ``offsets_ptr`` int64
        [programs + 1], the start of each program's part of the list; ``addresses_ptr`` int64 [capacity], of
        the outputs; ``values_ptr`` float32 [values, capacity].
        """
        programs = self.rows[-1]
        return {
            "bits_ptr": torch.empty((programs, self.lanes), dtype=torch.int64, device=device),
            "offsets_ptr": torch.empty(programs + 1, dtype=torch.int64, device=device),
            "addresses_ptr": torch.empty(self.capacity, dtype=torch.int64, device=device),
            "values_ptr": torch.empty((self.values, self.capacity), dtype=torch.float32, device=device),
        }


@triton.jit
def load_bracket(fields_ptr, side):
    """(lo, hi] of a side as float32: scores up to lo are not selected, scores above hi are."""
    lo = tl.load(fields_ptr + BRACKETS + 2 * side).to(tl.int32)
    hi = tl.load(fields_ptr + BRACKETS + 2 * side + 1).to(tl.int32)
    return lo.to(tl.float32, bitcast=True), hi.to(tl.float32, bitcast=True)


@triton.jit
def store_undecided(bits_ptr, offsets_ptr, row, bits, undecided, BLOCK: tl.constexpr):
    """Store the bits of a program's undecided elements, and their number."""
    tl.store(bits_ptr + row.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4), bits)
    tl.store(offsets_ptr + row + 1, undecided.to(tl.int64))


@triton.jit
def begin_searches(
    fields_ptr, thresholds_ptr, offsets_ptr, rows, capacity, k, SIDES: tl.constexpr, BLOCK: tl.constexpr
):
    """In the pass's last program: compute the offsets of the list, and start the search of each threshold.

    The threshold is lo, or in the list, or, if the brackets failed, anywhere among all scores.
    """
    listed = (k * 0).to(tl.int64)  # k is an int32 wherever 32 bits hold it
    tl.store(offsets_ptr, listed)
    row = listed
    while row < rows:
        here = row + tl.arange(0, BLOCK)
        counts = tl.load(offsets_ptr + 1 + here, mask=here < rows, other=0)
        tl.debug_barrier()
        tl.store(offsets_ptr + 1 + here, listed + tl.cumsum(counts), mask=here < rows)
        listed += tl.sum(counts)
        row += BLOCK
    failed = listed > capacity
    for side in tl.static_range(SIDES):
        below = tl.load(fields_ptr + COUNTS + 4 * side)
        upto = tl.load(fields_ptr + COUNTS + 4 * side + 1)
        inside = tl.load(fields_ptr + COUNTS + 4 * side + 2)
        failed = failed | (k < below) | (k >= upto + inside)
    for side in tl.static_range(SIDES):
        lo = tl.load(fields_ptr + BRACKETS + 2 * side)
        hi = tl.load(fields_ptr + BRACKETS + 2 * side + 1)
        upto = tl.load(fields_ptr + COUNTS + 4 * side + 1)
        found = k < upto
        shift = bin_bits(tl.maximum(hi - lo, 1), BINS)
        low = tl.where(failed, 0, tl.where(found, lo, lo + 1))
        left = tl.where(failed, k, tl.where(found, -1, k - upto))
        store_search(fields_ptr, thresholds_ptr, side, low, tl.where(failed, 31 - BITS, shift), left)
    tl.store(fields_ptr + LISTED, tl.where(failed, 0, listed))
    tl.store(fields_ptr + FAILED, failed.to(tl.int64))
    if failed:  # all elements are counted again
        tl.store(fields_ptr + tl.arange(0, 4), tl.zeros((4,), tl.int64))


@triton.jit
def _bit_count(words):
    """Number of set bits of each int64."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    sums = eights + (eights >> 8)
    sums += sums >> 16
    return (sums + (sums >> 32)) & 0x7F


@triton.jit
def _lowest_bit(words):
    """Index of the lowest set bit of nonzero words, from the float64 exponent of its value."""
    value = (words & (0 - words)).to(tl.float64).to(tl.int64, bitcast=True)
    return ((value >> 52) & 0x7FF) - 1023


@triton.jit
def _gather_scores(
    pointers_ptr,
    tensor,
    n_tensors,
    offsets,
    mask,
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    DISTANCE: tl.constexpr,
):
    """Scores of one tensor at given offsets."""
    s_ptr = load_row(pointers_ptr, ROLE, tensor, n_tensors, DTYPES)
    u_ptr = load_row(pointers_ptr, ROLE + 1, tensor, n_tensors, DTYPES)
    return load_score(s_ptr, u_ptr, offsets, mask, DTYPES[ROLE + 1] is not None, DISTANCE)


@kernel
def _list_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    fields_ptr,
    thresholds_ptr,
    bits_ptr,
    offsets_ptr,
    addresses_ptr,
    values_ptr,
    # Scalars
    n_tensors,
    first_row,
    capacity,
    all_programs,
    # Constexprs
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    SIDES: tl.constexpr,
    DISTANCE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Gather a chunk's undecided elements and count them in the windows; the last program narrows these.

    An undecided element reads one sector of each of up to seven streams, and writes up to 36 bytes.
    """
    chunk = tl.program_id(0)
    tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK)
    if tl.load(fields_ptr + FAILED) != 0:
        for side in tl.static_range(SIDES):
            count_chunk(
                pointers_ptr, fields_ptr, n_tensors, tensor, start, numel, side,
                DTYPES, ROLE + 2 * side, DISTANCE, BLOCK, TILES,
            )  # fmt: skip
    else:
        row = first_row + chunk
        place = tl.load(offsets_ptr + row)
        if tl.load(offsets_ptr + row + 1) > place:
            lanes = tl.arange(0, BLOCK // 4)
            words = tl.load(bits_ptr + row.to(tl.int64) * (BLOCK // 4) + lanes)
            counts = _bit_count(words)
            places = place + tl.cumsum(counts) - counts
            while tl.max((words != 0).to(tl.int32)) > 0:
                mask = words != 0
                bit = _lowest_bit(words)
                offsets = start + (bit >> 2) * BLOCK + lanes * 4 + (bit & 3)
                for side in tl.static_range(SIDES):
                    score = _gather_scores(
                        pointers_ptr, tensor, n_tensors, offsets, mask, DTYPES, ROLE + 2 * side, DISTANCE
                    )
                    tl.store(values_ptr + side * capacity + places, score, mask=mask)
                    add_to_bins(fields_ptr, side, score, mask)
                if SIDES == 2:  # a fusion: the output's address, then base, inner and outer
                    size: tl.constexpr = tl.dtype(DTYPES[0]).primitive_bitwidth // 8
                    tl.store(
                        addresses_ptr + places, tl.load(pointers_ptr + tensor) + offsets * size, mask=mask
                    )
                    for role in tl.static_range(1, 4):
                        row_ptr = load_row(pointers_ptr, role, tensor, n_tensors, DTYPES)
                        value = load_float32(row_ptr, offsets, mask)
                        tl.store(values_ptr + (role + 1) * capacity + places, value, mask=mask)
                words = words & (words - 1)
                places += 1
    if last_program(fields_ptr, STEP, all_programs):
        for side in tl.static_range(SIDES):
            narrow_search(fields_ptr, thresholds_ptr, side)


@kernel
def _narrow_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    fields_ptr,
    thresholds_ptr,
    values_ptr,
    # Scalars
    n_tensors,
    chunks,
    capacity,
    all_programs,
    # Constexprs
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    SIDES: tl.constexpr,
    DISTANCE: tl.constexpr,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Count the list, or all scores of the table, in the windows; the last program narrows the windows.

    With several tables, the FIRST launch counts the list. The grid is capped; programs loop.
    """
    part = tl.program_id(0)
    if tl.load(fields_ptr + FAILED) != 0:
        while part < chunks:
            tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, part, BLOCK)
            for side in tl.static_range(SIDES):
                count_chunk(
                    pointers_ptr, fields_ptr, n_tensors, tensor, start, numel, side,
                    DTYPES, ROLE + 2 * side, DISTANCE, BLOCK, TILES,
                )  # fmt: skip
            part += tl.num_programs(0)
    elif FIRST:
        listed = tl.load(fields_ptr + LISTED)
        entry = part.to(tl.int64) * BLOCK
        while entry < listed:
            entries = entry + tl.arange(0, BLOCK)
            mask = entries < listed
            for side in tl.static_range(SIDES):
                score = tl.load(values_ptr + side * capacity + entries, mask=mask, other=0.0)
                add_to_bins(fields_ptr, side, score, mask)
            entry += tl.num_programs(0).to(tl.int64) * BLOCK
    if last_program(fields_ptr, STEP, all_programs):
        for side in tl.static_range(SIDES):
            narrow_search(fields_ptr, thresholds_ptr, side)


def list_and_search(
    grouped: Sequence[Table], undecided: Undecided, scores: Mapping[str, object], config: LaunchConfig
) -> list[PreparedLaunch]:
    """The launches after the pass, which make the list and find the thresholds in it.

    Args:
        scores: the kernels' constants ROLE, SIDES and DISTANCE, which say where a table has the scores.
    """
    blocks = {"BLOCK": config.block, "TILES": config.tiles}
    launches = []
    for table, first_row in zip(grouped, undecided.rows, strict=False):
        arguments = {
            # Scalars
            "first_row": first_row,
            "capacity": undecided.capacity,
            "all_programs": undecided.rows[-1],
            # Constexprs
            "DTYPES": table.dtypes,
            "STEP": LIST_STEP,
        }
        arguments |= table.arguments | scores | blocks
        launches.append(PreparedLaunch(_list_kernel, table.programs, arguments, config.options))
    wanted = max(triton.cdiv(undecided.capacity, config.block), *(table.programs for table in grouped))
    programs = capped_grid(wanted, grouped[0].pointers.device)
    for step in (SECOND_STEP, THIRD_STEP):
        for index, table in enumerate(grouped):
            arguments = {
                # Scalars
                "chunks": table.programs,
                "capacity": undecided.capacity,
                "all_programs": programs * len(grouped),
                # Constexprs
                "DTYPES": table.dtypes,
                "STEP": step,
                "FIRST": index == 0,
            }
            arguments |= table.arguments | scores | blocks
            launches.append(PreparedLaunch(_narrow_kernel, programs, arguments, config.options))
    return launches

"""The elements that brackets leave undecided: bits from the pass, then a list in the order of the elements.

The pass stores a word of bits per lane and a count per program. The last program of a group computes prefix
sums of the counts. They give every program a fixed part of the list, independent of timing. One launch
gathers the undecided elements with their values; two more search the thresholds in the list. If the brackets
of a group failed, the same launches search all its scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from rkif_kernels.backends.triton.groups import (
    FIRST_ROW,
    LIST_END,
    LIST_START,
    PIECE,
    PROGRAMS,
    Groups,
    K,
    group_of,
    number_of,
)
from rkif_kernels.backends.triton.launch import LaunchConfig, PreparedLaunch
from rkif_kernels.backends.triton.table import Table
from rkif_kernels.backends.triton.windows import (
    BINS,
    BITS,
    BRACKETS,
    COUNTS,
    FAILED,
    LIST_STEP,
    SECOND_STEP,
    THIRD_STEP,
    add_to_bins,
    bin_bits,
    count_chunk,
    fields_of,
    last_program,
    narrow_searches,
    searching,
    store_search,
)

MAX_TILES = 16  # four bits per tile in a word of 64


@dataclass(frozen=True)
class Undecided:
    """The memory for the undecided elements of a pass.

    Attributes:
        programs: number of programs of the pass.
        lanes: number of words of bits that a program stores.
        capacity: maximum number of listed elements.
        values: number of values per listed element, its scores first.
    """

    programs: int
    lanes: int
    capacity: int
    values: int

    @staticmethod
    def of(groups: Groups, values: int, config: LaunchConfig) -> Undecided:
        assert config.tiles <= MAX_TILES
        return Undecided(groups.rows[-1], config.block // 4, groups.capacity, values)

    def allocate(self, device: torch.device) -> dict[str, Tensor]:
        """The memory, by the names of the kernels' parameters.

        ``bits_ptr`` is int64 [programs, lanes], bit ``4 * tile + element`` of a lane; ``offsets_ptr`` int64
        [programs, 2], the start and the end of each program's part of the list; ``addresses_ptr`` int64
        [capacity], of the outputs; ``values_ptr`` float32 [values, capacity].
        """
        return {
            "bits_ptr": torch.empty((self.programs, self.lanes), dtype=torch.int64, device=device),
            "offsets_ptr": torch.empty((self.programs, 2), dtype=torch.int64, device=device),
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
    tl.store(offsets_ptr + 2 * row + 1, undecided.to(tl.int64))


@triton.jit
def begin_searches(
    fields_ptr, thresholds_ptr, offsets_ptr, groups_ptr, padded_groups, group,
    SIDES: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the parts of a group's list, and start its searches; called by its last program of the pass.

    A threshold is lo, or a listed score. If the brackets failed, it is any score of the group.

    Args:
        fields_ptr: the fields of the group.
    """
    k = number_of(groups_ptr, group, K)
    row = number_of(groups_ptr, group, FIRST_ROW)
    end = row + number_of(groups_ptr, group, PROGRAMS + STEP)
    listed = number_of(groups_ptr, group, LIST_START)
    while row < end:
        here = row + tl.arange(0, BLOCK)
        counts = tl.load(offsets_ptr + 2 * here + 1, mask=here < end, other=0)
        ends = listed + tl.cumsum(counts)
        tl.debug_barrier()
        tl.store(offsets_ptr + 2 * here, ends - counts, mask=here < end)
        tl.store(offsets_ptr + 2 * here + 1, ends, mask=here < end)
        listed += tl.sum(counts)
        row += BLOCK
    failed = listed > number_of(groups_ptr, group, LIST_END)
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
        store_search(
            fields_ptr,
            thresholds_ptr + side * padded_groups + group,
            side,
            low,
            tl.where(failed, 31 - BITS, shift),
            left,
        )
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
    indices_ptr,
    groups_ptr,
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
    padded_groups,
    groups_a_tensor,
    first_row,
    capacity,
    # Constexprs
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    SIDES: tl.constexpr,
    DISTANCE: tl.constexpr,
    FUSED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Gather a chunk's undecided elements and count them; a group's last program narrows its windows.

    For an undecided element, one sector of each of up to seven streams is read, and up to 36 bytes are
    written. Without a fusion (FUSED false), groups whose thresholds are found are skipped.
    """
    chunk = tl.program_id(0)
    tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK)
    group = group_of(indices_ptr, tensor, groups_a_tensor)
    own_ptr = fields_of(fields_ptr, group, SIDES)
    if FUSED | searching(own_ptr, SIDES):
        if tl.load(own_ptr + FAILED) != 0:
            for side in tl.static_range(SIDES):
                count_chunk(
                    pointers_ptr, own_ptr, n_tensors, tensor, start, numel, side,
                    DTYPES, ROLE + 2 * side, DISTANCE, BLOCK, TILES,
                )  # fmt: skip
        else:
            row = (first_row + chunk).to(tl.int64)
            place = tl.load(offsets_ptr + 2 * row)
            if tl.load(offsets_ptr + 2 * row + 1) > place:
                lanes = tl.arange(0, BLOCK // 4)
                words = tl.load(bits_ptr + row * (BLOCK // 4) + lanes)
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
                        add_to_bins(own_ptr, side, score, mask)
                    if FUSED:  # the output's address, then base, inner and outer
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
        if last_program(own_ptr, STEP, number_of(groups_ptr, group, PROGRAMS + STEP)):
            narrow_searches(own_ptr, thresholds_ptr + group, padded_groups, SIDES)


@kernel
def _narrow_kernel(
    # Tensors
    pointers_ptr,
    indices_ptr,
    groups_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    part_rows_ptr,
    piece_parts_ptr,
    piece_starts_ptr,
    fields_ptr,
    thresholds_ptr,
    offsets_ptr,
    values_ptr,
    # Scalars
    n_tensors,
    span,
    padded_groups,
    groups_a_tensor,
    first_row,
    capacity,
    # Constexprs
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    SIDES: tl.constexpr,
    DISTANCE: tl.constexpr,
    STEP: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Count the listed elements of PIECE chunks, or all; a group's last program narrows its windows."""
    part, piece, rows = load_chunk(part_rows_ptr, piece_parts_ptr, piece_starts_ptr, tl.program_id(0), PIECE)
    group = group_of(indices_ptr, part * span, groups_a_tensor)
    own_ptr = fields_of(fields_ptr, group, SIDES)
    if searching(own_ptr, SIDES):
        row = piece
        if groups_a_tensor == 0:
            row += first_row
        else:
            row += number_of(groups_ptr, group, FIRST_ROW)
        last = row + tl.minimum(rows - piece, PIECE) - 1
        if tl.load(own_ptr + FAILED) != 0:
            while row <= last:
                tensor, start, numel = load_chunk(
                    numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, row - first_row, BLOCK
                )
                for side in tl.static_range(SIDES):
                    count_chunk(
                        pointers_ptr, own_ptr, n_tensors, tensor, start, numel, side,
                        DTYPES, ROLE + 2 * side, DISTANCE, BLOCK, TILES,
                    )  # fmt: skip
                row += 1
        else:
            entry = tl.load(offsets_ptr + 2 * row)
            end = tl.load(offsets_ptr + 2 * last + 1)
            while entry < end:
                entries = entry + tl.arange(0, BLOCK)
                mask = entries < end
                for side in tl.static_range(SIDES):
                    score = tl.load(values_ptr + side * capacity + entries, mask=mask, other=0.0)
                    add_to_bins(own_ptr, side, score, mask)
                entry += BLOCK
        if last_program(own_ptr, STEP, number_of(groups_ptr, group, PROGRAMS + STEP)):
            narrow_searches(own_ptr, thresholds_ptr + group, padded_groups, SIDES)


def list_and_search(
    grouped: Sequence[Table],
    groups: Groups,
    undecided: Undecided,
    scores: Mapping[str, object],
    config: LaunchConfig,
    *,
    fused: bool,
) -> list[PreparedLaunch]:
    """The launches after the pass, which make the list and find the thresholds in it.

    Args:
        scores: the kernels' constants ROLE, SIDES and DISTANCE, which say where a table has the scores.
        fused: whether the list is that of a fusion.
    """
    lists = []
    narrows: list[tuple[int, dict[str, object]]] = []
    for table, group_arguments, first_row, pieces in zip(
        grouped, groups.arguments, groups.rows, groups.pieces, strict=False
    ):
        if not pieces.programs:
            continue
        arguments = table.arguments | group_arguments | scores
        arguments |= {
            # Scalars
            "first_row": first_row,
            "capacity": undecided.capacity,
            # Constexprs
            "DTYPES": table.dtypes,
            "BLOCK": config.block,
            "TILES": config.tiles,
        }
        listing = arguments | {"FUSED": fused, "STEP": LIST_STEP}
        lists.append(PreparedLaunch(_list_kernel, table.programs, listing, config.options))
        arguments |= {
            "part_rows_ptr": pieces.numels,
            "piece_parts_ptr": pieces.chunk_tensors,
            "piece_starts_ptr": pieces.chunk_starts,
            "PIECE": PIECE,
        }
        narrows.append((pieces.programs, arguments))
    return lists + [
        PreparedLaunch(_narrow_kernel, programs, arguments | {"STEP": step}, config.options)
        for step in (SECOND_STEP, THIRD_STEP)
        for programs, arguments in narrows
    ]

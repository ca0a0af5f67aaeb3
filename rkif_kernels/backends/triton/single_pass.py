"""Exact thresholds and the fusion itself in one pass over memory.

A sample gives each learner a bracket (lo, hi] that very probably holds the order statistic, and few of the
scores. One pass reads all elements. A score up to lo is not selected and a score above hi is, so almost every
element is final when it is written. The pass marks the undecided elements and counts the scores below the
brackets. Then the undecided elements are listed with their values. The counts and the list give the exact
thresholds, and the listed elements are fused again.

The counts prove whether a bracket holds its order statistic. If one does not, or the list is too short
(because of many ties at the threshold), the launches that search the list search all scores instead, and the
launch that fuses the list fuses all elements. The device makes this decision. The host does not wait for it,
so the whole call can be captured in a CUDA graph. The second fusion reads the inputs again, so ``out`` must
not be one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from rkif_kernels.backends.triton.bracket import find_brackets
from rkif_kernels.backends.triton.elements import (
    add_counts,
    kernel,
    lane_sums,
    load_chunk,
    load_rows,
    pack_counts,
    squared_lanes,
)
from rkif_kernels.backends.triton.fuse import (
    INNER_SCORE,
    cases,
    fuse_,
    fuse_chunk,
    load_tile,
    merge,
    merge_arguments,
    store_norms,
)
from rkif_kernels.backends.triton.groups import PROGRAMS, find_groups, number_of
from rkif_kernels.backends.triton.launch import (
    Bracketing,
    LaunchConfig,
    PreparedLaunch,
    capped_grid,
)
from rkif_kernels.backends.triton.launches import chosen
from rkif_kernels.backends.triton.radix import radix_threshold
from rkif_kernels.backends.triton.table import (
    ALIGNMENT,
    StreamOrder,
    Table,
    aligned,
    keep_for_graph,
    tables,
)
from rkif_kernels.backends.triton.undecided import (
    Undecided,
    begin_searches,
    list_and_search,
    load_bracket,
    store_undecided,
)
from rkif_kernels.backends.triton.windows import (
    COUNTS,
    FAILED,
    FINISH_STEP,
    PASS_STEP,
    last_program,
    workspace,
)
from rkif_kernels.contiguous import in_place, same_tensors
from rkif_kernels.types import FuseStats, FusionInputs, MergeRule


@triton.jit
def _bracketed_fuse_tile(
    rows,
    brackets,
    weights,
    first,
    numel,
    FULL: tl.constexpr,
    DTYPES: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Fuse one block; returns the bits of undecided elements, counts and squared norms, in lanes."""
    offsets, mask, base, inner, outer, score_in, score_out = load_tile(
        rows, first, numel, FULL, DTYPES, (False, False), BLOCK
    )

    m_in = score_in > brackets[0]
    m_out = score_out > brackets[2]
    open_in = mask & m_in & (score_in <= brackets[1])
    open_out = mask & m_out & (score_out <= brackets[3])
    undecided = open_in | open_out
    # Undecided elements are stored too, as if selected, because a mask would narrow the store.
    fused, tau_in, tau_out = merge(
        base, inner, outer, m_in, m_out, weights, DTYPES, OUTER_FROM_INNER, ROUND_BF16
    )
    tl.store(rows[0] + offsets, fused, mask=mask)
    none = tl.zeros_like(mask)
    return (
        lane_sums(undecided.to(tl.int32) << (tl.arange(0, BLOCK) & 3), BLOCK),
        pack_counts(*cases(m_in, m_out, mask & (undecided == 0)), BLOCK),
        pack_counts(mask & (score_in < brackets[0]), mask & (m_in == 0), open_in, undecided, BLOCK),
        pack_counts(mask & (score_out < brackets[2]), mask & (m_out == 0), open_out, none, BLOCK),
        squared_lanes(tau_in, BLOCK),
        squared_lanes(tau_out, BLOCK),
        squared_lanes(tl.where(undecided, 0.0, fused.to(tl.float32) - base), BLOCK),
    )


@kernel
def _bracketed_fuse_kernel(
    # Tensors
    pointers_ptr,
    groups_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    fields_ptr,
    thresholds_ptr,
    bits_ptr,
    offsets_ptr,
    partial_norms_ptr,
    # Scalars
    n_tensors,
    padded_groups,
    first_row,
    weights,
    # Constexprs
    DTYPES: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """The pass over all elements. Float32 with uncertainties: reads 28 bytes per element, writes 33 bits.

    A program owns one chunk of one tensor. Counts are integer atomics; bits, the number of undecided elements
    and squared norms go to one row per program. The loop has neither barriers nor atomics.
    """
    chunk = tl.program_id(0)
    tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK)
    row = first_row + chunk
    lists = load_rows(pointers_ptr, tensor, n_tensors, DTYPES)
    lo_in, hi_in = load_bracket(fields_ptr, 0)
    lo_out, hi_out = load_bracket(fields_ptr, 1)
    brackets = (lo_in, hi_in, lo_out, hi_out)

    bits = tl.zeros((BLOCK // 4,), tl.int64)
    selected = tl.zeros((BLOCK // 4,), tl.int32)
    inner_side, outer_side = selected, selected
    norm_in = tl.zeros((BLOCK // 4,), tl.float64)
    norm_out, norm_update = norm_in, norm_in
    for tile in range(TILES):
        first = start + tile * BLOCK
        if first < numel:
            if first + BLOCK <= numel:
                marks, a, b, c, x, y, z = _bracketed_fuse_tile(
                    lists, brackets, weights, first, numel, True,
                    DTYPES, OUTER_FROM_INNER, BLOCK, ROUND_BF16,
                )  # fmt: skip
            else:
                marks, a, b, c, x, y, z = _bracketed_fuse_tile(
                    lists, brackets, weights, first, numel, False,
                    DTYPES, OUTER_FROM_INNER, BLOCK, ROUND_BF16,
                )  # fmt: skip
            bits |= marks.to(tl.int64) << (4 * tile)
            selected += a
            inner_side += b
            outer_side += c
            norm_in += x
            norm_out += y
            norm_update += z
    store_undecided(bits_ptr, offsets_ptr, row, bits, tl.sum((inner_side >> 24) & 0xFF), BLOCK)
    add_counts(fields_ptr, selected)
    add_counts(fields_ptr + COUNTS, inner_side, 3)
    add_counts(fields_ptr + COUNTS + 4, outer_side, 3)
    store_norms(partial_norms_ptr, row, norm_in, norm_out, norm_update)
    if last_program(fields_ptr, STEP, number_of(groups_ptr, 0, PROGRAMS + STEP)):
        begin_searches(fields_ptr, thresholds_ptr, offsets_ptr, groups_ptr, padded_groups, 0, 2, STEP, BLOCK)


@kernel
def _finish_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    fields_ptr,
    thresholds_ptr,
    offsets_ptr,
    addresses_ptr,
    values_ptr,
    partial_norms_ptr,
    norms_ptr,
    # Scalars
    n_tensors,
    padded_groups,
    chunks,
    first_row,
    rows,
    first_program,
    all_programs,
    capacity,
    weights,
    # Constexprs
    DTYPES: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Fuse the listed elements of a table with the exact thresholds; if the brackets failed, all elements.

    The last program sums the norms in a fixed order. The grid is capped; programs loop.
    """
    OUT: tl.constexpr = DTYPES[0]
    thresholds = (tl.load(thresholds_ptr), tl.load(thresholds_ptr + padded_groups))
    norm_in = tl.zeros((BLOCK // 4,), tl.float64)
    norm_out, norm_update = norm_in, norm_in
    failed = tl.load(fields_ptr + FAILED) != 0
    if failed:
        part = tl.program_id(0)
        while part < chunks:
            tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, part, BLOCK)
            lists = load_rows(pointers_ptr, tensor, n_tensors, DTYPES)
            selected, norm_in, norm_out, norm_update = fuse_chunk(
                lists, thresholds, weights, start, numel, (norm_in, norm_out, norm_update),
                DTYPES, (False, False), OUTER_FROM_INNER, BLOCK, TILES, ROUND_BF16,
            )  # fmt: skip
            add_counts(fields_ptr, selected)
            part += tl.num_programs(0)
    else:
        entry = tl.load(offsets_ptr + 2 * first_row) + tl.program_id(0).to(tl.int64) * BLOCK
        end = tl.load(offsets_ptr + 2 * (first_row + chunks) - 1)
        while entry < end:
            entries = entry + tl.arange(0, BLOCK)
            mask = entries < end
            m_in = tl.load(values_ptr + entries, mask=mask, other=0.0) > thresholds[0]
            m_out = tl.load(values_ptr + capacity + entries, mask=mask, other=0.0) > thresholds[1]
            base = tl.load(values_ptr + 2 * capacity + entries, mask=mask, other=0.0)
            inner = tl.load(values_ptr + 3 * capacity + entries, mask=mask, other=0.0)
            outer = tl.load(values_ptr + 4 * capacity + entries, mask=mask, other=0.0)
            fused, _, _ = merge(
                base, inner, outer, m_in, m_out, weights, DTYPES, OUTER_FROM_INNER, ROUND_BF16
            )
            addresses = tl.load(addresses_ptr + entries, mask=mask, other=0)
            tl.store(addresses.to(tl.pointer_type(tl.dtype(OUT))), fused, mask=mask)
            add_counts(fields_ptr, pack_counts(*cases(m_in, m_out, mask), BLOCK))
            norm_update += squared_lanes(fused.to(tl.float32) - base, BLOCK)
            entry += tl.num_programs(0).to(tl.int64) * BLOCK
    store_norms(partial_norms_ptr, rows + first_program + tl.program_id(0), norm_in, norm_out, norm_update)
    if last_program(fields_ptr, STEP, all_programs):
        row = tl.where(failed, rows, 0)  # the norms of the pass do not count if all elements were fused again
        total_in = tl.zeros((BLOCK,), tl.float64)
        total_out, total_update = total_in, total_in
        while row < rows + all_programs:
            here = row + tl.arange(0, BLOCK)
            mask = here < rows + all_programs
            total_in += tl.load(partial_norms_ptr + here * 3, mask=mask, other=0.0)
            total_out += tl.load(partial_norms_ptr + here * 3 + 1, mask=mask, other=0.0)
            total_update += tl.load(partial_norms_ptr + here * 3 + 2, mask=mask, other=0.0)
            row += BLOCK
        tl.store(norms_ptr, tl.sum(total_in))
        tl.store(norms_ptr + 1, tl.sum(total_out))
        tl.store(norms_ptr + 2, tl.sum(total_update))


def select_and_fuse_(
    inputs: FusionInputs,
    k: int,
    rule: MergeRule,
    *,
    config: LaunchConfig | None = None,
    bracketing: Bracketing | None = None,
) -> FuseStats:
    """See :func:`rkif_kernels.ops.select_and_fuse_`, for one threshold per side.

    ``k`` is that of both thresholds, from 0. ``out`` shares no memory with the inputs.
    """
    row = chosen("fuse", inputs.lists, inputs.numel)
    bracketing = bracketing or row.bracketing
    if inputs.numel < bracketing.min_numel:
        inner, outer = (
            radix_threshold(scores, k, config) for scores in (inputs.inner_scores, inputs.outer_scores)
        )
        return fuse_(inputs, (inner, outer), rule, config)
    config = config or row.launch
    with in_place(inputs.out, ALIGNMENT) as targets:
        rows = aligned((targets, *inputs.lists[1:]))  # keeps copies until the last launch
        return BracketedFusion(tables(rows, config.chunk), k, rule, config, bracketing).launch()


def prepared_fusion(
    inputs: FusionInputs,
    k: int,
    rule: MergeRule,
    *,
    config: LaunchConfig | None = None,
    bracketing: Bracketing | None = None,
) -> Callable[[FusionInputs], FuseStats] | None:
    """:func:`select_and_fuse_` for tensors with fixed addresses; None if it would copy some of them."""
    row = chosen("fuse", inputs.lists, inputs.numel)
    config, bracketing = config or row.launch, bracketing or row.bracketing
    rows = aligned(inputs.lists)
    pairs = zip(rows, inputs.lists, strict=True)
    addressable = all(same_tensors(row, role) for row, role in pairs if role is not None)
    if not addressable or inputs.numel < bracketing.min_numel:
        return None
    grouped = tables(rows, config.chunk)
    streams = StreamOrder(inputs.device, [memory for table in grouped for memory in table.memory])
    fusion = BracketedFusion(grouped, k, rule, config, bracketing)

    def launch(inputs: FusionInputs) -> FuseStats:
        streams.enter()
        keep_for_graph(fusion, inputs.lists)  # a plan drops its least recently used launches
        return fusion.launch()

    return launch


class BracketedFusion:
    """A fusion in one pass over memory, prepared for tensors with fixed addresses.

    Args:
        grouped: the tables of the lists in the order of ROLES.
        k, rule, config, bracketing: see :func:`select_and_fuse_`.
    """

    def __init__(
        self,
        grouped: Sequence[Table],
        k: int,
        rule: MergeRule,
        config: LaunchConfig,
        bracketing: Bracketing,
    ) -> None:
        self._device = grouped[0].pointers.device
        kind = {"ROLE": INNER_SCORE, "SIDES": 2, "DISTANCE": False}
        groups = find_groups(grouped, [k], False, 2, bracketing, config)
        undecided = Undecided.of(groups, 5, config)
        rows = groups.rows
        wanted = (max(table.programs, triton.cdiv(undecided.capacity, config.block)) for table in grouped)
        programs = [capped_grid(count, self._device) for count in wanted]
        self._undecided, self._norm_rows = undecided, rows[-1] + sum(programs)
        selection = replace(config, max_registers=None)
        brackets, samples = find_brackets(grouped, groups, kind, bracketing, selection)
        self._samples = 2 * samples
        passes, finish = [], []
        for index, (table, group_arguments) in enumerate(zip(grouped, groups.arguments, strict=True)):
            arguments = group_arguments | table.arguments | merge_arguments(table, rule, config)
            arguments["first_row"] = rows[index]
            passes.append(
                PreparedLaunch(
                    _bracketed_fuse_kernel,
                    table.programs,
                    arguments | {"STEP": PASS_STEP},
                    config.options,
                )
            )
            arguments |= {
                "rows": rows[-1],
                "capacity": undecided.capacity,
                "chunks": table.programs,
                "first_program": sum(programs[:index]),
                "all_programs": sum(programs),
                "STEP": FINISH_STEP,
            }
            finish.append(PreparedLaunch(_finish_kernel, programs[index], arguments, config.options))
        searches = list_and_search(grouped, groups, undecided, kind, selection, fused=True)
        self._launches = [*brackets, *passes, *searches, *finish]

    def launch(self) -> FuseStats:
        """Fuse once, on the current stream."""
        device = self._device
        memory = workspace(1, 2, device) | self._undecided.allocate(device)
        memory["samples_ptr"] = torch.empty(self._samples, dtype=torch.int32, device=device)
        memory["partial_norms_ptr"] = torch.empty((self._norm_rows, 3), dtype=torch.float64, device=device)
        memory["norms_ptr"] = torch.empty(3, dtype=torch.float64, device=device)
        for launch in self._launches:
            launch(memory)
        fields, thresholds = memory["fields_ptr"][0], memory["thresholds_ptr"]
        return FuseStats(fields[:4], memory["norms_ptr"], (thresholds[0, :1], thresholds[1, :1]))

"""Exact thresholds by one bracketed pass over the scores, or by radix selection for few scores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.triton.bracket import find_brackets
from rkif_kernels.backends.triton.elements import (
    add_counts,
    kernel,
    lane_sums,
    load_chunk,
    load_row,
    load_score,
    pack_counts,
    tile_mask,
)
from rkif_kernels.backends.triton.groups import PROGRAMS, find_groups, group_of, number_of
from rkif_kernels.backends.triton.launch import Bracketing, LaunchConfig, PreparedLaunch
from rkif_kernels.backends.triton.launches import chosen
from rkif_kernels.backends.triton.radix import radix_threshold
from rkif_kernels.backends.triton.table import aligned, tables
from rkif_kernels.backends.triton.undecided import (
    Undecided,
    begin_searches,
    list_and_search,
    load_bracket,
    store_undecided,
)
from rkif_kernels.backends.triton.whole import whole_tensors
from rkif_kernels.backends.triton.windows import (
    COUNTS,
    PASS_STEP,
    fields_of,
    last_program,
    searching,
    workspace,
)
from rkif_kernels.types import Scores


@triton.jit
def _bracketed_scores_tile(
    rows,
    brackets,
    first,
    numel,
    FULL: tl.constexpr,
    DTYPES: tl.constexpr,
    SIDES: tl.constexpr,
    DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The bits of the elements with a score in its bracket, and the counts of each side, in lanes."""
    offsets = first + tl.arange(0, BLOCK)
    mask = tile_mask(offsets, numel, FULL)
    none = tl.zeros_like(mask)
    score = load_score(rows[0], rows[1], offsets, mask, DTYPES[1] is not None, DISTANCE)
    inside = mask & (score > brackets[0]) & (score <= brackets[1])
    if SIDES == 2:
        other = load_score(rows[2], rows[3], offsets, mask, DTYPES[3] is not None, DISTANCE)
        inside_other = mask & (other > brackets[2]) & (other <= brackets[3])
        undecided = inside | inside_other
        fourth = undecided
        others = pack_counts(
            mask & (other < brackets[2]), mask & (other <= brackets[2]), inside_other, none, BLOCK
        )
    else:
        undecided, fourth = inside, none
        others = tl.zeros((BLOCK // 4,), tl.int32)
    return (
        lane_sums(undecided.to(tl.int32) << (tl.arange(0, BLOCK) & 3), BLOCK),
        pack_counts(mask & (score < brackets[0]), mask & (score <= brackets[0]), inside, fourth, BLOCK),
        others,
    )


@kernel
def _bracketed_scores_kernel(
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
    # Scalars
    n_tensors,
    padded_groups,
    groups_a_tensor,
    first_row,
    # Constexprs
    DTYPES: tl.constexpr,
    SIDES: tl.constexpr,
    DISTANCE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Mark the elements with a score in its bracket, and count the scores below.

    Float32: reads 8 bytes per element (S, U) and side, writes a bit. Tensors whose thresholds are known are
    not read. The loop has neither barriers nor atomics.
    """
    chunk = tl.program_id(0)
    tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK)
    group = group_of(indices_ptr, tensor, groups_a_tensor)
    own_ptr = fields_of(fields_ptr, group, SIDES)
    if searching(own_ptr, SIDES):
        OTHER: tl.constexpr = 2 * SIDES - 2  # for one side the same rows again, which are not read
        rows = (
            load_row(pointers_ptr, 0, tensor, n_tensors, DTYPES),
            load_row(pointers_ptr, 1, tensor, n_tensors, DTYPES),
            load_row(pointers_ptr, OTHER, tensor, n_tensors, DTYPES),
            load_row(pointers_ptr, OTHER + 1, tensor, n_tensors, DTYPES),
        )
        lo, hi = load_bracket(own_ptr, 0)
        lo_other, hi_other = load_bracket(own_ptr, SIDES - 1)
        brackets = (lo, hi, lo_other, hi_other)
        bits = tl.zeros((BLOCK // 4,), tl.int64)
        counts = tl.zeros((BLOCK // 4,), tl.int32)
        others = counts
        for tile in range(TILES):
            first = start + tile * BLOCK
            if first < numel:
                if first + BLOCK <= numel:
                    marks, n, m = _bracketed_scores_tile(
                        rows, brackets, first, numel, True, DTYPES, SIDES, DISTANCE, BLOCK
                    )
                else:
                    marks, n, m = _bracketed_scores_tile(
                        rows, brackets, first, numel, False, DTYPES, SIDES, DISTANCE, BLOCK
                    )
                bits |= marks.to(tl.int64) << (4 * tile)
                counts += n
                others += m
        UNDECIDED: tl.constexpr = 8 * (SIDES + 1)  # one side packs no fourth count
        undecided = tl.sum((counts >> UNDECIDED) & 0xFF)
        store_undecided(bits_ptr, offsets_ptr, first_row + chunk, bits, undecided, BLOCK)
        add_counts(own_ptr + COUNTS, counts, 3)
        if SIDES == 2:
            add_counts(own_ptr + COUNTS + 4, others, 3)
        if last_program(own_ptr, STEP, number_of(groups_ptr, group, PROGRAMS + STEP)):
            begin_searches(
                own_ptr, thresholds_ptr, offsets_ptr, groups_ptr, padded_groups, group, SIDES, STEP, BLOCK
            )


def score_thresholds(
    scores: Scores,
    *,
    ks: Sequence[int],
    per_tensor: bool,
    config: LaunchConfig | None = None,
    bracketing: Bracketing | None = None,
    whole: LaunchConfig | None = None,
) -> Tensor:
    """See :func:`rkif_kernels.ops.score_thresholds`; one ``k`` for each group, from 0."""
    (thresholds,) = _thresholds([scores], ks, per_tensor, config, bracketing, whole)
    return thresholds


def both_thresholds(
    inner: Scores,
    outer: Scores,
    *,
    ks: Sequence[int],
    per_tensor: bool,
    config: LaunchConfig | None = None,
    bracketing: Bracketing | None = None,
    whole: LaunchConfig | None = None,
) -> list[Tensor]:
    """:func:`score_thresholds` of both learners, in the same launches if both scores have the same form."""
    together = [[inner, outer]] if inner.distance == outer.distance else [[inner], [outer]]
    thresholds = (_thresholds(sides, ks, per_tensor, config, bracketing, whole) for sides in together)
    return list(chain.from_iterable(thresholds))


def _thresholds(
    sides: Sequence[Scores],
    ks: Sequence[int],
    per_tensor: bool,
    config: LaunchConfig | None,
    bracketing: Bracketing | None,
    whole: LaunchConfig | None,
) -> list[Tensor]:
    """The thresholds of one or two scores of the same elements."""
    lists, numel = (
        [part for scores in sides for part in (scores.sensitivity, scores.uncertainty)],
        sides[0].numel,
    )
    row = chosen("threshold", lists, numel)
    bracketing = bracketing or row.bracketing
    if not per_tensor and numel < bracketing.min_numel:
        return [radix_threshold(scores, ks[0], config) for scores in sides]
    config = config or row.launch
    whole = whole or chosen("whole", lists, numel).launch
    rows = aligned(lists)  # keeps copies until the last launch
    grouped = tables(rows, config.chunk)
    groups = find_groups(grouped, ks, per_tensor, len(sides), bracketing, config, whole.block)
    undecided = Undecided.of(groups, len(sides), config)
    kind = {"ROLE": 0, "SIDES": len(sides), "DISTANCE": sides[0].distance}
    launches = whole_tensors(grouped, groups, kind, whole)
    samplings, samples = find_brackets(grouped, groups, kind, bracketing, config)
    launches += samplings
    for table, group_arguments, first_row, pieces in zip(
        grouped, groups.arguments, groups.rows, groups.pieces, strict=False
    ):
        arguments = {
            # Scalars
            "first_row": first_row,
            # Constexprs
            "DTYPES": table.dtypes,
            "STEP": PASS_STEP,
            "BLOCK": config.block,
            "TILES": config.tiles,
        }
        arguments |= table.arguments | group_arguments | kind
        if pieces.programs:
            launches.append(
                PreparedLaunch(_bracketed_scores_kernel, table.programs, arguments, config.options)
            )
    device = sides[0].device
    memory = workspace(groups.count, len(sides), device) | undecided.allocate(device)
    memory["samples_ptr"] = torch.empty(groups.count * len(sides) * samples, dtype=torch.int32, device=device)
    for launch in (*launches, *list_and_search(grouped, groups, undecided, kind, config, fused=False)):
        launch(memory)
    return list(memory["thresholds_ptr"][:, : groups.count].unbind())

"""Exact thresholds by one bracketed pass; for few scores, or one threshold per tensor, by radix selection."""

from __future__ import annotations

from collections.abc import Sequence

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
from rkif_kernels.backends.triton.launch import Bracketing, LaunchConfig, PreparedLaunch
from rkif_kernels.backends.triton.launches import chosen
from rkif_kernels.backends.triton.radix import radix_thresholds
from rkif_kernels.backends.triton.table import aligned, tables
from rkif_kernels.backends.triton.undecided import (
    Undecided,
    begin_searches,
    list_and_search,
    load_bracket,
    store_undecided,
)
from rkif_kernels.backends.triton.windows import COUNTS, PASS_STEP, last_program, workspace
from rkif_kernels.types import Scores


@triton.jit
def _bracketed_scores_tile(
    s_ptr,
    u_ptr,
    lo,
    hi,
    first,
    numel,
    FULL: tl.constexpr,
    UNCERTAINTY: tl.constexpr,
    DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The bits of the scores in the bracket, and the counts, in lanes."""
    offsets = first + tl.arange(0, BLOCK)
    mask = tile_mask(offsets, numel, FULL)
    score = load_score(s_ptr, u_ptr, offsets, mask, UNCERTAINTY, DISTANCE)
    inside = mask & (score > lo) & (score <= hi)
    return (
        lane_sums(inside.to(tl.int32) << (tl.arange(0, BLOCK) & 3), BLOCK),
        pack_counts(mask & (score < lo), mask & (score <= lo), inside, tl.zeros_like(mask), BLOCK),
    )


@kernel
def _bracketed_scores_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    fields_ptr,
    thresholds_ptr,
    bits_ptr,
    offsets_ptr,
    # Scalars
    n_tensors,
    first_row,
    rows,
    capacity,
    k,
    # Constexprs
    DTYPES: tl.constexpr,
    DISTANCE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Mark the scores in the bracket, and count those below it. Float32: reads 8 bytes per element (S, U)."""
    chunk = tl.program_id(0)
    tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK)
    s_ptr = load_row(pointers_ptr, 0, tensor, n_tensors, DTYPES)
    u_ptr = load_row(pointers_ptr, 1, tensor, n_tensors, DTYPES)
    lo, hi = load_bracket(fields_ptr, 0)
    bits = tl.zeros((BLOCK // 4,), tl.int64)
    counts = tl.zeros((BLOCK // 4,), tl.int32)
    for tile in range(TILES):
        first = start + tile * BLOCK
        if first < numel:
            if first + BLOCK <= numel:
                marks, n = _bracketed_scores_tile(
                    s_ptr, u_ptr, lo, hi, first, numel, True, DTYPES[1] is not None, DISTANCE, BLOCK
                )
            else:
                marks, n = _bracketed_scores_tile(
                    s_ptr, u_ptr, lo, hi, first, numel, False, DTYPES[1] is not None, DISTANCE, BLOCK
                )
            bits |= marks.to(tl.int64) << (4 * tile)
            counts += n
    store_undecided(bits_ptr, offsets_ptr, first_row + chunk, bits, tl.sum((counts >> 16) & 0xFF), BLOCK)
    add_counts(fields_ptr + COUNTS, counts, 3)
    if last_program(fields_ptr, STEP, rows):
        begin_searches(fields_ptr, thresholds_ptr, offsets_ptr, rows, capacity, k, 1, BLOCK)


def score_thresholds(
    scores: Scores,
    *,
    ks: Sequence[int],
    per_tensor: bool,
    config: LaunchConfig | None = None,
    bracketing: Bracketing | None = None,
) -> Tensor:
    """See :func:`rkif_kernels.ops.score_thresholds`; one ``k`` for each group, from 0."""
    lists, numel = (scores.sensitivity, scores.uncertainty), scores.numel
    row = chosen("threshold", lists, numel)
    bracketing = bracketing or row.bracketing
    if per_tensor or numel < bracketing.min_numel:
        return radix_thresholds(scores, ks=ks, per_tensor=per_tensor, config=config)
    config = config or row.launch
    (k,), fraction = ks, ks[0] / max(numel - 1, 1)
    rows = aligned(lists)  # copies among them live until the last launch
    grouped = tables(rows, config.chunk)
    device = grouped[0].pointers.device
    undecided = Undecided.of(grouped, bracketing.capacity(fraction, numel, sides=1), 1, config)
    kind = {"ROLE": 0, "SIDES": 1, "DISTANCE": scores.distance}
    launches, samples = find_brackets(grouped, kind, fraction, bracketing, config)
    for table, first_row in zip(grouped, undecided.rows, strict=False):
        arguments = {
            # Scalars
            "first_row": first_row,
            "rows": undecided.rows[-1],
            "capacity": undecided.capacity,
            "k": k,
            # Constexprs
            "DTYPES": table.dtypes,
            "DISTANCE": scores.distance,
            "STEP": PASS_STEP,
            "BLOCK": config.block,
            "TILES": config.tiles,
        }
        arguments |= table.arguments
        launches.append(PreparedLaunch(_bracketed_scores_kernel, table.programs, arguments, config.options))
    memory = workspace(1, device) | undecided.allocate(device)
    memory["samples_ptr"] = torch.empty(samples, dtype=torch.int32, device=device)
    for launch in (*launches, *list_and_search(grouped, undecided, kind, config)):
        launch(memory)
    return memory["thresholds_ptr"]

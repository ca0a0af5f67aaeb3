"""Exact thresholds and the fusion itself in one pass over memory.

A sample gives each learner a bracket (lo, hi] that very probably holds the wanted order statistic, and holds
few of the scores. One pass reads everything: a score that is not above lo is not selected and one above hi
is, so almost every element is final when it is written. The few others are listed; the pass also counts what
lies below the brackets. From the counts and the list follow the exact thresholds, and the listed elements
are done over.

The counts prove whether a bracket held what it should. If one did not, or the list was too short (ties by
the million at the threshold), a radix selection over everything and a second fusion follow. They are always
launched, and do nothing where they are not needed: so nothing waits for the device, and the whole can be
captured in a CUDA graph. The price is that ``out`` must not be one of the inputs, or the second fusion would
find its inputs overwritten by the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.triton.elements import (
    add_packed,
    find_tensor,
    gather_float32,
    gather_score,
    kernel,
    load_float32,
    load_row,
    load_score,
    packed,
    squares,
)
from rkif_kernels.backends.triton.fuse import (
    INNER_SCORE,
    OUTER_SCORE,
    cases,
    constants,
    launch_fuse,
    merge,
    norms_of,
    scalars,
    store_norms,
)
from rkif_kernels.backends.triton.launch import BRACKETING, FUSE, Bracketing, LaunchConfig
from rkif_kernels.backends.triton.radix import select_from_lists, select_from_tables
from rkif_kernels.backends.triton.table import ALIGNMENT, Table, aligned, constant, tables
from rkif_kernels.contiguous import in_place
from rkif_kernels.types import ROLES, CaseWeights, FuseStats, FusionInputs, OuterFrom

# What the pass leaves behind in one int64 array: the four cases' counts; for each learner the scores < lo,
# <= lo, and in the bracket, and one unused; how many elements were listed, how many entries of the list
# count, and whether the brackets failed.
SIDES, LISTED, LENGTH, FAILED = (tl.constexpr(place) for place in (4, 12, 13, 14))
TALLIES = 15


@kernel
def _sample_kernel(
    # Tensors
    pointers_ptr,
    firsts_ptr,
    samples_ptr,
    # Scalars
    n_tensors,
    start,
    numel,
    step,
    cells,
    first_cell,
    all_cells,
    # Constexprs
    INNER_S: tl.constexpr,
    INNER_U: tl.constexpr,
    OUTER_S: tl.constexpr,
    OUTER_U: tl.constexpr,
    INNER_ROLE: tl.constexpr,
    OUTER_ROLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both learners' scores of one element from every ``step`` neighbours, at a hashed place among them.

    Equal distances alone would fall into step with a pattern in the parameters.
    """
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cell < cells
    begin = cell.to(tl.int64) * step
    bits = (first_cell + cell).to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    width = tl.minimum(numel - begin, step)
    positions = start + begin + ((bits.to(tl.int64) * width) >> 32)
    tensors = find_tensor(firsts_ptr, n_tensors, positions, mask)
    offsets = positions - tl.load(firsts_ptr + tensors, mask=mask, other=0)
    inner = gather_score(pointers_ptr, INNER_ROLE, tensors, n_tensors, offsets, mask, INNER_S, INNER_U)
    outer = gather_score(pointers_ptr, OUTER_ROLE, tensors, n_tensors, offsets, mask, OUTER_S, OUTER_U)
    tl.store(samples_ptr + first_cell + cell, inner, mask=mask)
    tl.store(samples_ptr + all_cells + first_cell + cell, outer, mask=mask)


@triton.jit
def _pass_tile(
    rows,
    brackets,
    weights,
    position,
    offsets,
    mask,
    tally_ptr,
    positions_ptr,
    values_ptr,
    capacity,
    OUT: tl.constexpr,
    INNER_U: tl.constexpr,
    OUTER_U: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Fuse what the brackets decide, list what they do not; returns counts and squared norms, in lanes."""
    out_ptr, base_ptr, inner_ptr, outer_ptr, s_in_ptr, u_in_ptr, s_out_ptr, u_out_ptr = rows
    base = load_float32(base_ptr, offsets, mask)
    inner = load_float32(inner_ptr, offsets, mask)
    outer = load_float32(outer_ptr, offsets, mask)
    score_in = load_score(s_in_ptr, u_in_ptr, offsets, mask, INNER_U)
    score_out = load_score(s_out_ptr, u_out_ptr, offsets, mask, OUTER_U)

    m_in = score_in > brackets[0]
    m_out = score_out > brackets[2]
    open_in = mask & m_in & (score_in <= brackets[1])
    open_out = mask & m_out & (score_out <= brackets[3])
    listed = open_in | open_out
    # What is listed is stored with the rest, as if above the threshold: a mask would narrow the store.
    fused, tau_in, tau_out = merge(
        base, inner, outer, m_in, m_out, weights, OUT, OUTER_FROM_INNER, ROUND_BF16
    )
    tl.store(out_ptr + offsets, fused, mask=mask)

    n_listed = tl.sum(listed.to(tl.int32))
    if n_listed > 0:
        first = tl.atomic_add(tally_ptr + LISTED, n_listed.to(tl.int64), sem="relaxed")
        place = tl.cumsum(listed.to(tl.int32)) - 1
        keep = listed & (place < capacity - first)
        tl.store(positions_ptr + first + place, position + offsets, mask=keep)
        # Infinity on a side that is decided: it comes after every score that the side's k-th can be.
        tl.store(values_ptr + first + place, tl.where(open_in, score_in, float("inf")), mask=keep)
        tl.store(
            values_ptr + capacity + first + place, tl.where(open_out, score_out, float("inf")), mask=keep
        )

    none = tl.zeros_like(mask)
    return (
        packed(*cases(m_in, m_out, mask & (listed == 0)), BLOCK),
        packed(mask & (score_in < brackets[0]), mask & (m_in == 0), open_in, none, BLOCK),
        packed(mask & (score_out < brackets[2]), mask & (m_out == 0), open_out, none, BLOCK),
        squares(tau_in, BLOCK),
        squares(tau_out, BLOCK),
        squares(tl.where(listed, 0.0, fused.to(tl.float32) - base), BLOCK),
    )


@kernel
def _pass_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    firsts_ptr,
    brackets_ptr,
    tally_ptr,
    positions_ptr,
    values_ptr,
    partial_norms_ptr,
    # Scalars
    n_tensors,
    capacity,
    in_only_in,
    in_only_out,
    out_only_in,
    out_only_out,
    both_in,
    both_out,
    neither_in,
    neither_out,
    # Constexprs
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    INNER_S: tl.constexpr,
    INNER_U: tl.constexpr,
    OUTER_S: tl.constexpr,
    OUTER_U: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """The pass over everything. Float32 with uncertainties: reads 28 bytes an element, writes 4.

    A program owns one chunk of one tensor. Counts are integer atomics, squared norms go to a slot a program.
    The list's order depends on timing; it matters to the last bits of the update's norm alone.
    """
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensors_ptr + program)
    start = tl.multiple_of(tl.load(chunk_starts_ptr + program), BLOCK)
    numel = tl.load(numels_ptr + tensor)
    position = tl.load(firsts_ptr + tensor)
    rows = (
        load_row(pointers_ptr, 0, tensor, n_tensors, OUT),
        load_row(pointers_ptr, 1, tensor, n_tensors, BASE),
        load_row(pointers_ptr, 2, tensor, n_tensors, INNER),
        load_row(pointers_ptr, 3, tensor, n_tensors, OUTER),
        load_row(pointers_ptr, 4, tensor, n_tensors, INNER_S),
        load_row(pointers_ptr, 5, tensor, n_tensors, INNER_U),
        load_row(pointers_ptr, 6, tensor, n_tensors, OUTER_S),
        load_row(pointers_ptr, 7, tensor, n_tensors, OUTER_U),
    )
    brackets = (
        tl.load(brackets_ptr),
        tl.load(brackets_ptr + 1),
        tl.load(brackets_ptr + 2),
        tl.load(brackets_ptr + 3),
    )
    weights = (
        in_only_in, in_only_out, out_only_in, out_only_out, both_in, both_out, neither_in, neither_out,
    )  # fmt: skip

    selected = tl.zeros((BLOCK // 4,), tl.int32)
    inner_side, outer_side = selected, selected
    norm_in = tl.zeros((BLOCK // 4,), tl.float64)
    norm_out, norm_update = norm_in, norm_in
    for tile in range(TILES):
        first = start + tile * BLOCK
        offsets = first + tl.arange(0, BLOCK)
        if first < numel:
            # A mask that depends on the size would narrow every access to one element; only the tail has one.
            if first + BLOCK <= numel:
                a, b, c, x, y, z = _pass_tile(
                    rows, brackets, weights, position, offsets, tl.zeros((BLOCK,), tl.int1) == 0,
                    tally_ptr, positions_ptr, values_ptr, capacity,
                    OUT, INNER_U, OUTER_U, OUTER_FROM_INNER, BLOCK, ROUND_BF16,
                )  # fmt: skip
            else:
                a, b, c, x, y, z = _pass_tile(
                    rows, brackets, weights, position, offsets, offsets < numel,
                    tally_ptr, positions_ptr, values_ptr, capacity,
                    OUT, INNER_U, OUTER_U, OUTER_FROM_INNER, BLOCK, ROUND_BF16,
                )  # fmt: skip
            selected += a
            inner_side += b
            outer_side += c
            norm_in += x
            norm_out += y
            norm_update += z
    add_packed(tally_ptr, selected)
    add_packed(tally_ptr + SIDES, inner_side)
    add_packed(tally_ptr + SIDES + 4, outer_side)
    store_norms(partial_norms_ptr, program, norm_in, norm_out, norm_update)


@kernel
def _decide_kernel(
    # Tensors
    tally_ptr,
    brackets_ptr,
    ks_ptr,
    thresholds_ptr,
    in_list_ptr,
    in_all_ptr,
    # Scalars
    capacity,
):
    """Where each threshold is to be found: at lo, in the list, or, the brackets having failed, anywhere.

    Writes each side's k among the listed scores and among all, -1 where it need not be looked for there.
    """
    listed = tl.load(tally_ptr + LISTED)
    failed = listed > capacity
    for side in tl.static_range(2):
        k = tl.load(ks_ptr + side)
        below = tl.load(tally_ptr + SIDES + 4 * side)
        upto = tl.load(tally_ptr + SIDES + 4 * side + 1)
        inside = tl.load(tally_ptr + SIDES + 4 * side + 2)
        failed = failed | (k < below) | (k >= upto + inside)
        tl.store(thresholds_ptr + side, tl.load(brackets_ptr + 2 * side))
    for side in tl.static_range(2):
        k = tl.load(ks_ptr + side)
        upto = tl.load(tally_ptr + SIDES + 4 * side + 1)
        tl.store(in_list_ptr + side, tl.where(failed | (k < upto), -1, k - upto))
        tl.store(in_all_ptr + side, tl.where(failed, k, -1))
    tl.store(tally_ptr + LENGTH, tl.where(failed, 0, listed))
    tl.store(tally_ptr + FAILED, failed.to(tl.int64))
    for case in tl.static_range(4):  # the second fusion counts again
        tl.store(tally_ptr + case, tl.where(failed, 0, tl.load(tally_ptr + case)))


@kernel
def _fix_up_kernel(
    # Tensors
    pointers_ptr,
    firsts_ptr,
    positions_ptr,
    thresholds_ptr,
    tally_ptr,
    partial_norms_ptr,
    # Scalars
    n_tensors,
    start,
    numel,
    in_only_in,
    in_only_out,
    out_only_in,
    out_only_out,
    both_in,
    both_out,
    neither_in,
    neither_out,
    # Constexprs
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    INNER_S: tl.constexpr,
    INNER_U: tl.constexpr,
    OUTER_S: tl.constexpr,
    OUTER_U: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Fuse the listed elements of this table, now that the thresholds are known."""
    program = tl.program_id(0)
    entries = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < tl.load(tally_ptr + LENGTH)
    positions = tl.load(positions_ptr + entries, mask=mask, other=-1)
    mask = mask & (positions >= start) & (positions - start < numel)  # start + numel may not fit 32 bits
    tensors = find_tensor(firsts_ptr, n_tensors, positions, mask)
    offsets = positions - tl.load(firsts_ptr + tensors, mask=mask, other=0)
    base = gather_float32(pointers_ptr, 1, tensors, n_tensors, offsets, mask, BASE)
    inner = gather_float32(pointers_ptr, 2, tensors, n_tensors, offsets, mask, INNER)
    outer = gather_float32(pointers_ptr, 3, tensors, n_tensors, offsets, mask, OUTER)
    score_in = gather_score(pointers_ptr, 4, tensors, n_tensors, offsets, mask, INNER_S, INNER_U)
    score_out = gather_score(pointers_ptr, 6, tensors, n_tensors, offsets, mask, OUTER_S, OUTER_U)
    m_in = score_in > tl.load(thresholds_ptr)
    m_out = score_out > tl.load(thresholds_ptr + 1)
    weights = (
        in_only_in, in_only_out, out_only_in, out_only_out, both_in, both_out, neither_in, neither_out,
    )  # fmt: skip
    fused, _, _ = merge(base, inner, outer, m_in, m_out, weights, OUT, OUTER_FROM_INNER, ROUND_BF16)
    targets = tl.load(pointers_ptr + tensors, mask=mask, other=0).to(tl.pointer_type(OUT))
    tl.store(targets + offsets, fused, mask=mask)
    add_packed(tally_ptr, packed(*cases(m_in, m_out, mask), BLOCK))
    zero = tl.zeros((BLOCK // 4,), tl.float64)
    store_norms(partial_norms_ptr, program, zero, zero, squares(fused.to(tl.float32) - base, BLOCK))


def select_and_fuse_(
    inputs: FusionInputs,
    *,
    k: int,
    weights: CaseWeights,
    outer_from: OuterFrom,
    config: LaunchConfig = FUSE,
    bracketing: Bracketing = BRACKETING,
) -> FuseStats:
    """See :func:`rkif_kernels.ops.select_and_fuse_`, for one threshold a side.

    ``k`` is that of both thresholds, from 0. ``out`` shares no memory with the inputs.
    """
    device, numel = inputs.device, inputs.numel
    tally = torch.zeros(TALLIES, dtype=torch.int64, device=device)
    thresholds = torch.empty(2, dtype=torch.float32, device=device)
    fusion = {"weights": weights, "outer_from": outer_from, "config": config}
    sides = {"s_roles": (INNER_SCORE, OUTER_SCORE), "per_tensor": False, "config": config}
    with in_place(inputs.out, ALIGNMENT) as targets:
        rows = aligned((targets, *inputs.lists[1:]))
        grouped = tables(rows, config.chunk)
        if numel < bracketing.least:
            norms, parts = norms_of(grouped, 0, device)
            ks = constant(device, (k, k), torch.int64).clone()
            select_from_tables(grouped, remaining=ks, found=thresholds, **sides)
            launch_fuse(grouped, parts[: len(grouped)], thresholds.split(1), tally, **fusion)
        else:
            step = bracketing.step(numel)
            cells = [triton.cdiv(table.numel, step) for table in grouped]
            capacity = bracketing.capacity(k, numel, sum(cells))
            lists = triton.cdiv(capacity, config.block)
            norms, parts = norms_of(grouped, lists, device)
            first, fixed = parts[: len(grouped)], parts[len(grouped) :]
            positions = torch.empty(capacity, dtype=torch.int64, device=device)
            values = torch.empty((2, capacity), dtype=torch.float32, device=device)
            in_list, in_all = torch.empty((2, 2), dtype=torch.int64, device=device)

            ends = bracketing.sample_ks(k, numel, sum(cells))
            brackets = _brackets(grouped, step, cells, ends, config, device)
            for table, partial in zip(grouped, first, strict=True):
                _pass_kernel[(table.programs,)](
                    # Tensors
                    table.pointers,
                    table.layout.numels,
                    table.layout.chunk_tensors,
                    table.layout.chunk_starts,
                    table.firsts,
                    brackets,
                    tally,
                    positions,
                    values,
                    partial,
                    # Scalars
                    n_tensors=table.tensors,
                    capacity=capacity,
                    **scalars(weights),
                    # Constexprs
                    BLOCK=config.block,
                    TILES=config.tiles,
                    **constants(table, outer_from),
                    **config.options,
                )
            _decide_kernel[(1,)](
                tally, brackets, constant(device, (k, k), torch.int64), thresholds, in_list, in_all,
                capacity=capacity, **config.options,
            )  # fmt: skip
            length, failed = (tally[place.value : place.value + 1] for place in (LENGTH, FAILED))
            select_from_lists(values, length, in_list, thresholds, config=config)
            for table, partial in zip(grouped, fixed, strict=True):
                _fix_up_kernel[(lists,)](
                    # Tensors
                    table.pointers,
                    table.firsts,
                    positions,
                    thresholds,
                    tally,
                    partial,
                    # Scalars
                    n_tensors=table.tensors,
                    start=table.start,
                    numel=table.numel,
                    **scalars(weights),
                    # Constexprs
                    BLOCK=config.block,
                    **constants(table, outer_from),
                    **config.options,
                )
            select_from_tables(grouped, remaining=in_all, found=thresholds, **sides)
            launch_fuse(grouped, first, thresholds.split(1), tally, run=failed, **fusion)
    return FuseStats(tally[:4], norms.sum(0), thresholds.split(1))


def _brackets(
    grouped: Sequence[Table],
    step: int,
    cells: Sequence[int],
    ends: tuple[int, int],
    config: LaunchConfig,
    device: torch.device,
) -> Tensor:
    """float32 [4]: lo and hi for the inner learner, then for the outer one.

    Args:
        step: neighbours that one score is sampled from.
        cells: scores sampled from each table.
        ends: ks of lo and hi in the sample; -1 for a side that lies beyond it, and excludes nothing.
    """
    samples = torch.empty((2, sum(cells)), dtype=torch.float32, device=device)
    for index, (table, here) in enumerate(zip(grouped, cells, strict=True)):
        _sample_kernel[(triton.cdiv(here, config.block),)](
            # Tensors
            table.pointers,
            table.firsts,
            samples,
            # Scalars
            n_tensors=table.tensors,
            start=table.start,
            numel=table.numel,
            step=step,
            cells=here,
            first_cell=sum(cells[:index]),
            all_cells=sum(cells),
            # Constexprs
            **dict(zip(ROLES[INNER_SCORE:], table.dtypes[INNER_SCORE:], strict=True)),
            INNER_ROLE=INNER_SCORE,
            OUTER_ROLE=OUTER_SCORE,
            BLOCK=config.block,
            **config.options,
        )
    brackets = constant(device, (-1.0, float("inf")) * 2, torch.float32).clone()
    select_from_lists(
        samples,
        constant(device, (sum(cells),), torch.int64),
        constant(device, ends * 2, torch.int64).clone(),
        brackets,
        config=config,
    )
    return brackets

"""The masked, weighted merge of two task vectors, with given thresholds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.choose import interpreting
from rkif_kernels.backends.triton.elements import (
    add_counts,
    kernel,
    load_chunk,
    load_float32,
    load_rows,
    load_score,
    pack_counts,
    round_to,
    squared_lanes,
    tile_mask,
)
from rkif_kernels.backends.triton.launch import LaunchConfig
from rkif_kernels.backends.triton.launches import chosen
from rkif_kernels.backends.triton.table import ALIGNMENT, Table, aligned, tables
from rkif_kernels.contiguous import in_place
from rkif_kernels.types import ROLES, FuseStats, FusionInputs, MergeRule

INNER_SCORE = ROLES.index("INNER_S")


@triton.jit
def _by_case(m_in, m_out, in_only, out_only, both, neither):
    return tl.where(m_in, tl.where(m_out, both, in_only), tl.where(m_out, out_only, neither))


@triton.jit
def merge(
    base,
    inner,
    outer,
    m_in,
    m_out,
    weights,
    DTYPES: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """(base + w_in*tau_in) + w_out*tau_out, rounded to the dtype of the output; and the two task vectors."""
    tau_in = inner - base
    tau_out = outer - (inner if OUTER_FROM_INNER else base)
    w_in = _by_case(m_in, m_out, weights[0], weights[2], weights[4], weights[6])
    w_out = _by_case(m_in, m_out, weights[1], weights[3], weights[5], weights[7])
    return round_to((base + w_in * tau_in) + w_out * tau_out, DTYPES, 0, ROUND_BF16), tau_in, tau_out


@triton.jit
def cases(m_in, m_out, mask):
    """Masks of the elements selected by the inner learner only, the outer only, both, neither."""
    m_in, others = mask & m_in, mask & (m_in == 0)
    return m_in & (m_out == 0), others & m_out, m_in & m_out, others & (m_out == 0)


@triton.jit
def load_tile(
    rows, first, numel, FULL: tl.constexpr, DTYPES: tl.constexpr, DISTANCES: tl.constexpr, BLOCK: tl.constexpr
):
    """One block: offsets, mask, base, inner and outer in float32, and the scores of each learner."""
    offsets = first + tl.arange(0, BLOCK)
    mask = tile_mask(offsets, numel, FULL)
    base = load_float32(rows[1], offsets, mask)
    inner = load_float32(rows[2], offsets, mask)
    outer = load_float32(rows[3], offsets, mask)
    score_in = load_score(rows[4], rows[5], offsets, mask, DTYPES[5] is not None, DISTANCES[0])
    score_out = load_score(rows[6], rows[7], offsets, mask, DTYPES[7] is not None, DISTANCES[1])
    return offsets, mask, base, inner, outer, score_in, score_out


@triton.jit
def store_norms(partial_norms_ptr, row, inner, outer, update):
    """Sum a program's three squared norms over lanes, and store them in its row."""
    tl.store(partial_norms_ptr + row * 3, tl.sum(inner))
    tl.store(partial_norms_ptr + row * 3 + 1, tl.sum(outer))
    tl.store(partial_norms_ptr + row * 3 + 2, tl.sum(update))


@triton.jit
def _fuse_tile(
    rows,
    thresholds,
    weights,
    first,
    numel,
    FULL: tl.constexpr,
    DTYPES: tl.constexpr,
    DISTANCES: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Fuse one block; returns its counts of the cases and three squared norms, in lanes."""
    offsets, mask, base, inner, outer, score_in, score_out = load_tile(
        rows, first, numel, FULL, DTYPES, DISTANCES, BLOCK
    )
    m_in, m_out = score_in > thresholds[0], score_out > thresholds[1]
    fused, tau_in, tau_out = merge(
        base, inner, outer, m_in, m_out, weights, DTYPES, OUTER_FROM_INNER, ROUND_BF16
    )
    tl.store(rows[0] + offsets, fused, mask=mask)
    # Values beyond the mask were loaded as zero, so only the counts need the mask.
    return (
        pack_counts(*cases(m_in, m_out, mask), BLOCK),
        squared_lanes(tau_in, BLOCK),
        squared_lanes(tau_out, BLOCK),
        squared_lanes(fused.to(tl.float32) - base, BLOCK),
    )


@triton.jit
def fuse_chunk(
    rows,
    thresholds,
    weights,
    start,
    numel,
    norms,
    DTYPES: tl.constexpr,
    DISTANCES: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Fuse one chunk; returns its counts of the cases, and the three norms with its own added, in lanes."""
    selected = tl.zeros((BLOCK // 4,), tl.int32)
    norm_in, norm_out, norm_update = norms
    for tile in range(TILES):
        first = start + tile * BLOCK
        if first < numel:
            if first + BLOCK <= numel:
                n, x, y, z = _fuse_tile(
                    rows, thresholds, weights, first, numel, True, DTYPES,
                    DISTANCES, OUTER_FROM_INNER, BLOCK, ROUND_BF16,
                )  # fmt: skip
            else:
                n, x, y, z = _fuse_tile(
                    rows, thresholds, weights, first, numel, False, DTYPES,
                    DISTANCES, OUTER_FROM_INNER, BLOCK, ROUND_BF16,
                )  # fmt: skip
            selected += n
            norm_in += x
            norm_out += y
            norm_update += z
    return selected, norm_in, norm_out, norm_update


@kernel
def _fuse_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    indices_ptr,
    inner_thresholds_ptr,
    outer_thresholds_ptr,
    counts_ptr,
    partial_norms_ptr,
    # Scalars
    n_tensors,
    inner_stride,
    outer_stride,
    weights,
    # Constexprs
    DTYPES: tl.constexpr,
    DISTANCES: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """out = (base + w_in*(inner - base)) + w_out*(outer - inner), weights by the two mask bits.

    A program owns one chunk of one tensor. Float32 with uncertainties: reads 28 bytes per element, writes 4.
    Counts are integer atomics, and each program stores its squared norms in its own row, so results do not
    depend on timing.
    """
    chunk = tl.program_id(0)
    tensor, start, numel = load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK)
    rows = load_rows(pointers_ptr, tensor, n_tensors, DTYPES)
    index = tl.load(indices_ptr + tensor)
    thresholds = (
        tl.load(inner_thresholds_ptr + index * inner_stride),
        tl.load(outer_thresholds_ptr + index * outer_stride),
    )
    zero = tl.zeros((BLOCK // 4,), tl.float64)
    selected, norm_in, norm_out, norm_update = fuse_chunk(
        rows, thresholds, weights, start, numel, (zero, zero, zero), DTYPES,
        DISTANCES, OUTER_FROM_INNER, BLOCK, TILES, ROUND_BF16,
    )  # fmt: skip
    add_counts(counts_ptr, selected)
    store_norms(partial_norms_ptr, chunk, norm_in, norm_out, norm_update)


def merge_arguments(table: Table, rule: MergeRule, config: LaunchConfig) -> dict[str, object]:
    """The arguments of the fusing kernels other than memory: weights and constants."""
    return {
        "weights": rule.factors,
        "DTYPES": table.dtypes,
        "OUTER_FROM_INNER": rule.outer_from == "inner",
        "BLOCK": config.block,
        "TILES": config.tiles,
        "ROUND_BF16": interpreting(),
    }


def fuse_(
    inputs: FusionInputs,
    thresholds: tuple[Tensor, Tensor],
    rule: MergeRule,
    config: LaunchConfig | None = None,
) -> FuseStats:
    """See :func:`rkif_kernels.ops.fuse_`."""
    config = config or chosen("merge", inputs.lists, inputs.numel).launch
    device = thresholds[0].device
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    with in_place(inputs.out, ALIGNMENT) as targets:
        rows = aligned((targets, *inputs.lists[1:]))  # keeps copies until the last launch
        grouped = tables(rows, config.chunk)
        # An even number of rows keeps each part aligned to 16 bytes; otherwise kernels would be recompiled.
        sizes = [table.programs + table.programs % 2 for table in grouped]
        norms = torch.zeros((sum(sizes), 3), dtype=torch.float64, device=device)
        for table, partial_norms in zip(grouped, norms.split(sizes), strict=True):
            _fuse_kernel[(table.programs,)](
                # Tensors
                **table.arguments,
                indices_ptr=table.indices,
                inner_thresholds_ptr=thresholds[0],
                outer_thresholds_ptr=thresholds[1],
                counts_ptr=counts,
                partial_norms_ptr=partial_norms,
                # Scalars
                inner_stride=int(thresholds[0].numel() > 1),
                outer_stride=int(thresholds[1].numel() > 1),
                # Constexprs
                DISTANCES=(inputs.inner_scores.distance, inputs.outer_scores.distance),
                **merge_arguments(table, rule, config),
                **config.options,
            )
    return FuseStats(counts, norms.sum(0), thresholds)

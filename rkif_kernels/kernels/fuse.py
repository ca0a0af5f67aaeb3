"""The masked, weighted merge of two task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backend import interpreting
from rkif_kernels.in_place import in_place
from rkif_kernels.kernels.elements import load_float32, load_row, round_to
from rkif_kernels.kernels.table import ALIGNMENT, tables
from rkif_kernels.launch import STREAM, LaunchConfig
from rkif_kernels.numerics import float32
from rkif_kernels.types import CaseWeights, FuseStats, OuterFrom, Scores


@triton.jit
def _selected(s_ptr, u_ptr, threshold, offsets, mask, UNCERTAINTY: tl.constexpr):
    score = load_float32(s_ptr, offsets, mask)
    if UNCERTAINTY is not None:
        score *= load_float32(u_ptr, offsets, mask)
    # What is not a number counts as zero, here as in the selection.
    return tl.where(score > 0, score, 0.0) > threshold


@triton.jit
def _by_case(m_in, m_out, in_only, out_only, both, neither):
    return tl.where(m_in, tl.where(m_out, both, in_only), tl.where(m_out, out_only, neither))


@triton.jit
def _fuse_tile(
    rows,
    thresholds,
    inner_weights,
    outer_weights,
    offsets,
    mask,
    OUT: tl.constexpr,
    INNER_U: tl.constexpr,
    OUTER_U: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Fuse one block; returns its counts (inner only, outer only, both) and three squared norms."""
    out_ptr, base_ptr, inner_ptr, outer_ptr, s_in_ptr, u_in_ptr, s_out_ptr, u_out_ptr = rows
    base = load_float32(base_ptr, offsets, mask)
    inner = load_float32(inner_ptr, offsets, mask)
    outer = load_float32(outer_ptr, offsets, mask)
    m_in = _selected(s_in_ptr, u_in_ptr, thresholds[0], offsets, mask, INNER_U)
    m_out = _selected(s_out_ptr, u_out_ptr, thresholds[1], offsets, mask, OUTER_U)

    tau_in = inner - base
    tau_out = outer - (inner if OUTER_FROM_INNER else base)
    w_in = _by_case(m_in, m_out, inner_weights[0], inner_weights[1], inner_weights[2], inner_weights[3])
    w_out = _by_case(m_in, m_out, outer_weights[0], outer_weights[1], outer_weights[2], outer_weights[3])
    fused = round_to((base + w_in * tau_in) + w_out * tau_out, OUT, ROUND_BF16)
    tl.store(out_ptr + offsets, fused, mask=mask)

    # Beyond the mask everything was loaded as zero, so only the counts need it.
    update = fused.to(tl.float32) - base
    return (
        tl.sum((mask & m_in & (m_out == 0)).to(tl.int32)),
        tl.sum((mask & m_out & (m_in == 0)).to(tl.int32)),
        tl.sum((mask & m_in & m_out).to(tl.int32)),
        _squared_norm(tau_in),
        _squared_norm(tau_out),
        _squared_norm(update),
    )


@triton.jit
def _squared_norm(vector):
    wide = vector.to(tl.float64)
    return tl.sum(wide * wide)


@triton.jit
def _fuse_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    inner_thresholds_ptr,
    outer_thresholds_ptr,
    counts_ptr,
    partial_norms_ptr,
    # Scalars
    n_tensors,
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
    """out = (base + w_in*(inner - base)) + w_out*(outer - inner), weights by the two mask bits.

    A program owns one chunk of one tensor. Float32 with uncertainties: reads 28 bytes an element, writes 4.
    Counts are integer atomics; squared norms go to a slot a program, so that nothing depends on timing.
    """
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensors_ptr + program)
    start = tl.multiple_of(tl.load(chunk_starts_ptr + program), BLOCK)
    numel = tl.load(numels_ptr + tensor)
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
    thresholds = (tl.load(inner_thresholds_ptr + tensor), tl.load(outer_thresholds_ptr + tensor))
    inner_weights = (in_only_in, out_only_in, both_in, neither_in)
    outer_weights = (in_only_out, out_only_out, both_out, neither_out)

    in_only, out_only, both = 0, 0, 0
    zero = tl.zeros((), tl.float64)
    norm_in, norm_out, norm_update = zero, zero, zero
    for tile in range(TILES):
        first = start + tile * BLOCK
        offsets = first + tl.arange(0, BLOCK)
        if first < numel:
            # A mask that depends on the size would narrow every access to one element; only the tail has one.
            if first + BLOCK <= numel:
                a, b, c, x, y, z = _fuse_tile(
                    rows, thresholds, inner_weights, outer_weights, offsets, tl.zeros((BLOCK,), tl.int1) == 0,
                    OUT, INNER_U, OUTER_U, OUTER_FROM_INNER, ROUND_BF16,
                )  # fmt: skip
            else:
                a, b, c, x, y, z = _fuse_tile(
                    rows, thresholds, inner_weights, outer_weights, offsets, offsets < numel,
                    OUT, INNER_U, OUTER_U, OUTER_FROM_INNER, ROUND_BF16,
                )  # fmt: skip
            in_only += a
            out_only += b
            both += c
            norm_in += x
            norm_out += y
            norm_update += z
    tl.atomic_add(counts_ptr, in_only.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + 1, out_only.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + 2, both.to(tl.int64), sem="relaxed")
    tl.store(partial_norms_ptr + program * 3, norm_in)
    tl.store(partial_norms_ptr + program * 3 + 1, norm_out)
    tl.store(partial_norms_ptr + program * 3 + 2, norm_update)


def fuse_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    inner: Sequence[Tensor],
    outer: Sequence[Tensor],
    inner_scores: Scores,
    outer_scores: Scores,
    *,
    thresholds: tuple[Tensor, Tensor],
    weights: CaseWeights,
    outer_from: OuterFrom,
    config: LaunchConfig = STREAM,
) -> FuseStats:
    """See :func:`rkif_kernels.ops.fuse_`."""
    device = thresholds[0].device
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    squared_norms = torch.zeros(3, dtype=torch.float64, device=device)
    total = sum(tensor.numel() for tensor in out)
    scalars = {
        f"{case}_{side}": float32(weight)
        for case, pair in zip(("in_only", "out_only", "both", "neither"), weights, strict=True)
        for side, weight in zip(("in", "out"), pair, strict=True)
    }
    with in_place(out, ALIGNMENT) as targets:
        roles = (
            targets,
            base,
            inner,
            outer,
            inner_scores.sensitivity,
            inner_scores.uncertainty,
            outer_scores.sensitivity,
            outer_scores.uncertainty,
        )
        # All tables before the first launch: what cannot be allocated must fail before anything is written.
        for table in list(tables(roles, config.chunk)):
            indices = torch.tensor(table.indices, device=device)
            partial_norms = torch.empty((table.programs, 3), dtype=torch.float64, device=device)
            _fuse_kernel[(table.programs,)](
                # Tensors
                table.pointers,
                table.numels,
                table.chunk_tensors,
                table.chunk_starts,
                *(threshold.expand(len(out))[indices] for threshold in thresholds),
                counts,
                partial_norms,
                # Scalars
                n_tensors=len(table.indices),
                **scalars,
                # Constexprs
                **dict(
                    zip(
                        ("OUT", "BASE", "INNER", "OUTER", "INNER_S", "INNER_U", "OUTER_S", "OUTER_U"),
                        table.dtypes,
                        strict=True,
                    )
                ),
                OUTER_FROM_INNER=outer_from == "inner",
                BLOCK=config.block,
                TILES=config.tiles,
                ROUND_BF16=interpreting(),
                **config.options,
            )
            squared_norms += partial_norms.sum(0)
    counts[3] = total - counts.sum()
    return FuseStats(counts, squared_norms)

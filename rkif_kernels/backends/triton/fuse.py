"""The masked, weighted merge of two task vectors, thresholds given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.backends.choose import interpreting
from rkif_kernels.backends.triton.elements import (
    add_packed,
    kernel,
    load_float32,
    load_row,
    load_score,
    packed,
    round_to,
    squares,
)
from rkif_kernels.backends.triton.launch import FUSE, LaunchConfig
from rkif_kernels.backends.triton.table import ALIGNMENT, Table, aligned, tables
from rkif_kernels.contiguous import in_place
from rkif_kernels.numerics import float32
from rkif_kernels.types import ROLES, CaseWeights, FuseStats, FusionInputs, OuterFrom

INNER_SCORE, OUTER_SCORE = ROLES.index("INNER_S"), ROLES.index("OUTER_S")


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
    OUT: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """(base + w_in*tau_in) + w_out*tau_out, rounded to what is stored; and the two task vectors."""
    tau_in = inner - base
    tau_out = outer - (inner if OUTER_FROM_INNER else base)
    w_in = _by_case(m_in, m_out, weights[0], weights[2], weights[4], weights[6])
    w_out = _by_case(m_in, m_out, weights[1], weights[3], weights[5], weights[7])
    return round_to((base + w_in * tau_in) + w_out * tau_out, OUT, ROUND_BF16), tau_in, tau_out


@triton.jit
def cases(m_in, m_out, mask):
    """Whether an element is selected by the inner learner only, the outer only, both, neither."""
    m_in, others = mask & m_in, mask & (m_in == 0)
    return m_in & (m_out == 0), others & m_out, m_in & m_out, others & (m_out == 0)


@triton.jit
def store_norms(partial_norms_ptr, row, inner, outer, update):
    """A program's three squared norms, from lanes to its row."""
    tl.store(partial_norms_ptr + row * 3, tl.sum(inner))
    tl.store(partial_norms_ptr + row * 3 + 1, tl.sum(outer))
    tl.store(partial_norms_ptr + row * 3 + 2, tl.sum(update))


@triton.jit
def _fuse_tile(
    rows,
    thresholds,
    weights,
    offsets,
    mask,
    OUT: tl.constexpr,
    INNER_U: tl.constexpr,
    OUTER_U: tl.constexpr,
    INNER_DISTANCE: tl.constexpr,
    OUTER_DISTANCE: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Fuse one block; returns its counts of the cases and three squared norms, in lanes."""
    out_ptr, base_ptr, inner_ptr, outer_ptr, s_in_ptr, u_in_ptr, s_out_ptr, u_out_ptr = rows
    base = load_float32(base_ptr, offsets, mask)
    inner = load_float32(inner_ptr, offsets, mask)
    outer = load_float32(outer_ptr, offsets, mask)
    m_in = load_score(s_in_ptr, u_in_ptr, offsets, mask, INNER_U, INNER_DISTANCE) > thresholds[0]
    m_out = load_score(s_out_ptr, u_out_ptr, offsets, mask, OUTER_U, OUTER_DISTANCE) > thresholds[1]
    fused, tau_in, tau_out = merge(
        base, inner, outer, m_in, m_out, weights, OUT, OUTER_FROM_INNER, ROUND_BF16
    )
    tl.store(out_ptr + offsets, fused, mask=mask)
    # Beyond the mask everything was loaded as zero, so only the counts need it.
    return (
        packed(*cases(m_in, m_out, mask), BLOCK),
        squares(tau_in, BLOCK),
        squares(tau_out, BLOCK),
        squares(fused.to(tl.float32) - base, BLOCK),
    )


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
    run_ptr,
    # Scalars
    n_tensors,
    inner_stride,
    outer_stride,
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
    INNER_DISTANCE: tl.constexpr,
    OUTER_DISTANCE: tl.constexpr,
    OUTER_FROM_INNER: tl.constexpr,
    GUARDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """out = (base + w_in*(inner - base)) + w_out*(outer - inner), weights by the two mask bits.

    A program owns one chunk of one tensor. Float32 with uncertainties: reads 28 bytes an element, writes 4.
    Counts are integer atomics; squared norms go to a slot a program, so that nothing depends on timing.
    GUARDED: it runs only if ``run_ptr`` says so.
    """
    if GUARDED:
        if tl.load(run_ptr) == 0:
            return
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
    index = tl.load(indices_ptr + tensor)
    thresholds = (
        tl.load(inner_thresholds_ptr + index * inner_stride),
        tl.load(outer_thresholds_ptr + index * outer_stride),
    )
    weights = (
        in_only_in, in_only_out, out_only_in, out_only_out, both_in, both_out, neither_in, neither_out,
    )  # fmt: skip

    selected = tl.zeros((BLOCK // 4,), tl.int32)
    norm_in = tl.zeros((BLOCK // 4,), tl.float64)
    norm_out, norm_update = norm_in, norm_in
    for tile in range(TILES):
        first = start + tile * BLOCK
        offsets = first + tl.arange(0, BLOCK)
        if first < numel:
            # A mask that depends on the size would narrow every access to one element; only the tail has one.
            if first + BLOCK <= numel:
                n, x, y, z = _fuse_tile(
                    rows, thresholds, weights, offsets, tl.zeros((BLOCK,), tl.int1) == 0,
                    OUT, INNER_U, OUTER_U, INNER_DISTANCE, OUTER_DISTANCE, OUTER_FROM_INNER,
                    BLOCK, ROUND_BF16,
                )  # fmt: skip
            else:
                n, x, y, z = _fuse_tile(
                    rows, thresholds, weights, offsets, offsets < numel,
                    OUT, INNER_U, OUTER_U, INNER_DISTANCE, OUTER_DISTANCE, OUTER_FROM_INNER,
                    BLOCK, ROUND_BF16,
                )  # fmt: skip
            selected += n
            norm_in += x
            norm_out += y
            norm_update += z
    add_packed(counts_ptr, selected)
    store_norms(partial_norms_ptr, program, norm_in, norm_out, norm_update)


def scalars(weights: CaseWeights) -> dict[str, float]:
    """The rule's weights as arguments of a kernel."""
    return {
        f"{case}_{side}": float32(weight)
        for case, pair in zip(("in_only", "out_only", "both", "neither"), weights, strict=True)
        for side, weight in zip(("in", "out"), pair, strict=True)
    }


def constants(table: Table, outer_from: OuterFrom) -> dict[str, object]:
    """What the kernels that fuse are compiled for."""
    return {
        **dict(zip(ROLES, table.dtypes, strict=True)),
        "OUTER_FROM_INNER": outer_from == "inner",
        "ROUND_BF16": interpreting(),
    }


def launch_fuse(
    grouped: Sequence[Table],
    partial_norms: Sequence[Tensor],
    thresholds: tuple[Tensor, Tensor],
    counts: Tensor,
    *,
    weights: CaseWeights,
    outer_from: OuterFrom,
    config: LaunchConfig,
    distances: tuple[bool, bool] = (False, False),
    run: Tensor | None = None,
) -> None:
    """One launch a table.

    Args:
        partial_norms: float64 [programs, 3] for each table; written.
        counts: int64 [4], added to.
        distances: whether the scores of inner and outer are distances.
        run: one int64; where it is zero on the device, nothing is done.
    """
    for table, norms in zip(grouped, partial_norms, strict=True):
        _fuse_kernel[(table.programs,)](
            # Tensors
            table.pointers,
            table.layout.numels,
            table.layout.chunk_tensors,
            table.layout.chunk_starts,
            table.indices,
            *thresholds,
            counts,
            norms,
            counts if run is None else run,
            # Scalars
            n_tensors=table.tensors,
            inner_stride=int(thresholds[0].numel() > 1),
            outer_stride=int(thresholds[1].numel() > 1),
            **scalars(weights),
            # Constexprs
            INNER_DISTANCE=distances[0],
            OUTER_DISTANCE=distances[1],
            GUARDED=run is not None,
            BLOCK=config.block,
            TILES=config.tiles,
            **constants(table, outer_from),
            **config.options,
        )


def norms_of(grouped: Sequence[Table], extra: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Memory for three norms a program, behind it ``extra`` rows for each table; whole and in parts."""
    sizes = [table.programs for table in grouped] + [extra] * len(grouped)
    # Two rows are 48 bytes: every part begins on a boundary of 16, or kernels would be compiled for either.
    even = [size + size % 2 for size in sizes]
    whole = torch.zeros((sum(even), 3), dtype=torch.float64, device=device)
    return whole, [part[:size] for part, size in zip(whole.split(even), sizes, strict=True)]


def fuse_(
    inputs: FusionInputs,
    *,
    thresholds: tuple[Tensor, Tensor],
    weights: CaseWeights,
    outer_from: OuterFrom,
    config: LaunchConfig = FUSE,
) -> FuseStats:
    """See :func:`rkif_kernels.ops.fuse_`."""
    device = thresholds[0].device
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    with in_place(inputs.out, ALIGNMENT) as targets:
        rows = aligned((targets, *inputs.lists[1:]))
        grouped = tables(rows, config.chunk)
        norms, parts = norms_of(grouped, 0, device)
        launch_fuse(
            grouped,
            parts[: len(grouped)],
            thresholds,
            counts,
            weights=weights,
            outer_from=outer_from,
            config=config,
            distances=(inputs.inner_scores.distance, inputs.outer_scores.distance),
        )
    return FuseStats(counts, norms.sum(0), thresholds)

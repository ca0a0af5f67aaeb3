"""Exact order statistics by radix selection on the bit pattern: three histogram passes, no sorting.

A positive float32 has 31 significant bits, and patterns order like values. The digits are 11, 10 and 10 bits
wide; each pass counts one digit of the scores that share the digits found so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkif_kernels.kernels.elements import load_float32, load_row
from rkif_kernels.kernels.table import tables
from rkif_kernels.launch import STREAM, LaunchConfig
from rkif_kernels.types import Scores

DIGITS = ((20, 11), (10, 10), (0, 10))  # (shift, bits), most significant first


@triton.jit
def _histogram_kernel(
    # Tensors
    pointers_ptr,
    numels_ptr,
    chunk_tensors_ptr,
    chunk_starts_ptr,
    groups_ptr,
    prefixes_ptr,
    histograms_ptr,
    # Scalars
    n_tensors,
    # Constexprs
    SENSITIVITY: tl.constexpr,
    UNCERTAINTY: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Count the digit at SHIFT of all scores whose higher bits equal their group's prefix.

    A program owns one chunk of one tensor. Float32: reads 8 bytes an element (S, U).
    """
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensors_ptr + program)
    start = tl.multiple_of(tl.load(chunk_starts_ptr + program), BLOCK)
    numel = tl.load(numels_ptr + tensor)
    group = tl.load(groups_ptr + tensor)
    prefix = tl.load(prefixes_ptr + group)
    s_ptr = load_row(pointers_ptr, 0, tensor, n_tensors, SENSITIVITY)
    u_ptr = load_row(pointers_ptr, 1, tensor, n_tensors, UNCERTAINTY)

    BINS: tl.constexpr = 1 << BITS
    histogram = tl.zeros((BINS,), tl.int32)
    for tile in range(TILES):
        first = start + tile * BLOCK
        offsets = first + tl.arange(0, BLOCK)
        # A mask that depends on the size would narrow every access to one element; only the tail has one.
        if first + BLOCK <= numel:
            mask = tl.zeros((BLOCK,), tl.int1) == 0
            histogram += _count_tile(s_ptr, u_ptr, offsets, mask, prefix, UNCERTAINTY, SHIFT, BITS)
        elif first < numel:
            mask = offsets < numel
            histogram += _count_tile(s_ptr, u_ptr, offsets, mask, prefix, UNCERTAINTY, SHIFT, BITS)
    bins = histograms_ptr + group.to(tl.int64) * BINS + tl.arange(0, BINS)
    tl.atomic_add(bins, histogram.to(tl.int64), mask=histogram > 0, sem="relaxed")


@triton.jit
def _count_tile(
    s_ptr,
    u_ptr,
    offsets,
    mask,
    prefix,
    UNCERTAINTY: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
):
    score = load_float32(s_ptr, offsets, mask)
    if UNCERTAINTY is not None:
        score *= load_float32(u_ptr, offsets, mask)
    # Zero for what is not positive, a NaN product and a negative zero included.
    key = tl.where(score > 0, score, 0.0).to(tl.int32, bitcast=True)
    wanted = mask & ((key >> (SHIFT + BITS)) == prefix)
    digit = (key >> SHIFT) & ((1 << BITS) - 1)
    return tl.histogram(digit, 1 << BITS, mask=wanted)


def score_thresholds(
    scores: Scores, *, ranks: Sequence[int], per_tensor: bool, config: LaunchConfig = STREAM
) -> Tensor:
    """See :func:`rkif_kernels.ops.score_thresholds`; ``ranks`` holds one rank for each group, from 0.

    Prefixes and remaining ranks stay on the device: no result is waited for between the passes.
    """
    device = scores.sensitivity[0].device
    groups = torch.arange(len(scores.sensitivity), device=device, dtype=torch.int32)
    if not per_tensor:
        groups.zero_()
    prefixes = torch.zeros(len(ranks), dtype=torch.int32, device=device)
    remaining = torch.tensor(ranks, dtype=torch.int64).to(device)
    grouped = list(tables((scores.sensitivity, scores.uncertainty), config.chunk))
    for shift, bits in DIGITS:
        histograms = torch.zeros((len(ranks), 1 << bits), dtype=torch.int64, device=device)
        for table in grouped:
            _histogram_kernel[(table.programs,)](
                # Tensors
                table.pointers,
                table.numels,
                table.chunk_tensors,
                table.chunk_starts,
                groups[torch.tensor(table.indices, device=device)],
                prefixes,
                histograms,
                # Scalars
                n_tensors=len(table.indices),
                # Constexprs
                SENSITIVITY=table.dtypes[0],
                UNCERTAINTY=table.dtypes[1],
                SHIFT=shift,
                BITS=bits,
                BLOCK=config.block,
                TILES=config.tiles,
                **config.options,
            )
        up_to = histograms.cumsum(1)
        digit = (up_to <= remaining[:, None]).sum(1, keepdim=True)
        remaining -= (up_to.gather(1, digit) - histograms.gather(1, digit)).squeeze(1)
        prefixes = (prefixes << bits) | digit.squeeze(1).int()
    return prefixes.view(torch.float32)

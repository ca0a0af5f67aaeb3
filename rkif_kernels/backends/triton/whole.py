"""The thresholds of small tensors, all of whose scores fit into the registers of one program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import triton
import triton.language as tl

from rkif_kernels.backends.triton.elements import kernel, load_row, load_score
from rkif_kernels.backends.triton.groups import Groups, K, group_of, number_of
from rkif_kernels.backends.triton.launch import LaunchConfig, PreparedLaunch
from rkif_kernels.backends.triton.table import Table
from rkif_kernels.backends.triton.windows import fields_of, store_search


@triton.jit
def key_of_k(keys, mask, k):
    """The ``k``-th smallest of ``keys``, by radix selection; the smallest if k is negative."""
    key = k.to(tl.int32) * 0
    remaining = tl.maximum(k, 0)
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        wanted = mask & (((keys >> shift) >> 8) == key)
        histogram = tl.histogram((keys >> shift) & 0xFF, 256, mask=wanted)
        found = tl.sum((tl.cumsum(histogram) <= remaining).to(tl.int32))
        remaining -= tl.sum(tl.where(tl.arange(0, 256) < found, histogram, 0))
        key = (key << 8) | found
    return key


@triton.jit
def _score(s_ptr, u_ptr, offsets, mask, DTYPES: tl.constexpr, ROLE: tl.constexpr, DISTANCE: tl.constexpr):
    return load_score(s_ptr, u_ptr, offsets, mask, DTYPES[ROLE + 1] is not None, DISTANCE)


@kernel
def _whole_kernel(
    # Tensors
    pointers_ptr,
    indices_ptr,
    groups_ptr,
    firsts_ptr,
    tensors_ptr,
    fields_ptr,
    thresholds_ptr,
    # Scalars
    n_tensors,
    padded_groups,
    # Constexprs
    DTYPES: tl.constexpr,
    ROLE: tl.constexpr,
    SIDES: tl.constexpr,
    DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the thresholds of a tensor of at most BLOCK scores. Float32: reads 8 bytes per element (S, U)."""
    tensor = tl.load(tensors_ptr + tl.program_id(0))
    numel = tl.load(firsts_ptr + tensor + 1) - tl.load(firsts_ptr + tensor)
    even = tl.multiple_of(numel // 8 * 8, 8)
    offsets = tl.arange(0, BLOCK)
    mask, full = offsets < numel, offsets < even
    group = group_of(indices_ptr, tensor, 1)
    own_ptr = fields_of(fields_ptr, group, SIDES)
    k = number_of(groups_ptr, group, K)
    for side in tl.static_range(SIDES):
        s_ptr = load_row(pointers_ptr, ROLE + 2 * side, tensor, n_tensors, DTYPES)
        u_ptr = load_row(pointers_ptr, ROLE + 2 * side + 1, tensor, n_tensors, DTYPES)
        # Groups of eight elements share one mask, so their accesses are wide. The rest has separate loads.
        score = _score(s_ptr, u_ptr, offsets, full, DTYPES, ROLE + 2 * side, DISTANCE)
        score += _score(s_ptr, u_ptr, offsets, mask & (offsets >= even), DTYPES, ROLE + 2 * side, DISTANCE)
        keys = score.to(tl.int32, bitcast=True)
        key = key_of_k(keys, mask, k).to(tl.int64)
        store_search(own_ptr, thresholds_ptr + side * padded_groups + group, side, key, 0, -1)


def whole_tensors(
    grouped: Sequence[Table],
    groups: Groups,
    scores: Mapping[str, object],
    config: LaunchConfig,
) -> list[PreparedLaunch]:
    """The launches that find the thresholds of tensors of at most a block of scores.

    Args:
        scores: the kernel's constants ROLE, SIDES and DISTANCE, which say where a table has the scores.
    """
    launches = []
    for table, group_arguments, layout in zip(grouped, groups.arguments, groups.wholes, strict=True):
        arguments = table.arguments | group_arguments | scores
        arguments |= {"firsts_ptr": table.firsts, "tensors_ptr": layout.chunk_tensors}
        arguments |= {"DTYPES": table.dtypes, "BLOCK": config.block}
        if layout.programs:
            launches.append(PreparedLaunch(_whole_kernel, layout.programs, arguments, config.options))
    return launches

"""The groups of scores that have one threshold each: all scores together, or each tensor.

The kernels read the properties of a group from a row of numbers, so the same compiled kernels find one
threshold or hundreds. No program of a search has elements of two groups. The last program of each group takes
the next step of the search for its group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate, chain
from operator import add
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from rkif_kernels.backends.triton.launch import Bracketing, LaunchConfig
from rkif_kernels.backends.triton.table import Layout, Table, constant, keep_for_graph, layout_of
from rkif_kernels.backends.triton.windows import padded

# Offsets of the numbers in the row of a group, int64; see _Numbers.
K, SHARE, FIRST_STRIDE, FIRST_SAMPLED, LOW_K, HIGH_K = (tl.constexpr(place) for place in range(6))
STRIDE, MARGIN, LIST_START, LIST_END, FIRST_ROW, PROGRAMS = (tl.constexpr(place) for place in range(6, 12))
NUMBERS = tl.constexpr(17)

COUNTED_BLOCKS = 16  # blocks of the second sample per program
PIECE = 8  # number of chunks whose listed elements one program counts


@triton.jit
def group_of(indices_ptr, tensor, groups_a_tensor):
    """Index of a tensor's group: its index in the caller's lists, or 0 if all tensors are one group."""
    return (groups_a_tensor * tl.load(indices_ptr + tensor)).to(tl.int64)


@triton.jit
def number_of(groups_ptr, group, NUMBER: tl.constexpr):
    """The number at an offset in the row of a group."""
    return tl.load(groups_ptr + group * NUMBERS + NUMBER)


@dataclass
class _Numbers:
    """The row of numbers of a group.

    Attributes:
        k: of its order statistic, from 0.
        share: k divided by its maximum, in units of 2^-32.
        first_stride, sampled: elements per cell of the first sample, and number of sampled scores.
        low_k, high_k: the positions of the window's ends in the sorted first sample.
        stride: elements per cell of the second sample.
        margin: half-width of the bracket, in scores of the second sample.
        list_start, list_end: the group's part of the list of undecided elements.
        first_row: index of the group's first program in the pass.
        programs: number of the group's programs in each launch, by step.
    """

    k: int
    share: int
    first_stride: int = 0
    sampled: int = 0
    low_k: int = 0
    high_k: int = 0
    stride: int = 0
    margin: int = 0
    list_start: int = 0
    list_end: int = 0
    first_row: int = 0
    programs: tuple[int, ...] = (0, 0, 0, 0, 0, 0)

    @property
    def row(self) -> tuple[int, ...]:
        *fields, programs = astuple(self)
        return *fields, *programs


class Part(NamedTuple):
    """The elements of a group in one table: their number, and the number of their chunks."""

    group: int
    numel: int
    chunks: int


class Work(NamedTuple):
    """The work on a part in the launches that do not take one chunk per program.

    Attributes:
        whole: number of elements, if one program finds the threshold; else 0.
        sampled, counted: number of elements of the first and of the second sample.
        chunks: number of chunks that may have undecided elements.
    """

    whole: int
    sampled: int
    counted: int
    chunks: int


@dataclass(frozen=True)
class Groups:
    """The groups of a search, for its launches.

    Attributes:
        count: number of groups.
        arguments: for each table, arguments that the kernels of a search share, by the names of parameters.
        capacity: of the list of undecided elements, for all groups together.
        rows: index of the first program of each table in the pass; at the end, the number of programs.
        run: number of neighbours in a run of the first sample.
        firsts: for each table, the work on its first group in the previous tables.
        wholes, samples, counts, pieces: for each table, the distribution of :class:`Work` over programs.
    """

    count: int
    arguments: list[dict[str, Any]]
    capacity: int
    rows: list[int]
    run: int
    firsts: list[Work]
    wholes: list[Layout]
    samples: list[Layout]
    counts: list[Layout]
    pieces: list[Layout]


def find_groups(
    grouped: Sequence[Table],
    ks: Sequence[int],
    per_tensor: bool,
    sides: int,
    bracketing: Bracketing,
    config: LaunchConfig,
    whole: int = 0,
) -> Groups:
    """Divide the work of a search into groups, and the work of each group over programs.

    Args:
        grouped: the tables with the scores.
        ks: ``k`` of each group, from 0.
        per_tensor: whether each tensor is a group, or all tensors are one.
        sides: number of scores of each element: 1, or 2 for both learners.
        bracketing: sizes of the samples and of the lists.
        config: of the launches.
        whole: with ``per_tensor``, maximum number of scores of a tensor whose threshold one program finds.
    """
    parts = tuple(
        tuple(
            Part(index, size, _quotient(size, config.chunk))
            for index, size in zip(table.members, table.sizes, strict=True)
        )
        if per_tensor
        else (Part(0, table.numel, table.programs),)
        for table in grouped
    )
    # Single scores are a better sample than runs. But each costs an access, too many for hundreds of groups.
    run = bracketing.run if per_tensor else 1
    sizes = Work(max(whole, 1), config.block, config.block * COUNTED_BLOCKS, PIECE)
    plan = _planned(parts, tuple(ks), per_tensor, run, sides, bracketing, sizes)
    device = grouped[0].pointers.device
    numbers = constant(device, plan.numbers, torch.int64)
    layouts = [
        [layout_of(device, work[which], size) for work in plan.work] for which, size in enumerate(sizes)
    ]
    for used in (numbers, *chain.from_iterable(layouts)):
        keep_for_graph(used, [[grouped[0].pointers]])
    return Groups(
        len(ks),
        [
            {
                "groups_ptr": numbers,
                "indices_ptr": table.indices,
                "padded_groups": padded(len(ks)),
                "groups_a_tensor": int(per_tensor),
                "span": 1 if per_tensor else table.tensors,
            }
            for table in grouped
        ],
        plan.capacity,
        [0, *accumulate(table.programs for table in grouped)],
        run,
        plan.firsts,
        *layouts,
    )


class _Plan(NamedTuple):
    """The host's part of :class:`Groups`.

    Attributes:
        numbers: of all groups, in sequence.
        work: for each table, and each field of :class:`Work`, the work on its parts.
    """

    numbers: tuple[int, ...]
    work: list[list[tuple[int, ...]]]
    firsts: list[Work]
    capacity: int


@functools.lru_cache(maxsize=64)
def _planned(
    parts: tuple[tuple[Part, ...], ...],
    ks: tuple[int, ...],
    per_tensor: bool,
    run: int,
    sides: int,
    bracketing: Bracketing,
    sizes: Work,
) -> _Plan:
    """The numbers of all groups, and the work on each table; cached, because rounds repeat the search.

    Args:
        parts: of each table.
        sizes: maximum work of one program.
    """
    numels = [0] * len(ks)
    for part in chain.from_iterable(parts):
        numels[part.group] += part.numel
    groups = [
        _Numbers(
            k=k,
            share=(k << 32) // max(numel - 1, 1),
            first_stride=max(run, _quotient(numel * run, bracketing.first_samples)),
            stride=bracketing.stride(numel),
        )
        for k, numel in zip(ks, numels, strict=True)
    ]
    work, firsts, done = [], [], [Work(0, 0, 0, 0)] * len(ks)
    first_row = 0
    for table in parts:
        firsts.append(done[table[0].group])
        table_work = []
        for part in table:
            group = groups[part.group]
            if not any(group.programs):
                group.first_row = first_row
            first_row += part.chunks
            if per_tensor and part.numel <= sizes.whole:
                part_work = Work(part.numel, 0, 0, 0)
            else:
                sampled = _quotient(part.numel, group.first_stride) * run
                counted = _quotient(part.numel, group.stride) * bracketing.run
                part_work = Work(0, sampled, counted, part.chunks)
            _, sampling, counting, narrowing = map(_quotient, part_work, sizes)
            programs = (sampling, counting, part.chunks, part.chunks, narrowing, narrowing)
            group.programs = tuple(map(add, group.programs, programs))
            done[part.group] = Work(*map(add, done[part.group], part_work))
            table_work.append(part_work)
        work.append(list(zip(*table_work, strict=True)))
    room = 0
    for group, numel, (whole, sampled, _, _) in zip(groups, numels, done, strict=True):
        group.list_start = room
        if not whole:
            fraction = group.k / max(numel - 1, 1)
            group.sampled = sampled
            group.low_k, group.high_k = bracketing.sample_ks(fraction, sampled, numel, run)
            group.margin = math.ceil(bracketing.margin(fraction, numel))
            room += bracketing.capacity(fraction, numel, sides)
        group.list_end = room
    return _Plan(tuple(chain.from_iterable(group.row for group in groups)), work, firsts, room)


def _quotient(size: int, part: int) -> int:
    """``size / part``, rounded up; ``triton.cdiv`` takes much longer."""
    return -(-size // part)

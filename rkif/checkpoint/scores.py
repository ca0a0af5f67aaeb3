"""The scores that select elements: given importance, or magnitudes of the task vectors."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rkif.checkpoint.buffers import as_bytes
from rkif.checkpoint.layout import OutputTensor, Piece
from rkif.checkpoint.methods import Method
from rkif.checkpoint.request import ARGUMENTS
from rkif.checkpoint.source import DTYPES, InvalidInputError, TensorReader
from rkif.checkpoint.tiles import Tile
from rkif_kernels import Scores, bracket, magnitudes

BLOCKS, BLOCK = 1024, 1024  # blocks per sample, and consecutive elements per block


def scores_of(method: Method, tile: Tile) -> tuple[Scores, Scores]:
    """The scores of a tile, inner and outer: the importance, or without it the task vectors' magnitudes."""
    if tile.importance is not None:
        return Scores(tile.importance[0]), Scores(tile.importance[1])
    start = tile.base if method.outer_from == "base" else tile.inner
    return magnitudes(tile.inner, tile.base), magnitudes(tile.outer, start)


def invalid_input(tensors: Sequence[OutputTensor], tile: Tile) -> InvalidInputError:
    """The error for a tile with a value that is not finite, or with negative importance: names the first."""
    rows = [tile.base, tile.inner, tile.outer, *(tile.importance or ())]
    for role, (argument, row) in enumerate(zip(ARGUMENTS, rows, strict=False)):
        for position, part in enumerate(row):
            tensor = tensors[tile.tensors[position]]
            wrong = ~part.isfinite() if role < 3 else ~(part.isfinite() & (part >= 0))
            if wrong.any():
                index = int(wrong.nonzero()[0])
                return InvalidInputError(
                    f"{argument}: {tensor.inputs[role].file} has {float(part[index])} in "
                    f"{tensor.name!r}, element {tile.starts[position] + index:,}; nothing was published"
                )
    results = [row for row in (tile.out, *_differences(tile)) if row]
    name = next(
        tensors[index].name
        for position, index in enumerate(tile.tensors)
        if not all(row[position].isfinite().all() for row in results)
    )
    return InvalidInputError(f"the fusion of {name!r} exceeds the range of its dtype; nothing was published")


def _differences(tile: Tile) -> list[list[Tensor]]:
    pairs = ((tile.inner, tile.base), (tile.outer, tile.base), (tile.outer, tile.inner))
    return [
        [end.float() - start.float() for end, start in zip(ends, starts, strict=True)]
        for ends, starts in pairs
    ]


def guess_thresholds(
    method: Method, tensors: Sequence[OutputTensor]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Lower and upper score for each side; the threshold over ``tensors`` very probably lies between them.

    A small sample is read. Tensors that are not fused are left out.
    """
    fused = [index for index, tensor in enumerate(tensors) if tensor.fused and tensor.target.numel]
    ends = list(accumulate(tensors[index].target.numel for index in fused))
    numel = ends[-1]
    k = method.threshold_k(numel)
    assert k is not None
    reader = TensorReader()
    samples: tuple[list[Tensor], list[Tensor]] = ([], [])
    try:
        for element in range(0, numel, max(numel // BLOCKS, BLOCK)):
            position = bisect_right(ends, element)
            index = fused[position]
            size = tensors[index].target.numel
            start = element - (ends[position] - size)
            tile = _read(reader, tensors[index], Piece(index, start, min(start + BLOCK, size)))
            for sample, scores in zip(samples, scores_of(method, tile), strict=True):
                sample.append(scores.values(0))
    finally:
        reader.close()
    inner, outer = (bracket(torch.cat(sample).numpy(), k / max(numel - 1, 1), BLOCK) for sample in samples)
    return inner, outer


def _read(reader: TensorReader, tensor: OutputTensor, piece: Piece) -> Tile:
    parts = []
    for entry in tensor.inputs:
        part = torch.empty(piece.numel, dtype=DTYPES[entry.dtype])
        reader.read(entry, piece.start, as_bytes(part))
        parts.append([part])
    base, inner, outer, *importance = parts
    scores = (importance[0], importance[1]) if importance else None
    return Tile([piece.tensor], [piece.start], [], base, inner, outer, scores)

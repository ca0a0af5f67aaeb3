"""What elements are selected by: given importance, or the magnitudes of the task vectors."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rkif.checkpoint import layout
from rkif.checkpoint.layout import Piece
from rkif.checkpoint.methods import Method
from rkif.checkpoint.source import DTYPES, InvalidInputError, Reader
from rkif.checkpoint.stream import as_bytes
from rkif.checkpoint.tiles import Tile
from rkif_kernels import Scores, bracket, magnitudes

ROLES = ("BASE", "INNER", "OUTER", "--inner-importance", "--outer-importance")
BLOCKS, BLOCK = 1024, 1024  # elements in a row, at so many places, are a sample


def scores_of(method: Method, tile: Tile) -> tuple[Scores, Scores]:
    """What the two sides of a tile select by; without given importance the magnitudes of the task vectors."""
    if tile.importance is not None:
        return Scores(tile.importance[0]), Scores(tile.importance[1])
    start = tile.base if method.outer_from == "base" else tile.inner
    return magnitudes(tile.inner, tile.base), magnitudes(tile.outer, start)


def invalid_input(tensors: Sequence[layout.Tensor], tile: Tile) -> InvalidInputError:
    """What is wrong with a tile whose values are not all finite, or whose importance is negative."""
    rows = [tile.base, tile.inner, tile.outer, *(tile.importance or ())]
    for role, (argument, row) in enumerate(zip(ROLES, rows, strict=False)):
        for position, part in enumerate(row):
            tensor = tensors[tile.tensors[position]]
            wrong = ~part.isfinite() if role < 3 else ~(part.isfinite() & (part >= 0))
            if wrong.any():
                index = int(wrong.nonzero()[0])
                return InvalidInputError(
                    f"{argument}: {tensor.inputs[role].file} has {float(part[index])} in "
                    f"{tensor.name!r}, element {tile.starts[position] + index:,}; nothing was published"
                )
    beyond = [
        tensors[number].name
        for position, number in enumerate(tile.tensors)
        if not all(row[position].isfinite().all() for row in (tile.out, *_differences(tile)) if row)
    ]
    return InvalidInputError(
        f"the fusion of {beyond[0]!r} exceeds the range of its dtype; nothing was published"
    )


def _differences(tile: Tile) -> list[list[Tensor]]:
    pairs = ((tile.inner, tile.base), (tile.outer, tile.base), (tile.outer, tile.inner))
    return [
        [end.float() - start.float() for end, start in zip(ends, starts, strict=True)]
        for ends, starts in pairs
    ]


def guess_thresholds(
    method: Method, tensors: Sequence[layout.Tensor]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """For each side two scores between which the global threshold very probably lies, from a small sample."""
    fused = [number for number, tensor in enumerate(tensors) if tensor.fused and tensor.target.numel]
    ends = list(accumulate(tensors[number].target.numel for number in fused))
    numel = ends[-1]
    k = method.threshold_k(numel)
    assert k is not None
    reader = Reader()
    picked: tuple[list[Tensor], list[Tensor]] = ([], [])
    try:
        for at in range(0, numel, max(numel // BLOCKS, BLOCK)):
            place = bisect_right(ends, at)
            number = fused[place]
            start = at - (ends[place] - tensors[number].target.numel)
            piece = Piece(number, start, min(start + BLOCK, tensors[number].target.numel))
            for found, scores in zip(
                picked, scores_of(method, _read(reader, tensors[number], piece)), strict=True
            ):
                found.append(scores.values(0))
    finally:
        reader.close()
    inner, outer = (bracket(torch.cat(found).numpy(), k / max(numel - 1, 1), BLOCK) for found in picked)
    return inner, outer


def _read(reader: Reader, tensor: layout.Tensor, piece: Piece) -> Tile:
    parts = []
    for entry in tensor.inputs:
        part = torch.empty(piece.numel, dtype=DTYPES[entry.dtype])
        reader.read(entry, piece.start, as_bytes(part))
        parts.append([part])
    base, inner, outer, *importance = parts
    scores = (importance[0], importance[1]) if importance else None
    return Tile([piece.tensor], [piece.start], [], base, inner, outer, scores)

"""The scores that select elements: importance from files, or magnitudes of the task vectors."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from rkif.checkpoint.buffers import as_bytes
from rkif.checkpoint.layout import OutputTensor, Piece
from rkif.checkpoint.methods import Method
from rkif.checkpoint.source import DTYPES, InvalidInputError, TensorReader
from rkif.checkpoint.tiles import Tile
from rkif_kernels import Scores, bracket, magnitudes

BLOCKS, BLOCK = 1024, 1024  # blocks per sample, and consecutive elements per block


def scores_of(method: Method, tile: Tile) -> list[Scores]:
    """The scores of a tile by model: the importance if it is given, else the task vectors' magnitudes."""
    if tile.importance is not None:
        return [Scores(row) for row in tile.importance]
    starts = [tile.base] * len(tile.models)
    if method.outer_from == "inner":
        starts[1] = tile.inner
    return [magnitudes(end, start) for end, start in zip(tile.models, starts, strict=True)]


def invalid_element(
    argument: str, file: Path, name: str, values: Tensor, wrong: Tensor, start: int = 0
) -> InvalidInputError:
    """The error that names the first wrong element of a tensor.

    Args:
        argument, file, name: the input, its file, and the tensor's name.
        values: elements of the tensor, flat.
        wrong: bool, of the same length: the elements that are wrong.
        start: index of the first element of ``values`` in the tensor.
    """
    index = int(wrong.nonzero()[0])
    return InvalidInputError(
        f"{argument}: {file} has {float(values[index])} in {name!r}, element {start + index:,}; "
        "nothing was published"
    )


def invalid_input(tensors: Sequence[OutputTensor], tile: Tile, arguments: Iterable[str]) -> InvalidInputError:
    """The error for a tile with a value that is not finite, or negative importance; it names the first one.

    Args:
        tensors: the tensors of the layout.
        tile: the tile.
        arguments: names of the inputs, in the order of their roles.
    """
    rows = [tile.base, *tile.models, *(tile.importance or ())]
    for role, (argument, row) in enumerate(zip(arguments, rows, strict=False)):
        for position, part in enumerate(row):
            tensor = tensors[tile.tensors[position]]
            wrong = ~part.isfinite() if role <= len(tile.models) else ~(part.isfinite() & (part >= 0))
            if wrong.any():
                file, start = tensor.inputs[role].file, tile.starts[position]
                return invalid_element(argument, file, tensor.name, part, wrong, start)
    results = [row for row in (tile.out, *_differences(tile)) if row]
    name = next(
        tensors[index].name
        for position, index in enumerate(tile.tensors)
        if not all(row[position].isfinite().all() for row in results)
    )
    return InvalidInputError(f"the fusion of {name!r} exceeds the range of its dtype; nothing was published")


def _differences(tile: Tile) -> list[list[Tensor]]:
    pairs = [(end, tile.base) for end in tile.models]
    if len(tile.models) == 2:
        pairs.append((tile.outer, tile.inner))
    return [
        [end.float() - start.float() for end, start in zip(ends, starts, strict=True)]
        for ends, starts in pairs
    ]


def guess_thresholds(
    method: Method, tensors: Sequence[OutputTensor], ks: Sequence[int]
) -> list[tuple[float, float]]:
    """Bounds of the ``k``-th score of each model, which hold with high probability.

    They come from a small sample, which is read from disk. Tensors that are not fused are left out.
    """
    fused = [index for index, tensor in enumerate(tensors) if tensor.fused and tensor.target.numel]
    ends = list(accumulate(tensors[index].target.numel for index in fused))
    numel = ends[-1]
    reader = TensorReader()
    samples: list[list[Tensor]] = [[] for _ in range(method.models)]
    try:
        for element in range(0, numel, max(numel // BLOCKS, BLOCK)):
            position = bisect_right(ends, element)
            index = fused[position]
            size = tensors[index].target.numel
            start = element - (ends[position] - size)
            piece = Piece(index, start, min(start + BLOCK, size))
            tile = _read(reader, tensors[index], piece, method.models)
            for sample, scores in zip(samples, scores_of(method, tile), strict=True):
                sample.append(scores.values(0))
    finally:
        reader.close()
    return [
        bracket(torch.cat(sample).numpy(), k / max(numel - 1, 1), BLOCK)
        for sample, k in zip(samples, ks, strict=True)
    ]


def _read(reader: TensorReader, tensor: OutputTensor, piece: Piece, models: int) -> Tile:
    parts = []
    for entry in tensor.inputs:
        part = torch.empty(piece.numel, dtype=DTYPES[entry.dtype])
        reader.read(entry, piece.start, as_bytes(part))
        parts.append([part])
    base, *others = parts
    return Tile([piece.tensor], [piece.start], [], base, others[:models], others[models:] or None)

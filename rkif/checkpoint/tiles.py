"""Parts of tensors that are processed together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from rkif.checkpoint.layout import Chunk, Piece

TILE = 1 << 17  # number of elements that a CPU processes at a time, so that they stay in cache


class Tile(NamedTuple):
    """Parts of some tensors, on the device that computes.

    Attributes:
        tensors: indices of the tensors in the layout.
        starts: index of the first element of each part in its tensor.
        out, base: the parts, flat; ``out`` is empty in a scan.
        models: the parts of each model: inner and outer, or any number of models.
        importance: the parts of the inner and of the outer importance; None to select by magnitude.
        names: names of the tensors.
    """

    tensors: Sequence[int]
    starts: Sequence[int]
    out: Sequence[Tensor]
    base: Sequence[Tensor]
    models: Sequence[Sequence[Tensor]]
    importance: Sequence[Sequence[Tensor]] | None = None
    names: Sequence[str] = ()

    @property
    def inner(self) -> Sequence[Tensor]:
        return self.models[0]

    @property
    def outer(self) -> Sequence[Tensor]:
        return self.models[1]


def tiles(
    chunk: Chunk,
    rows: Sequence[Sequence[Tensor]],
    targets: Sequence[Tensor] | None,
    largest: int,
    names: Sequence[str],
    models: int,
) -> Iterator[Tile]:
    """Yield the parts of a chunk in groups of at most ``largest`` elements; larger parts are cut.

    Args:
        chunk: the chunk.
        rows: inputs by role, then by piece of the chunk.
        targets: outputs by piece; None in a scan.
        largest: maximum number of elements of a group.
        names: names of all tensors of the layout.
        models: number of rows after the first that are models; the others are importances.
    """
    pending: list[tuple[int, Piece]] = []  # position in the chunk, and the part of its tensor
    taken = 0
    for position, piece in enumerate(chunk):
        for start in range(piece.start, piece.stop, largest):
            part = Piece(piece.tensor, start, min(start + largest, piece.stop))
            if pending and taken + part.numel > largest:
                yield _tile(chunk, rows, targets, pending, names, models)
                pending, taken = [], 0
            pending.append((position, part))
            taken += part.numel
    yield _tile(chunk, rows, targets, pending, names, models)


def _tile(
    chunk: Chunk,
    rows: Sequence[Sequence[Tensor]],
    targets: Sequence[Tensor] | None,
    chosen: Sequence[tuple[int, Piece]],
    names: Sequence[str],
    models: int,
) -> Tile:
    def cut(row: Sequence[Tensor]) -> list[Tensor]:
        return [
            row[position][part.start - chunk[position].start : part.stop - chunk[position].start]
            for position, part in chosen
        ]

    base, *others = map(cut, rows)
    return Tile(
        [part.tensor for _, part in chosen],
        [part.start for _, part in chosen],
        [] if targets is None else cut(targets),
        base,
        others[:models],
        others[models:] or None,
        [names[part.tensor] for _, part in chosen],
    )

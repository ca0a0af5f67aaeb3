"""Parts of tensors that are processed together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from rkif.checkpoint.layout import Chunk, Piece

TILE = 1 << 17  # elements that a CPU computes on at a time, so that they stay in cache


class Tile(NamedTuple):
    """Parts of some tensors, on the computing device.

    Attributes:
        tensors: their indices in the layout.
        starts: the element of each tensor at which its part starts.
        out, base, inner, outer: the parts, flat; ``out`` is empty in a scan.
        importance: of the inner and of the outer learner; None to select by magnitude.
        names: of the tensors.
    """

    tensors: Sequence[int]
    starts: Sequence[int]
    out: Sequence[Tensor]
    base: Sequence[Tensor]
    inner: Sequence[Tensor]
    outer: Sequence[Tensor]
    importance: tuple[Sequence[Tensor], Sequence[Tensor]] | None
    names: Sequence[str] = ()


def tiles(
    chunk: Chunk,
    rows: Sequence[Sequence[Tensor]],
    targets: Sequence[Tensor] | None,
    largest: int,
    names: Sequence[str],
) -> Iterator[Tile]:
    """Yield the parts of a chunk in groups of at most ``largest`` elements; larger parts are cut.

    Args:
        rows: inputs by role, then by piece of the chunk.
        targets: outputs by piece; None in a scan.
    """
    pending: list[tuple[int, Piece]] = []  # position in the chunk, and the part of its tensor
    taken = 0
    for position, piece in enumerate(chunk):
        for start in range(piece.start, piece.stop, largest):
            part = Piece(piece.tensor, start, min(start + largest, piece.stop))
            if pending and taken + part.numel > largest:
                yield _tile(chunk, rows, targets, pending, names)
                pending, taken = [], 0
            pending.append((position, part))
            taken += part.numel
    yield _tile(chunk, rows, targets, pending, names)


def _tile(
    chunk: Chunk,
    rows: Sequence[Sequence[Tensor]],
    targets: Sequence[Tensor] | None,
    chosen: Sequence[tuple[int, Piece]],
    names: Sequence[str],
) -> Tile:
    def cut(row: Sequence[Tensor]) -> list[Tensor]:
        return [
            row[position][part.start - chunk[position].start : part.stop - chunk[position].start]
            for position, part in chosen
        ]

    base, inner, outer, *importance = map(cut, rows)
    return Tile(
        [part.tensor for _, part in chosen],
        [part.start for _, part in chosen],
        [] if targets is None else cut(targets),
        base,
        inner,
        outer,
        (importance[0], importance[1]) if importance else None,
        [names[part.tensor] for _, part in chosen],
    )

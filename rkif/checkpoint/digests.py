"""Digests of tensors that are read and written piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rkif.checkpoint import layout
from rkif.checkpoint.layout import Chunk
from rkif.checkpoint.source import Entry, Reader
from rkif.checkpoint.stream import as_bytes

EMPTY = hashlib.sha256().hexdigest()  # of a tensor without elements


class Digests:
    """SHA-256 of tensors that come piece by piece, in order, in some roles.

    Args:
        tensors: of the layout.
        roles: where a tensor lies in each role, to read again what was taken in of it before an interruption.
    """

    def __init__(
        self, tensors: Sequence[layout.Tensor], roles: Callable[[layout.Tensor], Sequence[Entry]]
    ) -> None:
        self._tensors, self._roles = tensors, roles
        self._running: list[Any] = []
        self._at: tuple[int, int] | None = None  # the tensor that was left unfinished, and where

    def add(self, chunk: Chunk, rows: Sequence[Sequence[Tensor]]) -> list[dict[str, str]]:
        """Take in the parts of a chunk, a row a role; for each the digests of the tensors that end in it."""
        finished: list[dict[str, str]] = [{} for _ in rows]
        for position, piece in enumerate(chunk):
            tensor = self._tensors[piece.tensor]
            if (piece.tensor, piece.start) != self._at:
                self._begin(tensor, piece.start)
            for role, row in enumerate(rows):
                self._running[role].update(as_bytes(row[position]))
                if piece.stop == tensor.target.numel:
                    finished[role][tensor.name] = self._running[role].hexdigest()
            self._at = (piece.tensor, piece.stop)
        return finished

    def _begin(self, tensor: layout.Tensor, numel: int) -> None:
        """Begin a tensor, with its first elements if those were taken in by others."""
        entries = self._roles(tensor)
        self._running = [hashlib.sha256() for _ in entries]
        if not numel:
            return
        reader = Reader()
        try:
            for running, entry in zip(self._running, entries, strict=True):
                for block in reader.blocks(entry, numel):
                    running.update(block)
        finally:
            reader.close()

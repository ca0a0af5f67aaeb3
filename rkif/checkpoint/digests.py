"""Digests of tensors that are read and written piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rkif.checkpoint import layout
from rkif.checkpoint.layout import Chunk
from rkif.checkpoint.source import Entry, Reader
from rkif.checkpoint.stream import as_bytes

EMPTY = hashlib.sha256().hexdigest()  # of a tensor without elements


class Digests:
    """SHA-256 of tensors that come piece by piece, in order, in some roles."""

    def __init__(self, tensors: Sequence[layout.Tensor]) -> None:
        self._tensors = tensors
        self._running: list[Any] = []

    def add(self, chunk: Chunk, rows: Sequence[Sequence[Tensor]]) -> list[dict[str, str]]:
        """Take in the parts of a chunk, a row a role; for each the digests of the tensors that end in it."""
        finished: list[dict[str, str]] = [{} for _ in rows]
        for position, piece in enumerate(chunk):
            if piece.start == 0:
                self._running = [hashlib.sha256() for _ in rows]
            tensor = self._tensors[piece.tensor]
            for role, row in enumerate(rows):
                self._running[role].update(as_bytes(row[position]))
                if piece.stop == tensor.target.numel:
                    finished[role][tensor.name] = self._running[role].hexdigest()
        return finished

    def take_up(self, entries: Sequence[Entry], numel: int) -> None:
        """Read again what had been taken in of a tensor when the work was interrupted: its first elements."""
        self._running = [hashlib.sha256() for _ in entries]
        reader = Reader()
        try:
            for running, entry in zip(self._running, entries, strict=True):
                for block in reader.blocks(entry, numel):
                    running.update(block)
        finally:
            reader.close()

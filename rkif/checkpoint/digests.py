"""Digests of tensors that are read and written piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rkif.checkpoint.buffers import as_bytes
from rkif.checkpoint.layout import Chunk, OutputTensor
from rkif.checkpoint.source import Entry, TensorReader

EMPTY = hashlib.sha256().hexdigest()  # of a tensor without elements


class Digests:
    """SHA-256 of tensors that arrive piece by piece, in order, in one or more roles.

    Args:
        tensors: the tensors of the layout.
        entries_of: gives a tensor's entries by role. A resumed fusion reads the elements from them that were
            digested before the interruption.
    """

    def __init__(
        self, tensors: Sequence[OutputTensor], entries_of: Callable[[OutputTensor], Sequence[Entry]]
    ) -> None:
        self._tensors, self._entries_of = tensors, entries_of
        self._running: list[Any] = []
        self._next: tuple[int, int] | None = (
            None  # tensor and element that would continue the running digests
        )

    def add(self, chunk: Chunk, rows: Sequence[Sequence[Tensor]]) -> list[dict[str, str]]:
        """Digest a chunk, one row per role; return, by role, the digests of the tensors that end in it."""
        finished: list[dict[str, str]] = [{} for _ in rows]
        for position, piece in enumerate(chunk):
            tensor = self._tensors[piece.tensor]
            if (piece.tensor, piece.start) != self._next:
                self._start(tensor, piece.start)
            for role, row in enumerate(rows):
                self._running[role].update(as_bytes(row[position]))
                if piece.stop == tensor.target.numel:
                    finished[role][tensor.name] = self._running[role].hexdigest()
            self._next = (piece.tensor, piece.stop)
        return finished

    def _start(self, tensor: OutputTensor, numel: int) -> None:
        """Start a tensor; its first ``numel`` elements are read from disk."""
        entries = self._entries_of(tensor)
        self._running = [hashlib.sha256() for _ in entries]
        if not numel:
            return
        reader = TensorReader()
        try:
            for running, entry in zip(self._running, entries, strict=True):
                for block in reader.blocks(entry, numel):
                    running.update(block)
        finally:
            reader.close()

"""Loads the inputs of chunks, one chunk ahead of the computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rkif.checkpoint.buffers import IN_FLIGHT, Buffers, as_bytes, split
from rkif.checkpoint.digests import Digests
from rkif.checkpoint.preflight import Plan
from rkif.checkpoint.source import Entry, TensorReader


@dataclass(frozen=True)
class LoadedChunk:
    """The inputs of a chunk on the device; valid until the next chunk is requested.

    Attributes:
        index: the chunk's index.
        tensors: by role (base, models, then the importances), then by piece of the chunk; flat.
        digests: by role, the SHA-256 of each tensor that ends in this chunk; empty unless requested.
    """

    index: int
    tensors: list[list[Tensor]]
    digests: list[dict[str, str]]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for row in self.tensors for part in row)


class Loader:
    """Reads chunks in a separate thread, until :meth:`close`."""

    def __init__(self, plan: Plan) -> None:
        self._tensors, self._chunks = plan.layout.tensors, plan.chunks
        roles, device = len(plan.checkpoints), plan.request.device
        self._buffers = [Buffers(roles, plan.slot, device) for _ in range(IN_FLIGHT)]
        self._reader = TensorReader()
        self._thread = ThreadPoolExecutor(1, "rkif-read")
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Wait for the read in progress, and close the files."""
        self._thread.shutdown(cancel_futures=True)
        self._reader.close()

    def load(self, indices: Iterable[int], digests: Digests | None = None) -> Iterator[LoadedChunk]:
        """Yield the chunks in the order of ``indices``; the reading thread adds each to ``digests``.

        Raises:
            OSError: reading failed; it names the file.
        """
        ahead: deque[tuple[int, Buffers, Future[list[dict[str, str]]]]] = deque()
        for position, index in enumerate(indices):
            buffers = self._buffers[position % IN_FLIGHT]
            ahead.append((index, buffers, self._thread.submit(self._read, index, buffers, digests)))
            if len(ahead) == IN_FLIGHT:
                yield self._loaded(*ahead.popleft())
        for index, buffers, reading in ahead:
            yield self._loaded(index, buffers, reading)

    def _read(self, index: int, buffers: Buffers, digests: Digests | None) -> list[dict[str, str]]:
        if self._stream is not None:
            self._stream.synchronize()  # wait for the last copy out of this memory
        chunk = self._chunks[index]
        rows = self._split(index, buffers.host)
        for entries, row in zip(self._entries(index), rows, strict=True):
            for entry, piece, part in zip(entries, chunk, row, strict=True):
                self._reader.read(entry, piece.start, as_bytes(part))
        buffers.start_copy_to_device(self._stream)
        return [] if digests is None else digests.add(chunk, rows)

    def _loaded(self, index: int, buffers: Buffers, reading: Future[list[dict[str, str]]]) -> LoadedChunk:
        digests = reading.result()
        buffers.wait_for_copy()
        return LoadedChunk(index, self._split(index, buffers.on_device), digests)

    def _split(self, index: int, buffers: Sequence[Tensor]) -> list[list[Tensor]]:
        chunk, entries = self._chunks[index], self._entries(index)
        # Copied chunks have no importances, so zip leaves the buffers of these out.
        return [split(chunk, *pair) for pair in zip(entries, buffers, strict=False)]

    def _entries(self, index: int) -> list[list[Entry]]:
        """By role, the entries of the chunk's tensors."""
        return [
            list(row)
            for row in zip(
                *(self._tensors[piece.tensor].inputs for piece in self._chunks[index]), strict=True
            )
        ]

    def nbytes(self, indices: Iterable[int]) -> int:
        """Bytes of the inputs of some chunks."""
        return sum(
            piece.numel * entry.itemsize
            for index in indices
            for piece in self._chunks[index]
            for entry in self._tensors[piece.tensor].inputs
        )

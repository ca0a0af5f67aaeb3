"""Writes the output's chunks, one chunk behind the computation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

from torch import Tensor

from rkif.checkpoint.buffers import IN_FLIGHT, Buffers, as_bytes, split
from rkif.checkpoint.digests import Digests
from rkif.checkpoint.layout import Chunk
from rkif.checkpoint.loader import LoadedChunk
from rkif.checkpoint.preflight import Plan
from rkif.checkpoint.source import Entry
from rkif.checkpoint.workdir import Workdir
from rkif.distributed.process_group import ProcessGroup

OUT = "OUT"  # the output's name among the arguments


class OutputWriter:
    """Writes chunks, digests them and records them in the journal, in a separate thread.

    For each chunk: fill :meth:`targets`, then :meth:`submit`; at the end :meth:`finish` and :meth:`close`.

    Args:
        plan: gives the layout of the files; rank 0 allocates them at once and writes their headers.
        work: the folder of the files.
        processes: the processes that share the work.

    Raises:
        OSError: there is not enough disk space for the files.
    """

    def __init__(self, plan: Plan, work: Workdir, processes: ProcessGroup) -> None:
        self._work, self._tensors, self._chunks = work, plan.layout.tensors, plan.chunks
        self._arguments = list(plan.checkpoints)
        self._digests = Digests(self._tensors, lambda tensor: [tensor.target])
        self._slot, self._device = plan.slot, plan.request.device
        self._submitted = 0
        self._writing: Future[None] | None = None
        with processes.raise_on_any_failure():
            if processes.rank == 0:
                work.allocate(plan.layout.sizes)
        self._files = {name: os.open(work.data / name, os.O_WRONLY) for name in plan.layout.sizes}
        if processes.rank == 0:
            for name, header in plan.layout.headers.items():
                os.pwrite(self._files[name], header, 0)
        self._thread = ThreadPoolExecutor(1, "rkif-write")

    def close(self) -> None:
        """Wait for the write in progress, whether or not it succeeds, and close the files."""
        self._thread.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)

    def targets(self, index: int) -> list[Tensor]:
        """The output buffers of a chunk: flat tensors on the device, one for each of its pieces."""
        chunk = self._chunks[index]
        return split(chunk, self._entries(chunk), self._next_buffers.on_device[0])

    def submit(self, chunk: LoadedChunk, counts: Sequence[int], squared_norms: Sequence[float]) -> None:
        """Write the targets of this chunk, and record its counts, norms and digests.

        Waits until the previous chunk is written, so that a kill loses at most one computed chunk.

        Raises:
            OSError: writing the previous chunk failed; it names the file.
        """
        buffers = self._next_buffers
        buffers.copy_to_host()
        self.finish()
        record = {"chunk": chunk.index, "counts": counts, "squared_norms": squared_norms}
        self._writing = self._thread.submit(self._write, buffers.host[0], record, chunk.digests)
        self._submitted += 1

    def finish(self) -> None:
        """Wait until everything that was submitted is on disk.

        Raises:
            OSError: writing failed; it names the file.
        """
        if self._writing is not None:
            self._writing.result()

    @cached_property
    def _buffers(self) -> list[Buffers]:
        """Buffers, allocated for the first chunk, when the scan has freed its memory."""
        return [Buffers(1, self._slot, self._device) for _ in range(IN_FLIGHT)]

    @property
    def _next_buffers(self) -> Buffers:
        return self._buffers[self._submitted % IN_FLIGHT]

    def _entries(self, chunk: Chunk) -> list[Entry]:
        return [self._tensors[piece.tensor].target for piece in chunk]

    def _write(self, buffer: Tensor, record: dict[str, Any], input_digests: list[dict[str, str]]) -> None:
        chunk = self._chunks[record["chunk"]]
        entries = self._entries(chunk)
        row = split(chunk, entries, buffer)
        for piece, entry, part in zip(chunk, entries, row, strict=True):
            self._write_part(entry, piece.start, as_bytes(part))
        for name in {entry.file.name for entry in entries}:
            os.fdatasync(self._files[name])
        (output_digests,) = self._digests.add(chunk, [row])
        digests = dict(zip(self._arguments, input_digests, strict=False))  # copied chunks have no importance
        self._work.record(record | {"digests": digests | {OUT: output_digests}})

    def _write_part(self, entry: Entry, start: int, content: memoryview) -> None:
        """Write the bytes of a tensor from element ``start`` on."""
        offset, done = entry.offset + start * entry.itemsize, 0
        try:
            while done < len(content):
                done += os.pwrite(self._files[entry.file.name], content[done:], offset + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(entry.file)) from error

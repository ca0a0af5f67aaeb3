"""Reading, computing and writing at the same time, in buffers that are allocated once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rkif.checkpoint import layout
from rkif.checkpoint.layout import ALIGNMENT, Chunk, aligned
from rkif.checkpoint.source import DTYPES, Entry, Reader

IN_FLIGHT = 2  # chunks: one is read while another is computed on, one is computed while another is written


class Buffers:
    """Memory for one chunk in each of some roles, and of its copy on the device where that is not the CPU."""

    def __init__(self, roles: int, size: int, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self.host = [_aligned_empty(size, pinned=cuda) for _ in range(roles)]
        self._there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in self.host if cuda]
        self._copied: torch.cuda.Event | None = None

    def send(self, stream: Any) -> None:
        """Begin to copy to the device."""
        if self._there:
            stream.wait_stream(torch.cuda.default_stream(self.device))  # it may still be read from
            with torch.cuda.stream(stream):
                for there, here in zip(self._there, self.host, strict=True):
                    there.copy_(here, non_blocking=True)
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied.record(stream)

    def arrived(self) -> list[Tensor]:
        """The buffers on the device, which will wait for what was sent before it computes."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
        return self.here()

    def here(self) -> list[Tensor]:
        """The buffers on the device, to be written."""
        return self._there or self.host

    def fetch(self) -> None:
        """Copy from the device, and wait for it."""
        if self._there:
            for there, here in zip(self._there, self.host, strict=True):
                here.copy_(there)


def _aligned_empty(size: int, *, pinned: bool) -> Tensor:
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size]


def parts(chunk: Chunk, entries: Sequence[Entry], buffer: Tensor) -> list[Tensor]:
    """The chunk's pieces in a buffer, as flat tensors of the entries' dtypes."""
    found, at = [], 0
    for piece, entry in zip(chunk, entries, strict=True):
        size = piece.numel * entry.itemsize
        found.append(buffer[at : at + size].view(DTYPES[entry.dtype]))
        at += aligned(size)
    return found


def as_bytes(part: Tensor) -> memoryview:
    return part.view(torch.uint8).numpy().data


class Loader:
    """Reads the inputs of chunks, one ahead of what is asked for."""

    def __init__(
        self, tensors: Sequence[layout.Tensor], chunks: Sequence[Chunk], slots: Sequence[Buffers]
    ) -> None:
        self._tensors, self._chunks, self._slots = tensors, chunks, slots
        self._reader = Reader()
        device = slots[0].device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def load(
        self, numbers: Iterable[int], also: Callable[[int, list[list[Tensor]]], Any]
    ) -> Iterator[tuple[int, Buffers, Any]]:
        """Yield (chunk, its buffers, what ``also`` made of chunk and parts) while the next chunk is read.

        The buffers are valid until the next chunk is asked for. ``also`` runs in the reading thread.
        """

        def read(number: int, buffers: Buffers) -> Any:
            if self._stream is not None:
                self._stream.synchronize()  # the last copy out of this memory
            rows = self.inputs(number, buffers.host)
            for row, (entries, _) in zip(rows, self._roles(number), strict=True):
                for part, entry, piece in zip(row, entries, self._chunks[number], strict=True):
                    self._reader.read(entry, piece.start, as_bytes(part))
            buffers.send(self._stream)
            return also(number, rows)

        with ThreadPoolExecutor(1, "rkif-read") as pool:
            ahead: deque[tuple[int, Buffers, Future[Any]]] = deque()
            for turn, number in enumerate(numbers):
                buffers = self._slots[turn % len(self._slots)]
                ahead.append((number, buffers, pool.submit(read, number, buffers)))
                if len(ahead) == len(self._slots):
                    chunk, ready, made = ahead.popleft()
                    yield chunk, ready, made.result()
            for chunk, ready, made in ahead:
                yield chunk, ready, made.result()

    def inputs(self, number: int, buffers: Sequence[Tensor]) -> list[list[Tensor]]:
        """The chunk's parts in each role of ``buffers``."""
        return [parts(self._chunks[number], entries, buffers[role]) for entries, role in self._roles(number)]

    def _roles(self, number: int) -> Iterator[tuple[list[Entry], int]]:
        chosen = [self._tensors[piece.tensor] for piece in self._chunks[number]]
        for role in range(len(chosen[0].inputs)):
            yield [tensor.inputs[role] for tensor in chosen], role

    def close(self) -> None:
        self._reader.close()

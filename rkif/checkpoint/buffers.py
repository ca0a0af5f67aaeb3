"""Memory for chunks, allocated once: on the host, and on the device unless that is the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rkif.checkpoint.layout import ALIGNMENT, Chunk, aligned
from rkif.checkpoint.source import DTYPES, Entry

IN_FLIGHT = 2  # chunks in memory: one is read or written while another is computed


class Buffers:
    """The buffers of one chunk, one for each role.

    Args:
        roles: number of buffers.
        size: bytes of each buffer.
        device: the device that computes. With CUDA, the host's buffers are pinned, and each has a copy on it.

    Attributes:
        device: the device that computes.
        host: uint8 [size] each, aligned to ALIGNMENT.
    """

    def __init__(self, roles: int, size: int, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self.host = [_aligned_empty(size, pinned=cuda) for _ in range(roles)]
        self._copies = [torch.empty(size, dtype=torch.uint8, device=device) for _ in self.host if cuda]
        self._copied: torch.cuda.Event | None = None

    @property
    def on_device(self) -> list[Tensor]:
        """The copies on the device; on a CPU, the host's buffers themselves."""
        return self._copies or self.host

    def start_copy_to_device(self, stream: Any) -> None:
        """Copy on ``stream``, without waiting; nothing to do on a CPU."""
        if self._copies:
            stream.wait_stream(torch.cuda.default_stream(self.device))  # it may still read the last chunk
            with torch.cuda.stream(stream):
                for copy, host in zip(self._copies, self.host, strict=True):
                    copy.copy_(host, non_blocking=True)
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied.record(stream)

    def wait_for_copy(self) -> None:
        """Make the device's current stream wait for the copy of :meth:`start_copy_to_device`."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)

    def copy_to_host(self) -> None:
        """Copy the device's buffers back, and wait; nothing to do on a CPU."""
        if self._copies:
            for copy, host in zip(self._copies, self.host, strict=True):
                host.copy_(copy)


def _aligned_empty(size: int, *, pinned: bool) -> Tensor:
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size]


def split(chunk: Chunk, entries: Sequence[Entry], buffer: Tensor) -> list[Tensor]:
    """Views of a buffer, one for each of the chunk's pieces: flat, in the dtype of the piece's entry."""
    views, start = [], 0
    for piece, entry in zip(chunk, entries, strict=True):
        size = piece.numel * entry.itemsize
        views.append(buffer[start : start + size].view(DTYPES[entry.dtype]))
        start += aligned(size)
    return views


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a flat CPU tensor."""
    return tensor.view(torch.uint8).numpy().data

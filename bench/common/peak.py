"""The memory budget of a benchmark, and the peak of memory beyond a step's inputs."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

GIB = 2**30


def budget(device: torch.device, gib: float | None) -> int:
    """Bytes for inputs: ``gib`` if given, else 11 GiB on a CPU and half of a GPU's memory."""
    if gib is not None:
        return int(gib * GIB)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 2
    return 11 * GIB


def release(device: torch.device) -> None:
    """Release unused memory before the next inputs are allocated."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Peak:
    """The peak of memory during a ``with`` block: PyTorch's allocations on CUDA, resident memory on Linux.

    Attributes:
        extra: bytes beyond the memory in use on entry; None where unknown.
        total: bytes; None where unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.extra: int | None = None
        self.total: int | None = None

    def __enter__(self) -> Peak:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif _CLEAR.exists():
            _CLEAR.write_text("5")  # resets the high-water mark
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self.total = torch.cuda.max_memory_allocated()
        else:
            self.total = _status("VmHWM")
        if self.total is not None and self._before is not None:
            self.extra = max(self.total - self._before, 0)

    def _now(self) -> int | None:
        return torch.cuda.memory_allocated() if self._cuda else _status("VmRSS")


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _status(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None

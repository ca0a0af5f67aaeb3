"""How much memory there is to measure in, and how much a step took beside its inputs."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

GIB = 2**30


def budget(device: torch.device, gib: float | None) -> int:
    """Bytes for inputs: as stated, or 11 GiB on a CPU and half of a GPU's memory."""
    if gib is not None:
        return int(gib * GIB)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 2
    return 11 * GIB


def release(device: torch.device) -> None:
    """Give unused memory back before the next inputs are made."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Peak:
    """The peak of memory inside a ``with`` block, beyond what was there on entering.

    Allocated by PyTorch on CUDA; resident in the process on Linux; elsewhere unknown.

    Attributes:
        extra: bytes, or None.
        total: bytes with what was there before, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.extra: int | None = None
        self.total: int | None = None

    def __enter__(self) -> Peak:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif _CLEAR.exists():
            _CLEAR.write_text("5")  # the high-water mark starts anew
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

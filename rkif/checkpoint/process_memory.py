"""Memory of the process's own: what a bound on memory bounds."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_ASSUMED = 256 << 20  # where it cannot be measured: Python and PyTorch


def anonymous_memory() -> int:
    """Bytes of resident memory that belong to no file: what cannot be dropped and read again."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return _ASSUMED

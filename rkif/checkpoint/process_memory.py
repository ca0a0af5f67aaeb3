"""Anonymous memory of the process, which ``--max-memory`` bounds."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_ASSUMED = 256 << 20  # for Python and PyTorch, if it cannot be measured


def anonymous_memory() -> int:
    """Bytes of resident memory that belong to no file, so the system cannot free and reread them."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return _ASSUMED

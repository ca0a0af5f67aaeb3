"""Progress of a fusion, and its data volume and memory."""

from __future__ import annotations

from typing import Protocol

from rkif.checkpoint.process_memory import anonymous_memory


class Progress(Protocol):
    """Receives progress."""

    def stage(self, name: str, total: int) -> None:
        """Begin a stage that processes ``total`` bytes."""

    def advance(self, size: int) -> None:
        """Add ``size`` processed bytes to the stage."""


class NullProgress:
    """Ignores progress."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, size: int) -> None: ...


class ProgressMeter:
    """Forwards progress, and measures bytes and memory.

    Attributes:
        read: bytes processed in all stages.
        memory: maximum bytes of anonymous memory, measured after each step.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.read = 0
        self.memory = 0

    def stage(self, name: str, total: int) -> None:
        self._progress.stage(name, total)

    def advance(self, size: int) -> None:
        self.read += size
        self.memory = max(self.memory, anonymous_memory())
        self._progress.advance(size)

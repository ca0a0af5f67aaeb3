"""Simulated captures of CUDA graphs: calls in a capture are executed at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Captures:
    """Whether a graph is being captured."""

    active = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.active = True
        try:
            yield
        finally:
            self.active = False

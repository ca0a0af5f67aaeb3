"""The whole fusion: thresholds, masks and merge."""

from __future__ import annotations

from collections.abc import Callable

from bench.kernels.operations import Fuse, Operation

OPERATION = Fuse


def bench_fuse(measured: Callable[[type[Operation]], None]) -> None:
    measured(OPERATION)

"""The importance update: every parameter, every step."""

from __future__ import annotations

from collections.abc import Callable

from bench.kernels.operations import Observe, Operation

OPERATION = Observe


def bench_observe(measured: Callable[[type[Operation]], None]) -> None:
    measured(OPERATION)

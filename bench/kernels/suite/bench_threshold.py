"""The exact threshold of one learner's scores."""

from __future__ import annotations

from collections.abc import Callable

from bench.kernels.operations import Operation, Threshold

OPERATION = Threshold


def bench_threshold(measured: Callable[[type[Operation]], None]) -> None:
    measured(OPERATION)

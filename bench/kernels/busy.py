"""The time of the CPU kernels while another process keeps one core busy."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from bench.kernels.implementations import implementations
from bench.kernels.operations import DTYPES, OPERATIONS
from bench.kernels.shapes import LORA_R8, ShapeSet

GOAL = 1.6  # maximum ratio of busy to quiet time
ROUNDS = 15


class Row(NamedTuple):
    """Attributes:
    op: the operation.
    quiet_ms, busy_ms: medians, without and with a process that keeps one core busy.
    """

    op: str
    quiet_ms: float
    busy_ms: float

    @property
    def ratio(self) -> float:
        return self.busy_ms / self.quiet_ms


def measure(rounds: int = ROUNDS, shapes: ShapeSet = LORA_R8) -> list[Row]:
    """Time each operation of rkif's first backend in float32, quiet and busy in turn.

    Raises:
        RuntimeError: this process may use only one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RuntimeError("one core is kept busy, so two are needed; this process may use one")
    device, rows = torch.device("cpu"), []
    for name, operation in OPERATIONS.items():
        inputs = operation(shapes, DTYPES["float32"], device)
        run = implementations(name, device)[0].make()
        inputs.call(run)
        quiet, busy = [], []
        for _ in range(rounds):
            quiet.append(_milliseconds(inputs.call, run))
            with _busy(cores[0]):
                busy.append(_milliseconds(inputs.call, run))
        rows.append(Row(name, round(statistics.median(quiet), 3), round(statistics.median(busy), 3)))
    return rows


def _milliseconds(call: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - start) * 1e3


@contextmanager
def _busy(core: int) -> Iterator[None]:
    """Keep a core busy during the block."""
    code = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()

"""Timing, and the bandwidth of a copy for comparison."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]

COPIED = {"cpu": 2**27, "cuda": 2**28}  # float32 elements: 0.5 and 1 GiB, more than any cache


def synchronised() -> float:
    """The time in seconds after a synchronisation with the GPU: the benchmarks' timer on CUDA."""
    torch.cuda.synchronize()
    return time.perf_counter()


def timer(device: torch.device) -> Callable[[], float]:
    return synchronised if device.type == "cuda" else time.perf_counter


def seconds(run: Run, device: torch.device) -> float:
    """Seconds of one run."""
    now = timer(device)
    start = now()
    run()
    return now() - start


def captured(run: Run) -> Run | None:
    """Capture ``run`` in a CUDA graph; returns its replay, or None if it waits for the GPU."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, fills caches and allocates before the capture
            run()
    before = torch.cuda.current_stream()
    before.wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.set_stream(before)  # a failed capture leaves its own stream current
        torch.cuda.synchronize()
        return None
    return graph.replay


def plan(once: float, *, round_s: float, total_s: float, rounds: tuple[int, int]) -> tuple[int, int]:
    """The number of rounds and iterations for a run of ``once`` seconds.

    Args:
        once: seconds of one run.
        round_s: minimum seconds of a round; it makes the synchronisation around a round negligible.
        total_s: seconds of all rounds.
        rounds: minimum and maximum of rounds; the minimum takes precedence over ``total_s``.

    Returns:
        (rounds, iterations per round).
    """
    iterations = max(1, math.ceil(round_s / once))
    return min(max(int(total_s / (once * iterations)), rounds[0]), rounds[1]), iterations


def copy_gbps(device: torch.device, elements: int | None = None) -> float:
    """GB/s read and written by a large ``Tensor.copy_``, from the median of several rounds."""
    source = torch.rand(elements or COPIED[device.type], device=device)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    run()
    rounds, iterations = plan(seconds(run, device), round_s=0.02, total_s=1.0, rounds=(5, 50))

    def several() -> None:
        for _ in range(iterations):
            run()

    taken = statistics.median(seconds(several, device) for _ in range(rounds)) / iterations
    return 2 * source.nbytes / taken / 1e9

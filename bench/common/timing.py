"""How time is taken, and the bandwidth that it is held against."""

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
    """Seconds, once the GPU has done all it was given: the benchmarks' timer on CUDA."""
    torch.cuda.synchronize()
    return time.perf_counter()


def timer(device: torch.device) -> Callable[[], float]:
    return synchronised if device.type == "cuda" else time.perf_counter


def seconds(run: Run, device: torch.device) -> float:
    """One run, alone."""
    now = timer(device)
    start = now()
    run()
    return now() - start


def captured(run: Run) -> Run | None:
    """``run`` as a CUDA graph's replay, or None where it cannot be captured: it waits for the GPU."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # whatever is compiled, cached or allocated once
            run()
    before = torch.cuda.current_stream()
    before.wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.set_stream(before)  # a capture that failed leaves its own behind
        torch.cuda.synchronize()
        return None
    return graph.replay


def plan(once: float, *, round_s: float, total_s: float, rounds: tuple[int, int]) -> tuple[int, int]:
    """How often to run what takes ``once`` seconds.

    Args:
        once: seconds of one run.
        round_s: a round's length at least, so that what brackets it (a synchronisation) does not count.
        total_s: seconds to spend.
        rounds: fewest and most rounds; the fewest also where that takes longer.

    Returns:
        (rounds, iterations in each).
    """
    iterations = max(1, math.ceil(round_s / once))
    return min(max(int(total_s / (once * iterations)), rounds[0]), rounds[1]), iterations


def copy_gbps(device: torch.device, elements: int | None = None) -> float:
    """Bytes read and written a nanosecond by a large ``Tensor.copy_``, the median of several."""
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

"""One measurement: check the result, take the time, make the row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.common.rows import Row, row
from bench.common.timing import captured, plan, seconds
from bench.kernels.implementations import Implementation
from bench.kernels.operations import Operation, bytes_per_element


@dataclass(frozen=True)
class Budget:
    """How long to measure: minimum seconds per round, total seconds, minimum and maximum of rounds."""

    round_s: float = 0.01
    total_s: float = 1.0
    rounds: tuple[int, int] = (5, 100)


QUICK = Budget(round_s=0.002, total_s=0.2, rounds=(3, 20))


def measure(
    benchmark: Any,
    operation: Operation,
    implementation: Implementation,
    budget: Budget,
    copy_gbps: float,
) -> Row:
    """Check an implementation's result, then time it.

    Args:
        benchmark: pytest-benchmark's fixture.
        operation: what to run, with its inputs.
        implementation: what runs it.
        budget: how long to measure.
        copy_gbps: the copy bandwidth in this session.

    Raises:
        AssertionError: the result is wrong; nothing has been timed.
    """
    run_once = implementation.make()
    if implementation.same:
        operation.check(run_once, implementation.exact)

    def call() -> None:
        operation.call(run_once)

    on_cuda = operation.device.type == "cuda"
    replay = captured(call) if on_cuda and implementation.captures else None
    run = replay or call
    run()
    rounds, iterations = plan(
        seconds(run, operation.device),
        round_s=budget.round_s,
        total_s=budget.total_s,
        rounds=budget.rounds,
    )
    benchmark.pedantic(run, rounds=rounds, iterations=iterations, warmup_rounds=1)
    taken = benchmark.stats.stats.data  # seconds of one iteration, one value per round
    shapes, dtypes = operation.shapes, operation.dtypes
    return row(
        op=operation.name,
        shape=shapes.name,
        dtype=dtypes.name,
        implementation=implementation.name,
        numel=shapes.numel,
        tensors=len(shapes.shapes),
        seconds=[value / operation.repeats for value in taken],
        bytes_min=shapes.numel * bytes_per_element(operation.name, dtypes),
        copy_gbps=copy_gbps,
        device=operation.device,
        graph=replay is not None,
    )

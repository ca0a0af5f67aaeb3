"""Measurements of the kernels with other launch configurations: blocks, warps, brackets.

The fastest becomes a row of ``launches.json`` for the GPU, the version of Triton and the size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.common import rows
from bench.common.timing import captured, copy_gbps, plan, seconds
from bench.kernels.measure import Budget
from bench.kernels.operations import DTYPES, OPERATIONS, Operation, bytes_per_element
from bench.kernels.shapes import fitted
from rkif_kernels import FusionInputs, ImportanceInputs, MergeRule, Smoothing, order_statistic_k
from rkif_kernels.backends.choose import available
from rkif_kernels.backends.triton import launches
from rkif_kernels.backends.triton.launch import Bracketing, LaunchConfig
from rkif_kernels.backends.triton.undecided import MAX_TILES
from rkif_kernels.types import Scores

# Block, tiles and warps of a program.
PROGRAMS = (
    (1024, 8, 4),
    (512, 16, 4),
    (512, 8, 4),
    (512, 16, 2),
    (1024, 4, 4),
    (1024, 8, 8),
    (2048, 4, 8),
    (256, 32, 2),
)
# Tried with the fastest program: numbers of scores per sampled run, and relative lengths of the list.
STRIDES, SLACKS = (64, 256), (1.5, 3.0)
# Shape -> maximum number of elements that its result applies to; None for any number.
SIZES = {"llama-2-13b-lora-r8": 2**24, "one-64Mi": None}
DTYPE = DTYPES["float32"]
BUDGET = Budget(round_s=0.005, total_s=0.3, rounds=(5, 50))
GAIN = 0.98  # a faster configuration takes less than this share of the default's time; the rest may be noise


class Timed(NamedTuple):
    """A launch configuration, and the row of its measurement."""

    launch: launches.Row
    row: rows.Row


def file() -> Path:
    return rows.RESULTS / "launches.jsonl"


def measure(
    device: torch.device, shapes: Sequence[str], console: Console, *, into: Path | None = None
) -> None:
    """Time every operation with every configuration, after comparing its result with the reference.

    Args:
        into: a file like ``launches.json``, to which the fastest configurations are written.

    Raises:
        RuntimeError: Triton kernels do not run on the device.
        AssertionError: a result is wrong.
    """
    if "triton" not in available(device):
        raise RuntimeError(f"Triton kernels do not run on {device}")
    bandwidth = copy_gbps(device)
    for shape in shapes or SIZES:
        for name, kind in OPERATIONS.items():
            operation = kind(fitted(shape, 2**27), DTYPE, device)
            usual = replace(
                launches.default(name),
                op=name,
                architecture=launches.architecture(device),
                triton=launches.triton_version(),
                dtypes=DTYPE.name,
                numel_up_to=SIZES.get(shape),
            )
            time = partial(_timed, operation, bandwidth, usual)
            timings = [time(launch) for launch in _programs(usual)]
            timings += [time(launch) for launch in _brackets(fastest(timings).launch)]
            for timed in timings:
                rows.write(file(), timed.row)
            console.print(_table(timings))
            if into is not None:
                launches.write(into, [_measured(fastest(timings))])


def fastest(timings: Sequence[Timed]) -> Timed:
    """The default, which is the first, unless another one is faster by more than noise."""
    best = min(timings, key=_milliseconds)
    return best if _milliseconds(best) < GAIN * _milliseconds(timings[0]) else timings[0]


def markdown() -> str:
    """The launch configurations of calls and their measurements, as a table."""
    lines = [
        "| operation | GPU | triton | dtypes | parameters | block x tiles, warps | sample, list | measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in launches.rows():
        names = (row.op, row.architecture, row.triton, row.dtypes)
        cells = ["any other" if name == launches.ANY else name for name in names]
        cells.append("any number" if row.numel_up_to is None else f"up to {row.numel_up_to:,}")
        cells += [row.launch.label, _bracket_label(row.bracketing), _measurement(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _programs(usual: launches.Row) -> Iterator[launches.Row]:
    """Yield the default, then configurations with other programs."""
    yield usual
    for block, tiles, num_warps in PROGRAMS:
        config = LaunchConfig(block, tiles, num_warps, usual.launch.max_registers)
        if config != usual.launch and (usual.bracketing is None or tiles <= MAX_TILES):
            yield replace(usual, launch=config)


def _brackets(best: launches.Row) -> Iterator[launches.Row]:
    """Yield the fastest program with other brackets."""
    if best.bracketing is not None:
        for stride in STRIDES:
            yield replace(best, bracketing=replace(best.bracketing, sample_stride=stride))
        for slack in SLACKS:
            yield replace(best, bracketing=replace(best.bracketing, list_slack=slack))


def _timed(operation: Operation, bandwidth: float, usual: launches.Row, launch: launches.Row) -> Timed:
    device, shapes = operation.device, operation.shapes
    run = partial(_RUNS[operation.name](device), launch)
    operation.check(run, exact=True)
    call = partial(operation.call, run)
    replay = (captured(call) if device.type == "cuda" else None) or call
    count, iterations = plan(
        seconds(replay, device), round_s=BUDGET.round_s, total_s=BUDGET.total_s, rounds=BUDGET.rounds
    )
    several = partial(_several, replay, iterations)
    taken = [seconds(several, device) / iterations / operation.repeats for _ in range(count)]
    row = rows.row(
        op=operation.name,
        shape=shapes.name,
        dtype=DTYPE.name,
        implementation=_label(launch),
        numel=shapes.numel,
        tensors=len(shapes.shapes),
        seconds=taken,
        bytes_min=shapes.numel * bytes_per_element(operation.name, DTYPE),
        copy_gbps=bandwidth,
        device=device,
        default=launch == usual,
    )
    return Timed(launch, row)


def _measured(timed: Timed) -> launches.Row:
    row = timed.row
    figures = {"ms": row["ms_median"], "share": row["share"], "commit": rows.commit_of(row)}
    return replace(timed.launch, measured={"device": row["device"], "shape": row["shape"], **figures})


def _measurement(row: launches.Row) -> str:
    if row.measured is None:
        return "not measured"
    return "{shape}: {ms:.4f} ms, {share:.0%} of a copy; {device}, at {commit}".format(**row.measured)


def _table(timings: Sequence[Timed]) -> Table:
    out = Table(title=f"{timings[0].row['op']}, {timings[0].row['shape']}")
    for heading in ("block x tiles, warps; sample, list", "ms", "of a copy"):
        out.add_column(heading, justify="right")
    for _, row in sorted(timings, key=_milliseconds):
        name = row["implementation"] + (" (default)" if row["default"] else "")
        out.add_row(name, f"{row['ms_median']:.4f}", f"{row['share']:.1%}")
    return out


def _milliseconds(timed: Timed) -> float:
    return float(timed.row["ms_median"])


def _label(launch: launches.Row) -> str:
    brackets = "" if launch.bracketing is None else f"; {_bracket_label(launch.bracketing)}"
    return launch.launch.label + brackets


def _bracket_label(bracketing: Bracketing | None) -> str:
    if bracketing is None:
        return "-"
    return f"{bracketing.run} of {bracketing.sample_stride}, {bracketing.list_slack:g} times"


def _several(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def _observe(device: torch.device) -> Callable[..., Any]:
    from rkif_kernels.backends import triton as kernels

    nonfinite = torch.zeros(1, dtype=torch.int64, device=device)

    def run(launch: launches.Row, *lists: Any, beta1: float, beta2: float) -> None:
        inputs = ImportanceInputs(*lists)
        kernels.update_importance_(inputs, Smoothing(beta1, beta2), nonfinite, launch.launch)

    return run


def _threshold(device: torch.device) -> Callable[..., Any]:
    from rkif_kernels.backends import triton as kernels

    def run(launch: launches.Row, scores: Scores, density: float) -> Tensor:
        k = order_statistic_k(scores.numel, density)
        return kernels.score_thresholds(
            scores, ks=[k], per_tensor=False, config=launch.launch, bracketing=launch.bracketing
        )

    return run


def _fuse(device: torch.device) -> Callable[..., Any]:
    from rkif_kernels.backends import triton as kernels

    def run(launch: launches.Row, out: list[Tensor], *lists: Any, density: float, weights: Any) -> Any:
        inputs = FusionInputs(out, *lists)
        k, rule = order_statistic_k(inputs.numel, density), MergeRule(weights, "inner")
        return kernels.select_and_fuse_(inputs, k, rule, config=launch.launch, bracketing=launch.bracketing)

    return run


_RUNS = {"observe": _observe, "threshold": _threshold, "fuse": _fuse}

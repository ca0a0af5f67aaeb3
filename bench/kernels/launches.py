"""The Triton kernels with several launch configurations: block, tiles and warps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.common import rows
from bench.common.timing import captured, copy_gbps, plan, seconds
from bench.kernels.measure import Budget
from bench.kernels.operations import DTYPES, OPERATIONS, bytes_per_element
from bench.kernels.shapes import fitted
from rkif_kernels import FusionInputs, ImportanceInputs, MergeRule, Smoothing, order_statistic_k
from rkif_kernels.backends.choose import available
from rkif_kernels.backends.triton.launch import FUSE, STREAM, LaunchConfig
from rkif_kernels.types import Scores

DEFAULTS = {"observe": STREAM, "threshold": STREAM, "fuse": FUSE}
CONFIGS = tuple(
    LaunchConfig(block, tiles, num_warps)
    for block, tiles, num_warps in (
        (1024, 8, 4),
        (512, 16, 4),
        (512, 8, 4),
        (512, 16, 2),
        (1024, 4, 4),
        (1024, 8, 8),
        (2048, 4, 8),
        (256, 32, 2),
    )
)
SHAPES = ("one-64Mi", "llama-2-13b-lora-r8")
BUDGET = Budget(round_s=0.005, total_s=0.3, rounds=(5, 50))


def file() -> Path:
    return rows.RESULTS / "launches.jsonl"


def measure(device: torch.device, shapes: Sequence[str], console: Console) -> None:
    """Check every operation against the reference with every configuration, time it, and write rows.

    Raises:
        RuntimeError: Triton kernels do not run on the device.
        AssertionError: a result is wrong.
    """
    if "triton" not in available(device):
        raise RuntimeError(f"Triton kernels do not run on {device}")
    bandwidth = copy_gbps(device)
    dtypes = DTYPES["float32"]
    for shape in shapes or SHAPES:
        for name, kind in OPERATIONS.items():
            operation = kind(fitted(shape, 2**27), dtypes, device)
            found = []
            for config in CONFIGS:
                run = partial(_RUNS[name](device), config)
                operation.check(run, exact=True)
                call = partial(operation.call, run)
                replay = (captured(call) if device.type == "cuda" else None) or call
                count, iterations = plan(
                    seconds(replay, device),
                    round_s=BUDGET.round_s,
                    total_s=BUDGET.total_s,
                    rounds=BUDGET.rounds,
                )
                several = partial(_several, replay, iterations)
                taken = [seconds(several, device) / iterations / operation.repeats for _ in range(count)]
                found.append(
                    rows.row(
                        op=name,
                        shape=shape,
                        dtype=dtypes.name,
                        implementation=_label(config),
                        numel=operation.shapes.numel,
                        tensors=len(operation.shapes.shapes),
                        seconds=taken,
                        bytes_min=operation.shapes.numel * bytes_per_element(name, dtypes),
                        copy_gbps=bandwidth,
                        device=device,
                        default=config == DEFAULTS[name],
                    )
                )
                rows.write(file(), found[-1])
            console.print(_table(found))


def markdown() -> str:
    """The rows as a table, with the time of a copy of as many bytes as the prediction."""
    if not file().exists():
        return "Not measured yet: no GPU has run them.\n"
    lines = [
        "| operation | parameters | block x tiles, warps | predicted, ms | measured | of a copy | device |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows.read(file()):
        predicted = row["bytes_min"] / row["copy_gbps"] / 1e6
        chosen = " (default)" if row["default"] else ""
        lines.append(
            f"| {row['op']} | {row['shape']} | {row['implementation']}{chosen} | {predicted:.3f} | "
            f"{row['ms_median']:.3f} | {row['share']:.0%} | {row['device']} |"
        )
    return "\n".join(lines) + "\n"


def _table(found: Sequence[rows.Row]) -> Table:
    out = Table(title=f"{found[0]['op']}, {found[0]['shape']}")
    for heading in ("block x tiles, warps", "ms", "of a copy"):
        out.add_column(heading, justify="right")
    for row in sorted(found, key=lambda row: row["ms_median"]):
        name = row["implementation"] + (" (default)" if row["default"] else "")
        out.add_row(name, f"{row['ms_median']:.4f}", f"{row['share']:.1%}")
    return out


def _label(config: LaunchConfig) -> str:
    return f"{config.block} x {config.tiles}, {config.num_warps}"


def _several(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def _observe(device: torch.device) -> Callable[..., Any]:
    from rkif_kernels.backends import triton as kernels

    nonfinite = torch.zeros(1, dtype=torch.int64, device=device)

    def run(config: LaunchConfig, *lists: Any, beta1: float, beta2: float) -> None:
        kernels.update_importance_(ImportanceInputs(*lists), Smoothing(beta1, beta2), nonfinite, config)

    return run


def _threshold(device: torch.device) -> Callable[..., Any]:
    from rkif_kernels.backends import triton as kernels

    def run(config: LaunchConfig, scores: Scores, density: float) -> Tensor:
        k = order_statistic_k(sum(t.numel() for t in scores.sensitivity), density)
        return kernels.score_thresholds(scores, ks=[k], per_tensor=False, config=config)

    return run


def _fuse(device: torch.device) -> Callable[..., Any]:
    from rkif_kernels.backends import triton as kernels

    def run(config: LaunchConfig, out: list[Tensor], *inputs: Any, density: float, weights: Any) -> Any:
        k = order_statistic_k(sum(t.numel() for t in out), density)
        return kernels.select_and_fuse_(
            FusionInputs(out, *inputs), k, MergeRule(weights, "inner"), config=config
        )

    return run


_RUNS = {"observe": _observe, "threshold": _threshold, "fuse": _fuse}

"""Methods side by side on a task sequence: one row a run in ``bench/results/continual.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import commit, device_name
from rkif.continual.config import RunConfig, load_config
from rkif.continual.model import device
from rkif.continual.progress import RunProgress, comparison_table
from rkif.continual.run import run

RESULTS = Path(__file__).parent / "results" / "continual.jsonl"


def compare(config_path: Path, methods: Sequence[str], out: Path, console: Console) -> None:
    """Run methods on a config and append a row for each to the results.

    Interrupted and called again it goes on: finished runs are read, a half-finished one is resumed (its row
    then has no wall time).

    Args:
        config_path: a config of ``rkif run``; its ``method`` is replaced.
        methods: names of methods.
        out: folder for the runs, ``out/<method>``.
        console: where to show progress and the table.
    """
    config = load_config(config_path)
    finished = []
    for method in methods:
        chosen = RunConfig.model_validate(config.model_dump() | {"method": method})
        folder = out / method
        resumed = folder.exists()
        started = time.monotonic()
        metrics = run(chosen, folder, resume=resumed, progress=RunProgress(console))
        _record(_row(chosen, metrics, None if resumed else time.monotonic() - started))
        finished.append(metrics)
    console.print(comparison_table(finished))


def _row(config: RunConfig, metrics: dict[str, Any], wall: float | None) -> dict[str, Any]:
    order = config.tasks.order
    return {
        "suite": order.partition("-")[0] if isinstance(order, str) else "custom",
        "order": order,
        "method": metrics["method"],
        "seed": config.seed,
        **{
            key: metrics[key] if metrics[key] is None else round(metrics[key], 3)
            for key in ("op", "bwt", "fwt")
        },
        "samples": metrics["samples"],
        "steps": metrics["steps"],
        "wall_s": wall if wall is None else round(wall, 1),
        "model": Path(config.model).name,
        "trainable": metrics["trainable"],
        "split": metrics["split"],
        "device": device_name(device(config)),
        "commit": commit(),
        "tasks": metrics["tasks"],
        "records": metrics["records"],
        "initial": metrics["initial"],
        "accuracy": metrics["accuracy"],
        "settings": config.model_dump(mode="json", exclude={"model", "tasks", "method", "seed"}),
    }


def _record(row: dict[str, Any]) -> None:
    """Append a row; one with the same figures from the same settings is there already after a second call."""
    RESULTS.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    same = ("suite", "order", "method", "seed", "model", "accuracy", "settings")
    if not any(all(old[key] == row[key] for key in same) for old in rows):
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")

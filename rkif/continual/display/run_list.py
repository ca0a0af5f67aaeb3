"""The runs in a folder as a table, which ``rkif report`` and ``rkif log`` show for a folder of runs."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from rkif.continual.display.progress import format_number
from rkif.continual.rundir.folder import METRICS, RunReader
from rkif.ledger.chain import LEDGER

_DEPTH = 2  # runs/NAME, or a folder of such folders


def find_runs(folder: Path) -> list[Path]:
    """The runs at most two levels below a folder, by name; none if the folder is a run itself."""
    if any((folder / name).exists() for name in (METRICS, LEDGER)):
        return []
    configs = (path for level in range(1, _DEPTH + 1) for path in folder.glob("*/" * level + "config.yaml"))
    return sorted(config.parent for config in configs)


def print_runs(folder: Path) -> bool:
    """Print the runs in a folder; False if it is a run itself, or has none."""
    runs = find_runs(folder)
    if runs:
        Console().print(run_list(runs))
    return bool(runs)


def run_list(runs: list[Path]) -> Table:
    """A line for each run: method, learned tasks, OP, BWT and FWT, or the error if it cannot be read."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("run", "method", "tasks"):
        table.add_column(heading, overflow="fold")
    for heading in ("OP", "BWT", "FWT"):
        table.add_column(heading, justify="right")
    for run in runs:
        try:
            metrics = RunReader(run).metrics()
        except ValueError as error:
            table.add_row(str(run), f"damaged: {error}")
            continue
        if not metrics:
            table.add_row(str(run), "has measured nothing yet")
            continue
        learned = len(metrics["accuracy"][0]) if metrics["accuracy"] else 0
        scores = [format_number(metrics[key], sign=key != "op") for key in ("op", "bwt", "fwt")]
        table.add_row(str(run), metrics["method"], f"{learned} of {len(metrics['tasks'])}", *scores)
    return table

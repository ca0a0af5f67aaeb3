"""Progress, plan and summary of a fusion in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from rkif.checkpoint.card import selections
from rkif.checkpoint.preflight import MIB, Plan
from rkif.checkpoint.summary import Summary


class Bar:
    """A progress bar with throughput and time left; a context manager."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,  # without a terminal it would print an empty line
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(name, total=total)

    def advance(self, size: int) -> None:
        assert self._task is not None
        self._bars.advance(self._task, size)


def plan_table(plan: Plan) -> Table:
    """The inputs and the plan of the fusion."""
    request, layout = plan.request, plan.layout
    table = _table("Pre-flight: no problem found")
    for argument, checkpoint in plan.checkpoints.items():
        size = sum(entry.nbytes for entry in checkpoint.tensors.values())
        dtypes = ", ".join(sorted({entry.dtype for entry in checkpoint.tensors.values()}))
        table.add_row(
            argument, f"{checkpoint.path}: {len(checkpoint.tensors)} tensors, {_gb(size)}, {dtypes}"
        )
    table.add_row("output", f"{request.out}: {_files(len(layout.sizes))}, {_gb(plan.written)}")
    table.add_row("method", _settings(request.method.name, request.settings))
    table.add_row("parameters", f"{plan.numel:,}")
    table.add_row("memory", f"{plan.memory / MIB:,.0f} MiB at most, including Python and PyTorch")
    table.add_row("time", f"about {_duration(plan.seconds)}, to read {_gb(plan.read)}")
    for note in plan.notes:
        table.add_row("note", note)
    return table


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan, ready for JSON."""
    return {
        "problems": [],
        "notes": plan.notes,
        "tensors": len(plan.layout.tensors),
        "parameters": plan.numel,
        "files": plan.layout.sizes,
        "read": plan.read,
        "written": plan.written,
        "memory": plan.memory,
        "seconds": plan.seconds,
        "method": plan.request.method.name,
        "settings": plan.request.settings,
    }


def summary_table(summary: Summary) -> Table:
    """The result, time, data volume and memory of the fusion; its digest is too long for a row."""
    report = summary.report
    total = max(sum(report["counts"].values()), 1)
    complete = not summary.seconds  # it was complete before this call
    title = f"Fused into {summary.out}{', resumed' if summary.resumed else ''}"
    table = _table(f"{summary.out} is already complete" if complete else title)
    table.add_row("method", _settings(summary.method, summary.settings))
    table.add_row("parameters", f"{report['numel']:,} in {summary.tensors} tensors, {_files(summary.files)}")
    cases = ", ".join(f"{name} {n / total:.1%}" for name, n in selections(report))
    table.add_row("selected by", cases)
    for side, threshold in zip(report["norms"], report["thresholds"], strict=False):
        if isinstance(threshold, float):
            table.add_row(f"threshold, {side}", f"{threshold:.6g}")
    norms = ", ".join(f"{name} {norm:.6g}" for name, norm in report["norms"].items())
    table.add_row("L2 norms", norms)
    if "truncation" in report:
        lost = max(report["truncation"].values())
        table.add_row("truncation", f"at most {lost:.2%} of an update's norm is lost at the adapter's rank")
    if complete:
        return table
    speed = summary.read / summary.seconds / 1e6
    duration = f"{_duration(summary.seconds)} ({summary.cpu_seconds:.1f} s of CPU): {_gb(summary.read)} read"
    table.add_row("time", f"{duration} at {speed:,.0f} MB/s, {_gb(summary.written)} written")
    table.add_row("memory", f"{summary.memory / MIB:,.0f} MiB")
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _settings(method: str, settings: dict[str, Any]) -> str:
    return ", ".join([method, *(f"{name} {_short(value)}" for name, value in settings.items())])


def _short(value: Any) -> str:
    """A value in one line; numbers of a list with six digits."""
    if isinstance(value, list | tuple) and all(isinstance(part, float) for part in value):
        return ",".join(f"{part:.6g}" for part in value)
    return str(value)


def _files(count: int) -> str:
    return f"{count} file{'s' if count > 1 else ''}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**8 else f"{size / 1e6:.2f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""The terminal output of a run: progress bars while it runs, tables at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rkif.continual.config import RunConfig
from rkif.continual.tasks.records import Task

MAX_TASK_COLUMNS = 6  # more do not fit the width of a terminal


class RunProgress:
    """Shows a run on a console: a bar for the tasks, and a bar for the current activity.

    Args:
        console: on a terminal it shows bars, otherwise a line per evaluation.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def shown(self, config: RunConfig, tasks: Sequence[Task]) -> Iterator[None]:
        """Show bars while the block runs."""
        self._tasks = tasks
        self._bars = Progress(
            TextColumn("{task.description:<36}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,  # without a terminal it would print an empty line
        )
        with self._bars:
            self._whole = self._bars.add_task(config.method, total=len(tasks), note="")
            self._part = self._bars.add_task("", total=None, note="")
            try:
                yield
            except KeyboardInterrupt:
                self.console.print("Interrupted; --resume continues from the last checkpoint.")
                raise

    def warn(self, what: str) -> None:
        self.console.print(f"[yellow]warning:[/] {what}")

    def stage(self, what: str) -> None:
        self._bars.reset(self._part, description=what, total=None, note="")

    def task(self, index: int, steps: int, done: int) -> None:
        """Show that the training of a task begins, or continues after ``done`` steps."""
        description = f"learning {self._tasks[index].name}"
        self._bars.update(self._whole, completed=index)
        self._bars.reset(self._part, description=description, total=steps, completed=done, note="")

    def advance(self, loss: float) -> None:
        self._bars.update(self._part, advance=1, note=f"loss {loss:.3f}")

    def evaluating(self, when: str, tasks: int) -> None:
        self._bars.reset(self._part, description=f"measuring {when}", total=tasks, note="")

    def evaluated(self) -> None:
        self._bars.update(self._part, advance=1)

    def measured(self, index: int, metrics: Mapping[str, Any]) -> None:
        """Print the metrics of all tasks after task ``index``."""
        self._bars.update(self._whole, completed=index + 1)
        column = [row[index] for row in metrics["accuracy"]]
        shown = "  ".join(f"{task.name} {value:.1f}" for task, value in zip(self._tasks, column, strict=True))
        for name, row in metrics.get("harness", {}).items():
            shown += f"  {name} {_format_any(row['values'][-1])}"
        self.console.print(f"[bold]{metrics['method']}[/] after {self._tasks[index].name}: {shown}")


def run_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Tables of one run: each task's accuracy before training, right after learning it, and at the end.

    There is a table for accuracy, one for each of the user's metrics, and one for tasks of lm-eval.
    """
    accuracy = _run_table(
        f"{metrics['method']}: accuracy in % ({metrics['split']} split)",
        metrics,
        metrics["accuracy"],
        metrics["initial"],
        format_number,
    )
    accuracy.caption = (
        f"OP {format_number(metrics['op'])}   BWT {format_number(metrics['bwt'], sign=True)}   "
        f"FWT {format_number(metrics['fwt'], sign=True)}   ({metrics['samples']:,} training samples)"
    )
    user_tables = [
        _run_table(f"{metrics['method']}: {name}", metrics, part["matrix"], part["initial"], _format_any)
        for name, part in metrics["metrics"].items()
    ]
    harness = [_harness_table(metrics)] if metrics.get("harness") else []
    return [accuracy, *user_tables, *harness]


def _harness_table(metrics: Mapping[str, Any]) -> Table:
    """Tasks of lm-eval, which are not learned, in the units of their metrics."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{metrics['method']}: tasks of lm-eval, not learned")
    table.add_column("task")
    table.add_column("metric")
    for heading in ("documents", "before", "at the end", "change"):
        table.add_column(heading, justify="right")
    for name, row in metrics["harness"].items():
        before, end = row["values"][0], row["values"][-1]
        table.add_row(
            name,
            row["metric"].removesuffix(",none"),
            str(row["documents"]),
            _format_any(before),
            _format_any(end),
            _format_any(end - before, sign=True),
        )
    return table


def _run_table(
    title: str,
    metrics: Mapping[str, Any],
    matrix: Sequence[Sequence[float]],
    initial: Sequence[float],
    write: Callable[..., str],
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("task")
    for heading in ("records", "before", "learned", "at the end", "change"):
        table.add_column(heading, justify="right")
    for i, (name, row) in enumerate(zip(metrics["tasks"], matrix, strict=True)):
        table.add_row(
            name,
            str(metrics["records"][i]),
            write(initial[i]),
            write(row[i]),
            write(row[-1]),
            write(row[-1] - row[i], sign=True),
        )
    return table


def _format_any(value: float, *, sign: bool = False) -> str:
    """A number with four significant digits."""
    return f"{value:{'+' if sign else ''}.4g}"


def comparison_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """A table with a row per run over the same tasks: final accuracies, OP, BWT, FWT and samples.

    Accuracies of single tasks are left out if there are more than ``MAX_TASK_COLUMNS``.
    """
    tasks = runs[0]["tasks"]
    columns = [("method", [metrics["method"] for metrics in runs])]
    for i, name in enumerate(tasks if len(tasks) <= MAX_TASK_COLUMNS else []):
        columns.append((name, _marked([metrics["accuracy"][i][-1] for metrics in runs])))
    for key in ("op", "bwt", "fwt"):
        columns.append((key.upper(), _marked([metrics[key] for metrics in runs], sign=key != "op")))
    columns.append(("samples", [f"{metrics['samples']:,}" for metrics in runs]))
    table = Table(
        title=f"accuracy in % at the end ({runs[0]['split']} split)",
        caption="* the best of a column",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    table.columns[0].justify = "left"
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def _marked(values: Sequence[float | None], *, sign: bool = False) -> list[str]:
    """The numbers of a column; the largest is bold and has a star, unless all are equal."""
    best = max((value for value in values if value is not None), default=None)
    shown = [format_number(value, sign=sign) for value in values]
    return [
        f"[bold]{number}*[/]" if value == best and len(set(values)) > 1 else f"{number} "
        for value, number in zip(values, shown, strict=True)
    ]


def format_number(value: float | None, *, sign: bool = False) -> str:
    """A number with one decimal place; "-" for None."""
    if value is None:
        return "-"
    return f"{value:+.1f}" if sign else f"{value:.1f}"

"""``rkif report A B ...``: runs side by side, as one HTML page."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from rkif.continual.display.progress import format_number
from rkif.continual.display.report import plots
from rkif.continual.display.report.headline import EXPLANATIONS, RunFacts, read_facts
from rkif.continual.display.report.page import PAGE
from rkif.continual.rundir.folder import RunReader
from rkif.continual.rundir.settings import flat_settings, shown_value, without_places
from rkif.files import require_folder, write_text

# Heading -> the value of a run, and its format. The largest value of a column is the best.
_SCORES: dict[str, tuple[Callable[[RunFacts], float | None], Callable[[float | None], str]]] = {
    "OP": (lambda run: run.metrics["op"], format_number),
    "BWT": (lambda run: run.metrics["bwt"], lambda value: format_number(value, sign=True)),
    "FWT": (lambda run: run.metrics["fwt"], lambda value: format_number(value, sign=True)),
    "kept": (lambda run: run.retention, lambda value: "-" if value is None else f"{100 * value:.0f} %"),
}


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write a page that compares runs: metrics, differing settings, forgetting curves, accuracy by task.

    Curves and accuracies by task are shown if all runs learn the same tasks in the same order.

    Args:
        runs: at least two folders.
        out: the page's path.

    Returns:
        ``out``.

    Raises:
        ValueError: a folder is not a run, has no results yet, or is damaged.
        ImportError: matplotlib is not installed.
        OSError: the page cannot be written.
    """
    require_folder(out.parent)
    compared = _named([read_facts(RunReader(run)) for run in runs])
    sections = [_headline(compared), _scores(compared), _settings(compared)]
    tasks = compared[0].metrics["tasks"]
    if all(run.metrics["tasks"] == tasks for run in compared):
        sections += [_curves(compared, tasks), _final(compared, tasks)]
        harness = [run.metrics.get("harness", {}) for run in compared]
        if harness[0] and all(list(rows) == list(harness[0]) for rows in harness):
            sections += [_harness(compared, len(tasks))]
    else:
        sections.append("<p>The runs differ in tasks or order, so they are not compared by task.</p>")
    page = PAGE.replace("{{title}}", f"{len(compared)} runs").replace("{{body}}", "\n".join(sections))
    write_text(out, page)
    return out


def _named(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """The runs with unique names: that of the folder, with a number if it repeats."""
    names = [run.name for run in runs]
    return [
        run._replace(name=f"{run.name} ({names[: place + 1].count(run.name)})")
        if names.count(run.name) > 1
        else run
        for place, run in enumerate(runs)
    ]


def _headline(runs: Sequence[RunFacts]) -> str:
    kept = [f"{run.name} keeps {100 * run.retention:.0f} %" for run in runs if run.retention is not None]
    if not kept:
        return ""
    return f'<p class="headline">{html.escape(", ".join(kept))} of what it learned.</p>'


def _scores(runs: Sequence[RunFacts]) -> str:
    head = "".join(
        f"<th>{heading}</th>" for heading in ("method", "model", "date", "tasks", "samples", *_SCORES)
    )
    best = {}
    for heading, (value, _) in _SCORES.items():
        known = [figure for run in runs if (figure := value(run)) is not None]
        best[heading] = max(known, default=None)
    rows = []
    for run in runs:
        facts = (run.method, run.model, run.date, f"{run.learned}", f"{run.metrics['samples']:,}")
        cells = "".join(f"<td>{html.escape(fact)}</td>" for fact in facts)
        for heading, (value, write) in _SCORES.items():
            figure = value(run)
            leading = figure is not None and figure == best[heading]
            cells += f"<td{' class=best' if leading else ''}>{write(figure)}</td>"
        rows.append(f"<tr><th>{html.escape(run.name)}</th>{cells}</tr>")
    notes = "<br>".join(
        [
            *EXPLANATIONS.values(),
            "Kept: accuracy at the end over that right after learning, without the last task.",
        ]
    )
    return (
        f'<section><div class="scroll"><table><tr><th>run</th>{head}</tr>{"".join(rows)}</table></div>'
        f'<p class="note">{notes}</p></section>'
    )


def _settings(runs: Sequence[RunFacts]) -> str:
    """A row per setting that is not the same in all runs, a column per run. The scores show the model."""
    rows, settings = [], [without_places(flat_settings(run.config)) for run in runs]
    for name in dict.fromkeys(name for of_run in settings for name in of_run if name != "model"):
        values = [shown_value(of_run.get(name)) for of_run in settings]
        if len(set(values)) > 1:
            cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
            rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    table = f'<table class="text"><tr><th></th>{head}</tr>{"".join(rows)}</table>'
    return f'<section><h2>Differing settings</h2><div class="scroll">{table}</div></section>'


def _curves(runs: Sequence[RunFacts], tasks: Sequence[str]) -> str:
    lines = {run.name: plots.Accuracy(run.metrics["initial"], run.metrics["accuracy"]) for run in runs}
    return (
        "<section><h2>Forgetting</h2><p>Accuracy in per cent of every task after each task of the sequence; "
        f"the dot marks the moment it was learned.</p>{plots.forgetting_curves(tasks, lines)}</section>"
    )


def _harness(runs: Sequence[RunFacts], tasks: int) -> str:
    values = {run.name: {name: row["values"] for name, row in run.metrics["harness"].items()} for run in runs}
    return (
        "<section><h2>Tasks of lm-eval</h2><p>They are not learned. Dashed: before training. Each has the "
        f"unit of its metric.</p>{plots.harness_curves(tasks, values)}</section>"
    )


def _final(runs: Sequence[RunFacts], tasks: Sequence[str]) -> str:
    """A row per run, a column per task: the accuracy after the last learned task."""
    head = "".join(f"<th>{html.escape(task)}</th>" for task in tasks)
    ends = [[row[-1] for row in run.metrics["accuracy"]] for run in runs]
    best = [max(column) for column in zip(*ends, strict=True)]
    rows = "".join(
        f"<tr><th>{html.escape(run.name)}</th>"
        + "".join(
            f"<td{' class=best' if value == most else ''}>{value:.1f}</td>"
            for value, most in zip(end, best, strict=True)
        )
        + "</tr>"
        for run, end in zip(runs, ends, strict=True)
    )
    return (
        "<section><h2>Accuracy at the end</h2><p>In per cent. Bold: the best of a task.</p>"
        f'<div class="scroll"><table><tr><th></th>{head}</tr>{rows}</table></div></section>'
    )

"""``rkif report``: a run as one HTML page without external files."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rkif.continual.display.report import plots
from rkif.continual.display.report.headline import read_facts, summary
from rkif.continual.display.report.ledger_section import ledger_sections, loop_summary
from rkif.continual.display.report.page import PAGE
from rkif.continual.rundir.folder import RunReader
from rkif.files import write_text


def write_report(run: Path) -> Path:
    """Write ``RUN/report.html`` from the files of a run. For an unfinished run, it has the learned tasks.

    For the ledger of a training loop, it has only rounds, because this ledger has no accuracy.

    Returns:
        The page's path.

    Raises:
        ValueError: there is no run, nothing was measured yet, or a file is damaged.
        ImportError: matplotlib is not installed.
    """
    reader = RunReader(run)
    if not reader.metrics() and (records := reader.records()) and not records[0]["tasks"]:
        title, sections = f"{records[0]['method']} in a training loop", [loop_summary(records)]
        sections += ledger_sections(records)
    else:
        facts = read_facts(reader)
        title, sections = f"{facts.name}: {len(facts.metrics['tasks'])} tasks", [summary(facts)]
        sections += [_curves(facts.metrics)]
        sections += [_matrix(name, *matrix) for name, matrix in _matrices(facts.metrics).items()]
        if harness := facts.metrics.get("harness"):
            sections += [_harness(facts.metrics["tasks"], harness)]
        rounds = reader.rounds()
        if rounds:
            sections += [_rounds(rounds)]
        sections += ledger_sections(facts.ledger)
    settings = f"<section><h2>Settings</h2><pre>{html.escape(reader.config_text())}</pre></section>"
    page = PAGE.replace("{{title}}", html.escape(title)).replace("{{body}}", "\n".join([*sections, settings]))
    out = run / "report.html"
    write_text(out, page)
    return out


def _matrices(metrics: Mapping[str, Any]) -> dict[str, tuple[Sequence[str], Any, Any]]:
    """Name -> (tasks, matrix, values before training), for accuracy and the user's metrics."""
    matrices = {"accuracy": (metrics["tasks"], metrics["accuracy"], metrics["initial"])}
    for name, metric in metrics["metrics"].items():
        matrices[name] = (metrics["tasks"], metric["matrix"], metric["initial"])
    return matrices


def _curves(metrics: Mapping[str, Any]) -> str:
    accuracy = plots.Accuracy(metrics["initial"], metrics["accuracy"])
    return (
        "<section><h2>Forgetting</h2><p>Accuracy in per cent of every task after each task of the sequence; "
        "the dot marks the moment it was learned."
        f"</p>{plots.forgetting_curves(metrics['tasks'], {'': accuracy})}</section>"
    )


def _matrix(name: str, tasks: Sequence[str], matrix: Any, initial: Sequence[float]) -> str:
    """A row per task, a column per evaluation; shaded from the smallest value to the largest."""
    values = [value for row in [*matrix, initial] for value in row]
    low, high = min(values), max(values)
    rows = []
    for i, (task, row, before) in enumerate(zip(tasks, matrix, initial, strict=True)):
        cells = [
            _cell(value, _share(value, low, high), learned=j == i)
            for j, value in enumerate([before, *row], start=-1)
        ]
        rows.append(f"<tr><th>{html.escape(task)}</th>{''.join(cells)}</tr>")
    return (
        f"<section><h2>{html.escape(name.capitalize())}</h2><p>Row: the measured task. Column: the task "
        "learned last. Framed: measured right after it was learned.</p>"
        f"{_table('<th></th>', tasks[: len(matrix[0])], rows)}</section>"
    )


def _harness(tasks: Sequence[str], harness: Mapping[str, Any]) -> str:
    """A row per task of lm-eval, shaded by its own values, and their curves."""
    rows = []
    for name, row in harness.items():
        values = row["values"]
        cells = "".join(
            _cell(value, _share(value, min(values), max(values)), learned=False) for value in values
        )
        facts = f"<td>{html.escape(row['metric'].removesuffix(',none'))}</td><td>{row['documents']:,}</td>"
        rows.append(f"<tr><th>{html.escape(name)}</th>{facts}{cells}</tr>")
    learned = tasks[: len(values) - 1]
    curves = plots.harness_curves(len(tasks), {"": {name: row["values"] for name, row in harness.items()}})
    return (
        "<section><h2>Tasks of lm-eval</h2><p>They are not learned: their changes are those of the model's "
        "general ability. Dashed: before training. Each has the unit of its metric.</p>"
        f"{curves}{_table('<th></th><th>metric</th><th>documents</th>', learned, rows)}</section>"
    )


def _table(first: str, tasks: Sequence[str], rows: Sequence[str]) -> str:
    """A table with the heading cells ``first``, and a column before training and after each task."""
    head = "".join(f"<th>{html.escape(task)}</th>" for task in tasks)
    body = f"<tr>{first}<th>before</th>{head}</tr>{''.join(rows)}"
    return f'<div class="scroll"><table>{body}</table></div>'


def _cell(value: float, share: float, *, learned: bool) -> str:
    return f'<td{" class=learned" if learned else ""} style="--shade:{share:.2f}">{value:.4g}</td>'


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _rounds(rounds: Mapping[str, Mapping[str, Any]]) -> str:
    return (
        "<section><h2>Importance</h2><p>Mean importance of each tensor in each round, as each learner "
        "measured it; brighter is more important. Each map has its own logarithmic scale.</p>"
        f"{plots.importance_maps(rounds)}</section>"
        "<section><h2>Masks</h2><p>The share of parameters that each learner selected. The middle band is "
        "the overlap of the two masks. The rest is selected by neither.</p>"
        f"{plots.mask_overlap(rounds)}</section>"
        "<section><h2>Movement</h2><p>L2 norms of the two task vectors of a round, and of the fusion's "
        f"update.</p>{plots.movement(rounds)}</section>"
    )

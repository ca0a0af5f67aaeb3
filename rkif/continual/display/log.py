"""``rkif log``: tables of a run's ledger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rkif.continual.display.modules import is_in_module, require_module
from rkif.continual.display.verdicts import reasons
from rkif.continual.rundir.head import head_of
from rkif.continual.spelling import did_you_mean
from rkif.gate import Verdict
from rkif.ledger.chain import LedgerRecord
from rkif_kernels import CASES, require_choice

COLOURS = {"keep": "green", "damp": "yellow", "undo": "red", "stop": "red", "refused": "red"}
CASE_HEADINGS = ("in", "out", "both", "none")
NO_GATE = "-"


@dataclass(frozen=True)
class Share:
    """The effect of a round on a group of parameters.

    Attributes:
        moved: L2 norm of their change.
        counts: numbers of elements selected by inner only, outer only, both, neither.
        importance: mean score of an element, inner and outer.
    """

    moved: float
    counts: tuple[int, ...]
    importance: tuple[float, float]

    @property
    def shares(self) -> list[str]:
        """The counts in percent."""
        total = sum(self.counts) or 1
        return [f"{100 * count / total:.1f}" for count in self.counts]


def verified_line(run: Path, checked: Mapping[str, int], records: Sequence[LedgerRecord]) -> str:
    """The result of :func:`rkif.continual.rundir.verify.require_whole` as a line of text."""
    head = head_of(records)
    return (
        f"{run}: {checked['records']} records in an unbroken chain; {checked['tasks']} tasks' files and "
        f"{checked['states']} kept states match the ledger; last hash {head.hash}, in base64 {head.root}"
    )


def select(
    records: Sequence[LedgerRecord],
    *,
    task: str | None = None,
    verdict: str | None = None,
    module: str | None = None,
) -> list[LedgerRecord]:
    """The records of a task, or of rounds with a verdict, or all; ``module`` is only checked.

    Raises:
        ValueError: there is no such task or verdict, or no parameter is in ``module``.
    """
    rounds = [record for record in records if record["event"] == "round"]
    if module is not None:
        require_module(module, rounds[0]["modules"] if rounds else ())
    if task is not None:
        tasks = next(record["tasks"] for record in records if record["event"] == "begin")
        if not tasks:
            raise ValueError("--task: this is the ledger of a training loop, whose rounds have no task")
        if task not in tasks:
            suggestion = did_you_mean(task, tasks)
            raise ValueError(f"--task must be one of {', '.join(tasks)}; got {task!r}{suggestion}")
        records = [record for record in records if record.get("task") == task]
    if verdict is not None:
        require_choice("--verdict", verdict, list(get_args(Verdict)))
        records = [record for record in records if record["event"] == "round" and _verdict(record) == verdict]
    return list(records)


def only_module(records: Sequence[LedgerRecord], module: str | None) -> Iterator[LedgerRecord]:
    """The records; each round keeps only the parameters in ``module``."""
    for record in records:
        if module is not None and "modules" in record:
            values = {name: value for name, value in record["modules"].items() if is_in_module(name, module)}
            record = {**record, "modules": values}
        yield record


def records_table(
    records: Sequence[LedgerRecord], module: str | None, valid: Sequence[LedgerRecord]
) -> Table:
    """A row per record, without records of states and measurements.

    With ``module``, the rows are rounds, with their effect on the parameters of the module.

    Args:
        records: the records to show.
        module: parts of parameters' names.
        valid: all records that were not rolled back later.

    Raises:
        ValueError: no parameter is in ``module``.
    """
    numbers = {record["seq"] for record in valid}
    rows = []
    for record in records:
        note = "" if record["seq"] in numbers else "rolled back"
        if record["event"] == "round":
            part = _share(record, module)
            first, stop = record["steps"]
            cells: list[str | Text] = [
                str(record["round"]),
                record["task"] or "",
                f"{first + 1}-{stop}",
                _coloured(_verdict(record)),
                *part.shares,
                f"{part.moved:.3g}",
            ]
            rows.append((cells, note or "; ".join(reasons(record))))
        elif module is None and (record["event"] not in ("state", "measured") or "harness" in record):
            cells = ["", record.get("task") or "", "", Text(_event(record), style="dim"), *[""] * 5]
            values = [f"{name} {value:.4g}" for name, value in record.get("harness", {}).items()]
            rows.append((cells, note or ", ".join(values)))
    headings = ["round", "task", "steps", "gate", *CASE_HEADINGS, "moved"]
    noted = any(note for _, note in rows)
    shown = _table([*headings, *(["note"] if noted else [])], caption=_caption(module, records))
    for cells, note in rows:
        shown.add_row(*cells, *([note] if noted else []), style="dim" if note == "rolled back" else None)
    return shown


def explanation(records: Sequence[LedgerRecord], module: str) -> dict[str, Any]:
    """The effect of rounds on the parameters of a module, by round and by task, as JSON values.

    Rounds in which they did not change are left out. In the sums over a task's rounds, an element is counted
    once per round.

    Args:
        records: records that were not rolled back later.
        module: parts of parameters' names.

    Raises:
        ValueError: no parameter is in ``module``, or there are no rounds.
    """
    rounds = [record for record in records if record["event"] == "round"]
    if not rounds:
        raise ValueError("there is no round to explain: nothing has been fused")
    parts = [(record, _share(record, module)) for record in rounds]
    by_task: dict[str | None, list[Share]] = {}
    for record, part in parts:
        by_task.setdefault(record["task"], []).append(part)
    return {
        "module": module,
        "parameters": sorted({n for record in rounds for n in record["modules"] if is_in_module(n, module)}),
        "rounds": [
            {
                "round": record["round"],
                "task": record["task"],
                "gate": _verdict(record),
                **_values(part.moved, part.counts),
                "importance": dict(zip(("inner", "outer"), part.importance, strict=True)),
            }
            for record, part in parts
            if part.moved > 0
        ],
        "tasks": [
            {
                "task": task,
                "rounds": len(shares),
                "changing_rounds": sum(share.moved > 0 for share in shares),
                **_values(
                    sum(share.moved for share in shares),
                    tuple(map(sum, zip(*(share.counts for share in shares), strict=True))),
                ),
                "outer_importance": {
                    "in_last_round": shares[-1].importance[1],
                    "now": parts[-1][1].importance[1],
                },
            }
            for task, shares in by_task.items()
        ],
    }


def explanation_tables(explained: dict[str, Any]) -> list[Table]:
    """Tables of an :func:`explanation`: the rounds that changed the parameters, and sums by task."""
    names = explained["parameters"]
    group = f"{len(names)} parameters of {explained['module']!r}" if len(names) > 1 else repr(names[0])
    by_round = _table(
        ("round", "task", "gate", "moved", *CASE_HEADINGS, "importance,\ninner", "importance,\nouter"),
        title=escape(f"rounds that changed {group}"),
    )
    for row in explained["rounds"]:
        by_round.add_row(
            str(row["round"]),
            row["task"] or "",
            _coloured(row["gate"]),
            f"{row['moved']:.3g}",
            *_share_of(row).shares,
            *(f"{value:.1e}" for value in row["importance"].values()),
        )
    by_task = _table(
        (
            *("task", "rounds", "changed\nthem in", "moved", *CASE_HEADINGS),
            *("importance,\nouter, last\nof task", "importance,\nouter, now"),
        ),
        title="all rounds" if [row["task"] for row in explained["tasks"]] == [None] else "by task",
        caption=f"{_caption(explained['module'], explained['rounds'])} "
        "importance: mean of an element, as a learner measured it.",
    )
    for row in explained["tasks"]:
        by_task.add_row(
            row["task"] or "",
            str(row["rounds"]),
            str(row["changing_rounds"]),
            f"{row['moved']:.3g}",
            *_share_of(row).shares,
            *(f"{value:.1e}" for value in row["outer_importance"].values()),
        )
    return [by_round, by_task]


def print_tables(console: Console, *tables: Table) -> None:
    """Print tables as wide as their cells, so that a narrow terminal breaks lines instead of cutting cells.

    A title is one line, so that the name in it can be copied.
    """
    anything = console.options.update(width=10_000)
    for one in tables:
        for column in one.columns:
            if column.no_wrap:
                cells = (column.header, *column.cells)
                column.min_width = max(console.measure(cell, options=anything).maximum for cell in cells)
    console.width = max(console.width, *(console.measure(one, options=anything).minimum for one in tables))
    for one in tables:
        if one.title:
            console.print(one.title, soft_wrap=True, style="italic", highlight=False)
            one.title = None
        console.print(one)


def _values(moved: float, counts: tuple[int, ...]) -> dict[str, Any]:
    return {"moved": moved, "counts": dict(zip(CASES, counts, strict=True))}


def _share_of(row: dict[str, Any]) -> Share:
    return Share(row["moved"], tuple(row["counts"].values()), (0.0, 0.0))


def _share(record: LedgerRecord, module: str | None) -> Share:
    """The effect of a round on the parameters of ``module``, or on all parameters if it is None."""
    if module is not None:
        require_module(module, record["modules"])
    values = [value for name, value in record["modules"].items() if not module or is_in_module(name, module)]
    sizes = [value["numel"] for value in values]
    importance = [
        sum(value["importance"][side] * size for value, size in zip(values, sizes, strict=True))
        / (sum(sizes) or 1)
        for side in (0, 1)
    ]
    return Share(
        math.hypot(*(value["moved"] for value in values)),
        tuple(sum(value["counts"][case] for value in values) for case in range(len(CASES))),
        (importance[0], importance[1]),
    )


def _verdict(record: LedgerRecord) -> str:
    """The gate's verdict; without a gate "-", or "refused" for a fusion that was not applied."""
    if record["gate"] is not None:
        return str(record["gate"]["verdict"])
    return NO_GATE if record["applied"] else "refused"


def _coloured(verdict: str) -> Text:
    return Text(verdict, style=COLOURS.get(verdict, ""))


def _table(headings: Sequence[str], *, title: str | None = None, caption: str | None = None) -> Table:
    shown = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=title,
        caption=caption,
        caption_justify="left",
    )
    for heading in headings:
        justify: Literal["left", "right"] = "left" if heading in ("task", "gate", "note") else "right"
        shown.add_column(heading, justify=justify, no_wrap=heading != "note", overflow="fold")
    return shown


def _event(record: LedgerRecord) -> str:
    words = {"begin": "begun", "task": "learned", "rollback": f"back to round {record.get('to')}"}
    return words.get(record["event"], str(record["event"]))


def _caption(module: str | None, rounds: Sequence[dict[str, Any]]) -> str:
    """The text below a table that explains its columns. ``rounds`` are records, or rows of an explanation."""
    of = "all parameters" if module is None else f"the parameters of {escape(repr(module))}"
    caption = (
        f"in, out, both, none: per cent of {of} that the inner learner alone selected, the outer alone, "
        "both, neither. moved: L2 norm of their change."
    )
    verdicts = [
        one["gate"] if isinstance(one["gate"], str) else _verdict(one) for one in rounds if "gate" in one
    ]
    return caption + (f" gate {NO_GATE}: no gate checked the round." if NO_GATE in verdicts else "")

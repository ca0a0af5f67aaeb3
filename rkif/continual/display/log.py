"""``rkif log``: tables of a run's ledger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rkif.continual.display.verdicts import reasons
from rkif.fuser.parameters import short_name
from rkif.gate import Verdict
from rkif.ledger.chain import LedgerRecord
from rkif.ledger.records import not_rolled_back
from rkif_kernels import CASES, require_choice

COLOURS = {"keep": "green", "damp": "yellow", "undo": "red", "stop": "red", "refused": "red"}
CASE_HEADINGS = ("in", "out", "both", "none")


@dataclass(frozen=True)
class Share:
    """The effect of a round on a group of parameters.

    Attributes:
        moved: L2 norm of their change.
        counts: elements selected by inner only, outer only, both, neither.
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
    """The result of :func:`rkif.continual.rundir.verify.require_whole`."""
    return (
        f"{run}: {checked['records']} records in an unbroken chain; {checked['tasks']} tasks' files and "
        f"{checked['states']} kept states match the ledger; last hash {records[-1]['hash']}"
    )


def select(
    records: Sequence[LedgerRecord],
    *,
    task: str | None = None,
    verdict: str | None = None,
    module: str | None = None,
) -> list[LedgerRecord]:
    """The records of a task, and of rounds with a verdict.

    Raises:
        ValueError: there is no such task or verdict, or no parameter's name contains ``module``.
    """
    rounds = [record for record in records if record["event"] == "round"]
    if module is not None and not any(module in name for record in rounds[:1] for name in record["modules"]):
        raise ValueError(_no_module(rounds, module))
    if task is not None:
        tasks = next(record["tasks"] for record in records if record["event"] == "begin")
        require_choice("--task", task, tasks)
        records = [record for record in records if record.get("task") == task]
    if verdict is not None:
        require_choice("--verdict", verdict, list(get_args(Verdict)))
        records = [record for record in records if record["event"] == "round" and _verdict(record) == verdict]
    return list(records)


def only_module(records: Sequence[LedgerRecord], module: str | None) -> Iterator[LedgerRecord]:
    """The records; each round keeps only the parameters whose names contain ``module``."""
    for record in records:
        if module is not None and "modules" in record:
            values = {name: value for name, value in record["modules"].items() if module in name}
            record = {**record, "modules": values}
        yield record


def table(records: Sequence[LedgerRecord], module: str | None) -> Table:
    """A row per record. With ``module`` only rounds, and only their effect on those parameters.

    Raises:
        ValueError: no parameter's name contains ``module``.
    """
    headings = ["round", "task", "steps", "gate", *CASE_HEADINGS, "moved"]
    reason = any(reasons(record) for record in records if record["event"] == "round")
    shown = _table([*headings, *(["reason"] if reason else [])], caption=_caption(module))
    for record in records:
        if record["event"] == "round":
            part = _share(record, module)
            first, stop = record["steps"]
            shown.add_row(
                str(record["round"]),
                record["task"] or "",
                f"{first + 1}-{stop}",
                _coloured(_verdict(record)),
                *part.shares,
                f"{part.moved:.3g}",
                *(["; ".join(reasons(record))] if reason else []),
            )
        elif module is None and record["event"] not in ("state", "measured"):
            shown.add_row("", record.get("task") or "", "", Text(_event(record), style="dim"))
    return shown


def explain(records: Sequence[LedgerRecord], module: str) -> list[Table]:
    """Two tables: the rounds that changed the parameters, with the selecting learner; totals by task.

    Raises:
        ValueError: no parameter's name contains ``module``, or there are no rounds.
    """
    rounds = [record for record in not_rolled_back(records) if record["event"] == "round"]
    if not rounds:
        raise ValueError("there is no round to explain: nothing has been fused")
    parts = [(record, _share(record, module)) for record in rounds]
    names = sorted({name for record in rounds for name in record["modules"] if module in name})
    plural = "s" if len(names) > 1 else ""
    by_round = _table(
        ("round", "task", "gate", "moved", *CASE_HEADINGS, "imp in", "imp out"),
        title=f"{len(names)} parameter{plural} with {module!r} in the name: the rounds that moved them",
    )
    by_task = _table(
        ("task", "rounds", "moved in", "moved", *CASE_HEADINGS, "imp out then", "now"),
        title="by task",
        caption=f"{_caption(module)} imp: mean importance of an element, as each learner measured it.",
    )
    for record, part in parts:
        if part.moved > 0:
            importance = [f"{value:.1e}" for value in part.importance]
            by_round.add_row(
                str(record["round"]),
                record["task"] or "",
                _coloured(_verdict(record)),
                f"{part.moved:.3g}",
                *part.shares,
                *importance,
            )
    for task in dict.fromkeys(record["task"] for record in rounds):
        parts_of_task = [part for record, part in parts if record["task"] == task]
        # An element is counted once per round.
        counts = tuple(sum(column) for column in zip(*(part.counts for part in parts_of_task), strict=True))
        moved = sum(part.moved for part in parts_of_task)
        total = Share(moved, counts, parts_of_task[-1].importance)
        by_task.add_row(
            task or "",
            str(len(parts_of_task)),
            str(sum(part.moved > 0 for part in parts_of_task)),
            f"{moved:.3g}",
            *total.shares,
            f"{parts_of_task[-1].importance[1]:.1e}",
            f"{parts[-1][1].importance[1]:.1e}",
        )
    return [by_round, by_task]


def _share(record: LedgerRecord, module: str | None) -> Share:
    """The effect of a round on the parameters whose names contain ``module``; on all without it."""
    values = [value for name, value in record["modules"].items() if module is None or module in name]
    if not values:
        raise ValueError(_no_module([record], str(module)))
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


def _no_module(rounds: Sequence[LedgerRecord], module: str) -> str:
    if not rounds:
        return f"no parameter's name contains {module!r}: nothing has been fused"
    names = ", ".join(sorted({short_name(name) for name in rounds[0]["modules"]})[:3])
    return f"no parameter's name contains {module!r}; there are {names}, ..."


def _verdict(record: LedgerRecord) -> str:
    """The gate's verdict; without a gate "-", or "refused" for a fusion that was not applied."""
    if record["gate"] is not None:
        return str(record["gate"]["verdict"])
    return "-" if record["applied"] else "refused"


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
        justify: Literal["left", "right"] = "left" if heading in ("task", "gate", "reason") else "right"
        shown.add_column(heading, justify=justify, no_wrap=heading != "reason", overflow="fold")
    return shown


def _event(record: LedgerRecord) -> str:
    return {"begin": "begun", "task": "learned", "rollback": f"back to round {record.get('to')}"}[
        record["event"]
    ]


def _caption(module: str | None) -> str:
    of = "all parameters" if module is None else f"the parameters with {escape(repr(module))} in the name"
    return (
        f"in, out, both, none: per cent of {of} that the inner learner alone selected, the outer alone, "
        "both, neither. moved: L2 norm of their change."
    )

"""The top of the report: what was trained, and how much of it was retained, as a sentence and tiles."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rkif.continual.display.progress import format_number
from rkif.continual.rundir.folder import RunReader
from rkif.ledger.chain import LedgerError, LedgerRecord

EXPLANATIONS = {
    "op": "OP: mean accuracy over all tasks at the end.",
    "bwt": "BWT: mean change of a task's accuracy since it was learned; below zero is forgetting.",
    "fwt": "FWT: mean accuracy just before a task is learned, minus that before training.",
}
# Minimum retention, and class and text of the tile.
_LEVELS = (
    (0.95, "good", "little forgetting"),
    (0.8, "fair", "some forgetting"),
    (0.0, "bad", "much forgetting"),
)


class RunFacts(NamedTuple):
    """The facts of a run for tables and headlines.

    Attributes:
        name: name of its folder.
        model: the last part of the model's path or name.
        ledger: its records, or the error in it.
        metrics: the content of ``metrics.json``.
        config: the text of ``config.yaml``.
    """

    name: str
    model: str
    ledger: Sequence[LedgerRecord] | LedgerError
    metrics: Mapping[str, Any]
    config: str

    @property
    def date(self) -> str:
        """The date of the ledger's last record; "" if it is unknown."""
        records = [] if isinstance(self.ledger, LedgerError) else self.ledger
        times = [record["time"] for record in records if "time" in record]
        return str(times[-1])[:10] if times else ""

    @property
    def method(self) -> str:
        return str(self.metrics["method"])

    @property
    def learned(self) -> int:
        """Number of learned tasks."""
        return len(self.metrics["accuracy"][0])

    @property
    def retention(self) -> float | None:
        """Accuracy at the end divided by accuracy right after learning, both summed over tasks but the last.

        The last task is left out as in BWT, because nothing was learned after it. None if there is no earlier
        task, if their accuracy was zero, or if the tasks were not learned one after another.
        """
        matrix = self.metrics["accuracy"][: self.learned - 1]
        right_after = sum(row[i] for i, row in enumerate(matrix))
        if self.metrics["bwt"] is None or not right_after:
            return None
        return float(sum(row[-1] for row in matrix) / right_after)


def read_facts(reader: RunReader) -> RunFacts:
    """The facts of a run with results. A broken ledger is a fact, not an error.

    Raises:
        ValueError: nothing was measured yet, or a file is damaged.
    """
    metrics = reader.metrics()
    if not metrics.get("initial") or not metrics["accuracy"][0]:
        raise ValueError(f"{reader.path} has measured nothing yet")
    # The page does not need a valid config: only this line is read.
    config = reader.config_text()
    model = re.search(r"^model: (.+)$", config, re.MULTILINE)
    name = Path(model[1].strip("'\"")).name if model else ""
    ledger: Sequence[LedgerRecord] | LedgerError
    try:
        ledger = reader.records()
    except LedgerError as error:
        ledger = error
    return RunFacts(reader.path.resolve().name, name, ledger, metrics, config)


def headline(facts: RunFacts) -> str:
    """The main result of a run, as one sentence of plain text."""
    if facts.retention is None:
        return f"Mean accuracy over {facts.learned} tasks: {format_number(facts.metrics['op'])} %."
    matrix, before = facts.metrics["accuracy"], facts.learned - 1
    right_after = sum(matrix[i][i] for i in range(before)) / before
    at_the_end = sum(matrix[i][-1] for i in range(before)) / before
    earlier = "the first task" if before == 1 else f"the first {before} tasks"
    return (
        f"Keeps {100 * facts.retention:.0f} % of what it learned: the accuracy on {earlier} was "
        f"{right_after:.1f} % right after learning and is {at_the_end:.1f} % at the end."
    )


def summary(facts: RunFacts) -> str:
    """The first section of the page of a run."""
    metrics = facts.metrics
    words = _words(facts.retention)
    tiles = tile(format_number(metrics["op"]), "OP")
    tiles += tile(format_number(metrics["bwt"], sign=True), "BWT", *words)
    tiles += tile(format_number(metrics["fwt"], sign=True), "FWT")
    origin = [f"method {facts.method}", f"model {facts.model}", facts.date]
    what = (
        f"{facts.learned} of {len(metrics['tasks'])} tasks learned; {metrics['trainable']:,} parameters "
        f"trained; {metrics['samples']:,} training samples; measured on {sum(metrics['records']):,} records "
        f"of the {metrics['split']} split."
    )
    return (
        f'<section><p class="facts">{html.escape("; ".join(filter(None, origin)))}</p>'
        f'<p class="headline">{html.escape(headline(facts))}</p><div class="tiles">{tiles}</div>'
        f'<p>{html.escape(what)}</p><p class="note">{"<br>".join(EXPLANATIONS.values())}</p></section>'
    )


def tile(value: object, name: str, level: str = "", words: str = "") -> str:
    """A tile with a value and its name; ``level`` is the class of its colour, ``words`` the meaning of it."""
    below = f"<br>{html.escape(words)}" if words else ""
    return f'<div class="{f"tile {level}".strip()}"><b>{value}</b>{html.escape(name)}{below}</div>'


def _words(retention: float | None) -> Sequence[str]:
    return (
        ()
        if retention is None
        else next((level, text) for least, level, text in _LEVELS if retention >= least)
    )

"""The report's sections from the ledger: verdicts, refused rounds with reasons, movement, digests."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rkif.continual.display.report import plots
from rkif.continual.display.report.headline import tile
from rkif.ledger.chain import LedgerError, LedgerRecord
from rkif.ledger.records import not_rolled_back

MEANING = {
    "keep": "kept whole",
    "damp": "kept in part",
    "undo": "undone",
    "stop": "undone, and training ended",
    "unchecked": "not checked",
}
LEVELS = {"keep": "good", "damp": "fair", "undo": "bad", "stop": "bad"}  # classes of tiles


def ledger_sections(ledger: Sequence[LedgerRecord] | LedgerError) -> list[str]:
    """The sections as HTML. If there are no records or the chain is broken, one section with this error."""
    if isinstance(ledger, LedgerError):
        return [_section("Ledger", f'<p class="bad">The ledger is broken: {_text(ledger)}</p>')]
    if not ledger:
        return [_section("Ledger", '<p class="bad">The ledger is missing, or holds no record.</p>')]
    rounds = [record for record in not_rolled_back(ledger) if record["event"] == "round"]
    sections = []
    if any(record["gate"] for record in rounds):
        sections.append(_gate(rounds))
    if rounds:
        sections.append(
            _section(
                "Change by tensor",
                "<p>L2 norm of each tensor's change in each round, divided by the square root of its "
                "size, on a logarithmic scale. Blank: no change.</p>" + plots.movement_map(rounds),
            )
        )
    return [*sections, _digests(ledger)]


def loop_summary(records: Sequence[LedgerRecord]) -> str:
    """The first section of the page about a training loop."""
    rounds = [record for record in not_rolled_back(records) if record["event"] == "round"]
    applied = sum(record["applied"] for record in rounds)
    tiles = {"rounds": len(rounds), "fusions kept": applied, "not applied": len(rounds) - applied}
    shown = "".join(tile(value, name) for name, value in tiles.items())
    facts = "No round has ended yet."
    if rounds:
        facts = f"{rounds[-1]['numel']:,} parameters; {rounds[-1]['steps'][1]:,} inner steps."
    return f'<section><div class="tiles">{shown}</div><p>{facts}</p></section>'


def _gate(rounds: Sequence[LedgerRecord]) -> str:
    verdicts = Counter(record["gate"]["verdict"] for record in rounds if record["gate"])
    tiles = "".join(
        tile(verdicts[verdict], meaning, LEVELS.get(verdict, ""))
        for verdict, meaning in MEANING.items()
        if verdicts[verdict]
    )
    rows = "".join(
        f"<tr><th>{record['round']}</th><td>{_text(record['task'] or '')}</td>"
        f"<td>{_text(MEANING[record['gate']['verdict']])}{_share(record)}</td><td>{_reasons(record)}</td></tr>"
        for record in rounds
        if record["gate"] and record["gate"]["verdict"] in ("damp", "undo", "stop")
    )
    refused = (
        '<div class="scroll"><table class="text"><tr><th>round</th><th>task</th><th>verdict</th>'
        f"<th>objections to the whole step</th></tr>{rows}</table></div>"
    )
    return _section(
        "Gate",
        "<p>Each fusion is checked by these metrics before it is kept. Line: the value after each round, "
        "broken where a task begins. "
        "Cross: the value after a whole step that was refused.</p>"
        f'<div class="tiles">{tiles}</div>{plots.gate_values(rounds)}{refused if rows else ""}',
    )


def _share(record: LedgerRecord) -> str:
    factor = record["gate"]["factor"]
    return f" ({factor:g} of the step)" if 0 < factor < 1 else ""


def _reasons(record: LedgerRecord) -> str:
    return "<br>".join(_text(reason) for reason in record["gate"]["attempts"][0]["objections"])


def _digests(records: Sequence[LedgerRecord]) -> str:
    begin = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(begin["versions"].items()))
    returned = sum(record["event"] == "rollback" for record in records)
    digests = [record["parameters"] for record in records if "parameters" in record][-1]
    averages = [
        record["parameters"]["after"]
        for record in not_rolled_back(records)
        if "trained" in record.get("parameters", {})
    ]
    facts = {
        "records": f"{len(records)}, in an unbroken chain" + (f"; {returned} rollbacks" if returned else ""),
        "last hash": records[-1]["hash"],
        "parameters": digests.get("trained", digests["after"]),
        # With a moving average, the parameters are those from which training continues.
        **({"published average": averages[-1]} if averages else {}),
        "settings": begin["config"],
        "versions": versions,
        "begun": begin["time"],
        "last record": records[-1].get("time", "without a time"),
    }
    rows = "".join(f"<tr><th>{name}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    return _section(
        "Ledger",
        "<p>SHA-256 digests of the run's settings and results. <code>rkif log RUN --verify</code> checks the "
        "chain and every file. Compare the last hash with a stored copy to check whether the ledger was "
        "rewritten."
        f'</p><div class="scroll"><table class="text">{rows}</table></div>',
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _text(value: Any) -> str:
    return html.escape(str(value))

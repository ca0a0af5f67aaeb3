"""The report's sections from the ledger: verdicts, refused rounds with reasons, movement, digests."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rkif.continual.display.report import plots
from rkif.continual.rundir.ledger import LEDGER, LedgerError, LedgerRecord, read_ledger
from rkif.continual.rundir.recorder import not_rolled_back

MEANING = {
    "keep": "kept whole",
    "damp": "kept in part",
    "undo": "undone",
    "stop": "undone, and training ended",
    "unchecked": "not checked",
}


def ledger_sections(run: Path) -> list[str]:
    """The sections as HTML; for a broken chain only a section that says so."""
    path = run / LEDGER
    if not path.exists():
        return []
    try:
        records = list(read_ledger(path))
    except LedgerError as error:
        return [_section("Ledger", f'<p class="bad">The ledger does not hold together: {_text(error)}</p>')]
    if not records:
        return [_section("Ledger", '<p class="bad">The ledger holds no record.</p>')]
    rounds = [record for record in not_rolled_back(records) if record["event"] == "round"]
    sections = []
    if any(record["gate"] for record in rounds):
        sections.append(_gate(rounds))
    if rounds:
        sections.append(
            _section(
                "Where it moved",
                "<p>How far each round's fusion moved every tensor (L2, relative to the square root of its "
                "size), on a logarithmic scale. Blank: not at all.</p>" + plots.movement_map(rounds),
            )
        )
    return [*sections, _digests(records)]


def _gate(rounds: Sequence[LedgerRecord]) -> str:
    verdicts = Counter(record["gate"]["verdict"] for record in rounds if record["gate"])
    tiles = "".join(
        f'<div class="tile"><b>{verdicts[verdict]}</b>{_text(meaning)}</div>'
        for verdict, meaning in MEANING.items()
        if verdicts[verdict]
    )
    rows = "".join(
        f"<tr><th>{record['round']}</th><td>{_text(record['task'])}</td>"
        f"<td>{_text(MEANING[record['gate']['verdict']])}{_share(record)}</td><td>{_reasons(record)}</td></tr>"
        for record in rounds
        if record["gate"] and record["gate"]["verdict"] in ("damp", "undo", "stop")
    )
    refused = (
        '<div class="scroll"><table class="text"><tr><th>round</th><th>task</th><th>verdict</th>'
        f"<th>what spoke against the whole step</th></tr>{rows}</table></div>"
    )
    return _section(
        "Gate",
        "<p>Fusions are checked by these figures before they are kept. The line shows what every round left "
        "them at; a cross, what the whole step would have made of them where it was refused.</p>"
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
    facts = {
        "records": f"{len(records)}, in a whole chain" + (f"; {returned} rollbacks" if returned else ""),
        "last hash": records[-1]["hash"],
        "parameters": records[-1]["parameters"]["after"],
        "settings": begin["config"],
        "versions": versions,
        "begun": begin["time"],
        "last record": records[-1]["time"],
    }
    rows = "".join(f"<tr><th>{name}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    return _section(
        "Ledger",
        "<p>SHA-256 of what the run was made of and came to. <code>rkif log RUN --verify</code> checks the "
        "chain and every file again; whoever noted the last hash will see whether the ledger was rewritten."
        f'</p><div class="scroll"><table class="text">{rows}</table></div>',
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _text(value: Any) -> str:
    return html.escape(str(value))

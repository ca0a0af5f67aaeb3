"""The decisions of a gate as text: the reasons of a round, and a line on all rounds of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rkif.gate import without_values
from rkif.ledger.chain import LedgerRecord

PARTICIPLES = {
    "keep": "kept",
    "damp": "damped",
    "undo": "undone",
    "stop": "stopped",
    "unchecked": "unchecked",
}


def reasons(record: LedgerRecord) -> list[str]:
    """The reasons why a round's whole step was not taken; empty if it was."""
    gate = record["gate"]
    if gate is not None and gate["attempts"]:
        return list(gate["attempts"][0]["objections"])
    if record["applied"]:
        return []
    count = record.get("nonfinite", 0)
    return [f"the importance of {count} elements is not finite"] if count else ["the round was rolled back"]


def verdict_line(records: Sequence[LedgerRecord]) -> str | None:
    """The number of rounds by verdict, and the most frequent objection; None if no gate checked a round."""
    rounds = [record for record in records if record["event"] == "round" and record["gate"] is not None]
    if not rounds:
        return None
    verdicts = Counter(record["gate"]["verdict"] for record in rounds)
    counted = [f"{verdicts[name]} {word}" for name, word in PARTICIPLES.items() if verdicts[name]]
    line = f"gate: {', '.join(counted)}"
    objections = Counter(without_values(reason) for record in rounds for reason in reasons(record))
    if objections:
        line += f"; most often: {objections.most_common(1)[0][0]}"
    return line

"""``rkif log --test-result``: the gate's verdict on a round as an in-toto test result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rkif.attest.statement import make_statement, resource
from rkif.ledger.chain import LedgerRecord
from rkif.ledger.records import find_round

TEST_RESULT_TYPE = "https://in-toto.io/attestation/test-result/v0.1"
RESULTS = {"keep": "PASSED", "damp": "WARNED", "undo": "FAILED", "stop": "FAILED"}


def gate_statement(run: Path, records: Sequence[LedgerRecord], number: int) -> dict[str, Any]:
    """A Statement about the record of a round and its parameters, with the criteria as tests.

    A criterion that objected to a step is in "failedTests" if the fusion was undone, and in "warnedTests" if
    a smaller step was taken. After an undone fusion, the parameters are not a subject.

    Raises:
        ValueError: the run has no such round, or the gate did not check it.
    """
    record = find_round(records, number, run)
    gate = record["gate"]
    if gate is None or gate["verdict"] not in RESULTS:
        raise ValueError(f"--test-result: no gate checked round {number} of {run}")
    criteria = list(gate["before"])
    objections = [objection for attempt in gate["attempts"] for objection in attempt["objections"]]
    refused = {_criterion(objection, criteria) for objection in objections}
    result = RESULTS[gate["verdict"]]
    subject = [resource(f"record {record['seq']} of the ledger", record["hash"])]
    if result != "FAILED":  # after an undone fusion, the parameters are those of the previous round
        subject.append(resource(f"parameters after round {number}", record["parameters"]["after"]))
    return make_statement(
        subject,
        TEST_RESULT_TYPE,
        {
            "result": result,
            "configuration": [resource("config.yaml", record["config"])],
            "passedTests": [name for name in criteria if name not in refused],
            "warnedTests": [name for name in criteria if name in refused and result == "WARNED"],
            "failedTests": [name for name in criteria if name in refused and result == "FAILED"],
        },
    )


def _criterion(objection: str, criteria: Sequence[str]) -> str:
    """The criterion that made an objection; an objection begins with its name."""
    return max((name for name in criteria if objection.startswith(f"{name} ")), key=len, default="")

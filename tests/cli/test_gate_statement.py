"""The verdicts of a gate as in-toto test results."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from attestations import refused
from command import Rkif
from run_inputs import rewrite_ledger


def test_an_undone_round_is_a_failed_test_result(rkif: Rkif, original: Path) -> None:
    status, output, _ = rkif("log", original, "--test-result", 2)
    assert status == 0
    statement = json.loads(output)
    record = next(json.loads(line) for line in (original / "ledger.jsonl").open() if '"round":2,' in line)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert [one["digest"] for one in statement["subject"]] == [{"sha256": record["hash"]}]
    config = hashlib.sha256((original / "config.yaml").read_bytes()).hexdigest()
    assert statement["predicate"] == {
        "result": "FAILED",
        "configuration": [{"name": "config.yaml", "digest": {"sha256": config}}],
        "passedTests": [],
        "warnedTests": [],
        "failedTests": ["memory_loss"],
    }


@pytest.mark.parametrize(
    ("verdict", "result", "tests"),
    [
        ("keep", "PASSED", {"passedTests": ["loss", "loss of all"], "warnedTests": [], "failedTests": []}),
        ("damp", "WARNED", {"passedTests": ["loss"], "warnedTests": ["loss of all"], "failedTests": []}),
        ("stop", "FAILED", {"passedTests": ["loss"], "warnedTests": [], "failedTests": ["loss of all"]}),
    ],
)
def test_a_verdict_maps_to_a_result_and_its_criteria_to_tests(
    rkif: Rkif, run: Path, verdict: str, result: str, tests: dict[str, list[str]]
) -> None:
    figures = {"loss": 1.0, "loss of all": 2.0}
    whole = [] if verdict == "keep" else ["loss of all 2 is above 1"]
    attempts = [(1.0, whole)] if verdict != "damp" else [(1.0, whole), (0.5, [])]
    gate = {
        "verdict": verdict,
        "factor": 1.0,
        "before": figures,
        "attempts": [{"factor": f, "figures": figures, "objections": o} for f, o in attempts],
        "samples": 0,
    }

    def edit(record: dict[str, Any]) -> None:
        if record["event"] == "round":
            record["gate"] = gate

    rewrite_ledger(run / "ledger.jsonl", edit)
    statement = json.loads(rkif("log", run, "--test-result", 1)[1])
    records = [json.loads(line) for line in (run / "ledger.jsonl").open()]
    record = next(record for record in records if record.get("round") == 1)
    kept = [] if result == "FAILED" else [record["parameters"]["after"]]
    assert [one["digest"]["sha256"] for one in statement["subject"]] == [record["hash"], *kept]
    predicate = statement["predicate"]
    assert predicate["result"] == result
    assert {name: predicate[name] for name in tests} == tests


def test_a_test_result_has_the_fields_of_in_toto(rkif: Rkif, original: Path) -> None:
    pytest.importorskip("in_toto_attestation")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.test_result.v0 import test_result_pb2

    predicate = json.loads(rkif("log", original, "--test-result", 2)[1])["predicate"]
    json_format.ParseDict(predicate, test_result_pb2.TestResult())


def test_a_round_that_was_not_checked_has_no_test_result(rkif: Rkif, original: Path) -> None:
    assert f"no gate checked round 1 of {original}" in refused(rkif, "log", original, "--test-result", 1)
    assert f"no round 3: {original} has the rounds 1 to 2" in refused(
        rkif, "log", original, "--test-result", 3
    )

"""Heads of ledgers that are stored elsewhere, and the changes that they detect."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
from attestations import refused
from command import Rkif
from run_inputs import rewrite_ledger


def test_a_head_is_a_checkpoint_of_three_lines(rkif: Rkif, run: Path) -> None:
    status, output, _ = rkif("log", run, "--head")
    lines = (run / "ledger.jsonl").read_bytes().splitlines()
    record = json.loads(lines[-1])
    del record["hash"]
    content = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    root = base64.b64encode(hashlib.sha256(content).digest()).decode()
    origin = f"rkif.ledger/{json.loads(lines[0])['hash'][:16]}"
    assert (status, output) == (0, f"{origin}\n{len(lines)}\n{root}\n\n")


def test_a_stored_head_is_found_in_the_ledger_and_in_a_longer_one(
    rkif: Rkif, run: Path, tmp_path: Path
) -> None:
    noted, ledger = tmp_path / "head", run / "ledger.jsonl"
    noted.write_text(rkif("log", run, "--head")[1] + "— someone AAAA\n")  # signed by its keeper
    status, output, _ = rkif("log", run, "--verify", "--head", noted)
    assert status == 0
    assert f"the chain has the head in {noted}" in output
    content = ledger.read_bytes()
    ledger.write_bytes(b"".join(content.splitlines(keepends=True)[:4]))
    noted.write_text(rkif("log", run, "--head")[1])
    ledger.write_bytes(content)
    assert rkif("log", run, "--verify", "--head", noted)[0] == 0


def test_a_completely_rewritten_ledger_is_detected_by_a_stored_head(
    rkif: Rkif, run: Path, tmp_path: Path
) -> None:
    noted, ledger = tmp_path / "head", run / "ledger.jsonl"
    noted.write_text(rkif("log", run, "--head")[1])
    content = ledger.read_bytes()
    last = len(content.splitlines()) - 1
    for seq, message in {
        None: f"record 0 is not that of {noted}: the ledger was rewritten, or is that of another run",
        3: f"record {last} was rewritten: its hash is ",
    }.items():
        rewrite_ledger(ledger, lambda record: record.update(time="2020-01-01T00:00:00+00:00"), seq)
        assert rkif("log", run, "--verify")[0] == 0  # the chain alone does not tell
        errors = refused(rkif, "log", run, "--verify", "--head", noted)
        assert errors.count("\n") == 1
        assert message in errors
        ledger.write_bytes(content)
    ledger.write_bytes(b"".join(content.splitlines(keepends=True)[:last]))
    assert f"record {last} is missing: {noted} has a head of {last + 1} records" in refused(
        rkif, "log", run, "--verify", "--head", noted
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its lines are not origin, number of records and hash"),
        ("origin\n3\n", "its lines are not origin, number of records and hash"),
        ("origin\n03\nAAAA\n", "its lines are not origin, number of records and hash"),
        (f"origin\r\n3\r\n{'A' * 43}=\r\n\r\n", "its lines are not origin, number of records and hash"),
        (f"origin\n3\n{'A' * 43}\n", "its third line is not a SHA-256 in base64"),
        ("origin\n3\nAAAA\n", "its third line is not a SHA-256 in base64"),
        ("origin\n3\n????\n", "its third line is not a SHA-256 in base64"),
    ],
)
def test_a_file_without_a_head_is_one_clear_line(
    rkif: Rkif, original: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "head").write_bytes(text.encode())
    errors = refused(rkif, "log", original, "--verify", "--head", tmp_path / "head")
    assert errors == f"rkif: error: {tmp_path / 'head'} holds no head: {message}\n"


def test_a_stored_head_needs_its_options(rkif: Rkif, original: Path, tmp_path: Path) -> None:
    for arguments in (["--verify", "--head"], [tmp_path / "head"], [tmp_path / "head", "--head"]):
        assert "rkif log RUN --verify --head FILE" in refused(rkif, "log", original, *arguments)
    missing = refused(rkif, "log", original, "--verify", "--head", tmp_path / "head")
    assert missing == f"rkif: error: No such file or directory: {tmp_path / 'head'}\n"

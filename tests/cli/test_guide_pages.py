"""The pages on signatures and audits: their commands run, and the fields that they name exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import Rkif

from rkif.continual.rundir.schema import RECORDS, GateVerdict, Module, Record
from rkif.ledger.chain import CHAIN_KEYS


def guide(name: str) -> str:
    return (Path(__file__).parents[2] / "docs" / "guide" / name).read_text(encoding="utf-8")


def test_the_commands_of_the_guide_run(
    rkif: Rkif, run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("model_signing")
    run.rename(tmp_path / "RUN")
    folder.rename(tmp_path / "fused")
    monkeypatch.chdir(tmp_path)
    commands = "".join(re.findall(r"```sh\n(.*?)```", guide("signatures.md"), flags=re.DOTALL)).splitlines()
    assert len(commands) == 10
    for command in commands:
        call, _, target = command.partition(" > ")
        program, *arguments = call.split()
        if program == "rkif":
            status, output, errors = rkif(*arguments)
            assert status == 0, errors
            if target:
                Path(target).write_text(output)
        else:
            program = {"python": sys.executable}.get(program, program)
            subprocess.run([program, *arguments], check=True, capture_output=True)


def test_the_audit_page_names_fields_that_a_ledger_has(rkif: Rkif, run: Path) -> None:
    assert rkif("rollback", run, "--to", 1)[0] == 0
    records = [json.loads(line) for line in (run / "ledger.jsonl").open()]
    fields = {(record["event"], key) for record in records for key in record}
    events = {event for event, _ in fields}
    named = [name.split(".") for name in re.findall(r"`(\w+\.\w+)`", guide("audit.md"))]
    named = [name for name in named if name[0] in events]
    assert {event for event, _ in named} == {"begin", "round", "task", "state", "measured", "rollback"}
    assert [name for name in named if tuple(name) not in fields] == []


def test_the_reference_has_every_field_of_every_record() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "ledger.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(?:(\w+)\.)?(\w+)` \|", page, flags=re.MULTILINE))
    for event, model in RECORDS.items():
        own = set(model.model_fields) - set(Record.model_fields)
        assert {(event, name) for name in own} <= named
    keys = {*CHAIN_KEYS, "event", *Record.model_fields, *Module.model_fields, *GateVerdict.model_fields}
    assert {("", name) for name in keys} <= named

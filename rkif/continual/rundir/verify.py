"""``rkif log --verify``: check a run's files against its ledger."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

from rkif.continual.rundir.folder import RunReader, file_digests, task_folder
from rkif.continual.rundir.ledger import LEDGER, LedgerError, LedgerRecord
from rkif.continual.rundir.recorder import not_rolled_back, parameter_digest
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import read_checkpoint


def verify(run: Path) -> Counter[str]:
    """Check the ledger's chain, the succession of parameter digests, and every file with a recorded digest.

    Records are checked in order, so the error names the first bad one. A ledger that was rewritten as a whole
    passes. To exclude that, store the hash of the last record elsewhere and compare it.

    Args:
        run: the run's folder.

    Returns:
        The number of "records", "tasks" and "states" checked.

    Raises:
        ValueError: there is no run.
        LedgerError: names the first bad record and what it disagrees with.
    """
    reader = RunReader(run)
    records, path = reader.ledger(), run / LEDGER
    settings = hashlib.sha256(reader.config_text().encode()).hexdigest()
    tasks = reader.metrics().get("tasks", [])
    round_states = RoundStates(run)
    kept_rounds = set(round_states.rounds())
    checked = Counter({"records": len(records)})
    checkpoint = read_checkpoint(run)
    if checkpoint is not None and checkpoint.ledger_records > len(records):
        raise LedgerError(
            f"{path}: record {len(records)} is missing: the checkpoint knows of "
            f"{checkpoint.ledger_records} records"
        )
    valid = {record["seq"] for record in not_rolled_back(records)}
    parameters = None
    for record in records:
        where = f"{path}: record {record['seq']}"
        before = record["parameters"].get("before")
        if record["event"] == "round" and before != parameters:
            raise LedgerError(f"{where} begins with other parameters than the record before it ended with")
        parameters = record["parameters"]["after"]
        if record["seq"] not in valid:
            continue
        if record.get("config", settings) != settings:  # a rollback's record has no settings
            raise LedgerError(f"{where} is of other settings than {run / 'config.yaml'} has now")
        if record["event"] == "round" and record["round"] == 1 and 0 in kept_rounds:
            if parameter_digest(round_states.read(0).parameters) != before:
                raise LedgerError(f"{where}: the state kept of before the first round is another")
            checked["states"] += 1
        if record["event"] == "task":
            _check_task(task_folder(run, tasks.index(record["task"]), record["task"]), record, where)
            checked["tasks"] += 1
        elif record["event"] == "round" and record["round"] in kept_rounds:
            if parameter_digest(round_states.read(record["round"]).parameters) != parameters:
                raise LedgerError(f"{where}: the state kept of round {record['round']} is another")
            checked["states"] += 1
    return checked


def _check_task(folder: Path, record: LedgerRecord, where: str) -> None:
    if not folder.is_dir():
        raise LedgerError(f"{where}: {folder} is missing")
    digests = file_digests(folder)
    for name in sorted(digests.keys() | record["files"].keys()):
        if name not in digests:
            raise LedgerError(f"{where}: {folder / name} is missing")
        if name not in record["files"]:
            raise LedgerError(f"{where}: {folder / name} was not there when the task was learned")
        if digests[name] != record["files"][name]:
            raise LedgerError(f"{where}: {folder / name} is not the file that was written")

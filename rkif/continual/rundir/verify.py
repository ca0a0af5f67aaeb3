"""``rkif log --verify``: whether a run's ledger, models and states are what they were when it was written."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

from rkif.continual.rundir.folder import RunReader, file_digests, task_folder
from rkif.continual.rundir.ledger import LedgerError, Record, read_ledger
from rkif.continual.rundir.recorder import not_rolled_back, parameter_digest
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import read_checkpoint


def verify(run: Path) -> Counter[str]:
    """Check the chain, that each record begins where the one before ended, and every file it has a digest of.

    Records are checked in their order, so what is named is the first bad one. A ledger that was written anew
    as a whole holds together: whoever must exclude that notes the hash of the last record elsewhere.

    Args:
        run: the run's folder.

    Returns:
        How many "records", "tasks" and "snapshots" were checked.

    Raises:
        ValueError: there is no run.
        LedgerError: names the first record that does not hold, and what it does not fit.
    """
    reader = RunReader(run)
    path = run / "ledger.jsonl"
    if not path.exists():
        raise LedgerError(f"{path} is missing")
    records = list(read_ledger(path))
    if not records:
        raise LedgerError(f"{path} holds no record")
    settings = hashlib.sha256(reader.config_text().encode()).hexdigest()
    tasks = reader.metrics().get("tasks", [])
    snapshots = RoundStates(run / "snapshots", 0)
    kept = set(snapshots.rounds())
    checked = Counter({"records": len(records)})
    checkpoint = read_checkpoint(run)
    if checkpoint is not None and checkpoint.ledger_records > len(records):
        raise LedgerError(
            f"{path}: record {len(records)} is missing: the checkpoint knows of "
            f"{checkpoint.ledger_records} records"
        )
    left = {record["seq"] for record in records} - {record["seq"] for record in not_rolled_back(records)}
    parameters = None
    for record in records:
        where = f"{path}: record {record['seq']}"
        before = record["parameters"].get("before")
        if record["event"] == "round" and before != parameters:
            raise LedgerError(f"{where} begins with other parameters than the record before it ended with")
        parameters = record["parameters"]["after"]
        if record["seq"] in left:
            continue
        if record.get("config", settings) != settings:  # a rollback's says nothing of it
            raise LedgerError(f"{where} is of other settings than {run / 'config.yaml'} has now")
        if record["event"] == "round" and record["round"] == 1 and 0 in kept:
            if parameter_digest(snapshots.read(0).parameters) != before:
                raise LedgerError(f"{where}: the state kept of before the first round is another")
            checked["snapshots"] += 1
        if record["event"] == "task":
            _check_task(task_folder(run, tasks.index(record["task"]), record["task"]), record, where)
            checked["tasks"] += 1
        elif record["event"] == "round" and record["round"] in kept:
            if parameter_digest(snapshots.read(record["round"]).parameters) != parameters:
                raise LedgerError(f"{where}: the state kept of round {record['round']} is another")
            checked["snapshots"] += 1
    return checked


def _check_task(folder: Path, record: Record, where: str) -> None:
    if not folder.is_dir():
        raise LedgerError(f"{where}: {folder} is missing")
    found = file_digests(folder)
    for name in sorted(found.keys() | record["files"].keys()):
        if name not in found:
            raise LedgerError(f"{where}: {folder / name} is missing")
        if name not in record["files"]:
            raise LedgerError(f"{where}: {folder / name} was not there when the task was learned")
        if found[name] != record["files"][name]:
            raise LedgerError(f"{where}: {folder / name} is not the file that was written")

"""Checks a run's files against its ledger, for ``rkif log --verify`` and before a run is resumed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from rkif.continual.config_file import read_settings
from rkif.continual.rundir.folder import METRICS, RunReader, task_folder
from rkif.continual.rundir.recorded import require_recorded
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import CHECKPOINT, read_checkpoint
from rkif.files import TEMPORARY
from rkif.fuser.round_ledger import METHOD
from rkif.ledger.chain import LEDGER, LedgerError, LedgerRecord
from rkif.ledger.records import FORMAT, not_rolled_back


def verify(run: Path) -> Counter[str]:
    """Check the ledger's chain, the settings and parameters in its records, and the digest of every file.

    Records are checked in order, so the error names the first bad one. A ledger that was rewritten completely
    passes. To detect that, store the hash of the last record elsewhere and compare it.

    Args:
        run: the run's folder.

    Returns:
        The number of "records", "tasks" and "states" checked.

    Raises:
        ValueError: there is no run.
        LedgerError: a check failed; it names the first bad record and the reason.
    """
    reader = RunReader(run)
    return require_whole(reader, reader.ledger())


def require_whole(reader: RunReader, records: Sequence[LedgerRecord]) -> Counter[str]:
    """:func:`verify` for records that were read already; a run without records may only have its settings."""
    run, path = reader.path, reader.path / LEDGER
    if not records:
        _require_no_other(run, set(), None)
        return Counter()
    settings = hashlib.sha256(reader.config_text().encode()).hexdigest()
    metrics = reader.metrics()
    tasks = metrics.get("tasks", records[0]["tasks"])
    if tasks != records[0]["tasks"]:
        raise LedgerError(f"{path}: record 0 has other tasks than {run / 'metrics.json'}")
    checkpoint = read_checkpoint(run)
    known = 0 if checkpoint is None else checkpoint.ledger_records
    if known > len(records):
        raise LedgerError(
            f"{path}: record {len(records)} is missing: the checkpoint was written after {known} records"
        )
    columns = len(metrics["accuracy"][0]) if metrics else 0
    measured = sum(record["event"] == "measured" for record in records) - 1  # the first is before training
    if columns > max(measured, 0) and records[0].get("format", 1) == FORMAT:
        raise LedgerError(
            f"{path}: record {len(records)} is missing: {run / METRICS} has the accuracies after {columns} "
            f"tasks, and the ledger records {max(measured, 0)} of these measurements"
        )
    if records[-1]["event"] == "rollback" and known != len(records):
        raise LedgerError(
            f"{path}: record {len(records) - 1} is of a rollback that was not completed; "
            "rkif run --resume completes it"
        )
    valid = not_rolled_back(records)
    numbers = {record["seq"] for record in valid}
    parameters = None
    for record in records:
        where = f"{path}: record {record['seq']}"
        if "parameters" in record:
            if record["event"] == "round" and record["parameters"]["before"] != parameters:
                raise LedgerError(
                    f"{where} begins with other parameters than the record before it ended with"
                )
            if record["event"] == "rollback" and record["parameters"]["after"] != _kept_parameters(
                records[: record["seq"] + 1]
            ):
                raise LedgerError(f"{where} does not return to the parameters after round {record['to']}")
            parameters = _parameters_after(record)
        # The record of a run's rollback has no settings.
        none = settings if record["event"] == "rollback" else None
        if record["seq"] in numbers and record.get("config", none) != settings:
            raise LedgerError(f"{where} is of other settings than {run / 'config.yaml'} has now")
    _require_stated_settings(run, valid)
    recorded = require_recorded(run, records)
    learned = [record["task"] for record in valid if record["event"] == "task"]
    following = task_folder(run, len(learned), tasks[len(learned)]) if len(learned) < len(tasks) else None
    _require_no_other(run, recorded, following)
    states = sum(RoundStates(run).path(number) in recorded for number in RoundStates(run).rounds())
    return Counter({"records": len(records), "tasks": len(learned), "states": states})


def _require_stated_settings(run: Path, records: Sequence[LedgerRecord]) -> None:
    """Raise LedgerError unless the method and the seed in the records are those of the settings.

    The digest of the settings in the records was compared before, so records that a run wrote pass.
    """
    file = run / "config.yaml"
    settings = read_settings(file)
    averages = bool((settings.get("ema") or {}).get("decay"))
    seed, method = settings.get("seed"), settings.get("method", METHOD)  # a training loop's have neither
    for record in records:
        stated = {} if record["event"] == "rollback" else {"seed": seed}
        stated |= {"method": method} if record["event"] == "begin" else {}
        if not averages and "trained" in record.get("parameters", {}):
            raise LedgerError(
                f"{run / LEDGER}: record {record['seq']} is forged: it has trained parameters beside the "
                f"published ones, and {file}, whose digest it has, says ema.decay 0"
            )
        for key, value in stated.items():
            if record.get(key) != value:
                where = f"{run / LEDGER}: record {record['seq']}"
                raise LedgerError(
                    f"{where} is forged: its {key} is {record.get(key)!r}, and that of {file} is {value!r}, "
                    "although it has the digest of this file"
                )


def _kept_parameters(records: Sequence[LedgerRecord]) -> str:
    """Digest of the parameters to which the rollback in the last of these records returns."""
    kept = [r for r in not_rolled_back(records) if r["event"] != "rollback" and "parameters" in r]
    return _parameters_after(kept[-1])


def _parameters_after(record: LedgerRecord) -> str:
    """Digest of the parameters from which training continues after a record."""
    parameters = record["parameters"]
    return str(parameters.get("trained", parameters["after"]))


def _is_temporary(path: Path) -> bool:
    """Whether a name is temporary: those of rkif end in .tmp, those of safetensors begin with it."""
    return path.suffix == ".tmp" or TEMPORARY.fullmatch(path.name) is not None


def _require_no_other(run: Path, recorded: Collection[Path], following: Path | None) -> None:
    """Raise LedgerError for metrics, a checkpoint, or a file of a task or of the states that no record names.

    A kill may have left the folder of the next task and files under temporary names.
    """
    states = RoundStates(run).folder
    folders = {
        run / "tasks": "was not there when the task was learned",
        states: "is not a state that the run kept",
    }
    for path in (run / METRICS, run / CHECKPOINT):
        if path.exists() and path not in recorded:
            raise LedgerError(f"{run / LEDGER}: {path} is in no record")
    for folder, problem in folders.items():
        for path in sorted(folder.rglob("*")):
            entry = folder / path.relative_to(folder).parts[0]
            folder_of_a_task = path.is_dir() and folder != states
            if folder_of_a_task or entry == following or _is_temporary(entry):
                continue
            if path in recorded and path.is_file():
                continue
            raise LedgerError(f"{run / LEDGER}: {path} {problem}")

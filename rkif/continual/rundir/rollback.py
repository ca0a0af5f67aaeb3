"""``rkif rollback``: returns a run to the state after an earlier round."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rkif.continual.rundir.folder import METRICS, RunReader, metrics_sha256, task_folder, write_metrics
from rkif.continual.rundir.recorded import read_recorded_state, require_recorded
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import CHECKPOINT, RunState, read_checkpoint, state_sha256, write_state
from rkif.files import claimed
from rkif.ledger.chain import LEDGER, Ledger, LedgerRecord
from rkif.ledger.records import find_round, not_rolled_back, now, parameter_digest


def task_and_state_files(run: Path) -> set[str]:
    """The folders of tasks and the states after rounds, which a rollback may delete; relative to the run."""
    entries = (entry for name in ("tasks", "snapshots") for entry in (run / name).glob("*"))
    return {entry.relative_to(run).as_posix() for entry in entries}


def rollback(run: Path, to: int) -> LedgerRecord:
    """Return a run to the state after a round: parameters, importance, memory, optimizers and metrics.

    ``rkif run --resume`` continues from there, with the same bits as the first time. Later task folders,
    round states and columns of the metrics are deleted. The ledger keeps all records, and a record of the
    rollback is appended. If the process is killed, the next rollback or resume completes the rollback.

    Args:
        run: the run's folder.
        to: number of the round in the ledger, from 1; 0 for the state before the first round.

    Returns:
        The rollback's ledger record.

    Raises:
        ValueError: there is no such run or round, its state was not kept, or the state differs from the
            ledger.
        RuntimeError: another process uses the folder.
    """
    reader = RunReader(run)
    with claimed(run):
        return _rollback(reader, to)


def _rollback(reader: RunReader, to: int) -> LedgerRecord:
    """Everything is read and checked before anything is written."""
    run = reader.path
    finish_rollback(run)
    records = reader.records(torn=True)
    if records and not records[0]["tasks"]:
        raise ValueError(
            f"{run} is the ledger of a training loop, which has no states to return to: load the model "
            "and the fuser's state that were saved with the round"
        )
    if to != 0:
        find_round(records, to, run)
    state, metrics = _target(reader, records, to)
    require_recorded(run, records, [run / METRICS])
    RoundStates(run).later_than(to)  # check that they can be deleted
    checkpoint = read_checkpoint(run)
    record = Ledger(run / LEDGER).append(
        {
            "event": "rollback",
            "to": to,
            "task": metrics["tasks"][state.task],
            "finished": state.task,
            "parameters": {
                "before": None if checkpoint is None else parameter_digest(checkpoint.parameters),
                "after": parameter_digest(state.parameters),
            },
            "files": _files(replace(state, ledger_records=len(records) + 1), metrics),
            "time": now(),
        }
    )
    finish_rollback(run)
    return record


def _files(checkpoint: RunState, metrics: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the files that a rollback writes."""
    return {CHECKPOINT: state_sha256(checkpoint), METRICS: metrics_sha256(metrics)}


def _target(reader: RunReader, records: Sequence[LedgerRecord], to: int) -> tuple[RunState, dict[str, Any]]:
    """The state to return to, and the metrics at that time.

    Raises:
        ValueError: one of them is missing, or damaged, or they are of different runs.
    """
    state, metrics = read_recorded_state(reader.path, records, to), reader.metrics()
    if not metrics:
        raise ValueError(f"{reader.path} has rounds, but its metrics.json is missing")
    if metrics["tasks"] != records[0]["tasks"]:
        raise ValueError(
            f"{reader.path / 'metrics.json'} is damaged: tasks: they are not those of the ledger"
        )
    learned = sum(record["event"] == "task" for record in not_rolled_back(records))
    if state.task > min(learned, len(metrics["tasks"]) - 1):
        raise ValueError(f"the kept state of round {to} is damaged: task: {state.task}, of {learned} learned")
    for matrix in (metrics["accuracy"], *(metric["matrix"] for metric in metrics["metrics"].values())):
        for row in matrix:
            del row[state.task :]
    for row in metrics.get("harness", {}).values():
        del row["values"][state.task + 1 :]
    return state, metrics | {"op": None, "bwt": None, "fwt": None}


def finish_rollback(run: Path) -> None:
    """Complete an interrupted rollback, whose record is the last one of the ledger.

    Raises:
        ValueError: a file that is needed is damaged; nothing was changed.
    """
    if not (run / LEDGER).exists():
        return
    reader = RunReader(run)
    records = reader.records(torn=True)
    if not records or records[-1]["event"] != "rollback":
        return
    to = records[-1]["to"]
    checkpoint = read_checkpoint(run)
    if checkpoint is not None and checkpoint.ledger_records == len(records):
        return
    state, metrics = _target(reader, records, to)
    state = replace(state, ledger_records=len(records))
    if _files(state, metrics) != records[-1].get("files"):
        raise ValueError(
            f"{run / LEDGER}: record {len(records) - 1}: its rollback would write other files now"
        )
    for path in RoundStates(run).later_than(to):
        path.unlink()
    for index in range(state.task, len(metrics["tasks"])):
        shutil.rmtree(task_folder(run, index, metrics["tasks"][index]), ignore_errors=True)
    write_metrics(run, metrics)
    # The last step: until the checkpoint is written, the next call repeats all steps.
    write_state(run / CHECKPOINT, state)

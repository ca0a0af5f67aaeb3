"""``rkif rollback``: return a run to the state after an earlier round."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from rkif.continual.rundir.folder import RunReader, task_folder, write_metrics
from rkif.continual.rundir.ledger import LEDGER, Ledger, LedgerRecord
from rkif.continual.rundir.recorder import not_rolled_back, parameter_digest
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import read_checkpoint, write_checkpoint
from rkif.files import claimed


def rollback(run: Path, to: int) -> LedgerRecord:
    """Return a run to the state after a round: parameters, importance, memory, optimizers and metrics.

    ``rkif run --resume`` continues from there, with the same bits as the first time. Later task folders,
    round states and columns of the metrics are deleted. The ledger keeps all records, and gets one of the
    rollback. If the process is killed, the next rollback or resume completes the work.

    Args:
        run: the run's folder.
        to: number of the round in the ledger, from 1; 0 for the state before the first round.

    Returns:
        The rollback's ledger record.

    Raises:
        ValueError: no such run or round, its state was not kept, or the state differs from the ledger.
        RuntimeError: another process uses the folder.
    """
    reader = RunReader(run)
    with claimed(run):
        return _rollback(reader, to)


def _rollback(reader: RunReader, to: int) -> LedgerRecord:
    run = reader.path
    finish_rollback(run)
    ledger = Ledger(run / LEDGER)
    rounds = {
        record["round"]: record for record in not_rolled_back(ledger.records) if record["event"] == "round"
    }
    if to != 0 and to not in rounds:
        raise ValueError(f"no round {to}: {run} has {len(rounds)} of them")
    state = RoundStates(run).read(to)
    digest = parameter_digest(state.parameters)
    side, number = ("after", to) if to else ("before", 1)
    if number in rounds and digest != rounds[number]["parameters"][side]:
        raise ValueError(f"the state kept of round {to} is not what the ledger says it was")
    checkpoint = read_checkpoint(run)
    record = ledger.append(
        {
            "event": "rollback",
            "to": to,
            "task": reader.metrics()["tasks"][state.task],
            "finished": state.task,
            "parameters": {
                "before": None if checkpoint is None else parameter_digest(checkpoint.parameters),
                "after": digest,
            },
        }
    )
    finish_rollback(run)
    return record


def finish_rollback(run: Path) -> None:
    """Complete the rollback that the ledger's last record announces, if there is one."""
    path = run / LEDGER
    records = Ledger(path).records if path.exists() else []
    if not records or records[-1]["event"] != "rollback":
        return
    record = records[-1]
    checkpoint = read_checkpoint(run)
    if checkpoint is not None and checkpoint.ledger_records == len(records):
        return
    round_states = RoundStates(run)
    state = round_states.read(record["to"])
    round_states.discard_after(record["to"])
    metrics = RunReader(run).metrics()
    for index in range(state.task, len(metrics["tasks"])):
        shutil.rmtree(task_folder(run, index, metrics["tasks"][index]), ignore_errors=True)
    for matrix in (metrics["accuracy"], *(metric["matrix"] for metric in metrics["metrics"].values())):
        for row in matrix:
            del row[state.task :]
    write_metrics(run, metrics | {"op": None, "bwt": None, "fwt": None})
    # Last: as long as this checkpoint is missing, the next call repeats all steps.
    write_checkpoint(run, replace(state, ledger_records=len(records)))

"""What a run writes into its ledger.

Records have an "event":

- "begin": method, tasks, versions, the parameters' digest;
- "round": a fusion, see :class:`~rkif.continual.methods.RecurrentKIF`; rounds are numbered from 1 through all
  tasks;
- "task": a task has been learned and published: the memory's records, digests of its files;
- "rollback": the run returned to the state after round "to"; "finished" tasks of its remain.

Each has "config" (the settings' SHA-256), "seed" and "time".
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rkif.checkpoint.stream import as_bytes
from rkif.continual.rundir.ledger import CHAIN_KEYS, Ledger, LedgerError, Record
from rkif.fusion import FusionReport

NOT_REPRODUCED = ("time", *CHAIN_KEYS)  # what differs when a round is gone through again


class Recorder:
    """Writes rounds into a ledger, and sees that those gone through again after a kill are the same.

    A run resumes from a checkpoint. The rounds since then are in the ledger already; they are done again, and
    what comes of them is compared with the record instead of being written twice.

    Args:
        path: the ledger's file.
        position: records that the checkpoint accounts for; None for all that are there.

    Raises:
        LedgerError: the ledger does not hold together, or has fewer records than ``position``.

    Attributes:
        position: records that account for what has happened so far.
        rounds: rounds fused so far, those that were rolled back apart.
    """

    def __init__(self, path: Path, position: int | None = None) -> None:
        self.ledger = Ledger(path)
        known = len(self.ledger.records)
        if position is not None and position > known:
            raise LedgerError(f"{path} has {known} records where the checkpoint knows of {position}")
        self.position = known if position is None else position
        self.rounds = 0
        for record in self.ledger.records[: self.position]:
            self._count(record)

    def record(self, content: Mapping[str, Any]) -> None:
        """Write a record with the time, or confirm the one that is there.

        A round is given its number.

        Raises:
            LedgerError: what is recorded is not what happens now.
        """
        if content["event"] == "round":
            content = {**content, "round": self.rounds + 1}
        if self.position == len(self.ledger.records):
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self.ledger.append({**content, "time": now})
        else:
            recorded = self.ledger.records[self.position]
            for key in sorted((set(recorded) | set(content)) - set(NOT_REPRODUCED)):
                if recorded.get(key) != content.get(key):
                    raise LedgerError(
                        f"{self.ledger.path}: record {self.position} was not reproduced: {key!r} is "
                        f"{content.get(key)!r} now, and was {recorded.get(key)!r}"
                    )
        self._count(self.ledger.records[self.position])
        self.position += 1

    def _count(self, record: Mapping[str, Any]) -> None:
        """Keep ``rounds``, how many stand, up to date."""
        if record["event"] in ("round", "rollback"):
            self.rounds = int(record["round" if record["event"] == "round" else "to"])


def not_rolled_back(records: Iterable[Record]) -> list[Record]:
    """The records of what was not rolled back: later rounds, and tasks, of a state that was left are out."""
    kept: list[Record] = []
    for record in records:
        if record["event"] == "rollback":
            tasks = 0
            rest = []
            for one in kept:
                tasks += one["event"] == "task"
                late = one["event"] == "round" and one["round"] > record["to"]
                if not late and not (one["event"] == "task" and tasks > record["finished"]):
                    rest.append(one)
            kept = rest
        kept.append(record)
    return kept


def parameter_digest(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = parameters[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(as_bytes(tensor.contiguous().cpu().view(-1)))
    return digest.hexdigest()


def movement(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> L2 norm of a parameter's change."""
    return {name: float((after[name].float() - before[name].float()).norm()) for name in before}


def report_values(report: FusionReport) -> dict[str, Any]:
    """A report as JSON values; a number that is not finite becomes its name."""
    return {key: _finite(value) for key, value in report.to_dict().items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value

"""The records that a run writes to its ledger.

Each record has an "event":

- "begin": method, tasks, versions, the parameters' digest;
- "round": a fusion, see :class:`~rkif.continual.methods.RecurrentKIF`; rounds are numbered from 1 across all
  tasks;
- "task": a task was learned and published: the ids of the memory's records, the digests of the task's files;
- "state": a checkpoint, or the state after round "round", is about to be written;
- "measured": ``metrics.json`` is about to be written;
- "rollback": the run returned to the state after round "to"; its first "finished" tasks remain learned.

"files" has the SHA-256 of files that belong to a record; see :mod:`rkif.continual.rundir.recorded`.

Each record of a run has "config" (the SHA-256 of the settings), "seed" and "time".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkif.ledger.chain import CHAIN_KEYS, Ledger, LedgerError
from rkif.ledger.records import now

NOT_REPRODUCED = ("time", *CHAIN_KEYS)  # keys that differ when a round is trained again


class Recorder:
    """Appends records to a ledger, and compares those that a resumed run repeats.

    A run resumes from a checkpoint. Rounds after the checkpoint may be in the ledger already. They are
    trained again, and each new record is compared with the one in the ledger instead of being appended.

    Args:
        path: the ledger's file.
        position: number of records in the ledger at the checkpoint; None for all.

    Raises:
        LedgerError: the chain is broken, or the ledger has fewer records than ``position``.

    Attributes:
        ledger: the ledger.
        position: number of records written or confirmed so far.
        rounds: number of rounds so far, without those that were rolled back.
    """

    def __init__(self, path: Path, position: int | None = None) -> None:
        self.ledger = Ledger(path)
        known = len(self.ledger.records)
        if position is not None and position > known:
            raise LedgerError(f"{path} has {known} records, but the checkpoint was written after {position}")
        self.position = known if position is None else position
        self.rounds = 0
        for record in self.ledger.records[: self.position]:
            self._count(record)

    def record(self, content: Mapping[str, Any]) -> None:
        """Append a record with the time, or compare it with the record that the ledger has at this position.

        The record of a round gets the round's number.

        Raises:
            LedgerError: the record in the ledger differs from ``content``.
        """
        if content["event"] == "round":
            content = {**content, "round": self.rounds + 1}
        if self.position == len(self.ledger.records):
            self.ledger.append({**content, "time": now()})
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

    def skip_measured(self) -> None:
        """Skip the record of ``metrics.json``, if an earlier process wrote it together with the file."""
        following = self.ledger.records[self.position : self.position + 1]
        self.position += sum(record["event"] == "measured" for record in following)

    def _count(self, record: Mapping[str, Any]) -> None:
        """Update ``rounds``."""
        if record["event"] in ("round", "rollback"):
            self.rounds = int(record["round" if record["event"] == "round" else "to"])

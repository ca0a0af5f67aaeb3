"""What a run writes into its ledger: one record a round."""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rkif.checkpoint.stream import as_bytes
from rkif.fusion import FusionReport
from rkif.ledger import OWN, Ledger, LedgerError

NOT_REPRODUCED = ("time", *OWN)  # what differs when a round is gone through again


class Recorder:
    """Writes rounds into a ledger, and sees that those gone through again after a kill are the same.

    A run resumes from a checkpoint. The rounds since then are in the ledger already; they are done again, and
    what comes of them is compared with the record instead of being written twice.

    Args:
        path: the ledger's file.
        position: records that the checkpoint accounts for; None for all that are there.

    Raises:
        LedgerError: the ledger does not hold together, or has fewer records than ``position``.
    """

    def __init__(self, path: Path, position: int | None = None) -> None:
        self.ledger = Ledger(path)
        known = len(self.ledger.records)
        if position is not None and position > known:
            raise LedgerError(f"{path} has {known} records where the checkpoint knows of {position}")
        self.position = known if position is None else position

    def record(self, content: Mapping[str, Any]) -> None:
        """Write a record with the time, or confirm the one that is there.

        Raises:
            LedgerError: what is recorded is not what happens now.
        """
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
        self.position += 1


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

"""The ledger of a training loop: a record of every round that a fuser ends."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor

from rkif.config import stored_settings
from rkif.distributed.shards import to_whole
from rkif.files import read_text, write_text
from rkif.fusion import FusionReport, skipped_report
from rkif.ledger.chain import LEDGER, Ledger, LedgerError, LedgerRecord
from rkif.ledger.records import (
    begin_record,
    not_rolled_back,
    now,
    parameter_digest,
    report_values,
    selection,
)
from rkif_kernels import CASES

if TYPE_CHECKING:
    from rkif.fuser.fuser import Fuser

METHOD = "recurrent_kif"
R = TypeVar("R")


def recorded(end_round: Callable[[Fuser], R]) -> Callable[[Fuser], R]:
    """Decorate a method of a fuser that ends the round: with a ledger, the round is recorded."""

    @wraps(end_round)
    def ending(fuser: Fuser) -> R:
        if fuser._ledger is None:
            return end_round(fuser)
        start = fuser._ledger.begin_record()
        result = end_round(fuser)
        report: Any = result  # None after a rollback
        if report is None:
            numel = sum(fuser._shards.sizes)
            report = skipped_report(list(fuser.parameters), numel, 0, fuser.config.scope)
        fuser._ledger.end_record(start, report)
        return result

    return ending


class RoundStart(NamedTuple):
    """Copies of what a round's record needs and the end of the round overwrites, sharded like parameters."""

    base: dict[str, Tensor]
    digest: str  # of the base
    inner_scores: dict[str, Tensor]
    outer_scores: dict[str, Tensor]
    inner_steps: int


class RoundLedger:
    """Writes ``ledger.jsonl`` as ``rkif run`` does, and the fuser's settings to ``config.yaml`` beside it.

    Records have neither tasks nor ids of samples, because a fuser does not have them. With several processes,
    the first one writes.

    Args:
        folder: a new or empty folder, or that of a fuser with the same settings, whose state is loaded next.
        fuser: the fuser whose rounds are recorded. The ledger's first record is written at once.

    Raises:
        ValueError: the folder holds other files, or the ledger of other settings; or the settings discard
            scores that records need (``pack_inner``).
        LedgerError: the ledger's chain is broken.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, fuser: Fuser) -> None:
        if fuser.config.pack_inner:
            raise ValueError("ledger needs the inner scores of a round, which pack_inner=True discards")
        self.resumed = False  # whether the fuser's state was loaded
        self._fuser = fuser
        self._ledger: Ledger | None = None
        self._valid: list[LedgerRecord] = []  # the first record, and rounds that were not rolled back
        self._unwritten: list[dict[str, Any]] = []  # records of a round that has ended
        writes = fuser._shards.processes.rank == 0
        self._measures = writes or fuser._shards.sharded  # all processes take part in gathering shards
        digest = parameter_digest(_whole(fuser.parameters)) if self._measures else ""
        with fuser._shards.processes.raise_on_any_failure():
            if writes:
                self._ledger = self._open(folder, digest)

    def _open(self, folder: Path, digest: str) -> Ledger:
        values = _settings(self._fuser)
        settings, path = _text(values), folder / "config.yaml"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"ledger={str(folder)!r} must be a folder, not a file")
        folder.mkdir(parents=True, exist_ok=True)
        # A killed process can leave the temporary file.
        if {entry.name for entry in folder.iterdir()} <= {f"{path.name}.tmp"}:
            write_text(path, settings)
        elif not path.is_file():
            raise ValueError(f"ledger={str(folder)!r} is not empty and does not hold a ledger")
        elif (stored := read_text(path)) != settings:
            values["fusion"].pop("missing", None)  # older ledgers do not have this setting
            if stored != _text(values):
                raise ValueError(f"ledger={str(folder)!r} was written with other settings: see {path}")
            settings = stored
        self._identity = {"config": hashlib.sha256(settings.encode()).hexdigest()}
        ledger = Ledger(folder / LEDGER)
        if not ledger.records:
            ledger.append(self._complete(begin_record(METHOD, [], digest)))
        self._valid = [r for r in not_rolled_back(ledger.records) if r["event"] in ("begin", "round")]
        return ledger

    def require_position(self) -> None:
        """Check that the ledger has as many rounds as the fuser, or more if the fuser's state was loaded.

        Raises:
            LedgerError: the ledger has rounds of another fuser, or lacks rounds of this one.
        """
        with self._fuser._shards.processes.raise_on_any_failure():
            rounds = len(self._valid) - 1 + sum(record["event"] == "round" for record in self._unwritten)
            if self._ledger is None or rounds == self._fuser.round:
                return
            if not self.resumed or rounds < self._fuser.round:
                raise LedgerError(
                    f"{self._ledger.path} has {rounds} rounds, and this fuser has ended "
                    f"{self._fuser.round}: load the state that was saved with it, or choose a new folder"
                )

    def begin_record(self) -> RoundStart | None:
        """Copy what the record of the current round needs; None on a process that takes no part in it.

        Raises:
            LedgerError: as in :meth:`require_position`; another process has written to the ledger; or the
                round began with other parameters than the previous round ended with in the ledger.
            OSError: the record of the previous round could not be written, and still cannot be.
        """
        self.require_position()
        fuser = self._fuser
        base = fuser.base() if self._measures else {}
        digest = parameter_digest(_whole(base)) if self._measures else ""
        with fuser._shards.processes.raise_on_any_failure():
            self._write()
            if self._ledger is not None:
                self._ledger.require_unchanged()
                if digest != self._valid[fuser.round]["parameters"]["after"]:
                    raise LedgerError(
                        f"{self._ledger.path}: this round began with other parameters than the ledger has "
                        f"after round {fuser.round}: load the model and the state saved with it, or "
                        "choose a new folder"
                    )
        if not self._measures:
            return None
        scores = fuser.scores("inner"), fuser.scores("outer")
        return RoundStart(base, digest, *scores, fuser.inner_observed)

    def end_record(self, start: RoundStart | None, report: FusionReport) -> None:
        """Append the record of the ended round; before it, that of a return to an earlier state, if any.

        Raises:
            OSError, LedgerError: it cannot be written. :meth:`begin_record` of the next round tries again.
        """
        fuser = self._fuser
        if start is not None:
            effects = _effects(start, fuser.parameters, report)
            after = parameter_digest(_whole(fuser.parameters))
        with fuser._shards.processes.raise_on_any_failure():
            if self._ledger is None or start is None:
                return
            if len(self._valid) > fuser.round:  # rounds after the state that was loaded
                self._drop_rounds(self._ledger, fuser.round - 1, start.digest)
            first = self._valid[-1].get("steps", [0, 0])[1]
            content = {
                "event": "round",
                "round": fuser.round,
                "task": None,
                "steps": [first, first + start.inner_steps],
                "data": None,
                **report_values(report),
                "modules": effects,
                "parameters": {"before": start.digest, "after": after},
            }
            self._unwritten.append(self._complete(content))
            self._write()

    def _write(self) -> None:
        """Write the unwritten records. Those that cannot be written are kept for the next attempt."""
        while self._unwritten and self._ledger is not None:
            record = self._ledger.append(self._unwritten[0])
            del self._unwritten[0]
            if record["event"] == "round":
                self._valid.append(record)

    def _drop_rounds(self, ledger: Ledger, to: int, digest: str) -> None:
        """Record the return to the state after round ``to``."""
        last = next(r["parameters"]["after"] for r in reversed(ledger.records) if "parameters" in r)
        content = {"event": "rollback", "to": to, "task": None, "finished": 0}
        self._unwritten.append(self._complete(content | {"parameters": {"before": last, "after": digest}}))
        del self._valid[to + 1 :]

    def _complete(self, content: Mapping[str, Any]) -> dict[str, Any]:
        return {**content, **self._identity, "time": now()}


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, default=str) + "\n"  # JSON is YAML


def _settings(fuser: Fuser) -> dict[str, Any]:
    """The settings of a fuser and its gate as JSON values."""
    settings: dict[str, Any] = {"fusion": stored_settings(fuser.config)}
    if fuser._gatekeeper is not None:
        criteria, *others = fuser._gatekeeper.gate.settings
        values = [dataclasses.asdict(criterion) for criterion in criteria]
        settings["gate"] = dict(zip(("ladder", "otherwise", "every", "budget"), others, strict=True))
        settings["gate"]["criteria"] = [
            {key: value for key, value in criterion.items() if key != "evaluate"} for criterion in values
        ]
    return settings


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: to_whole(tensor) for name, tensor in tensors.items()}


def _effects(start: RoundStart, after: Mapping[str, Tensor], report: FusionReport) -> dict[str, Any]:
    """The effect of a round on each parameter; see :class:`rkif.continual.rundir.schema.Module`."""
    effects = {}
    for name, base in start.base.items():
        rows = (base, after[name], start.inner_scores[name], start.outer_scores[name])
        before, now_, inner, outer = (to_whole(row) for row in rows)
        means, counts = selection({name: inner}, {name: outer}, report)
        effects[name] = {
            "numel": base.numel(),
            "counts": [0] * len(CASES) if name in report.missing else counts[0].tolist(),
            "importance": means[0].tolist(),
            "moved": float((now_.float() - before.float()).norm()),
        }
    return effects

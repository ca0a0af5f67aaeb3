"""Compares the files of a run with their digests in the ledger.

A file's digest is written to the ledger before the file is renamed. So after a kill, the file of the last
record may still be the previous one, or missing; a resumed run writes it again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from rkif.continual.rundir.folder import task_folder
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import RunState
from rkif.files import file_sha256
from rkif.ledger.chain import LEDGER, LedgerError, LedgerRecord
from rkif.ledger.records import FORMAT


def recorded_files(run: Path, records: Sequence[LedgerRecord]) -> dict[Path, tuple[int, str]]:
    """File path -> index of the last record that names it, and SHA-256; without files rolled back later.

    Raises:
        LedgerError: the ledger was written by an earlier version of rkif.
    """
    version = records[0].get("format", 1)
    if version != FORMAT:
        raise LedgerError(
            f"{run / LEDGER}: record 0: the run is of format {version}; this version of rkif checks and "
            f"continues runs of format {FORMAT}: use the version that wrote it"
        )
    learned: list[Path] = []
    files: dict[Path, tuple[int, str]] = {}
    for record in records:
        folder, event = run, record["event"]
        if event == "task":
            folder = task_folder(run, len(learned), record["task"])
            learned.append(folder)
        elif event == "rollback":
            undone = learned[record["finished"] :]
            del learned[record["finished"] :]
            late = RoundStates(run).path(record["to"])
            files = {
                path: value
                for path, value in files.items()
                if not set(path.parents) & set(undone) and not (path.parent == late.parent and path > late)
            }
        for name, sha256 in (record.get("files") or {}).items():
            files[folder / name] = (record["seq"], sha256)
    return files


def _possible_digests(run: Path, records: Sequence[LedgerRecord]) -> dict[Path, tuple[int, set[str]]]:
    """As :func:`recorded_files`, with all SHA-256 that a file may have; "" if it may be missing."""
    recorded = recorded_files(run, records)
    pending = records[-1]["event"] in ("state", "measured")
    before = recorded_files(run, records[:-1]) if pending else recorded
    snapshots = RoundStates(run).folder
    return {
        path: (seq, {sha256, before.get(path, (0, ""))[1]} | ({""} if path.parent == snapshots else set()))
        for path, (seq, sha256) in recorded.items()
    }


def require_recorded(run: Path, records: Sequence[LedgerRecord], only: Collection[Path] = ()) -> set[Path]:
    """Compare files with their digests, in the order of the records; return the paths of all with a digest.

    A state after a round may be missing, because states are kept within a budget.

    Args:
        run: the run's folder.
        records: the records of its ledger; at least one.
        only: the files to compare; all if empty.

    Raises:
        LedgerError: a file is missing or differs; it names the record.
    """
    possible = _possible_digests(run, records)
    for path, (seq, digests) in sorted(possible.items(), key=lambda entry: (entry[1][0], entry[0])):
        where = f"{run / LEDGER}: record {seq}"
        if (only and path not in only) or _digest(path) in digests:
            continue
        if path.is_file():
            raise LedgerError(f"{where}: {path} is not the file that was written")
        missing = path if path.parent.is_dir() else path.parent
        raise LedgerError(f"{where}: {run} is incomplete: its {missing.relative_to(run)} is missing")
    return set(possible)


def read_recorded_state(run: Path, records: Sequence[LedgerRecord], number: int) -> RunState:
    """Read the state after a round.

    Raises:
        ValueError: the state was not kept, or its file differs from the ledger.
    """
    round_states = RoundStates(run)
    state, path = round_states.read(number), round_states.path(number)
    if _digest(path) not in _possible_digests(run, records).get(path, (0, set()))[1]:
        raise ValueError(f"the kept state of round {number} differs from the ledger")
    return state


def _digest(path: Path) -> str:
    return file_sha256(path) if path.is_file() else ""

"""The folder in which an output is made: locked, resumable, and published by one rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from rkif.checkpoint.source import InvalidInputError
from rkif.distributed.process_group import ALONE, ProcessGroup, RankFailedError
from rkif.files import fsync_folder, parse_json, remove_temporary, replace_tensors


class Workdir:
    """``OUT.partial``, beside ``OUT``: the output's files in ``data/``, and a journal of finished chunks.

    ``OUT`` itself does not exist until it is complete. The context manager holds a lock. If the block fails,
    the folder is kept and can be resumed; it is removed if no work was done, or if an input is invalid.

    Several processes may work in it, each on its own chunks. Rank 0 holds the lock, and creates and removes
    shared files. Each process has a journal and the state of its scan. Resuming reads all journals.

    Args:
        out: the output's folder; its parents are created.
        plan: digest of everything that determines the output; work with another digest is not resumed.
        slot: bytes of a chunk's buffer, which determines the chunks.
        resume: whether to continue an interrupted fusion.
        processes: the processes that share the work.

    Raises:
        ValueError: ``out`` exists (on entering).
        RuntimeError: another process works in it, or there is work that must not be resumed (on entering).
    """

    def __init__(
        self, out: Path, plan: str, slot: int, *, resume: bool, processes: ProcessGroup = ALONE
    ) -> None:
        self._out, self._resume, self._processes = out, resume, processes
        self._plan = {"plan": plan, "slot": slot}
        self._path = partial_folder(out)
        self._lock = FileLock(self._path / "lock")
        self.data = self._path / "data"
        self.records: list[dict[str, Any]] = []  # of all processes, in no order
        self._has_journal = False  # whether this process's journal has its first line

    def __enter__(self) -> Workdir:
        with self._processes.raise_on_any_failure():
            if self._processes.rank == 0:
                self._claim()
        with self._processes.raise_on_any_failure():
            if self._processes.rank > 0:
                self._read_journals(resume=self._resume)
        return self

    def _claim(self) -> None:
        """Lock the folder, and read the journals of an interrupted fusion."""
        for path in (self._path, *self._path.rglob("*")):
            if path.is_symlink():  # the weights would be written to a file elsewhere
                raise RuntimeError(f"{path} is a link; remove {self._path}")
        self._path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise RuntimeError(f"another process is writing {self._out} (in {self._path})") from None
        try:
            self._require_free()
            remove_temporary(self._path)
            self._read_journals(resume=self._resume)
            self.data.mkdir(exist_ok=True)
        except BaseException:
            if not self._journals():
                self.remove()
            self._lock.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._processes.rank > 0:
            return
        # The folder is removed if no work was recorded, or if any process has found an invalid input.
        invalid = isinstance(error, InvalidInputError) or (
            isinstance(error, RankFailedError) and f" failed: {InvalidInputError.__name__}: " in str(error)
        )
        if self._path.exists() and (invalid or not self._journals()):
            with contextlib.suppress(OSError):  # another process may still write into it
                self.remove()
        self._lock.release()

    def _require_free(self) -> None:
        if self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir())):
            raise ValueError(f"{self._out} exists; name another folder, or remove it")

    def _read_journals(self, *, resume: bool) -> None:
        self.records, self._has_journal = [], False
        for journal in self._journals():
            content = journal.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]  # a kill may have cut off the last line
            try:
                plan, *records = [parse_json(line, journal) for line in whole.splitlines()] or [None]
            except ValueError as error:
                raise RuntimeError(f"{error}; remove {self._path}") from error
            if not records:
                continue
            if not resume:
                raise RuntimeError(
                    f"{self._path} holds an interrupted fusion; continue it with --resume, or remove it"
                )
            if plan != self._plan:
                raise RuntimeError(
                    f"{self._path} is from other inputs or settings: it cannot be resumed; remove it"
                )
            if journal == self._journal:
                os.truncate(journal, len(whole))
                self._has_journal = True
            self.records += records

    def restart(self) -> None:
        """Discard the recorded work, which is repeated from the beginning."""
        for journal in self._journals():
            journal.unlink()
        self.records, self._has_journal = [], False

    def read_all(self) -> None:
        """Read the records of all processes."""
        self._read_journals(resume=True)

    def _journals(self) -> list[Path]:
        return sorted(self._path.glob("journal*.jsonl"))

    @property
    def _suffix(self) -> str:
        return f"-{self._processes.rank}" if self._processes.rank else ""

    @property
    def _journal(self) -> Path:
        return self._path / f"journal{self._suffix}.jsonl"

    @property
    def _state(self) -> Path:
        return self._path / f"scan{self._suffix}.safetensors"

    def allocate(self, sizes: dict[str, int]) -> None:
        """Create the files in full size, so that too little disk space is an error before the work begins.

        Raises:
            OSError: there is too little space; it names the file.
            RuntimeError: a file that chunks were written to is missing or has another size.
        """
        if any("chunk" in record for record in self.records):
            self._require_written(sizes)
        for name, size in sizes.items():
            path = self.data / name
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.ftruncate(descriptor, size)
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
            finally:
                os.close(descriptor)

    def _require_written(self, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            path = self.data / name
            if not path.exists() or path.stat().st_size != size:
                raise RuntimeError(f"{path} differs from what was written; remove {self._path}")

    def record(self, record: dict[str, Any]) -> None:
        """Append a line to the journal, and flush it to disk. The chunk must be on disk already."""
        lines = [record] if self._has_journal else [self._plan, record]
        with self._journal.open("ab" if self._has_journal else "wb") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self._has_journal = True
        self.records.append(record)

    def record_scan(self, state: dict[str, Tensor], position: dict[str, Any]) -> None:
        """Save the state and the position of the scan in one file, so that they agree after a kill."""
        text = {"position": json.dumps(position | {"ranks": self._processes.size})}
        replace_tensors(self._state, state, text)
        if not self._has_journal:
            self.record({"scanning": True})

    def recorded_scan(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last recorded state and position; None if there is none for this number of processes."""
        if not self._has_journal or not self._state.exists():
            return None
        with safe_open(self._state, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
            position = parse_json(file.metadata()["position"], self._state)
        return (state, position) if position["ranks"] == self._processes.size else None

    def publish(self, sizes: dict[str, int]) -> None:
        """Rename the finished folder to ``OUT``, and remove the rest.

        Args:
            sizes: bytes of the files of weights, by name.

        Raises:
            RuntimeError: a file is missing or has another size.
        """
        self._require_written(sizes)
        for folder in (*(path for path in self.data.rglob("*") if path.is_dir()), self.data):
            fsync_folder(folder)
        os.rename(self.data, self._out)
        fsync_folder(self._out.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder; the lock last, so that no other process starts before the end."""
        for path in self._path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        shutil.rmtree(self._path, ignore_errors=True)


def partial_folder(out: Path) -> Path:
    """The folder in which an output is written until it is complete."""
    return out.with_name(out.name + ".partial")


def recorded_slot(out: Path) -> int | None:
    """The ``slot`` of an interrupted fusion to ``out``; None if there is none."""
    try:
        with min(partial_folder(out).glob("journal*.jsonl")).open("rb") as file:
            return int(parse_json(file.readline(), out)["slot"])
    except (OSError, ValueError, KeyError, TypeError):  # a ValueError if there is no journal
        return None


def clear(out: Path) -> None:
    """Remove the work folder beside a finished output, which a kill after publication can leave."""
    partial = partial_folder(out)
    if partial.exists():
        with contextlib.suppress(Timeout), FileLock(partial / "lock", blocking=False):
            shutil.rmtree(partial, ignore_errors=True)

"""An append-only hash chain of JSON lines: what was done to a model.

A line is a JSON object with the keys "seq" (from 0), "previous" (the hash of the previous line; 64 zeros in
the first), the keys of the record's content, and "hash": the SHA-256 of the object without "hash", in
canonical form. A change of a line changes the hashes of all later lines, which a comparison with a copy of
a later hash reveals.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rkif.files import fsync_folder, named_in_errors

LEDGER = "ledger.jsonl"  # in the run's folder
LedgerRecord = dict[str, Any]
START = "0" * 64
CHAIN_KEYS = ("seq", "previous", "hash")
APPEND = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW


class LedgerError(ValueError):
    """The chain is broken; the message names the first bad record."""


class Ledger:
    """A ledger file, opened for one writer.

    Opening moves an unfinished last line, which a killed process can leave, to ``PATH.torn``. Links are not
    followed, so that no other file is changed.

    Args:
        path: the file; the first record creates it.

    Raises:
        LedgerError: a complete line breaks the chain, or the file is a link.

    Attributes:
        path: the file.
        records: all records, oldest first.
        torn: number of bytes of the unfinished last line; 0 if there was none.
    """

    def __init__(self, path: Path) -> None:
        if path.is_symlink():
            raise LedgerError(f"{path} is a link; a ledger must be a file")
        self.path = path
        self.torn = 0
        if path.exists():
            self._repair()
        self.records = list(read_ledger(path)) if path.exists() else []
        self._size = path.stat().st_size if path.exists() else 0

    @property
    def head(self) -> str:
        """The hash of the last record."""
        return str(self.records[-1]["hash"]) if self.records else START

    def append(self, content: Mapping[str, Any]) -> LedgerRecord:
        """Append a record and flush it to disk.

        Args:
            content: JSON values by key.

        Returns:
            The record as written.

        Raises:
            ValueError: ``content`` has a key "seq", "previous" or "hash", or a number that is not finite.
            LedgerError: another process has written to the file.
            OSError: the record cannot be written. The file is as it was then.
        """
        for key in CHAIN_KEYS:
            if key in content:
                raise ValueError(f"{key!r} is a key that the ledger itself writes")
        record = {"seq": len(self.records), "previous": self.head, **content}
        record = {**record, "hash": digest(record)}
        line = canonical(record) + b"\n"
        new = not self.records
        descriptor = os.open(self.path, APPEND | (os.O_CREAT if new else 0), 0o666)
        try:
            with named_in_errors(self.path):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self.require_unchanged()
                self._write(descriptor, line)
        finally:
            os.close(descriptor)
        self._size += len(line)
        self.records.append(json.loads(line))
        if new:
            fsync_folder(self.path.parent)
        return self.records[-1]

    def require_unchanged(self) -> None:
        """Check that the file has the size that it had when it was last read or appended to.

        Raises:
            LedgerError: it has another size.
            OSError: it is missing.
        """
        if (self._size or self.path.exists()) and self.path.stat().st_size != self._size:
            raise LedgerError(f"{self.path} was changed by another process since it was read")

    def _write(self, descriptor: int, line: bytes) -> None:
        """Write a line completely, or leave the file as it was."""
        try:
            written = 0
            while written < len(line):
                written += os.write(descriptor, line[written:])
            os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self._size)
            raise

    def _repair(self) -> None:
        """Move an unfinished last line away. A complete line ends with a line feed."""
        with self.path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a writer may be in the middle of a line
            content = file.read()
            whole = content.rfind(b"\n") + 1
            rest = content[whole:]
            if not rest:
                return
            self.torn = len(rest)
            path = self.path.with_name(self.path.name + ".torn")
            with os.fdopen(os.open(path, APPEND | os.O_CREAT, 0o666), "ab") as torn:
                torn.write(rest + b"\n")
                torn.flush()
                os.fsync(torn.fileno())
            file.truncate(whole)
            os.fsync(file.fileno())


def read_ledger(path: Path, *, torn: bool = False) -> Iterator[LedgerRecord]:
    """Yield the records of a ledger, each after its place in the chain has been checked.

    Args:
        path: the file.
        torn: whether an unfinished last line is ignored; by default it is an error.

    Raises:
        LedgerError: at the first record that breaks the chain.
    """
    previous = START
    content = path.read_bytes()
    lines = content.split(b"\n")
    for seq, line in enumerate(lines[:-1]):
        where = f"{path}: record {seq}"
        try:
            record = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise LedgerError(f"{where} is not JSON") from error
        if not isinstance(record, dict) or any(key not in record for key in CHAIN_KEYS):
            raise LedgerError(f"{where} lacks one of the keys {', '.join(CHAIN_KEYS)}")
        if (type(record["seq"]), record["seq"]) != (int, seq):  # True and 1.0 equal 1
            raise LedgerError(f"{where} has seq {record['seq']!r}")
        if record["previous"] != previous:
            raise LedgerError(f"{where} does not follow the record before it")
        stated = record["hash"]
        hashed = {key: value for key, value in record.items() if key != "hash"}
        try:
            unchanged = stated == digest(hashed)
        except ValueError as error:
            raise LedgerError(f"{where} is damaged: {error}") from error
        if not unchanged:
            raise LedgerError(f"{where} was changed: its hash does not match")
        if canonical(record) != line:
            raise LedgerError(f"{where} was rewritten: its content is the same, but not its characters")
        previous = stated
        yield record
    if lines[-1] and not torn:
        raise LedgerError(f"{path}: record {len(lines) - 1} is incomplete: it has no line feed at its end")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record in canonical form."""
    return hashlib.sha256(canonical(record)).hexdigest()


def canonical(record: Mapping[str, Any]) -> bytes:
    """A record as one line of ASCII JSON with sorted keys and no spaces; the same for equal records.

    It is not RFC 8785: floats, characters beyond ASCII and the order of keys beyond the basic plane differ.
    docs/guide/signatures.md has the list.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot represent.
    """
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")

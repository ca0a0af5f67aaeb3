"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name, bring it to disk, and give it its own."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    fsync_file(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file, or none; lines end in a line feed on every system."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def fsync_file(path: Path) -> None:
    """Bring a file to disk, with the mode of any other: safetensors makes its own for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Bring a folder's entries to disk: new names, and those that were given up."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone, as far as others ask; a kill gives it up. Nothing is written.

    Raises:
        RuntimeError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is working in {folder}") from None
        yield
    finally:
        os.close(descriptor)

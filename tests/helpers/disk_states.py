"""Copies of a folder as kills at several moments would leave it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def disk_states(folder: Path, copies: Path, calls: Sequence[tuple[Any, str]]) -> Iterator[list[Path]]:
    """Copy ``folder`` before and after every call of the functions, each given as (object, name).

    SIGKILL runs no handler, so what it leaves are the files of that moment. A resumed process knows nothing
    else, so states with the same files are copied once.

    Yields:
        The copies so far, in their order: paths in ``copies``. A path does not exist where the folder did not
        exist yet.
    """
    states: list[Path] = []
    latest: tuple[bool, list[tuple[str, bytes | None]]] | None = None

    def copy() -> None:
        nonlocal latest
        paths = sorted(folder.rglob("*"))
        files = [(str(path), path.read_bytes() if path.is_file() else None) for path in paths]
        content = folder.exists(), files
        if content == latest:
            return
        latest = content
        states.append(copies / f"{len(states)}")
        if folder.exists():
            shutil.copytree(folder, states[-1])

    with pytest.MonkeyPatch.context() as patch:
        for holder, name in calls:
            call = getattr(holder, name)

            def copying(*arguments: Any, call: Any = call, **more: Any) -> Any:
                copy()
                result = call(*arguments, **more)
                copy()
                return result

            patch.setattr(holder, name, copying)
        yield states

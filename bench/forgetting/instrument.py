"""What the commands that look into runs share: a run that leaves nothing behind, and its rows."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.forgetting.continual import CONFIGS
from rkif.continual.config import RunConfig
from rkif.continual.display.progress import RunProgress
from rkif.continual.run import run

DEFAULT = CONFIGS / "standard-minilm.yaml"
HARDLY_MEASURED = {"dev_limit": 8}  # changes to `tasks` of a run whose accuracy nobody asks for


@contextmanager
def silent_run(config: RunConfig) -> Iterator[tuple[dict[str, Any], Path]]:
    """The metrics of a run that says nothing, and its folder, which is gone after the block."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        out = Path(folder) / "run"
        yield run(config, out, progress=RunProgress(Console(file=nowhere))), out


@contextmanager
def replaced(kind: type, **methods: Callable[..., Any]) -> Iterator[None]:
    """While the block runs a class has other methods."""
    originals = {name: getattr(kind, name) for name in methods}
    for name, method in methods.items():
        setattr(kind, name, method)
    try:
        yield
    finally:
        for name, method in originals.items():
            setattr(kind, name, method)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON line a row, in place of all that was there."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def commit_of(row: Mapping[str, Any]) -> str:
    """The commit that a row was measured at, in short."""
    return str(row["commit"]).removesuffix("-dirty")[:7]

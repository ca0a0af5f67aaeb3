"""Reads JSON lines, with errors that name the file and the line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from rkif.files import parse_json, require_object


class DataContent(BaseModel):
    """An object in a file of the user: no value is converted, and unknown keys are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


class TaskLine(DataContent):
    """The key that every line must have; records of tasks outside the sequence are not checked further."""

    task: str


class RecordLine(TaskLine):
    """One record of a task."""

    id: str
    input: str
    output: str


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("PATH:LINE", object) for each line of a `.jsonl` or `.jsonl.gz` file; skip blank lines.

    Raises:
        ValueError: a line is not a JSON object in UTF-8, or the compressed file is damaged.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, require_object(parse_json(line, where, own=False), where, own=False)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: an incomplete gzip file: {error}") from error

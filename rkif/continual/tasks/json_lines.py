"""Reads JSON lines, with errors that name the file and the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


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
                    yield f"{path}:{number}", json_object(line, f"{path}:{number}")
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: an incomplete gzip file: {error}") from error


def json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; for anything else, raise ValueError that names `where`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value

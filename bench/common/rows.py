"""The store of measurements: files of JSON lines in ``bench/results``, one line per measurement.

The environment variable ``RKIF_BENCH_RESULTS`` names another folder.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common.machine import commit, device_name

# A trial run sets the variable, so that the committed rows stay.
RESULTS = Path(os.environ.get("RKIF_BENCH_RESULTS") or Path(__file__).parents[1] / "results")
KEY = ("op", "shape", "dtype", "implementation", "device")

Row = dict[str, Any]


def results_file(device: str) -> Path:
    """The file of committed rows for a device type, "cuda" or "cpu"."""
    return RESULTS / f"{'gpu' if device == 'cuda' else 'cpu'}.jsonl"


def row(
    *,
    op: str,
    shape: str,
    dtype: str,
    implementation: str,
    numel: int,
    tensors: int,
    seconds: Sequence[float],
    bytes_min: int,
    copy_gbps: float,
    device: torch.device,
    **more: Any,
) -> Row:
    """A row from the seconds of each round; ``share`` is the bandwidth as a share of a copy's."""
    p20, median, p80 = (float(value) * 1e3 for value in np.percentile(seconds, (20, 50, 80)))
    gbps = bytes_min / (median / 1e3) / 1e9
    return {
        "op": op,
        "shape": shape,
        "dtype": dtype,
        "implementation": implementation,
        "numel": numel,
        "tensors": tensors,
        "rounds": len(seconds),
        "ms_p20": round(p20, 6),
        "ms_median": round(median, 6),
        "ms_p80": round(p80, 6),
        "bytes_min": bytes_min,
        "gbps": round(gbps, 3),
        "copy_gbps": round(copy_gbps, 3),
        "share": round(gbps / copy_gbps, 4),
        **more,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that affect the figures."""
    installed = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "rkif"):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def read(path: Path) -> list[Row]:
    """The rows of a file; an empty list if there is no file.

    Raises:
        ValueError: a line is not a row.
    """
    if not path.exists():
        return []
    rows = []
    for line_number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{line_number} is not a row: {error}") from error
    return rows


def write(path: Path, new: Mapping[str, Any], key: Sequence[str] = KEY) -> None:
    """Replace the row with the same values of ``key``, or append the new row."""
    rows: list[Mapping[str, Any]] = [*read(path)]
    identity = [new[name] for name in key]
    same = (index for index, old in enumerate(rows) if [old.get(name) for name in key] == identity)
    at = next(same, len(rows))
    rows[at : at + 1] = [new]
    write_all(path, rows)


def write_all(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def commit_of(row: Mapping[str, Any]) -> str:
    """The abbreviated commit that a row was measured at."""
    return str(row["commit"]).removesuffix("-dirty")[:7]


def transposed(
    path: Path,
    caption: Callable[[Row], str],
    heading: Callable[[Row], str],
    labels: Mapping[str, str],
    show: Callable[[str, float], str],
) -> str:
    """A file of rows as Markdown: a caption, and a table with a column per row and a line per figure.

    Args:
        path: the rows, all measured in one call.
        caption: first row -> what was measured, on which device, at which commit.
        heading: row -> the heading of its column.
        labels: key of a figure -> its label, in order.
        show: (key, value) -> the cell.
    """
    rows = read(path)
    lines = [
        caption(rows[0]),
        "",
        "| | " + " | ".join(map(heading, rows)) + " |",
        "| --- |" + " ---: |" * len(rows),
    ]
    for key, label in labels.items():
        lines.append(f"| {label} | " + " | ".join(show(key, row[key]) for row in rows) + " |")
    return "\n".join(lines) + "\n"

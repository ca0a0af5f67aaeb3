"""Measurements on disk: JSON lines, one a measurement, the latest of each kind."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common.machine import commit, device_name

RESULTS = Path(__file__).parents[1] / "results"
KEY = ("op", "shape", "dtype", "implementation", "device")

Row = dict[str, Any]


def results_file(device: str) -> Path:
    """Where rows of a kind of device are committed."""
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
    """A row from the seconds that rounds took; ``share`` is of the copy bandwidth measured beside it."""
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
    """Of what decides the figures."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "rkif"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: a line is not a row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not a row: {error}") from error
    return rows


def write(path: Path, new: Row) -> None:
    """Put a row in place of the one with the same key, or at the end."""
    rows = read(path) if path.exists() else []
    key = _key(new)
    at = next((index for index, old in enumerate(rows) if _key(old) == key), len(rows))
    rows[at : at + 1] = [new]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    temporary.replace(path)


def _key(item: Row) -> tuple[Any, ...]:
    return tuple(item[name] for name in KEY)

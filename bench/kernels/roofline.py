"""The calls of the kernels, with what bounds their time (bytes, instructions, launches) and measured times.

Bytes and instructions are those of :mod:`bench.kernels.prediction`; ``bench host`` counts the launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common import rows
from bench.common.machine import commit, device_name
from bench.common.rows import Row
from bench.kernels import goals
from bench.kernels.operations import DENSITY
from bench.kernels.prediction import ASSUMPTIONS, CALLS, H100, PREDICTED, VARIANTS, Call

COUNTED = ("call", "tensors", "launches")
HEADER = (
    "| call | elements | bytes, least | moved | instructions | launches | floor, µs | predicted, µs "
    "| to the floor | goal | measured |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
)


def counts_file() -> Path:
    """The file that ``bench aot --write`` writes."""
    return rows.RESULTS / "aot.jsonl"


def host_file() -> Path:
    """The file that ``bench host --write`` writes."""
    return rows.RESULTS / "host.jsonl"


def write_counts(compiled: Iterable[Row]) -> None:
    """Write the rows of the compiled kernels that the predictions use.

    Raises:
        ValueError: one of them is missing, for a version of Triton among the rows.
    """
    kept = [row | {"commit": commit()} for row in compiled if _is_counted(row)]
    for version, rates in _rates(kept).items():
        if missing := VARIANTS.keys() - rates.keys():
            raise ValueError(f"--write: no {', '.join(sorted(missing))} among the rows of triton {version}")
    if not kept:
        raise ValueError(f"--write needs --target {PREDICTED}, or none")
    rows.write_all(counts_file(), kept)


def write_host(measured: Iterable[Row]) -> None:
    """Write the numbers of launches that ``bench host`` counted, but no times: they depend on the load."""
    conditions = {"device": device_name(torch.device("cpu")), "versions": rows.versions(), "commit": commit()}
    rows.write_all(host_file(), [{name: row[name] for name in COUNTED} | conditions for row in measured])


def markdown() -> str:
    """A line for each call and set of shapes."""
    compiled = rows.read(counts_file())
    rates = _rates(compiled)
    launches = {(row["call"], row["tensors"]): row["launches"] for row in rows.read(host_file())}
    measured = rows.read(rows.results_file("cuda"))
    versions = " / ".join(rates)
    commits = ", ".join(dict.fromkeys(map(rows.commit_of, compiled)))
    lines = [
        f"float32, S and U, density {DENSITY}, in one CUDA graph; bytes and instructions are those of an "
        f"element. Instructions were counted in code for {PREDICTED} by triton {versions}, compiled at "
        f"{commits}; predictions are for one {H100.name}. {ASSUMPTIONS} The floor is the time of "
        "a copy of the least bytes.",
        "",
        *HEADER,
    ]
    lines += [_line(call, rates, launches, measured) for call in CALLS]
    return "\n".join(lines) + "\n"


def _line(
    call: Call,
    rates: Mapping[str, Mapping[str, float]],
    launches: Mapping[tuple[Any, Any], int],
    measured: Sequence[Row],
) -> str:
    numel, tensors = call.shapes.numel, len(call.shapes.shapes)
    by_version = [call.launches(call.shapes, of_version) for of_version in rates.values()]
    predicted = [call.microseconds(of_version) for of_version in rates.values()]
    cells = (
        call.op,
        f"{numel:,}" + (f" in {tensors} tensors" if tensors > 1 else ""),
        str(call.least),
        f"{sum(launch.moved for launch in by_version[0]) / numel:.1f}",
        " / ".join(f"{sum(launch.instructions for launch in each) / numel:.0f}" for each in by_version),
        str(launches.get((call.op, tensors), "not counted")),
        f"{call.floor:.0f}",
        " / ".join(f"{microseconds:.0f}" for microseconds in predicted),
        " / ".join(f"{microseconds / call.floor:.2f}x" for microseconds in predicted),
        call.goal.limit.replace(" us", " µs") if call.goal else "-",
        "; ".join(_measurements(call, measured)) or "not measured",
    )
    return f"| {' | '.join(cells)} |"


def _measurements(call: Call, measured: Iterable[Row]) -> list[str]:
    """The measurements of a call, for each GPU."""
    return [
        f"{row['ms_median'] * 1e3:.0f} µs, {1 / row['share']:.2f}x the floor, {row['device']}"
        for row in measured
        if (row["op"], row["shape"], row["dtype"]) == (call.op, call.shapes.name, "float32")
        and row["implementation"] == goals.OURS
    ]


def _is_counted(row: Row) -> bool:
    return bool(row["target"] == PREDICTED and VARIANTS.get(row["kernel"]) == row["variant"])


def _rates(compiled: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Version of Triton -> kernel -> instructions an element in its bulk loop."""
    rates: dict[str, dict[str, float]] = {}
    for row in compiled:
        rates.setdefault(row["triton"], {})[row["kernel"]] = row["instructions_per_element"]
    return rates

"""The README's figures: made from the committed results, never typed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import checkpoints, kernels
from bench.continual import RESULTS

README = Path(__file__).parent.parent / "README.md"
FILES = (README, README.parent / "docs" / "checkpoints.md")  # that have tables


def with_tables(text: str) -> str:
    """``text`` with everything between a results marker and its end made anew.

    Raises:
        ValueError: a marker names results that nobody makes.
    """

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f"no such results: {name!r}")
        return f"<!-- results: {name} -->\n{TABLES[name]()}<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def continual_table() -> str:
    """One table for each sequence that was measured; of repeated runs the last counts."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        settings = row["settings"]
        training = settings["training"]
        steps = training["steps"] or f"{training['epochs']} epochs of"
        heading = (
            f"{row['model']}, order {row['order']}: {' → '.join(row['tasks'])}. "
            f"{row['trainable']:,} parameters trained, {steps} steps of {training['batch_size']} a task, "
            f"{sum(row['records'])} {row['split']} records, seed {row['seed']}, on {row['device']}."
        )
        groups.setdefault(heading, {})[row["method"]] = row
    parts = []
    for heading, methods in groups.items():
        lines = ["| method | OP | BWT | FWT | training samples |", "| --- | ---: | ---: | ---: | ---: |"]
        for method, row in methods.items():
            figures = " | ".join(_figure(row[key]) for key in ("op", "bwt", "fwt"))
            lines.append(f"| {method} | {figures} | {row['samples']:,} |")
        error = max(_standard_error(row) for row in methods.values())
        note = f"The standard error of an OP is about {error:.1f} points, from the number of records alone."
        parts.append(f"{heading}\n\n" + "\n".join(lines) + f"\n\n{note}\n")
    return "\n".join(parts)


def _standard_error(row: dict[str, Any]) -> float:
    """Of the mean over tasks of binomial accuracies, in points."""
    final = [accuracy[-1] for accuracy in row["accuracy"]]
    variances = [a * (100 - a) / n for a, n in zip(final, row["records"], strict=True)]
    return math.sqrt(sum(variances)) / len(final)


def _figure(value: object) -> str:
    return "-" if not isinstance(value, float | int) else f"{value:.1f}"


TABLES: dict[str, Callable[[], str]] = {
    "checkpoints": checkpoints.markdown,
    "continual": continual_table,
    "kernels": kernels.markdown,
}

"""The goals of the kernels on a GPU, and whether the rows reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.table import Table

from bench.common.rows import Row
from bench.kernels.shapes import LORA_R8
from bench.kernels.tables import grouped, milliseconds

LARGE = 2**26  # elements from which neither launches nor caches matter
OURS = "rkif.triton"

Finding = tuple[float, str]


@dataclass(frozen=True)
class Goal:
    """A goal for some of the rows.

    Attributes:
        text: the goal in words.
        findings: for every row that the goal concerns: ratio to the goal (1 or more: reached), and a text.
    """

    text: str
    findings: Callable[[Sequence[Row]], list[Finding]]


def table(found: Sequence[Row]) -> Table:
    """A table of the goals, each with the row that is furthest from it."""
    out = Table(title="goals")
    for heading in ("goal", "", "rows", "furthest from it"):
        out.add_column(heading)
    for goal in GOALS:
        findings = goal.findings(found)
        if not findings:
            out.add_row(goal.text, "[yellow]NOT MEASURED", "0", "-")
            continue
        ratio, words = min(findings)
        verdict = "[green]PASS" if ratio >= 1 else "[red]FAIL"
        out.add_row(goal.text, verdict, str(len(findings)), words)
    return out


def _share(found: Sequence[Row], op: str, goal: float) -> list[Finding]:
    return [
        (row["share"] / goal, f"{row['share']:.1%}: {_name(row)}")
        for row in _ours(found)
        if row["numel"] >= LARGE and row["op"] == op
    ]


def _microseconds(found: Sequence[Row], op: str, goal: float) -> list[Finding]:
    """Findings with the time of a copy of as many bytes: the minimum for inputs larger than the cache."""
    return [
        (
            goal / (row["ms_median"] * 1e3),
            f"{row['ms_median'] * 1e3:.1f} us: {_name(row)}; copying its bytes takes "
            f"{row['bytes_min'] / row['copy_gbps'] / 1e3:.1f} us",
        )
        for row in _ours(found)
        if row["op"] == op and row["shape"] == LORA_R8.name and row["dtype"] == "float32"
    ]


def _against_eager(found: Sequence[Row], goal: float) -> list[Finding]:
    findings = []
    for group in grouped(found).values():
        if OURS in group and "eager" in group:
            ours, eager = group[OURS], group["eager"]
            ratio = eager["ms_median"] / ours["ms_median"]
            times = f"{milliseconds(ours['ms_median'])} ms against {milliseconds(eager['ms_median'])}"
            findings.append((ratio / goal, f"{ratio:.1f}x: {_name(ours)}, {times}"))
    return findings


def _ours(found: Iterable[Row]) -> list[Row]:
    return [row for row in found if row["implementation"] == OURS]


def _name(row: Row) -> str:
    return f"{row['op']}, {row['shape']}, {row['dtype']}"


GOALS = (
    Goal(
        "observe: at least 90 % of a copy's bandwidth on large inputs",
        partial(_share, op="observe", goal=0.9),
    ),
    Goal("threshold: the same", partial(_share, op="threshold", goal=0.9)),
    Goal("fuse: the same", partial(_share, op="fuse", goal=0.9)),
    Goal("fuse: at most 1.15x the time of a copy of its bytes", partial(_share, op="fuse", goal=1 / 1.15)),
    Goal("13B adapter: observe below 25 us", partial(_microseconds, op="observe", goal=25)),
    Goal("13B adapter: fuse below 150 us", partial(_microseconds, op="fuse", goal=150)),
    Goal("at least 30x the eager transcription", partial(_against_eager, goal=30)),
)

"""What the kernels are to reach on a GPU, and whether the rows say that they do.

The floor of a call is the time in which a copy moves the least bytes of the call, at the speed that copies
had in the same session. No kernel is faster on inputs beyond the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from bench.common.rows import Row
from bench.kernels.shapes import LORA_R8

LARGE = 2**26  # elements from which neither launches nor caches matter
OURS = "rkif.triton"


@dataclass(frozen=True)
class Goal:
    """The longest time that a call may take.

    Attributes:
        op: the operation.
        adapter: whether the call is on the 13B adapter in float32; else on :data:`LARGE` elements and more.
        floors: at most so many times the floor; None for a goal in microseconds.
        microseconds: at most so long; None for a goal in floors.
    """

    op: str
    adapter: bool
    floors: float | None = None
    microseconds: float | None = None

    @property
    def limit(self) -> str:
        return f"at most {self.floors}x the floor" if self.floors else f"at most {self.microseconds:.0f} us"

    def concerns(self, op: str, shape: str, numel: int, dtype: str) -> bool:
        if self.adapter:
            return (op, shape, dtype) == (self.op, LORA_R8.name, "float32")
        return op == self.op and numel >= LARGE

    def ratio(self, microseconds: float, floor: float) -> float:
        """The time by the longest one allowed; ``floor`` in microseconds."""
        return microseconds / (self.floors * floor if self.floors else self.microseconds or 0)

    def verdict(self, microseconds: float, floor: float) -> str:
        return "reached" if self.ratio(microseconds, floor) <= 1 else "NOT REACHED"


GOALS = (
    Goal("observe", adapter=False, floors=1.25),
    Goal("fuse", adapter=False, floors=1.15),
    Goal("observe", adapter=True, floors=1.25),
    Goal("fuse", adapter=True, microseconds=150),
)


def table(measured: Sequence[Row]) -> Table:
    """Each goal with the row that is furthest from it."""
    out = Table(title="goals", caption="floor: the time of a copy of the least bytes, in the same session")
    for heading in ("call", "goal", "floor, us", "measured, us", "verdict", "row furthest from it"):
        out.add_column(heading)
    for goal in GOALS:
        call = f"{goal.op}, {'13B adapter' if goal.adapter else '64 Mi and more'}"
        rows = [row for row in measured if row["implementation"] == OURS and _concerned(goal, row)]
        if not rows:
            out.add_row(call, goal.limit, "-", "not measured", "-", "-")
            continue
        worst = max(rows, key=lambda row: goal.ratio(*_times(row)))
        microseconds, floor = _times(worst)
        verdict = goal.verdict(microseconds, floor)
        name = f"{worst['shape']}, {worst['dtype']}, {worst['device']}"
        out.add_row(call, goal.limit, f"{floor:.1f}", f"{microseconds:.1f}", verdict, name)
    return out


def _concerned(goal: Goal, row: Row) -> bool:
    return goal.concerns(row["op"], row["shape"], row["numel"], row["dtype"])


def _times(row: Row) -> tuple[float, float]:
    """Of a row: what the call took, and its floor, in microseconds."""
    return row["ms_median"] * 1e3, row["bytes_min"] / row["copy_gbps"] / 1e3

"""The goals of the kernels on a GPU, and whether the measured rows reach them.

The floor of a call is the time in which a copy moves the minimum bytes of the call, at the speed of copies in
the same session. No kernel is faster on inputs that are larger than the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from bench.common.rows import Row
from bench.kernels.shapes import LORA_R8

LARGE = 2**26  # number of elements from which launches and caches are negligible
OURS = "rkif.triton"


@dataclass(frozen=True)
class Goal:
    """The maximum time of a call.

    Attributes:
        op: the operation.
        adapter: whether the call is on the 13B adapter in float32; else on :data:`LARGE` or more elements.
        floors: the maximum as a multiple of the floor; None if it is in microseconds.
        microseconds: the maximum in microseconds; None if it is a multiple of the floor.
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
        """The time divided by the maximum; ``floor`` in microseconds."""
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
    """A table of each goal with the row that is furthest from it."""
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
    """The measured time and the floor of a row, in microseconds."""
    return row["ms_median"] * 1e3, row["bytes_min"] / row["copy_gbps"] / 1e3

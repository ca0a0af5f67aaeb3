"""A plan as tables for the terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from rich import box
from rich.table import Table

from rkif.plan.bytes import PHASES, Budget, Option, Training

GIB = 2**30


def bytes_table(training: Training, option: Option) -> Table:
    """Bytes per trainable parameter, by purpose and phase."""
    title = f"Bytes per trainable parameter, {name(option)}"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("")
    for phase in PHASES:
        table.add_column(f"{phase} phase" if phase != "fusion" else phase, justify="right")
    rows = option.bytes_a_parameter(training)
    for purpose, phases in rows.items():
        table.add_row(purpose, *(f"{phases[phase]:g}" if phases[phase] else "-" for phase in PHASES))
    table.add_section()
    sums = [sum(phases[phase] for phases in rows.values()) for phase in PHASES]
    table.add_row("in all", *(f"{total:g}" for total in sums), style="bold")
    return table


def options_table(budgets: Sequence[Budget], chosen: Budget | None, memory: int) -> Table:
    """The memory that every option needs on a device."""
    title = f"GiB on each device of {memory / GIB:.4g} GiB"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for column in ("option", "results", *PHASES, "peak", ""):
        table.add_column(column, justify="left" if column in ("option", "results", "") else "right")
    for one in budgets:
        table.add_row(
            name(one.option),
            "exact" if one.option.exact else "rounded",
            *(f"{one.phases[phase] / GIB:.2f}" for phase in PHASES),
            f"{one.bytes / GIB:.2f}",
            "<- chosen" if one is chosen else "fits" if one.fits else "too much",
            style="bold" if one is chosen else "" if one.fits else "dim",
        )
    return table


def name(option: Option) -> str:
    """The settings of an option that differ from their defaults, under their names in a config."""
    changes = (f"{key}: {str(value).lower()}" for key, value in option.changes.items())
    return ", ".join(changes) or "defaults"


def settings(option: Option) -> str:
    """An option as the ``fusion`` section of a config."""
    return str(yaml.safe_dump({"fusion": option.changes}, sort_keys=False)).rstrip()


def as_json(training: Training, budgets: Sequence[Budget], chosen: Budget | None) -> dict[str, Any]:
    return {
        "trainable": training.trainable,
        "frozen": training.frozen,
        "ranks": training.ranks,
        "options": [
            {
                "settings": one.option.changes,
                "exact": one.option.exact,
                "bytes": one.phases,
                "bytes_a_parameter": one.option.bytes_a_parameter(training),
                "peak": one.peak,
                "fits": one.fits,
            }
            for one in budgets
        ],
        "chosen": None if chosen is None else chosen.option.changes,
    }

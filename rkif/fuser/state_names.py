"""Names in a flat state: the prefix before the first dot is the section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def flatten(sections: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Convert section -> name -> value to one mapping "section.name" -> value."""
    return {f"{prefix}.{name}": value for prefix, part in sections.items() for name, value in part.items()}


def section(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Name -> value of one section of a flat state; empty if there is no such section."""
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}

"""Names in a flat state: parts of a state are told apart by prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def flatten(sections: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Prefix -> name -> value, as one mapping: prefix and name, such as "fuser." and "round", are joined."""
    return {prefix + name: value for prefix, names in sections.items() for name, value in names.items()}


def section(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """What :func:`flatten` made of one prefix: values whose names have it, under the rest of the names."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}

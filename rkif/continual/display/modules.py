"""The parameters of a module, by whole parts of their names."""

from __future__ import annotations

from collections.abc import Iterable

from rkif.continual.spelling import did_you_mean
from rkif.fuser.parameters import short_name


def is_in_module(parameter: str, module: str) -> bool:
    """Whether the parts of ``module`` are consecutive parts of a name: layers.10 is not in layers.1."""
    return f".{module.strip('.')}." in f".{parameter}."


def require_module(module: str, parameters: Iterable[str]) -> None:
    """Raise ValueError if no parameter is in the module. No parameters means that nothing was fused."""
    names = list(parameters)
    if any(is_in_module(name, module) for name in names):
        return
    if not names:
        raise ValueError(f"no parameter's name has {module!r}: nothing has been fused")
    short = sorted({short_name(name) for name in names})
    examples = ", ".join(map(repr, short[:3])) + (", ..." if len(short) > 3 else "")
    runs = dict.fromkeys(run for name in short for run in _runs(name.split(".")))
    raise ValueError(
        f"no parameter's name has {module!r} as whole parts; names are {examples}{did_you_mean(module, runs)}"
    )


def _runs(parts: list[str]) -> Iterable[str]:
    """All sequences of consecutive parts."""
    for first in range(len(parts)):
        for last in range(first + 1, len(parts) + 1):
            yield ".".join(parts[first:last])

"""Metrics of one's own: functions that are given predictions and records, and return a number."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rkif.continual.tasks.records import Record

Metric = Callable[[Sequence[str], Sequence[Record]], float]


def metric_name(spec: str) -> str:
    """What a metric is called in tables: its function's name."""
    return spec.rpartition(":")[2]


def locate(spec: str, folder: Path) -> str:
    """``module:function`` as ``/path/to/module.py:function`` where the module is a file in ``folder``."""
    module, _, function = spec.rpartition(":")
    file = folder / (module if module.endswith(".py") else module.replace(".", "/") + ".py")
    return f"{file}:{function}" if file.is_file() else spec


def load_metric(spec: str) -> Metric:
    """The function that ``module:function`` or ``file.py:function`` names.

    Raises:
        ValueError: there is no such module or function, or it is not callable.
    """
    module_name, _, function = spec.rpartition(":")
    try:
        if module_name.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            assert found is not None
            assert found.loader is not None
            module: Any = importlib.util.module_from_spec(found)
            sys.modules.setdefault(found.name, module)  # where dataclasses look for a class's module
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module does when it is imported
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"metrics: {spec!r} cannot be imported: {problem}") from error
    metric = getattr(module, function, None)
    if not callable(metric):
        raise ValueError(f"metrics: {module_name!r} has no function {function!r}")
    return metric  # type: ignore[no-any-return]


def evaluate_metric(
    name: str, metric: Metric, predictions: Sequence[str], records: Sequence[Record]
) -> float:
    """The metric's value.

    Raises:
        ValueError: it raises, or is not a finite number.
    """
    try:
        value: Any = metric(list(predictions), list(records))
    except Exception as error:  # whatever a user's function does
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"metric {name!r} failed on task {records[0].task!r}: {problem}") from error
    if hasattr(value, "item") and getattr(value, "size", None) == 1:  # numpy's numbers are none of Python's
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, float | int) or not math.isfinite(value):
        raise ValueError(
            f"metric {name!r} must return a finite number; got {value!r} for task {records[0].task!r}"
        )
    return float(value)

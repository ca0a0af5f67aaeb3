"""User metrics: functions of predictions and records that return a number."""

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
    """The name of a metric in tables: that of its function."""
    return spec.rpartition(":")[2]


def locate(spec: str, folder: Path) -> str:
    """``/path/to/module.py:function`` if the module is a file in ``folder``, else ``spec`` unchanged."""
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
            module_spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            assert module_spec is not None
            assert module_spec.loader is not None
            module: Any = importlib.util.module_from_spec(module_spec)
            sys.modules.setdefault(module_spec.name, module)  # dataclasses need their module here
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except Exception as error:  # the module may raise any exception
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"metrics: {spec!r} cannot be imported: {problem}") from error
    metric = getattr(module, function, None)
    if not callable(metric):
        raise ValueError(f"metrics: {module_name!r} has no function {function!r}")
    return metric  # type: ignore[no-any-return]


def evaluate_metric(
    name: str, metric: Metric, predictions: Sequence[str], records: Sequence[Record]
) -> float:
    """Call the metric.

    Raises:
        ValueError: the metric raises, or its value is not a finite number.
    """
    try:
        value: Any = metric(list(predictions), list(records))
    except Exception as error:  # the function may raise any exception
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"metric {name!r} failed on task {records[0].task!r}: {problem}") from error
    if hasattr(value, "item") and getattr(value, "size", None) == 1:  # a NumPy scalar
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, float | int) or not math.isfinite(value):
        raise ValueError(
            f"metric {name!r} must return a finite number; got {value!r} for task {records[0].task!r}"
        )
    return float(value)

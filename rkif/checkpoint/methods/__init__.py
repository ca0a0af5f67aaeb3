"""Methods that merge checkpoints: Recurrent-KIF, and the methods with which it is compared.

The others have mergekit's names, parameters and defaults. They merge any number of models that were
fine-tuned from BASE, so all task vectors start from BASE. ``wsm`` averages checkpoints of one run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rkif.checkpoint.methods.averages import CheckpointAverage, Linear
from rkif.checkpoint.methods.interface import EVERYTHING, NOTHING, Method, ScanResult
from rkif.checkpoint.methods.recurrent_kif import RecurrentKIFMerge
from rkif.checkpoint.methods.task_arithmetic import TaskArithmetic
from rkif.checkpoint.methods.varying import (
    TensorSettings,
    VaryingLinear,
    VaryingTaskArithmetic,
    varying_method,
)
from rkif_kernels import require_choice

__all__ = [
    "EVERYTHING",
    "NOTHING",
    "SETTINGS",
    "Method",
    "ScanResult",
    "TaskArithmetic",
    "TensorSettings",
    "make_method",
    "settings_of",
    "varying_method",
]

_MERGE = ("weight", "normalize", "lambda")
_SPARSIFIED: dict[str, dict[str, Any]] = {
    "ties": {"sparsification": "magnitude", "consensus": True, "normalize": True, "scope": "tensor"},
    "magnitude_prune": {"sparsification": "magnitude", "consensus": False, "scope": "tensor"},
    "dare_linear": {"sparsification": "random", "consensus": False, "rescale": True},
    "dare_ties": {"sparsification": "random", "consensus": True, "rescale": True},
}
SETTINGS: dict[str, tuple[str, ...]] = {
    "recurrent_kif": ("density", "rule", "scope", "outer_from"),
    "linear": ("weight", "normalize"),
    "wsm": ("shape",),
    "task_arithmetic": _MERGE,
    "ties": (*_MERGE, "density", "scope"),
    "magnitude_prune": (*_MERGE, "density", "scope"),
    "dare_linear": (*_MERGE, "density", "rescale", "seed"),
    "dare_ties": (*_MERGE, "density", "rescale", "seed"),
}


def make_method(name: str, settings: Mapping[str, Any], models: int = 2) -> Method:
    """The method of that name, with its defaults for settings that are not given.

    Args:
        name: a key of SETTINGS.
        settings: values of its settings.
        models: number of models that are merged, without the first checkpoint, BASE.

    Raises:
        TypeError, ValueError: the name is unknown; a setting is unknown or its value invalid; or the method
            does not merge this number of models.
    """
    require_choice("method", name, list(SETTINGS))
    for setting in settings:
        if setting not in SETTINGS[name]:
            raise ValueError(f"{setting} is not a setting of {name}, which has {', '.join(SETTINGS[name])}")
    if name == "recurrent_kif" and models != 2:
        raise ValueError(f"recurrent_kif fuses BASE, INNER and OUTER; got {_checkpoints(models + 1)}")
    if models < 1:
        least = "two checkpoints" if name == "wsm" else "BASE and at least one model"
        raise ValueError(f"{name} needs {least}; got {_checkpoints(models + 1)}")
    given = {"lambda_" if setting == "lambda" else setting: value for setting, value in settings.items()}
    if "weight" in SETTINGS[name]:
        given["weight"] = _weights(given.get("weight"), models)
    if name == "recurrent_kif":
        return RecurrentKIFMerge(**given)
    if name == "linear":
        return Linear(**given)
    if name == "wsm":
        return CheckpointAverage(models=models, **given)
    if name == "task_arithmetic":
        return TaskArithmetic(name, None, consensus=False, **given)
    return TaskArithmetic(name, **{"density": 0.2, **_SPARSIFIED[name], **given})


def settings_of(method: Method) -> dict[str, Any]:
    """The values of the method's settings, ready for JSON."""
    if isinstance(method, VaryingTaskArithmetic | VaryingLinear):
        return dict(method.settings)
    values = dataclasses.asdict(method)  # type: ignore[call-overload]
    names = SETTINGS[method.name]
    settings = {name: values["lambda_" if name == "lambda" else name] for name in names}
    if isinstance(method, CheckpointAverage):
        settings["weight"] = method.weight  # computed from the shape
    return settings


def _weights(weight: Any, models: int) -> tuple[float, ...]:
    if weight is None:
        return (1.0,) * models
    if len(weight) != models:
        raise ValueError(
            f"weight must have {models} number{'s' if models > 1 else ''}, one for each model after BASE; "
            f"got {tuple(weight)}"
        )
    return tuple(weight)


def _checkpoints(count: int) -> str:
    return f"{count} checkpoint{'' if count == 1 else 's'}"

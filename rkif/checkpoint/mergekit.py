"""Reads a merge from a YAML file of mergekit; an unsupported feature is an error that names it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkif.checkpoint.methods import (
    SETTINGS,
    Method,
    TensorSettings,
    make_method,
    settings_of,
    varying_method,
)
from rkif.checkpoint.source import FUSED, Checkpoint, open_checkpoint
from rkif.checkpoint.yaml_text import load_yaml

METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
_BY_TENSOR = ("weight", "density")
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The number of a tensor's layer: it follows the name of a list of layers, as models name these.
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True)
class Merge:
    """A merge as the file describes it; the names of tensors are not known yet.

    Attributes:
        file: the YAML file, for messages.
        method: one of METHODS.
        base: the checkpoint that gives the layout: base_model, or the first model.
        models: the models to merge, in their order; without base_model.
        by_model: for each model its "weight" and "density": numbers, gradients or lists of filters.
        shared: the same of the whole merge, for models without a value of their own.
        scalars: "normalize", "rescale" and "lambda", if they are given.
        dtype: dtype of the output; None to keep that of the checkpoint.
    """

    file: Path
    method: str
    base: Path
    models: tuple[Path, ...]
    by_model: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    scalars: Mapping[str, Any]
    dtype: str | None

    def load(self, seed: int | None = None) -> Method:
        """The method; the tensors' names and dtypes are read from the header of ``base``.

        Raises:
            ValueError: the base cannot be opened, dtypes would have to be converted, or a weight is missing.
        """
        problems: list[str] = []
        base = open_checkpoint(self.base, "BASE", problems)
        if base is None or problems:
            raise ValueError(problems[0])
        self._require_dtype(base)
        positions = _positions(base.tensors)
        fused = [name for name, entry in base.tensors.items() if entry.dtype in FUSED]
        by_tensor = {name: self._settings(name, positions[name]) for name in fused}
        if not by_tensor:
            raise ValueError(f"{self.base} has no floating-point tensor")
        given: dict[str, Any] = dict(self.scalars)
        if seed is not None:
            given["seed"] = seed
        count = len(self.models)
        first = next(iter(by_tensor.values()))
        if all(settings == first for settings in by_tensor.values()) and len(set(first.density)) == 1:
            density = {"density": first.density[0]} if "density" in SETTINGS[self.method] else {}
            return make_method(self.method, {**given, **density, "weight": first.weight}, count)
        plain = make_method(self.method, given, count)
        common = {name: value for name, value in settings_of(plain).items() if name not in _BY_TENSOR}
        described = {"models": [{**self.shared, **model} for model in self.by_model], **common}
        return varying_method(plain, by_tensor, described)

    def _require_dtype(self, base: Checkpoint) -> None:
        others = {entry.dtype for entry in base.tensors.values() if entry.dtype in FUSED}
        if self.dtype is not None and others - {_DTYPES[self.dtype]}:
            names = {value: key for key, value in _DTYPES.items()}
            dtypes = ", ".join(sorted(names[dtype] for dtype in others))
            raise ValueError(
                f"{self.file}: the output would be {self.dtype}, but {self.base} is {dtypes}; dtypes are not "
                "converted: leave dtype and out_dtype out, or set out_dtype to that of the checkpoint"
            )

    def _settings(self, tensor: str, position: float) -> TensorSettings:
        weights, densities = [], []
        for index in range(len(self.models)):
            weight = self._value("weight", index, tensor, position)
            if weight is None:
                raise ValueError(
                    f"{self.file}: models[{index}] ({self.models[index]}) has no weight for {tensor!r}"
                )
            density = self._value("density", index, tensor, position)
            weights.append(weight)
            densities.append(1.0 if density is None else density)
        return TensorSettings(tuple(weights), tuple(densities))

    def _value(self, name: str, index: int, tensor: str, position: float) -> float | None:
        """The value of a parameter for a model, else for the whole merge; None if neither has one."""
        for parameters in (self.by_model[index], self.shared):
            value = _evaluate(parameters[name], tensor, position) if name in parameters else None
            if value is not None:
                return value
        return None


def read_merge(file: Path) -> Merge:
    """Read a merge; model paths are relative to the current folder, as in mergekit.

    Raises:
        ValueError: the file is not a merge of mergekit, or has a feature that rkif does not support.
        OSError: the file cannot be read.
    """
    content = load_yaml(file.read_bytes(), str(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file}: it must have keys such as merge_method and models")
    _require_keys(file, "", content, _KEYS)
    method = content.get("merge_method")
    if method not in METHODS:
        raise ValueError(f"{file}: merge_method {method!r} is not supported; {', '.join(METHODS)} are")
    models = content.get("models")
    if not isinstance(models, list) or not models:
        raise ValueError(f"{file}: models must be a list of models")
    base = content.get("base_model")
    if base is None and method != "linear":
        raise ValueError(f"{file}: {method} needs base_model")
    by_model = []
    for index, model in enumerate(models):
        where = f"models[{index}]"
        if not isinstance(model, dict):
            raise ValueError(f"{file}: {where} must have keys, such as model and parameters; got {model!r}")
        _require_keys(file, f"{where}.", model, ("model", "parameters"))
        path = _path(file, f"{where}.model", model.get("model"))
        numbers = _numbers_of(file, f"{where}.parameters.", model.get("parameters") or {}, method, ())
        by_model.append((path, numbers))
    path = by_model[0][0] if base is None else _path(file, "base_model", base)
    if method != "linear":  # the base's own task vector is zero
        by_model = [one for one in by_model if one[0] != path]
        if not by_model:
            raise ValueError(f"{file}: models has no model beside base_model")
    scalar_names: list[str] = [
        name for name in ("normalize", "rescale", "lambda") if name in SETTINGS[method]
    ]
    shared = _numbers_of(file, "parameters.", content.get("parameters") or {}, method, scalar_names)
    scalars = {name: _scalar(file, name, shared.pop(name)) for name in scalar_names if name in shared}
    dtypes = {key: content[key] for key in ("dtype", "out_dtype") if content.get(key) is not None}
    for key, value in dtypes.items():
        if value not in list(_DTYPES):  # a value of YAML may not be hashable
            raise ValueError(f"{file}: {key} {value!r} is not supported; {', '.join(_DTYPES)} are")
    dtype = dtypes.get("out_dtype", dtypes.get("dtype"))
    paths, parameters = zip(*by_model, strict=True)
    return Merge(file, method, path, paths, parameters, shared, scalars, dtype)


def _require_keys(file: Path, where: str, content: Mapping[Any, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise ValueError(f"{file}: {where}{key} is not supported; {', '.join(known)} are")


def _path(file: Path, where: str, value: Any) -> Path:
    if not isinstance(value, str):
        raise ValueError(f"{file}: {where} must be the path of a checkpoint; got {value!r}")
    path = Path(value).expanduser()
    if not path.exists():
        hint = ""
        if "+" in value:
            hint = "; an adapter after a + is not supported"
        elif _HUB_NAME.fullmatch(value):
            hint = f"; a model of the Hub must be downloaded first: hf download {value} --local-dir {value}"
        raise ValueError(f"{file}: {where}: there is no {value}{hint}")
    return path


def _numbers_of(
    file: Path, where: str, parameters: Any, method: str, scalars: Sequence[str]
) -> dict[str, Any]:
    """The parameters, after a check of their names and of the forms of weight and density."""
    if not isinstance(parameters, dict):
        raise ValueError(f"{file}: {where[:-1]} must have keys, such as weight; got {parameters!r}")
    numbers = [name for name in _BY_TENSOR if name in SETTINGS[method]]
    _require_keys(file, where, parameters, [*numbers, *scalars, *(["int8_mask"] if scalars else [])])
    for name in numbers:
        if name in parameters:
            _require_form(file, f"{where}{name}", parameters[name])
    # int8_mask changes no result.
    return {name: value for name, value in parameters.items() if name != "int8_mask"}


def _scalar(file: Path, name: str, value: Any) -> Any:
    valid = _is_number(value) if name == "lambda" else isinstance(value, bool | int)
    if not valid:
        kind = "a number" if name == "lambda" else "true or false"
        raise ValueError(f"{file}: parameters.{name} must be {kind}; got {value!r}")
    return float(value) if name == "lambda" else bool(value)


def _require_form(file: Path, where: str, setting: Any) -> None:
    """Check that a setting is a number, a list of numbers (a gradient), or a list of values with filters."""
    if _is_number(setting) or _is_gradient(setting):
        return
    if not isinstance(setting, list) or not setting:
        raise ValueError(
            f"{file}: {where} must be a number, a list of numbers or a list of filters; got {setting!r}"
        )
    for index, one in enumerate(setting):
        if not isinstance(one, dict) or "value" not in one:
            raise ValueError(
                f"{file}: {where}[{index}] must have a value, and may have a filter; got {one!r}"
            )
        _require_keys(file, f"{where}[{index}].", one, ("filter", "value"))
        if not (_is_number(one["value"]) or _is_gradient(one["value"])):
            raise ValueError(
                f"{file}: {where}[{index}].value must be a number or a list; got {one['value']!r}"
            )
        if not isinstance(one.get("filter", "*"), str):
            raise ValueError(
                f"{file}: {where}[{index}].filter must be a part of a tensor's name; got {one['filter']!r}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_gradient(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _evaluate(setting: Any, tensor: str, position: float) -> float | None:
    """The value of a setting for one tensor; None if no filter matches.

    Args:
        position: position of the tensor's layer, from 0 for the first to 1 for the last. A gradient is
            interpolated linearly between its values, which have equal distances.
    """
    if _is_number(setting):
        return float(setting)
    if _is_gradient(setting):
        place = position * (len(setting) - 1)
        left = int(place)
        right = min(left + 1, len(setting) - 1)
        share = place - left
        return float((1 - share) * setting[left] + share * setting[right])
    for one in setting:
        if one.get("filter", "*") == "*" or one["filter"] in tensor:
            return _evaluate(one["value"], tensor, position)
    return None


def _positions(names: Iterable[str]) -> dict[str, float]:
    """Tensor name -> position of its layer in the list of layers, from 0 to 1; 0 outside, as in mergekit."""
    matches = {name: _LAYER.search(name) for name in names}
    counts: dict[str, int] = {}
    for name, match in matches.items():
        if match:
            before = name[: match.start(1)]
            counts[before] = max(counts.get(before, 0), int(match[1]) + 1)
    positions = {}
    for name, match in matches.items():
        last = counts[name[: match.start(1)]] - 1 if match else 0
        positions[name] = 0.0 if match is None else int(match[1]) / last if last else 1.0
    return positions

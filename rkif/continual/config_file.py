"""Reads a config file: its YAML, changes to single settings, and the folder of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rkif.continual.config_errors import yaml_problem
from rkif.continual.spelling import did_you_mean


class _UniqueKeyLoader(yaml.SafeLoader):
    """Rejects duplicate keys in a mapping; YAML would silently use the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [(key.tag, str(key.value)) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                mark = node.value[place][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key[1]!r} is given twice", mark)
        return super().construct_mapping(node, deep)


def read_settings(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The settings in a file, with changes such as "training.steps=20"; they are not validated.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, or a change is not KEY=VALUE with a value in YAML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such config file: {path}")
    content = _load(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected settings as `key: value`, got {type(content).__name__}")
    for change in changes:
        key, equals, value = change.partition("=")
        *parents, last = key.strip().split(".")
        if not equals or not all((*parents, last)):
            raise ValueError(f"--set must be KEY=VALUE, such as training.steps=20; got {change!r}")
        inner = content
        for parent in parents:
            if not isinstance(inner.get(parent), dict):
                inner[parent] = {}
            inner = inner[parent]
        inner[last] = _load(value.encode(), f"--set {key}")
    return content


def _load(text: bytes, where: str) -> Any:
    try:
        return yaml.load(text.decode("utf-8"), _UniqueKeyLoader)
    except RecursionError as error:
        raise ValueError(f"{where}: not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: not valid YAML: {yaml_problem(error)}") from error


def locate_model(model: str, here: Path) -> str:
    """The model's folder from the config's folder ``here``, or its name on the hub.

    It is a folder if it exists, is written as a path, or is in a folder that exists.
    """
    path = here / Path(model).expanduser()
    written_as_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    is_folder = path.exists() or written_as_path or (path.parent != here and path.parent.is_dir())
    return str(path) if is_folder else model


def require_model(model: str) -> None:
    """Raise ValueError where :func:`locate_model` returned a folder that is missing."""
    path = Path(model)
    if path.is_absolute() and not path.exists():
        siblings = [one.name for one in path.parent.glob("*")]
        raise ValueError(f"model: no such folder: {path}{did_you_mean(path.name, siblings)}")

"""Reads a config file: YAML, changes of single settings, and the location of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rkif.checkpoint.yaml_text import load_yaml
from rkif.continual.spelling import did_you_mean


def read_settings(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The settings in a file, with changes such as "training.steps=20", before validation.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, or a change is not KEY=VALUE with a value in YAML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such config file: {path}")
    content = load_yaml(path.read_bytes(), str(path))
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
        inner[last] = load_yaml(value.encode(), f"--set {key}")
    return content


def locate_model(model: str, here: Path) -> str:
    """The path of the model's folder, relative to the config's folder ``here``; or its name on the Hub.

    ``model`` is a folder if it exists, is written as a path, or is in a folder that exists.
    """
    path = here / Path(model).expanduser()
    written_as_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    is_folder = path.exists() or written_as_path or (path.parent != here and path.parent.is_dir())
    return str(path) if is_folder else model


def require_model(model: str) -> None:
    """Raise ValueError if :func:`locate_model` returned a folder that is missing."""
    path = Path(model)
    if path.is_absolute() and not path.exists():
        siblings = [one.name for one in path.parent.glob("*")]
        raise ValueError(f"model: no such folder: {path}{did_you_mean(path.name, siblings)}")

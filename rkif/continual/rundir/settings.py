"""Settings of runs by dotted name: compares a resumed run with its start, and runs with each other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rkif.continual.config import RunConfig, dump_config
from rkif.files import read_text


def require_same_settings(path: Path, config: RunConfig) -> list[str]:
    """Check that the settings are those of the run's file, because all results of a run must have the same.

    Folders may have moved: those of the model, the tasks, lm-eval's further tasks and the user's metrics. The
    tasks' records and lm-eval's requests are compared with their digests elsewhere; the model is not.

    Args:
        path: the file of the run's settings.
        config: the settings of the resumed run.

    Returns:
        A line for each path that differs, with the path at the start of the run and the current one.

    Raises:
        ValueError: other settings differ, or the file is damaged.
    """
    stored, given = read_text(path), dump_config(config)
    if stored == given:
        return []
    began, now = flat_settings(_with_defaults(stored)), flat_settings(given)
    if not began:
        raise ValueError(f"{path} is damaged: it has no settings")
    if refused := _differences(without_places(began), without_places(now)):
        old, new = refused[0]
        raise ValueError(f"{path} has {old}, but the config now has {new}")
    return [f"{old} is now {new}" for old, new in _differences(began, now)]


def flat_settings(text: str) -> dict[str, Any]:
    """Dotted name -> value of each setting of a config; empty if it is damaged."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}

    def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict) or not value:
            yield name, value
            return
        for key, part in value.items():
            yield from flat(part, f"{name}.{key}" if name else str(key))

    return dict(flat(content, "")) if isinstance(content, dict) else {}


def without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """The flat settings with names instead of absolute paths, and without the folders of tasks."""
    folders = ("tasks.folder", "evaluation.harness.include_path")
    return {
        name: _named(value) if name in ("model", "metrics", "gate.criteria") else value
        for name, value in settings.items()
        if name not in folders or value is None
    }


def shown_value(value: Any) -> str:
    """The value of a setting on one line, as in YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    line = text.removesuffix("...\n").removesuffix("\n")
    return json.dumps(value, ensure_ascii=False) if "\n" in line else line


def _with_defaults(text: str) -> str:
    """The config with the settings that are newer than the file, or ``text`` if it is no longer valid."""
    try:
        return dump_config(RunConfig.model_validate(yaml.safe_load(text)))
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _differences(began: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings that differ, as "`name: value`" at the start of the run and now.

    A section that only one of them has is null in the other.
    """

    def shown(settings: dict[str, Any], name: str) -> str:
        # The setting itself, the section that has it, or the first setting in the section.
        for other, value in settings.items():
            if f"{name}.".startswith(f"{other}.") or other.startswith(f"{name}."):
                return f"`{other}: {shown_value(value)}`"
        return f"no `{name}`"

    names = dict.fromkeys([*began, *now])
    return [
        (shown(began, name), shown(now, name))
        for name in names
        if (name in began, began.get(name)) != (name in now, now.get(name))
    ]


def _named(value: Any) -> Any:
    """The value with the last part of each absolute path."""
    if isinstance(value, list):
        return [_named(one) for one in value]
    if isinstance(value, dict):
        return value | {"metric": _named(value.get("metric"))}
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value

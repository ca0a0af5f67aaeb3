"""Compares the settings of a resumed run with those at its start."""

from __future__ import annotations

import math
from pathlib import Path

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
        ValueError: other settings differ.
    """
    stored, given = read_text(path), dump_config(config)
    if stored == given:
        return []
    try:
        began = RunConfig.model_validate(yaml.safe_load(stored))
    except (yaml.YAMLError, ValueError, RecursionError):
        _require_same_lines(path, stored, given)
        return []
    _require_same_lines(path, _one_line_each(_without_places(began)), _one_line_each(_without_places(config)))
    lines = zip(_one_line_each(began).splitlines(), _one_line_each(config).splitlines(), strict=False)
    return [f"`{old.strip(' -')}` is now `{new.strip(' -')}`" for old, new in lines if old != new]


def _one_line_each(config: RunConfig) -> str:
    """The settings, each on one line of any length, so that those of two configs can be paired."""
    return dump_config(config, width=math.inf)


def _require_same_lines(path: Path, stored: str, given: str) -> None:
    for old, new in zip([*stored.splitlines(), ""], [*given.splitlines(), ""], strict=False):
        if old != new:
            raise ValueError(f"{path} has `{old.strip()}`, but the config now has `{new.strip()}`")


def _without_places(config: RunConfig) -> RunConfig:
    """The settings with names instead of absolute paths, and without the folder of the tasks."""
    gate = config.gate
    if gate is not None:
        criteria = [one.model_copy(update={"metric": _name(one.metric)}) for one in gate.criteria]
        gate = gate.model_copy(update={"criteria": criteria})
    evaluation = config.evaluation
    if (harness := evaluation.harness) is not None and harness.include_path is not None:
        harness = harness.model_copy(update={"include_path": ""})
        evaluation = evaluation.model_copy(update={"harness": harness})
    places = {
        "model": _name(config.model),
        "tasks": config.tasks.model_copy(update={"folder": ""}),
        "metrics": [_name(spec) for spec in config.metrics],
        "gate": gate,
        "evaluation": evaluation,
    }
    return config.model_copy(update=places)


def _name(place: str) -> str:
    """The last part of an absolute path."""
    return Path(place).name if place.startswith("/") else place

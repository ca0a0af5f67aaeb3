"""The settings of a run that is resumed, compared with those that it began with."""

from __future__ import annotations

from pathlib import Path

import yaml

from rkif.continual.config import RunConfig, dump_config
from rkif.files import read_text


def require_same_settings(path: Path, config: RunConfig) -> list[str]:
    """Compare a run's settings file with the settings now: all metrics of a run must have the same.

    Folders may have moved: those of the model, the tasks, lm-eval's further tasks and the user's metrics. The
    tasks' records and lm-eval's requests are compared with their digests elsewhere; the model is not.

    Returns:
        A line for each place that differs: what the run began with, and what it is now.

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
    _require_same_lines(path, dump_config(_without_places(began)), dump_config(_without_places(config)))
    lines = zip(dump_config(began).splitlines(), given.splitlines(), strict=True)
    return [f"`{old.strip(' -')}` is now `{new.strip(' -')}`" for old, new in lines if old != new]


def _require_same_lines(path: Path, stored: str, given: str) -> None:
    for old, new in zip([*stored.splitlines(), ""], [*given.splitlines(), ""], strict=False):
        if old != new:
            raise ValueError(f"{path} has `{old.strip()}` where the config now says `{new.strip()}`")


def _without_places(config: RunConfig) -> RunConfig:
    """The settings with names instead of absolute paths; the folder of the tasks is left out."""
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

"""Sends the values of a run to an experiment tracker: TensorBoard, Weights & Biases, Trackio or MLflow."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Track = Callable[[Mapping[str, float], int], None]
"""Takes values by name and the number of inner steps so far."""

PROJECT = "rkif"


def require_tracker(tracker: Tracker) -> None:
    """Raise ImportError if the tracker's package is not installed."""
    if importlib.util.find_spec(tracker) is None:
        raise ImportError(f"tracking: {tracker} needs its package: pip install {tracker}")


@contextmanager
def tracked(tracker: Tracker | None, run: Path, settings: Mapping[str, Any]) -> Iterator[Track]:
    """Yield a function that sends values to a tracker; without a tracker it does nothing.

    A resumed run is a new run for the tracker. TensorBoard's files are in ``RUN/tensorboard``; the other
    trackers have settings for the place where they store values.

    Args:
        tracker: the tracker's name, after :func:`require_tracker`; None for none.
        run: the run's folder; the tracker shows its name.
        settings: the run's settings, which are stored with its values.
    """
    if tracker is None:
        yield lambda values, step: None
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers read the rank from it
    names: dict[Tracker, dict[str, Any]] = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": run},
        "wandb": {"run_name": PROJECT, "name": run.name},
        "trackio": {"run_name": PROJECT, "name": run.name},
        "mlflow": {"experiment_name": PROJECT, "run_name": run.name},
    }
    target = LOGGER_TYPE_TO_CLASS[tracker](**names[tracker])
    target.start()
    try:
        target.store_init_configuration(_flat(settings))
        yield lambda values, step: target.log(dict(values), step=step)
    finally:
        target.finish()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by "section.key"; values that are not numbers, booleans or text become text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            flat[prefix + key] = value if plain else str(value)
    return flat

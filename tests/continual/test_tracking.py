"""Experiment trackers: the values of a run arrive, by name and step."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from run_inputs import TASKS, files, go
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rkif.continual.config import RunConfig
from rkif.continual.rundir.folder import RunReader

GATE = {"criteria": [{"metric": "memory_loss", "tolerance": 10.0}]}


def test_tensorboard_gets_losses_rounds_and_accuracies(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    metrics = go(config(tracking="tensorboard", gate=GATE), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]

    def values(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(tag)}

    assert list(values("loss")) == list(range(1, 22))  # 7 inner steps in each of 3 tasks
    for task, row in zip(TASKS, metrics["accuracy"], strict=True):
        assert values(f"accuracy/{task}") == pytest.approx(dict(zip((7, 14, 21), row, strict=True)))
    assert values("op") == pytest.approx({21: metrics["op"]})
    rounds = [record for record in RunReader(tmp_path / "run").records() if record["event"] == "round"]
    ends = [7 * (1 + TASKS[1:].index(record["task"])) + record["steps"][1] for record in rounds]
    for tag, expected in {
        "rkif/threshold_outer": [record["thresholds"][1] for record in rounds],
        "rkif/share_both": [record["counts"]["both"] / record["numel"] for record in rounds],
        "rkif/norm_update": [record["norms"]["update"] for record in rounds],
        "rkif/gate_factor": [record["gate"]["factor"] for record in rounds],
        "rkif/gate_after/memory_loss": [
            record["gate"]["attempts"][-1]["figures"]["memory_loss"] for record in rounds
        ],
    }.items():
        assert values(tag) == pytest.approx(dict(zip(ends, expected, strict=True)), rel=1e-6)
    assert {"bwt", "fwt"} <= set(tags)


def test_a_tracker_changes_nothing_else(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    for name, tracker in (("plain", None), ("tracked", "tensorboard")):
        go(config(tracking=tracker), tmp_path / name)
    plain, tracked = files(tmp_path / "plain"), files(tmp_path / "tracked")
    same = {name for name in plain if name.endswith((".safetensors", "metrics.json", ".jsonl"))} - {
        "ledger.jsonl"
    }
    assert len(same) > 10
    # Digests of the settings are in the states' ledgers, not in the states.
    assert [name for name in same if tracked[name] != plain[name]] == []


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_get_a_project_and_a_run(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            calls.append(("log", (values, step)))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(**names: Any) -> Run:
        calls.append(("init", names))
        return Run()

    settings: dict[str, Any] = {}
    stub = types.ModuleType(tracker)
    stub.__spec__ = types.SimpleNamespace(name=tracker)  # type: ignore[assignment]
    vars(stub).update(
        init=init, config=types.SimpleNamespace(update=lambda values, **_: settings.update(values))
    )
    monkeypatch.setitem(sys.modules, tracker, stub)
    go(config(method="replay", tracking=tracker), tmp_path / "mine")
    assert calls[0] == ("init", {"project": "rkif", "name": "mine"})
    assert calls[-1][0] == "finish"
    assert settings["training.learning_rate"] == 1e-2
    assert settings["method"] == "replay"
    logged = [values for kind, values in calls if kind == "log"]
    assert [step for values, step in logged if "loss" in values] == list(range(1, 22))


def test_mlflow_gets_an_experiment_and_a_run(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stub with the functions of MLflow that accelerate calls."""
    calls: list[tuple[str, Any]] = []
    metrics: dict[str, dict[int, float]] = {}
    settings: dict[str, Any] = {}

    def called(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda **arguments: (calls.append((name, arguments)), result)[1]

    def log_metrics(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            metrics.setdefault(name, {})[step] = value

    stub = types.ModuleType("mlflow")
    stub.__spec__ = types.SimpleNamespace(name="mlflow")  # type: ignore[assignment]
    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=7)
    vars(stub).update(
        search_experiments=called("search", []),
        create_experiment=called("create", "17"),
        start_run=called("start"),
        end_run=called("end"),
        log_params=settings.update,
        log_metrics=log_metrics,
        utils=types.SimpleNamespace(validation=limits),
    )
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    found = go(config(method="replay", tracking="mlflow"), tmp_path / "mine")
    assert [name for name, _ in calls] == ["search", "create", "start", "end"]
    assert calls[1][1]["name"] == "rkif"
    assert (calls[2][1]["experiment_id"], calls[2][1]["run_name"]) == ("17", "mine")
    assert settings["training.learning_rate"] == 1e-2
    assert list(metrics["loss"]) == list(range(1, 22))
    for task, row in zip(TASKS, found["accuracy"], strict=True):
        assert metrics[f"accuracy/{task}"] == dict(zip((7, 14, 21), row, strict=True))
    assert metrics["op"] == {21: found["op"]}


def test_unknown_and_missing_trackers_are_refused(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValidationError, match="tracking"):
        config(tracking="paper")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="tracking: mlflow needs its package: pip install mlflow"):
        go(config(tracking="mlflow"), tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""A run that is killed and resumed ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from disk_states import disk_states
from run_inputs import TASKS, assert_same_files, files, go

from rkif.continual.config import RunConfig, dump_config
from rkif.continual.display.progress import RunProgress
from rkif.continual.rundir.settings import require_same_settings, shown_value
from rkif.continual.rundir.verify import verify
from rkif.continual.rundir.writer import RunWriter
from rkif.ledger.chain import LedgerError


class Killed(BaseException):
    """Not an Exception, so that no handler catches it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, events: int) -> None:
    """Raise Killed at an event: before and after every rename, and at every training step."""
    count = [0]
    rename = os.replace

    def tick() -> None:
        count[0] += 1
        if count[0] == events:
            raise Killed

    def dying_rename(*args: Any) -> None:
        tick()
        rename(*args)
        tick()

    monkeypatch.setattr(os, "replace", dying_rename)
    advance = RunProgress.advance

    def dying_advance(self: RunProgress, loss: float) -> None:
        advance(self, loss)
        tick()

    monkeypatch.setattr(RunProgress, "advance", dying_advance)


def test_a_run_killed_at_any_event_resumes_to_the_same_bytes(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    settings = config(tasks=config().tasks.model_dump() | {"order": TASKS[:2]})
    calls = [(os, "replace"), (os, "write"), (RunProgress, "advance")]
    with disk_states(tmp_path / "straight", tmp_path / "states", calls) as states:
        go(settings, tmp_path / "straight")
    assert len(states) > 40
    for state in states:
        ledger = state / "ledger.jsonl"
        if ledger.exists() and ledger.stat().st_size == 0:
            with pytest.raises(LedgerError, match="holds no record"):
                verify(state)
        elif ledger.exists():
            verify(state)  # the files left by a kill are valid
        go(settings, state, resume=True)
        assert_same_files(files(state), files(tmp_path / "straight"), f"killed at {state.name}")
        shutil.rmtree(state)


def test_a_run_killed_while_republishing_a_task_resumes(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The ledger has the task, but no later checkpoint exists; the task's folder is always complete."""
    training = config().training.model_dump() | {"steps": 4}  # a full round and a tail
    tasks = config().tasks.model_dump() | {"order": TASKS[:2]}
    settings = config(tasks=tasks, training=training, checkpoint_every=100)
    go(settings, tmp_path / "straight")

    def dying(*_: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "write_checkpoint", dying)
        with pytest.raises(Killed):
            go(settings, tmp_path / "once")
    calls = [(shutil, "rmtree"), (os, "unlink"), (os, "replace")]
    with disk_states(tmp_path / "once", tmp_path / "states", calls) as states:
        go(settings, tmp_path / "once", resume=True)
    assert len(states) > 10
    for state in states:
        go(settings, state, resume=True)
        assert_same_files(files(state), files(tmp_path / "straight"), f"killed at {state.name}")


@pytest.mark.parametrize("kept", ["metrics.json", "checkpoint.safetensors", "tasks/01-review/task.json"])
def test_resume_refuses_a_run_without_its_ledger(
    config: Callable[..., RunConfig], tmp_path: Path, kept: str
) -> None:
    settings = config(tasks=config().tasks.model_dump() | {"order": TASKS[:1]})
    whole, run = tmp_path / "whole", tmp_path / "run"
    go(settings, whole)
    (run / kept).parent.mkdir(parents=True)
    for name in ("config.yaml", kept):
        shutil.copy(whole / name, run / name)
    with pytest.raises(ValueError, match=f"{kept} (is in no record|was not there when the task)"):
        go(settings, run, resume=True)
    assert set(files(run)) == {"config.yaml", kept}


def test_resume_refuses_other_tasks(config: Callable[..., RunConfig], inputs: Path, tmp_path: Path) -> None:
    data = shutil.copytree(inputs / "tasks", tmp_path / "data")
    path = data / "tasks.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"orders": {"short": TASKS[:2]}}))
    settings = config(tasks={"folder": str(data), "order": "short"})
    go(settings, tmp_path / "run")
    path.write_text(json.dumps(table | {"orders": {"short": TASKS[1:]}}))
    with pytest.raises(ValueError, match="the tasks are tense, place; this run began with "):
        go(settings, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "changes", [{}, {"ema": {"decay": 0.75}, "distillation": {"memory": 1.0, "answers": "kept"}}]
)
def test_a_run_killed_many_times_resumes_to_the_same_bytes(
    config: Callable[..., RunConfig], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Every resumed run is killed a little later; no step is lost or repeated."""
    settings = config(tasks=config().tasks.model_dump() | {"order": TASKS[:2]}, **changes)
    go(settings, tmp_path / "straight")
    out = tmp_path / "killed"
    for attempt in range(60):
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, 5 + attempt % 7)
            try:
                go(settings, out, resume=attempt > 0)
                break
            except Killed:
                pass
    else:
        pytest.fail("sixty lives were not enough")
    assert attempt > 3
    assert_same_files(files(out), files(tmp_path / "straight"))


def test_a_run_killed_by_sigkill_resumes_to_the_same_bytes(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The command gets SIGKILL at arbitrary moments."""
    settings = config(training={"steps": 12, "batch_size": 4, "learning_rate": 1e-2})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    go(settings, tmp_path / "straight")
    command = [
        sys.executable,
        "-m",
        "rkif",
        "run",
        str(tmp_path / "config.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_files(files(tmp_path / "out"), files(tmp_path / "straight"))


def test_training_data_of_finished_tasks_may_be_deleted(
    config: Callable[..., RunConfig], inputs: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(inputs / "tasks", data)
    settings = config(tasks={"folder": str(data), "order": TASKS})
    go(settings, tmp_path / "straight")

    out = tmp_path / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        steps = [0]

        def stop(self: RunProgress, loss: float) -> None:
            steps[0] += 1
            if steps[0] == 10:  # in the second task
                raise Killed

        patch.setattr(RunProgress, "advance", stop)
        with pytest.raises(Killed):
            go(settings, out)
    train = data / "train.jsonl"
    lines = [line for line in train.read_text().splitlines(keepends=True) if '"task": "review"' not in line]
    train.write_text("".join(lines))
    go(settings, out, resume=True)
    assert_same_files(files(out), files(tmp_path / "straight"))


def test_a_finished_run_is_only_read(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    metrics = go(config(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert go(config(), tmp_path, resume=True) == metrics
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_resume_refuses_a_run_without_its_metrics(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The accuracy before training cannot be measured after training."""
    go(config(), tmp_path)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"its metrics\.json is missing"):
        go(config(), tmp_path, resume=True)


def test_a_run_that_was_moved_with_its_model_and_tasks_resumes_to_the_same_bytes(
    inputs: Path, config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    go(config(), tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 60)
        with pytest.raises(Killed):
            go(config(), tmp_path / "run")
    began = (tmp_path / "run" / "config.yaml").read_bytes()
    elsewhere = tmp_path / f"a folder whose name is wrapped over lines in YAML,{' and so on' * 9}"
    shutil.copytree(inputs, elsewhere)
    tasks = config().tasks.model_dump() | {"folder": str(elsewhere / "tasks")}
    moved = config(model=str(elsewhere / "model"), tasks=tasks)
    with pytest.raises(ValueError, match="has `seed: 3`, but the config now has `seed: 4`"):
        go(moved.model_copy(update={"seed": 4}), tmp_path / "run", resume=True)
    training = moved.training.model_copy(update={"batch_size": 2})
    with pytest.raises(ValueError, match=r"has `training\.batch_size: 4`, but the config now"):
        go(moved.model_copy(update={"training": training}), tmp_path / "run", resume=True)
    other = moved.model_copy(update={"model": str(elsewhere / "bert")})
    with pytest.raises(ValueError, match="has `model: model`, but the config now has `model: bert`"):
        go(other, tmp_path / "run", resume=True)
    assert require_same_settings(tmp_path / "run" / "config.yaml", moved) == [
        f"`model: {inputs}/model` is now `model: {elsewhere}/model`",
        f"`tasks.folder: {inputs}/tasks` is now `tasks.folder: {elsewhere}/tasks`",
    ]
    recorded = tmp_path / "run" / "config.yaml"
    recorded.write_text("")
    with pytest.raises(ValueError, match="is damaged: it has no settings"):
        require_same_settings(recorded, moved)
    settings = yaml.safe_load(began)
    del settings["ema"]  # as in a file that is older than this setting
    recorded.write_text(yaml.safe_dump(settings))
    assert len(require_same_settings(recorded, moved)) == 2
    recorded.write_text(yaml.safe_dump(settings | {"distilation": 1}))
    with pytest.raises(ValueError, match="has `distilation: 1`, but the config now has no `distilation`"):
        require_same_settings(recorded, moved)
    recorded.write_bytes(began)
    go(moved, tmp_path / "run", resume=True)
    assert recorded.read_bytes() == began
    verify(tmp_path / "run")
    metrics = [(tmp_path / name / "metrics.json").read_bytes() for name in ("straight", "run")]
    assert metrics[0] == metrics[1]
    ends = [files(tmp_path / name / "tasks" / "03-place") for name in ("straight", "run")]
    assert ends[0]["adapter_model.safetensors"] == ends[1]["adapter_model.safetensors"]
    dev = elsewhere / "tasks" / "dev.jsonl"
    dev.write_text(dev.read_text().replace("Answer:", "answer:"))
    with pytest.raises(ValueError, match="the dev records of task 'review' have changed"):
        go(moved, tmp_path / "run", resume=True)


def test_a_section_that_was_added_or_removed_is_null_on_one_side(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    recorded = tmp_path / "config.yaml"
    adapted, full = config(adapter={"r": 2}), config(adapter=None)
    recorded.write_text(dump_config(adapted))
    with pytest.raises(ValueError, match=r"has `adapter\.r: 2`, but the config now has `adapter: null`"):
        require_same_settings(recorded, full)
    recorded.write_text(dump_config(full))
    with pytest.raises(ValueError, match=r"has `adapter: null`, but the config now has `adapter\.r: 2`"):
        require_same_settings(recorded, adapted)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        (7, "7"),
        ("7", "'7'"),
        ("", "''"),
        (0.002, "0.002"),
        ("mean", "mean"),
        (["query", None], "[query, null]"),
        ({"metric": "accuracy", "higher": True}, "{metric: accuracy, higher: true}"),
        ("{instruction}\n{input}", '"{instruction}\\n{input}"'),
        ("é " * 60, f"'{'é ' * 60}'"),
    ],
)
def test_the_value_of_a_setting_is_one_line_of_yaml(value: object, shown: str) -> None:
    assert shown_value(value) == shown
    assert yaml.safe_load(shown) == value

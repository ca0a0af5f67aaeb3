"""A run on disk. Every file is written under a temporary name and renamed: at any moment all of it is whole.

::

    RUN/config.yaml               the settings, defaults filled in
    RUN/metrics.json              the accuracy matrix, OP, BWT, FWT
    RUN/ledger.jsonl              what every round did, see rkif.continual.rundir.ledger
    RUN/checkpoint.safetensors    where to go on: parameters and the method's state, at (task, step)
    RUN/snapshots/                the same after the latest rounds, and some of the earlier ones
    RUN/tasks/NN-name/            after each task: adapter (or model), importance, memory, figures,
                                  its rounds, what the method hands on to the next, and the records that
                                  a gate measures on
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from rkif.continual.config import RunConfig, dump_config
from rkif.continual.rundir.state import RunState, load_tensors, storable, write_checkpoint
from rkif.continual.tasks.replay_memory import ReplayMemory
from rkif.files import fsync_file, write_text

METRICS = (
    *("method", "split", "tasks", "data", "records", "trainable", "initial", "accuracy", "metrics"),
    *("op", "bwt", "fwt", "steps", "samples"),
)


class RunReader:
    """What a run's folder holds, for those who only look at it.

    Raises:
        ValueError: there is no run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.yaml").is_file():
            raise ValueError(f"{path} is no run: it has no config.yaml")

    def config_text(self) -> str:
        return _read_text(self.path / "config.yaml")

    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``; empty where nothing has been measured."""
        path = self.path / "metrics.json"
        metrics = _read_json(path) if path.exists() else {}
        for key in METRICS if path.exists() else ():
            if key not in metrics:
                raise ValueError(f"{path} is damaged, or of another version of rkif: it lacks {key!r}")
        return metrics

    def rounds(self) -> dict[str, dict[str, Tensor]]:
        """Task -> what its rounds did, in the order of learning; only tasks that had rounds."""
        found = {}
        for index, name in enumerate(self.metrics().get("tasks", [])):
            file = task_folder(self.path, index, name) / "rounds.safetensors"
            if file.exists():
                found[name] = load_tensors(file)
                if "norms" not in found[name]:
                    raise ValueError(f"{file} is damaged: it has no 'norms'")
        return found


def task_folder(run: Path, index: int, name: str) -> Path:
    """The folder of a run's task, from 0."""
    return run / "tasks" / f"{index + 1:02d}-{name}"


def file_digests(task: Path) -> dict[str, str]:
    """Name -> SHA-256 of a task's tensors and records. peft's settings list modules in any order."""
    files = sorted(path for path in task.iterdir() if path.suffix in (".safetensors", ".jsonl"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; made where it is missing.
        config: the run's settings.
        resume: whether to go on with a run that is there already.

    Raises:
        ValueError: there is a run already and ``resume`` is False, or it has other settings.
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path, config: RunConfig, *, resume: bool) -> None:
        self.path = path
        settings = path / "config.yaml"
        text = dump_config(config)
        path.mkdir(parents=True, exist_ok=True)
        # With nothing but its settings a run has not begun: they may still be corrected.
        if {entry.name for entry in path.iterdir()} - {"config.yaml", "config.yaml.tmp"}:
            if not settings.exists():
                raise ValueError(f"{path} is not empty, and no run; choose another --out")
            if not resume:
                raise ValueError(f"{path} holds a run already; go on with --resume, or choose another --out")
            _require_same(settings, text)
            return
        write_text(settings, text)

    def task(self, index: int, name: str) -> Path:
        """The folder of a task, from 0."""
        return task_folder(self.path, index, name)

    def read_metrics(self) -> dict[str, Any]:
        """What :meth:`write_metrics` wrote last; empty if it never did."""
        return RunReader(self.path).metrics()

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        write_metrics(self.path, metrics)

    def read_task(self, index: int, name: str) -> dict[str, Any]:
        """The figures that a task was published with."""
        return _read_json(self.task(index, name) / "task.json")

    def digests(self, index: int, name: str) -> dict[str, str]:
        """SHA-256 of those of a task's files that are the same whenever the task is learned the same way."""
        return file_digests(self.task(index, name))

    def read_memory(self, index: int, name: str) -> ReplayMemory:
        """The memory as it was after a task."""
        return ReplayMemory.load(self.task(index, name) / "memory.jsonl")

    def read_validation(self, index: int, name: str) -> ReplayMemory:
        """The records that a gate may measure tasks on, as they were after a task; empty for no gate."""
        path = self.task(index, name) / "validation.jsonl"
        return ReplayMemory.load(path) if path.exists() else ReplayMemory()

    def read_task_state(self, index: int, name: str) -> dict[str, Tensor]:
        """What the method handed on after a task; empty for most methods."""
        path = self.task(index, name) / "handed_on.safetensors"
        return load_tensors(path) if path.exists() else {}

    def publish_task(
        self,
        index: int,
        name: str,
        *,
        save_model: Callable[[Path], object],
        tensors: Mapping[str, Mapping[str, Tensor]],
        memory: ReplayMemory,
        validation: ReplayMemory,
        summary: Mapping[str, Any],
    ) -> None:
        """Write a task's folder; one that an interrupted run left is replaced.

        ``tensors`` maps the name of a safetensors file, without its suffix, to its tensors; none, no file.
        An empty ``validation`` is no file either.
        """
        final = self.task(index, name)
        temporary = final.with_name(final.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_model(temporary)
        for file, content in tensors.items():
            if content:
                save_file(storable(content), temporary / f"{file}.safetensors")
        memory.save(temporary / "memory.jsonl")
        if len(validation):
            validation.save(temporary / "validation.jsonl")
        _write_json(temporary / "task.json", summary)
        for path in temporary.iterdir():
            fsync_file(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)

    def write_checkpoint(self, checkpoint: RunState) -> None:
        write_checkpoint(self.path, checkpoint)


def write_metrics(run: Path, metrics: Mapping[str, Any]) -> None:
    """Write a run's ``metrics.json``."""
    _write_json(run / "metrics.json", metrics)


def _require_same(path: Path, text: str) -> None:
    """Two sets of settings in one run would make its figures mean nothing."""
    stored = _read_text(path).splitlines()
    given = text.splitlines()
    for old, new in zip([*stored, ""], [*given, ""], strict=False):
        if old != new:
            raise ValueError(f"{path} has `{old.strip()}` where the config now says `{new.strip()}`")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")

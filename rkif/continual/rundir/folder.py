"""The folder of a run. Every file is written under a temporary name and renamed, so no file is ever partial.

::

    RUN/config.yaml               the settings, with all defaults
    RUN/metrics.json              the accuracy matrix, OP, BWT, FWT
    RUN/ledger.jsonl              a record of every round, see rkif.continual.rundir.recorder
    RUN/checkpoint.safetensors    the state to continue from, see rkif.continual.rundir.state
    RUN/snapshots/                states after rounds, see rkif.continual.rundir.round_states
    RUN/tasks/NN-name/            written after each task:
        adapter or model          as save_pretrained writes it, with the tokenizer
        task.json                 name, steps, samples
        memory.jsonl              the replay memory after the task
        validation.jsonl          records on which the gate evaluates the task
        importance.safetensors    the outer learner's importance
        rounds.safetensors        statistics of the task's rounds, see rkif.continual.evaluation.history
        handed_on.safetensors     the method's task state, for the next task
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rkif.checkpoint.manifest import FileContent
from rkif.continual.config import RunConfig, dump_config
from rkif.continual.rundir.schema import Metrics, TaskSummary, require_records
from rkif.continual.rundir.settings import require_same_settings
from rkif.continual.rundir.state import CHECKPOINT, storable
from rkif.continual.tasks.replay_memory import ReplayMemory
from rkif.files import (
    file_sha256,
    fsync_file,
    load_tensors,
    parse_json,
    read_text,
    require_folder,
    save_tensors,
    validated,
    write_text,
)
from rkif.ledger.chain import LEDGER, LedgerError, LedgerRecord, read_ledger

METRICS = "metrics.json"  # in the run's folder


class RunReader:
    """Reads a run's folder without changing it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is not a run, or has a link in place of a file, which could lead to a file
            elsewhere.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_folder(path)
        if not (path / "config.yaml").is_file():
            raise ValueError(f"{path} is not a run: it has no config.yaml")
        _require_plain(path)

    def config_text(self) -> str:
        return read_text(self.path / "config.yaml")

    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``; empty if nothing was measured yet.

        Raises:
            ValueError: it is damaged; the message names the key.
        """
        path = self.path / METRICS
        return _read_json(path, Metrics) if path.exists() else {}

    def records(self, *, torn: bool = False) -> list[LedgerRecord]:
        """The ledger's records, oldest first; none if there is no ledger.

        Args:
            torn: whether an unfinished last line is ignored; by default it is an error.

        Raises:
            LedgerError: the chain is broken, or a record is not one that a run writes.
        """
        path = self.path / LEDGER
        records = list(read_ledger(path, torn=torn)) if path.exists() else []
        require_records(records, path)
        return records

    def ledger(self) -> list[LedgerRecord]:
        """The ledger's records, oldest first; at least one.

        Raises:
            LedgerError: there is no ledger, it is empty, its chain is broken, or it has a record that a run
                does not write.
        """
        path = self.path / LEDGER
        if not path.exists():
            raise LedgerError(f"{self.path} has no ledger: {path} is missing")
        records = self.records()
        if not records:
            raise LedgerError(f"{path} holds no record")
        return records

    def rounds(self) -> dict[str, dict[str, Tensor]]:
        """Task -> statistics of its rounds, in the order of learning; only tasks that had rounds."""
        rounds_of_task = {}
        for index, name in enumerate(self.metrics().get("tasks", [])):
            file = task_folder(self.path, index, name) / "rounds.safetensors"
            if file.exists():
                tensors = rounds_of_task[name] = load_tensors(file)
                _require_rounds(tensors, next(iter(rounds_of_task.values())), file)
        return rounds_of_task


def task_folder(run: Path, index: int, name: str) -> Path:
    """The folder of the run's task ``index``, from 0."""
    return run / "tasks" / f"{index + 1:02d}-{name}"


def file_digests(task: Path) -> dict[str, str]:
    """Path in a task's folder -> SHA-256 of every file."""
    files = sorted(path for path in task.rglob("*") if path.is_file())
    return {path.relative_to(task).as_posix(): file_sha256(path) for path in files}


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; created if it is missing.
        config: the run's settings.
        resume: whether the folder may have a run already.

    Raises:
        ValueError: the folder has files but is not a run; it has a run and ``resume`` is False; or the run
            has other settings.
        OSError: the folder cannot be written.

    Attributes:
        path: the folder.
        moved: a line for each folder in the settings that has moved since the run began.
    """

    def __init__(self, path: Path, config: RunConfig, *, resume: bool) -> None:
        self.path = path
        self.moved: list[str] = []
        settings = path / "config.yaml"
        text = dump_config(config)
        path.mkdir(parents=True, exist_ok=True)
        # A folder with only the settings has no run yet, so the settings may still change.
        if {entry.name for entry in path.iterdir()} - {"config.yaml", "config.yaml.tmp"}:
            if not settings.exists():
                raise ValueError(f"{path} is not empty and is not a run; choose another --out")
            if not resume:
                raise ValueError(f"{path} holds a run; continue with --resume, or choose another --out")
            self.moved = require_same_settings(settings, config)
            return
        write_text(settings, text)

    def config_sha256(self) -> str:
        """SHA-256 of the settings that the run began with."""
        return file_sha256(self.path / "config.yaml")

    def task(self, index: int, name: str) -> Path:
        """The folder of task ``index``, from 0."""
        return task_folder(self.path, index, name)

    def read_metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``; empty if there is none."""
        return RunReader(self.path).metrics()

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        write_metrics(self.path, metrics)

    def read_task(self, index: int, name: str) -> dict[str, Any]:
        """The content of a task's ``task.json``: name, steps, samples."""
        return _read_json(self.task(index, name) / "task.json", TaskSummary)

    def digests(self, index: int, name: str) -> dict[str, str]:
        """Path in a task's folder -> SHA-256 of every file."""
        return file_digests(self.task(index, name))

    def read_memory(self, index: int, name: str) -> ReplayMemory:
        """The replay memory after a task."""
        return ReplayMemory.load(self.task(index, name) / "memory.jsonl")

    def read_validation(self, index: int, name: str) -> ReplayMemory:
        """The records for the gate after a task; empty without a gate."""
        path = self.task(index, name) / "validation.jsonl"
        return ReplayMemory.load(path) if path.exists() else ReplayMemory()

    def read_task_state(self, index: int, name: str) -> dict[str, Tensor]:
        """The method's task state after a task; empty for most methods."""
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
        """Write a task's folder; it replaces a folder of an interrupted run.

        Args:
            index, name: index and name of the task.
            save_model: writes the model to a folder.
            tensors: name of a safetensors file without suffix -> its content; no file is written for {}.
            memory, validation: records after the task; no file is written for an empty ``validation``.
            summary: the content of ``task.json``.
        """
        final = self.task(index, name)
        temporary = final.with_name(final.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_model(temporary)
        for file, content in tensors.items():
            if content:
                save_tensors(temporary / f"{file}.safetensors", storable(content))
        memory.save(temporary / "memory.jsonl")
        if len(validation):
            validation.save(temporary / "validation.jsonl")
        _write_json(temporary / "task.json", summary)
        for path in temporary.rglob("*"):
            if path.is_file():
                fsync_file(path)
        if final.exists() and file_digests(final) == file_digests(temporary):
            shutil.rmtree(temporary)  # its digest is in the ledger, which must be correct after a kill
            return
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)


def write_metrics(run: Path, metrics: Mapping[str, Any]) -> None:
    """Write a run's ``metrics.json``."""
    _write_json(run / METRICS, metrics)


def metrics_sha256(metrics: Mapping[str, Any]) -> str:
    """SHA-256 of the file that :func:`write_metrics` writes."""
    return hashlib.sha256(_json_text(metrics).encode()).hexdigest()


def _require_plain(run: Path) -> None:
    """Raise ValueError if a run has a link, a folder in place of a file, or a file in place of a folder."""
    for name in ("config.yaml", METRICS, LEDGER, CHECKPOINT):
        for path in (run / name, run / f"{name}.tmp", run / f"{name}.torn"):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ValueError(f"{path} is a link or a folder; a run must have a file there")
    for folder in (run / "tasks", run / "snapshots"):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; a run must have a folder there")
        for path in (folder, *folder.rglob("*")):
            if path.is_symlink():
                raise ValueError(f"{path} is a link; a run must have its files in its own folder")


def _read_json(path: Path, model: type[FileContent]) -> dict[str, Any]:
    content: dict[str, Any] = parse_json(read_text(path), path)
    validated(model, content, path)
    return content


def _require_rounds(tensors: Mapping[str, Tensor], first: Mapping[str, Tensor], file: Path) -> None:
    """Raise ValueError unless a task's rounds are valid statistics of the same tensors as ``first``."""
    if "norms" not in tensors:
        raise ValueError(f"{file} is damaged: it has no 'norms'")
    if set(tensors) != set(first):
        raise ValueError(f"{file} is damaged: it has other tensors than those of an earlier task")
    widths = {"norms": 3, "counts": 4, "importance": 2}
    rounds = tensors["norms"].shape[:1]
    for name, tensor in tensors.items():
        kind = name.partition(".")[0]
        if kind not in widths or tensor.shape != (*rounds, widths[kind]):
            raise ValueError(f"{file} is damaged: {name!r} has the shape {tuple(tensor.shape)}")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, _json_text(content))


def _json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"

"""A task sequence, from the first task to the last, in a folder it can go on from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rkif.continual.config import RunConfig, dump_config
from rkif.continual.display.progress import RunProgress
from rkif.continual.evaluation.criteria import hold_out
from rkif.continual.evaluation.evaluate import ACCURACY, evaluate
from rkif.continual.evaluation.metrics import backward_transfer, forward_transfer, overall_performance
from rkif.continual.methods import METHODS, Context, Sequential
from rkif.continual.models.device import run_device
from rkif.continual.models.load import load_model
from rkif.continual.models.objective import Objective
from rkif.continual.rundir.folder import RunFolder
from rkif.continual.rundir.recorder import Recorder, parameter_digest
from rkif.continual.rundir.rollback import finish_rollback
from rkif.continual.rundir.round_states import RoundStates
from rkif.continual.rundir.state import RunState, read_checkpoint
from rkif.continual.tasks.load import load_tasks
from rkif.continual.tasks.records import Task
from rkif.continual.tasks.replay_memory import ReplayMemory
from rkif.continual.user_metrics import Metric, load_metric, metric_name
from rkif.files import claimed
from rkif.fuser.parameters import trainable_parameters


def run(config: RunConfig, out: Path, *, resume: bool = False, progress: RunProgress) -> dict[str, Any]:
    """Learn the tasks of a config one after another, and measure all of them after each.

    Killed at any moment and started again with ``resume`` it ends with the bits of a run that was not: every
    step is a function of the parameters, the method's state and its own number, and those are checkpointed.

    Args:
        config: the settings.
        out: the run's folder; see :mod:`rkif.continual.rundir.folder` for what comes to lie there.
        resume: go on with the run that is there. A finished one is only read.
        progress: where progress is shown.

    Returns:
        The content of ``metrics.json``.

    Raises:
        ValueError, OSError, ImportError: bad settings, tasks, model or folder, in one line.
        RuntimeError: another process is at work in the folder.
    """
    with _at_work(out):
        if resume:
            finish_rollback(out)
        start = (read_checkpoint(out) if resume else None) or RunState(0, 0, 0, 0, {}, {})
        with open_run(config, out, start.task, progress, resume=resume) as sequence:
            return sequence.run(start)


@contextmanager
def _at_work(out: Path) -> Iterator[None]:
    """Hold a run's folder from before anything is written to it; one that came to hold nothing is removed."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with claimed(out):
        try:
            yield
        finally:
            if new and not any(out.iterdir()):
                out.rmdir()


@contextmanager
def open_run(
    config: RunConfig, out: Path, finished: int, progress: RunProgress, *, resume: bool = True
) -> Iterator[TaskSequence]:
    """A run with its tasks and its model, which is untrained; progress is shown while the block runs.

    Args:
        config: the settings.
        out: the run's folder.
        finished: tasks that have been learned; their training records are not read.
        progress: where progress is shown.
        resume: whether the run may be there already.

    Raises:
        ValueError, OSError, ImportError: as :func:`run`.
    """
    _prepare_torch(config)
    method = METHODS[config.method]
    method.require(config)
    own = {metric_name(spec): load_metric(spec) for spec in config.metrics}
    tasks = load_tasks(
        config.tasks.folder,
        config.tasks.order,
        train_limit=config.tasks.train_limit,
        dev_limit=config.tasks.dev_limit,
        seed=config.seed,
        finished=0 if method.needs_all_tasks else finished,
    )
    _require_scorable(tasks, config)
    folder = RunFolder(out, config, resume=resume)
    with progress.shown(config, tasks):
        progress.stage("loading the model")
        model, objective = load_model(config, tasks, slices=len(tasks) if method.slices else 1)
        sequence = TaskSequence(config, folder, tasks, model, objective, own, progress)
        sequence.require_same_data()
        yield sequence


class TaskSequence:
    """The state of a run: the model, how far it has come, and what has been measured."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        tasks: Sequence[Task],
        model: nn.Module,
        objective: Objective,
        own: Mapping[str, Metric],
        progress: RunProgress,
    ) -> None:
        self.config = config
        self.folder = folder
        split = [hold_out(task, config) for task in tasks]
        self.tasks = [task for task, _ in split]
        self.held_out = [records for _, records in split]
        self.model = model
        self.objective = objective
        self.progress = progress
        self.own = own
        self.snapshots = RoundStates(folder.path / "snapshots", config.snapshots.budget)
        self.parameters = trainable_parameters(model)
        self.initial = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.metrics: dict[str, Any] = folder.read_metrics() or {
            "method": config.method,
            "split": "dev",
            "tasks": [task.name for task in self.tasks],
            "data": {task.name: _digests(task) for task in self.tasks},
            "records": [len(task.dev) for task in self.tasks],
            "trainable": sum(parameter.numel() for parameter in self.parameters.values()),
            "initial": [],
            "accuracy": [[] for _ in self.tasks],
            "metrics": {name: {"initial": [], "matrix": [[] for _ in self.tasks]} for name in self.own},
            "op": None,
            "bwt": None,
            "fwt": None,
            "steps": 0,
            "samples": 0,
        }

    def require_same_data(self) -> None:
        """Raises ValueError where tasks have other records than when the run began."""
        for task in self.tasks:
            for split, digest in _digests(task).items():
                if self.metrics["data"][task.name][split] != digest:
                    raise ValueError(
                        f"the {split} records of task {task.name!r} have changed since this run began"
                    )

    def run(self, start: RunState) -> dict[str, Any]:
        """Go on from ``start`` to the end of the last task."""
        if start.parameters:
            self.set_parameters(start.parameters)
            if not self.metrics["initial"]:
                raise ValueError(
                    f"{self.folder.path} has a checkpoint, but not what was measured before: its "
                    "metrics.json is missing"
                )
        self.recorder = Recorder(self.folder.path / "ledger.jsonl", start.ledger_records)
        if self.recorder.ledger.torn:
            self.progress.warn(
                f"the ledger's last line was torn ({self.recorder.ledger.torn} bytes): it is now in "
                "ledger.jsonl.torn, and its round is done again"
            )
        if not start.ledger_records:
            self._record(
                {
                    "event": "begin",
                    "method": self.config.method,
                    "tasks": [task.name for task in self.tasks],
                    "versions": {name: importlib.metadata.version(name) for name in ("rkif", "torch")},
                    "parameters": {"after": parameter_digest(self.parameters)},
                }
            )
        if not self.metrics["initial"]:
            before = self._evaluate("before training")
            self.metrics["initial"] = before[ACCURACY]
            for name, figures in self.metrics["metrics"].items():
                figures["initial"] = before[name]
            self.folder.write_metrics(self.metrics)
        for index in range(len(self.tasks)):
            if index >= start.task:
                self._learn(
                    index,
                    start if index == start.task else RunState(index, 0, 0, start.ledger_records, {}, {}),
                )
            if len(self.metrics["accuracy"][0]) <= index:
                self._measure(index)
        return self.metrics

    def _learn(self, index: int, start: RunState) -> None:
        """Train task ``index`` from where ``start`` says, and publish what came of it."""
        task, context = self.tasks[index], self.context(index, self._record)
        memory, validation = context.memory, context.validation
        method = self.method(context, start)
        if method.logs_rounds and len(memory) and not start.step:
            self.snapshots.write(self.recorder.rounds, self._state(index, 0, 0, {}))
        self.progress.task(index, context.steps, start.step)
        for step in range(start.step, context.steps):
            rounds = self.recorder.rounds
            loss = method.train_step(step)
            self.progress.advance(loss)
            if self.recorder.rounds > rounds:
                state = self._state(index, step + 1, method.samples, method.tensors())
                self.snapshots.write(self.recorder.rounds, state)
            if (step + 1) % self.config.checkpoint_every == 0 and step + 1 < context.steps:
                self._checkpoint(index, step + 1, method.samples, method.tensors())

        self.progress.stage("saving")
        method.finish()
        memory.add(
            task.name,
            task.instruction,
            task.train,
            fraction=self.config.memory.fraction,
            cap=self.config.memory.cap,
            seed=self.config.seed,
        )
        if held_out := self.held_out[index]:
            validation.add(task.name, task.instruction, held_out, fraction=1.0, seed=self.config.seed)
        self.folder.publish_task(
            index,
            task.name,
            save_model=self._save_model,
            state={
                "importance": method.importance(),
                "handed_on": method.task_state(),
                "rounds": method.rounds(),
            },
            memory=memory,
            validation=validation,
            figures={"task": task.name, "steps": context.steps, "samples": method.samples},
        )
        self._record(
            {
                "event": "task",
                "task": task.name,
                "steps": context.steps,
                "samples": method.samples,
                "memory": {name: list(ids) for name, ids in memory.ids.items()},
                "files": self.folder.digests(index, task.name),
                "parameters": {"after": parameter_digest(self.parameters)},
            }
        )
        self._checkpoint(index + 1, 0, method.samples, {})

    def context(self, index: int, record: Callable[[Mapping[str, Any]], None]) -> Context:
        """What the method gets to learn task ``index``."""
        before = (index - 1, self.tasks[index - 1].name)
        return Context(
            self.config,
            self.model,
            self.objective,
            self.tasks,
            index,
            memory=self.folder.read_memory(*before) if index else ReplayMemory(),
            validation=self.folder.read_validation(*before) if index else ReplayMemory(),
            previous_task_state=self.folder.read_task_state(*before) if index else {},
            initial=self.initial,
            record=record,
        )

    def method(self, context: Context, start: RunState) -> Sequential:
        """The method in the state that ``start`` holds; its parameters are set by :meth:`set_parameters`."""
        method = METHODS[self.config.method](context)
        if start.step:
            method.load_tensors(start.method)
            method.samples = start.samples
        else:
            method.begin()
        return method

    @torch.no_grad()
    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Give the trainable parameters their values.

        Raises:
            ValueError: they are of a model with others.
        """
        if set(values) != set(self.parameters):
            raise ValueError("the checkpoint is of a model with other trainable parameters")
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def _record(self, content: Mapping[str, Any]) -> None:
        self.recorder.record({**content, **self.identity()})

    def identity(self) -> dict[str, Any]:
        """What every record says of the run: its settings' SHA-256 and its seed."""
        settings = hashlib.sha256(dump_config(self.config).encode()).hexdigest()
        return {"config": settings, "seed": self.config.seed}

    def _save_model(self, folder: Path) -> None:
        """Adapter or model, with the tokenizer, as ``from_pretrained`` reads them."""
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.objective.tokenizer.save_pretrained(folder)

    def _checkpoint(self, task: int, step: int, samples: int, method: dict[str, Tensor]) -> None:
        self.folder.write_checkpoint(self._state(task, step, samples, method))

    def _state(self, task: int, step: int, samples: int, method: dict[str, Tensor]) -> RunState:
        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return RunState(task, step, samples, self.recorder.position, parameters, method)

    def _measure(self, index: int) -> None:
        """Fill the column of task ``index`` in the accuracy matrix, and the figures that follow from it."""
        accuracy, method = self.metrics["accuracy"], METHODS[self.config.method]
        columns = self._evaluate(f"after {self.tasks[index].name}")
        matrices = {ACCURACY: (accuracy, self.metrics["initial"])}
        for name, figures in self.metrics["metrics"].items():
            matrices[name] = (figures["matrix"], figures["initial"])
        for name, (matrix, initial) in matrices.items():
            for i, (row, before) in enumerate(zip(matrix, initial, strict=True)):
                # A method that knows the task answers with what it had made for it, if it has come to it yet.
                kept = method.task_aware and i != index
                row.append((row[-1] if row else before) if kept else columns[name][i])
        self.metrics["steps"], self.metrics["samples"] = self._totals(index)
        if index + 1 == len(self.tasks):
            self.metrics["op"] = overall_performance(accuracy)
            if method.sequential:
                self.metrics["bwt"] = backward_transfer(accuracy)
                self.metrics["fwt"] = forward_transfer(accuracy, self.metrics["initial"])
        self.folder.write_metrics(self.metrics)
        self.progress.measured(index, self.metrics)

    def _totals(self, index: int) -> tuple[int, int]:
        """Inner steps and training samples of the tasks up to ``index``."""
        figures = [self.folder.read_task(i, self.tasks[i].name) for i in range(index + 1)]
        return sum(f["steps"] for f in figures), sum(f["samples"] for f in figures)

    def _evaluate(self, when: str) -> dict[str, list[float]]:
        """Name of a metric -> its value on every task."""
        self.progress.evaluating(when)
        columns: dict[str, list[float]] = {ACCURACY: [], **{name: [] for name in self.own}}
        for task in self.tasks:
            for name, value in evaluate(self.model, self.objective, task, self.config, self.own).items():
                columns[name].append(value)
            self.progress.evaluated()
        return columns


def _require_scorable(tasks: Sequence[Task], config: RunConfig) -> None:
    for task in tasks:
        if config.evaluation.scoring == "likelihood" and not task.labels:
            raise ValueError(f"task {task.name!r} has no labels; its evaluation needs scoring: generation")


def _digests(task: Task) -> dict[str, str]:
    """What identifies the records of each split; a task that has been learned has no training records."""
    splits = {"train": task.train, "dev": task.dev}
    return {
        split: hashlib.sha256(repr(records).encode()).hexdigest()
        for split, records in splits.items()
        if records
    }


def _prepare_torch(config: RunConfig) -> None:
    """Resuming gives the same bits only if a step does; on GPUs that has to be asked for."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if run_device(config).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

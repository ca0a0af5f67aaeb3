"""A task sequence, from the first task to the last, in a folder it can go on from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rkif.continual.config import RunConfig
from rkif.continual.display.progress import RunProgress
from rkif.continual.methods import METHODS
from rkif.continual.models.device import run_device
from rkif.continual.models.load import load_model
from rkif.continual.rundir.folder import RunFolder
from rkif.continual.rundir.rollback import finish_rollback
from rkif.continual.rundir.state import RunState, read_checkpoint
from rkif.continual.task_sequence import TaskSequence
from rkif.continual.tasks.load import load_tasks
from rkif.continual.tasks.records import Task
from rkif.continual.user_metrics import load_metric, metric_name
from rkif.files import claimed


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
    metrics = {metric_name(spec): load_metric(spec) for spec in config.metrics}
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
        yield TaskSequence(config, folder, tasks, model, objective, metrics, progress)


def _require_scorable(tasks: Sequence[Task], config: RunConfig) -> None:
    for task in tasks:
        if config.evaluation.scoring == "likelihood" and not task.labels:
            raise ValueError(f"task {task.name!r} has no labels; its evaluation needs scoring: generation")


def _prepare_torch(config: RunConfig) -> None:
    """Resuming gives the same bits only if a step does; on GPUs that has to be asked for."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if run_device(config).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

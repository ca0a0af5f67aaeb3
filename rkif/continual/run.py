"""``rkif run``: learns the tasks of a config, or continues a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rkif.continual.config import RunConfig
from rkif.continual.config_file import require_model
from rkif.continual.display.progress import RunProgress
from rkif.continual.evaluation.harness import Harness, load_harness
from rkif.continual.methods import Sequential, method_of
from rkif.continual.models.device import run_device
from rkif.continual.models.load import load_model
from rkif.continual.rundir.folder import RunFolder, RunReader
from rkif.continual.rundir.rollback import finish_rollback
from rkif.continual.rundir.state import RunState, read_checkpoint
from rkif.continual.rundir.verify import require_whole
from rkif.continual.task_sequence import TaskSequence
from rkif.continual.tasks.load import load_tasks
from rkif.continual.tasks.records import Task
from rkif.continual.tracking import require_tracker
from rkif.continual.user_metrics import load_metric, metric_name
from rkif.files import claimed


def run(config: RunConfig, out: Path, *, resume: bool = False, progress: RunProgress) -> dict[str, Any]:
    """Learn the tasks of a config one after another, and evaluate all of them after each.

    A run that is killed and resumed ends with the same bits as an uninterrupted one, because a step is a
    function of the parameters, the method's state and the step's index, and the checkpoint has all three.

    Args:
        config: the settings.
        out: the run's folder; see :mod:`rkif.continual.rundir.folder` for its files.
        resume: whether to continue the run in ``out``, after comparing its files with the ledger. A finished
            run is only read.
        progress: shows the progress.

    Returns:
        The content of ``metrics.json``.

    Raises:
        ValueError, OSError, ImportError: settings, tasks, model or folder are invalid; one line of text.
        RuntimeError: another process uses the folder.
    """
    method = method_of(config)  # raises before a folder is made
    with _locked_folder(out):
        if resume and (out / "config.yaml").is_file():
            finish_rollback(out)
            reader = RunReader(out)
            require_whole(reader, reader.records(torn=True))
        start = (read_checkpoint(out) if resume else None) or RunState(0, 0, 0, 0, {}, {})
        with open_run(config, method, out, start.task, progress, resume=resume) as sequence:
            return sequence.run(start)


@contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """Lock the run's folder before anything is written; remove a new one that has no record at the end."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with claimed(out):
        try:
            yield
        finally:
            if new and {entry.name for entry in out.iterdir()} <= {"config.yaml"}:
                (out / "config.yaml").unlink(missing_ok=True)
                out.rmdir()


@contextmanager
def open_run(
    config: RunConfig,
    method: type[Sequential],
    out: Path,
    finished: int,
    progress: RunProgress,
    *,
    resume: bool = True,
) -> Iterator[TaskSequence]:
    """Context manager of a run with its tasks and its untrained model; progress is shown in the block.

    Args:
        config: the settings.
        method: the class of the config's method.
        out: the run's folder.
        finished: number of learned tasks; their training records are not read.
        progress: shows the progress.
        resume: whether the folder may have the run already.

    Raises:
        ValueError, OSError, ImportError: as :func:`run`.
    """
    _prepare_torch(config)
    require_model(config.model)
    if config.tracking is not None:
        require_tracker(config.tracking)
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
    if folder.moved:
        progress.warn(f"since the run began, folders have moved: {'; '.join(folder.moved)}")
    with progress.shown(config, tasks):
        if config.evaluation.harness is not None:
            progress.stage("loading tasks of lm-eval")
        harness_tasks = load_harness(config)
        progress.stage("loading the model")
        model, objective = load_model(config, tasks, slices=len(tasks) if method.slices else 1)
        harness = Harness(harness_tasks, model, objective.tokenizer, config)
        yield TaskSequence(config, folder, method, tasks, model, objective, metrics, harness, progress)


def _require_scorable(tasks: Sequence[Task], config: RunConfig) -> None:
    for task in tasks:
        if config.evaluation.scoring == "likelihood" and not task.labels:
            raise ValueError(f"task {task.name!r} has no labels; its evaluation needs scoring: generation")


def _prepare_torch(config: RunConfig) -> None:
    """Set PyTorch's threads, and deterministic algorithms on a GPU, so that runs have reproducible bits."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if run_device(config).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval), measured on the model of a run."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rkif.continual.config import RunConfig
from rkif.continual.config_evaluation import HarnessSettings
from rkif.continual.models.scoring import evaluating
from rkif.continual.spelling import did_you_mean

# The seeds of lm-eval's command line, so that a run's values are those of the command.
PYTHON_SEED, OTHER_SEED = 0, 1234


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval, or a group of tasks with a score.

    Attributes:
        name: lm-eval's name.
        metric: lm-eval's key of the value, a metric and a filter: "acc_norm,none".
        higher_is_better: whether the higher of two values is the better one.
        documents: name of each task of the group -> indices of the documents that the run reports.
        held_out: name of each task of the group -> indices of the gate's documents, which are the last ones.
        requests: SHA-256 of all requests to the model.
        loaded: the result of lm-eval's ``TaskManager.load``.
    """

    name: str
    metric: str
    higher_is_better: bool
    documents: Mapping[str, range]
    held_out: Mapping[str, range]
    requests: str
    loaded: Any

    def count(self, *, held_out: bool = False) -> int:
        """The number of documents of one measurement."""
        return sum(map(len, (self.held_out if held_out else self.documents).values()))


class Harness:
    """Measures a model on tasks of lm-eval.

    Args:
        tasks: as :func:`load_harness` returns them.
        model: the model, which is measured with its current parameters.
        tokenizer: the model's tokenizer; it is copied, because lm-eval may add a padding token.
        config: settings of the run.

    Attributes:
        tasks: the tasks by name.
    """

    def __init__(
        self, tasks: Sequence[HarnessTask], model: nn.Module, tokenizer: Any, config: RunConfig
    ) -> None:
        self.tasks = {task.name: task for task in tasks}
        self._model = model
        if tasks:
            from lm_eval.models.huggingface import HFLM

            with _calling("the model cannot be measured"):
                self._lm = HFLM(
                    pretrained=model,
                    tokenizer=copy.deepcopy(tokenizer),
                    backend=config.architecture,
                    batch_size=config.evaluation.batch_size,
                    mixed_precision_dtype="bfloat16" if config.precision == "bfloat16" else None,
                )

    def measure(self, name: str, *, held_out: bool = False) -> float:
        """The value of a task, in lm-eval's unit: an accuracy is in [0, 1].

        Args:
            name: name of the task.
            held_out: whether to measure on the gate's documents instead of the reported ones.

        Raises:
            ValueError: lm-eval fails, or the reported value is not finite.
        """
        from lm_eval.evaluator import evaluate

        task = self.tasks[name]
        samples = task.held_out if held_out else task.documents
        with evaluating(self._model), _calling(f"{name!r} failed"):
            for part in task.loaded["tasks"].values():
                part.set_fewshot_seed(seed=OTHER_SEED)
            results = evaluate(self._lm, task.loaded, samples=samples, bootstrap_iters=0, log_samples=False)
            value = float(results["results"][name][task.metric])
        if not held_out and not math.isfinite(value):
            raise ValueError(f"evaluation.harness: {task.metric!r} of {name!r} is {value}")
        return value


def load_harness(config: RunConfig) -> list[HarnessTask]:
    """Load the tasks of ``config.evaluation.harness``, with their data; an empty list without that setting.

    Raises:
        ImportError: lm-eval is not installed, or is too old.
        ValueError: there is no such task or metric, a task cannot be loaded, or the gate would leave no
            document to report.
    """
    settings = config.evaluation.harness
    if settings is None:
        return []
    manager = _task_manager(settings)
    gated = {} if config.gate is None else {one.metric: config.gate.records for one in config.gate.criteria}
    return [_load_task(manager, name, settings, gated.get(name, 0)) for name in settings.tasks]


def _task_manager(settings: HarnessSettings) -> Any:
    """The TaskManager of lm-eval, after a check that it has all tasks in the settings."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            'evaluation.harness needs lm-eval: pip install ".[lm-eval]" in the source folder of rkif '
            f"({error})"
        ) from error
    if not hasattr(TaskManager, "load"):
        raise ImportError("evaluation.harness needs lm-eval 0.4.12 or later: pip install --upgrade lm-eval")
    folder = settings.include_path
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"evaluation.harness.include_path: no such folder: {folder}")
    with _calling("its tasks cannot be read"):
        # Reading all tasks of lm-eval takes many seconds.
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not set(settings.tasks) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=folder)
    for name in settings.tasks:
        if name not in manager.all_tasks:
            where = "" if folder is None else f" and {folder} has none"
            raise ValueError(
                f"evaluation.harness.tasks: lm-eval has no task {name!r}{where}"
                f"{did_you_mean(name, manager.all_tasks)}"
            )
    return manager


def _load_task(manager: Any, name: str, settings: HarnessSettings, held_out: int) -> HarnessTask:
    with _calling(f"{name!r} cannot be loaded"):
        loaded = manager.load([name])
        parts = loaded["tasks"]
        counts = {part: len(task.eval_docs) for part, task in parts.items()}
    for task in parts.values():
        # As in lm-eval: no examples by default, and never any if the task's config has 0.
        shots = task.get_config("num_fewshot")
        if shots is None or (settings.num_fewshot is not None and shots != 0):
            task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
    keys = _metric_keys(loaded, name)
    if not keys:
        raise ValueError(
            f"evaluation.harness.tasks: {name!r} has no score of its own; name its tasks: {', '.join(parts)}"
        )
    metric = _chosen_metric(name, keys, settings.metrics.get(name))
    if held_out >= min(counts.values()):
        raise ValueError(
            f"gate.records: setting {held_out} documents of {name!r} aside would leave none of its "
            f"{min(counts.values())} to report"
        )
    reported = {part: count - held_out for part, count in counts.items()}
    documents = {part: range(min(settings.limit or count, count)) for part, count in reported.items()}
    last = {part: range(reported[part], count) for part, count in counts.items()}
    higher = next(iter(parts.values())).higher_is_better().get(metric.partition(",")[0], True)
    requests = _requests_sha256(name, parts, [documents, last])
    return HarnessTask(name, metric, bool(higher), documents, last, requests, loaded)


def _metric_keys(loaded: Any, name: str) -> list[str]:
    """lm-eval's keys of a task's values, the main one first; empty for a group without a score."""
    task = next(iter(loaded["tasks"].values()))
    filters = [one["name"] for one in task.get_config("filter_list") or [{"name": "none"}]]
    if (group := loaded["groups"].get(name)) is not None:
        metrics = {one.metric: one.filter_list or filters for one in group.aggregate_metric_list or ()}
    else:
        metrics = dict.fromkeys(task.aggregation(), filters) if name in loaded["tasks"] else {}
    return [f"{metric},{one}" for metric, of_metric in metrics.items() for one in of_metric]


def _chosen_metric(name: str, keys: Sequence[str], chosen: str | None) -> str:
    """The key that the settings choose, as a metric or as a whole key; by default the first."""
    for key in keys:
        if chosen is None or chosen in (key, key.partition(",")[0]):
            return key
    metrics = list(dict.fromkeys(key.partition(",")[0] for key in keys))
    raise ValueError(
        f"evaluation.harness.metrics: {name!r} has {', '.join(keys)}; got {chosen!r}"
        f"{did_you_mean(str(chosen), metrics)}"
    )


def _requests_sha256(name: str, parts: Mapping[str, Any], samples: Sequence[Mapping[str, range]]) -> str:
    """Digest of the requests for these documents. It depends on data, prompts, examples and their order."""
    digest = hashlib.sha256()
    with _calling(f"{name!r} has no requests"):
        for part, indices in [entry for one in samples for entry in one.items() if entry[1]]:
            parts[part].set_fewshot_seed(seed=OTHER_SEED)
            parts[part].build_all_requests(samples=indices)
            for request in parts[part].instances:
                digest.update(repr((request.request_type, request.args)).encode())
    return digest.hexdigest()


@contextmanager
def _calling(problem: str) -> Iterator[None]:
    """Context manager of a call of lm-eval: it sets the seeds of its command, and discards its stderr.

    The progress bars of lm-eval would break those of the run.

    Raises:
        ValueError: the block raises an error; the message begins with ``problem``.
    """
    random.seed(PYTHON_SEED)
    np.random.seed(OTHER_SEED)  # noqa: NPY002 - tasks use the global generator
    torch.manual_seed(OTHER_SEED)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    except Exception as error:  # the code of a task may raise any exception
        message = str(error).strip().partition("\n")[0]
        raise ValueError(f"evaluation.harness: {problem}: {type(error).__name__}: {message}") from error

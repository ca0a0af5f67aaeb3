"""The content of ``metrics.json``: the scores of all tasks before training and after every task."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rkif.continual.config import RunConfig
from rkif.continual.evaluation.evaluate import ACCURACY
from rkif.continual.evaluation.harness import HarnessTask
from rkif.continual.evaluation.metrics import backward_transfer, forward_transfer, overall_performance
from rkif.continual.tasks.records import Task

Column = Mapping[str, Sequence[float]]
"""Name of a metric, "accuracy" among them -> its value on every task."""


class AccuracyTable:
    """A matrix for accuracy and for each of the user's metrics: a row per task, a column per task learned.

    A task of lm-eval has a separate row, which begins with the value before training.

    Args:
        config: the run's settings.
        tasks: the tasks in the order of learning.
        metrics: names of the user's metrics.
        harness: tasks of lm-eval.
        trainable: number of trained parameters.
        saved: the content that an earlier process of the run wrote; empty at the start of a run.

    Attributes:
        content: JSON values, the content of ``metrics.json``.
    """

    def __init__(
        self,
        config: RunConfig,
        tasks: Sequence[Task],
        metrics: Iterable[str],
        harness: Iterable[HarnessTask],
        trainable: int,
        saved: dict[str, Any],
    ) -> None:
        self._harness = {task.name: _harness_row(task) for task in harness}
        self.content: dict[str, Any] = saved or {
            "method": config.method,
            "split": "dev",
            "tasks": [task.name for task in tasks],
            "data": {task.name: _digests(task) for task in tasks},
            "records": [len(task.dev) for task in tasks],
            "trainable": trainable,
            "initial": [],
            "accuracy": [[] for _ in tasks],
            "metrics": {name: {"initial": [], "matrix": [[] for _ in tasks]} for name in metrics},
            "op": None,
            "bwt": None,
            "fwt": None,
            "steps": 0,
            "samples": 0,
            **({"harness": copy.deepcopy(self._harness)} if self._harness else {}),
        }

    @property
    def begun(self) -> bool:
        """Whether the tasks were measured before training."""
        return bool(self.content["initial"])

    @property
    def columns(self) -> int:
        """Number of tasks after which all tasks were measured."""
        return len(self.content["accuracy"][0])

    def require_same_data(self, tasks: Sequence[Task]) -> None:
        """Raise ValueError if tasks, records, or lm-eval's requests are not those at the run's start."""
        if (names := [task.name for task in tasks]) != self.content["tasks"]:
            raise ValueError(f"the tasks are {', '.join(names)}; this run began with {self.content['tasks']}")
        for task in tasks:
            for split, digest in _digests(task).items():
                if self.content["data"][task.name][split] != digest:
                    raise ValueError(
                        f"the {split} records of task {task.name!r} have changed since this run began"
                    )
        for name, row in self._harness.items():
            saved = self.content.get("harness", {}).get(name, {})
            if {**saved, "values": []} != row:
                raise ValueError(
                    f"the documents or prompts of lm-eval's task {name!r} have changed since this run began"
                )

    def set_initial(self, column: Column, harness: Mapping[str, float]) -> None:
        """Store the values before training."""
        self._add_harness(harness)
        self.content["initial"] = column[ACCURACY]
        for name, metric in self.content["metrics"].items():
            metric["initial"] = column[name]

    def add(
        self, column: Column, harness: Mapping[str, float], *, task_aware: bool, steps: int, samples: int
    ) -> None:
        """Append the column measured after the next task.

        Args:
            column: the values on every task.
            harness: the value of each task of lm-eval.
            task_aware: whether the method answers each task with the model trained for it. If so, only the
                task just learned gets its value from ``column``; the others keep their last value.
            steps, samples: number of inner steps and training samples of all tasks learned so far.
        """
        learned = self.columns
        matrices = {ACCURACY: (self.content["accuracy"], self.content["initial"])}
        for name, metric in self.content["metrics"].items():
            matrices[name] = (metric["matrix"], metric["initial"])
        for name, (matrix, initial) in matrices.items():
            for i, (row, before) in enumerate(zip(matrix, initial, strict=True)):
                kept = task_aware and i != learned
                row.append((row[-1] if row else before) if kept else column[name][i])
        self._add_harness(harness)
        self.content["steps"], self.content["samples"] = steps, samples

    def _add_harness(self, harness: Mapping[str, float]) -> None:
        for name, value in harness.items():
            self.content["harness"][name]["values"].append(value)

    def summarise(self, *, sequential: bool) -> None:
        """Compute OP from the complete matrix, and BWT and FWT if the tasks were learned in sequence."""
        accuracy = self.content["accuracy"]
        self.content["op"] = overall_performance(accuracy)
        if sequential:
            self.content["bwt"] = backward_transfer(accuracy)
            self.content["fwt"] = forward_transfer(accuracy, self.content["initial"])


def measure(
    tasks: Iterable[Task],
    metrics: Iterable[str],
    evaluate: Callable[[Task], Mapping[str, float]],
) -> dict[str, list[float]]:
    """A column of the table; ``evaluate`` computes accuracy and the user's metrics of one task."""
    column: dict[str, list[float]] = {ACCURACY: [], **{name: [] for name in metrics}}
    for task in tasks:
        for name, value in evaluate(task).items():
            column[name].append(value)
    return column


def _harness_row(task: HarnessTask) -> dict[str, Any]:
    return {
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "documents": task.count(),
        "requests": task.requests,
        "values": [],
    }


def _digests(task: Task) -> dict[str, str]:
    """SHA-256 of each split's records. The training records of a learned task may not have been read."""
    splits = {"train": task.train, "dev": task.dev}
    return {
        split: hashlib.sha256(repr(records).encode()).hexdigest()
        for split, records in splits.items()
        if records
    }

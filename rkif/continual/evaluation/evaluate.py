"""What a model is worth on a task of a run: accuracy, and metrics of one's own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rkif.continual.config import RunConfig
from rkif.continual.models.device import autocast
from rkif.continual.models.objective import Objective
from rkif.continual.models.scoring import accuracy
from rkif.continual.tasks.records import Task
from rkif.continual.user_metrics import Metric, evaluate_metric

ACCURACY = "accuracy"


def evaluate(
    model: nn.Module, objective: Objective, task: Task, config: RunConfig, metrics: Mapping[str, Metric]
) -> dict[str, float]:
    """Ask a task's dev records.

    Returns:
        "accuracy", per cent of the records answered exactly, and each metric's value by its name.

    Raises:
        ValueError: the answers are to be chosen among labels, and the task has none; or a metric's value is
            not a finite number.
    """
    with autocast(config):
        predictions = objective.predict(model, task)
    own = {name: evaluate_metric(name, metric, predictions, task.dev) for name, metric in metrics.items()}
    return {ACCURACY: accuracy(predictions, task.dev), **own}

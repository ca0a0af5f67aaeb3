"""Accuracy and the user's metrics of a model on one task."""

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
    """Predict the answers to a task's dev records and score them.

    Returns:
        "accuracy", the percentage of exact answers, and each user metric's value by its name.

    Raises:
        ValueError: scoring is by likelihood and the task has no labels, or a metric's value is not a finite
            number.
    """
    with autocast(config):
        predictions = objective.predict(model, task)
    values = {ACCURACY: accuracy(predictions, task.dev)}
    for name, metric in metrics.items():
        values[name] = evaluate_metric(name, metric, predictions, task.dev)
    return values

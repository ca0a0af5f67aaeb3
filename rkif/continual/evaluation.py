"""Accuracy of a model on the tasks of a run."""

from __future__ import annotations

from torch import nn

from rkif.continual.config import RunConfig
from rkif.continual.model import autocast
from rkif.continual.objective import Objective
from rkif.continual.scoring import accuracy
from rkif.continual.tasks import Task


def evaluate(model: nn.Module, objective: Objective, task: Task, config: RunConfig) -> float:
    """Per cent of a task's dev records that the model answers exactly.

    Raises:
        ValueError: scoring by likelihood, and the task has no labels.
    """
    with autocast(config):
        predictions = objective.predict(model, task)
    return accuracy(predictions, task.dev)

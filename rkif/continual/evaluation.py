"""Accuracy of a model on the tasks of a run."""

from __future__ import annotations

from torch import nn

from rkif.continual.config import RunConfig
from rkif.continual.model import autocast
from rkif.continual.scoring import accuracy, predict_by_generation, predict_by_likelihood
from rkif.continual.tasks import Task
from rkif.continual.text import Encoder


def evaluate(model: nn.Module, encoder: Encoder, task: Task, config: RunConfig) -> float:
    """Per cent of a task's dev records that the model answers exactly.

    Raises:
        ValueError: scoring by likelihood, and the task has no labels.
    """
    settings = config.evaluation
    items = [(task.instruction, record) for record in task.dev]
    with autocast(config):
        if settings.scoring == "generation":
            predictions = predict_by_generation(
                model,
                encoder,
                items,
                batch_size=settings.batch_size,
                max_new_tokens=settings.max_new_tokens,
            )
        else:
            predictions = predict_by_likelihood(
                model, encoder, items, task.labels, batch_size=settings.batch_size
            )
    return accuracy(predictions, task.dev)

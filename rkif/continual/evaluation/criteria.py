"""The gate of a run: its criteria are measured on records of the earlier tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from rkif.continual.config import RunConfig
from rkif.continual.config_evaluation import CriterionSettings, GateSettings
from rkif.continual.evaluation.evaluate import ACCURACY, evaluate
from rkif.continual.evaluation.harness import Harness
from rkif.continual.models.device import autocast
from rkif.continual.models.objective import Objective
from rkif.continual.tasks.records import Item, Record, Task, stratified_subset
from rkif.continual.tasks.replay_memory import ReplayMemory
from rkif.continual.user_metrics import load_metric
from rkif.gate import Criterion, Gate
from rkif.seeding import derive_seed

MEMORY_LOSS = "memory_loss"


class GateStopped(RuntimeError):
    """The gate's verdict was "stop": training has ended, with the parameters of the round's start."""


def hold_out(task: Task, config: RunConfig) -> tuple[Task, tuple[Record, ...]]:
    """Set aside training records on which the gate will evaluate the task.

    Returns:
        The task without these records, and the records.

    Raises:
        ValueError: no record would be left to train on.
    """
    if config.gate is None or not config.gate.validates:
        return task, ()
    held_out = stratified_subset(
        task.train, config.gate.records, derive_seed(config.seed, "validation", task.name)
    )
    held_out_ids = {record.id for record in held_out}
    rest = tuple(record for record in task.train if record.id not in held_out_ids)
    if task.train and not rest:
        raise ValueError(
            f"gate.records: setting {config.gate.records} records of task {task.name!r} aside would leave "
            f"none of its {len(task.train)} to train on"
        )
    return replace(task, train=rest), held_out


def make_gate(
    settings: GateSettings,
    config: RunConfig,
    model: nn.Module,
    objective: Objective,
    tasks: Sequence[Task],
    memory: ReplayMemory,
    validation: ReplayMemory,
    harness: Harness | None,
) -> Gate:
    """Make the gate for the rounds of a task.

    Args:
        settings: settings of the gate.
        config: settings of the run.
        model: the model, which is measured with its current parameters.
        objective: computes the model's loss and answers.
        tasks: all tasks of the run.
        memory: records of the earlier tasks that the outer learner trains on, for the memory loss.
        validation: records of the earlier tasks that are not trained on, for accuracy and the user's metrics.
        harness: measures the tasks of lm-eval that criteria name; None if they name none.

    Raises:
        ValueError: a user metric cannot be imported.
    """
    tasks_by_name = {task.name: task for task in tasks}
    remembered = [item for items in memory.by_task.values() for item in items[: settings.records]]
    held_out = [
        replace(tasks_by_name[name], dev=tuple(record for _, record in items))
        for name, items in validation.by_task.items()
    ]

    def make_criterion(described: CriterionSettings) -> Criterion:
        name, higher = described.name, described.higher_is_better
        measure: Callable[[], float]
        if described.metric == MEMORY_LOSS:
            measure, samples = partial(mean_loss, model, objective, remembered, config), len(remembered)
        elif described.of_harness:
            assert harness is not None
            task = harness.tasks[name]
            measure, samples = partial(harness.measure, name, held_out=True), task.count(held_out=True)
            higher = task.higher_is_better if higher is None else higher
        else:
            user_metrics = {} if described.metric == ACCURACY else {name: load_metric(described.metric)}

            def measure() -> float:
                values = [evaluate(model, objective, task, config, user_metrics)[name] for task in held_out]
                return sum(values) / len(values)

            samples = sum(len(task.dev) for task in held_out)
        if higher is None:
            higher = described.metric != MEMORY_LOSS
        return Criterion(name, measure, higher, described.floor, described.tolerance, samples)

    return Gate(
        [make_criterion(described) for described in settings.criteria],
        ladder=tuple(settings.ladder),
        otherwise=settings.otherwise,
        every=settings.every,
        budget=settings.budget,
    )


@torch.no_grad()
def mean_loss(model: nn.Module, objective: Objective, items: Sequence[Item], config: RunConfig) -> float:
    """The mean loss over records in evaluation mode. The model's mode is restored."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    size, total, weights = config.evaluation.batch_size, 0.0, 0
    try:
        for start in range(0, len(items), size):
            batch = objective.collate(items[start : start + size])
            weight = objective.loss_terms(batch)
            with autocast(config):
                inputs = {name: tensor.to(device) for name, tensor in batch.items()}
                total += weight * float(objective.loss(model, inputs))
            weights += weight
    finally:
        model.train(was_training)
    return total / weights

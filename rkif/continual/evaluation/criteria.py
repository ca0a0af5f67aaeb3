"""The gate of a run: the criteria that its settings describe, measured on records of the earlier tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from rkif.continual.config import CriterionSettings, GateSettings, RunConfig
from rkif.continual.evaluation.evaluate import ACCURACY, evaluate
from rkif.continual.models.device import autocast
from rkif.continual.models.objective import Objective
from rkif.continual.tasks.records import Item, Record, Task, stratified_subset
from rkif.continual.tasks.replay_memory import ReplayMemory
from rkif.continual.user_metrics import load_metric
from rkif.gate import Criterion, Gate
from rkif.seeding import derive_seed

MEMORY_LOSS = "memory_loss"


class GateStopped(RuntimeError):
    """A gate said "stop": training has ended, with the parameters as they were before the round."""


def hold_out(task: Task, config: RunConfig) -> tuple[Task, tuple[Record, ...]]:
    """The task without the training records that the gate will measure it on, and these.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if config.gate is None or not config.gate.validates:
        return task, ()
    held = stratified_subset(
        task.train, config.gate.records, derive_seed(config.seed, "validation", task.name)
    )
    kept = {record.id for record in held}
    rest = tuple(record for record in task.train if record.id not in kept)
    if task.train and not rest:
        raise ValueError(
            f"gate.records: setting {config.gate.records} records of task {task.name!r} aside would leave "
            f"none of its {len(task.train)} to train on"
        )
    return replace(task, train=rest), held


def make_gate(
    settings: GateSettings,
    config: RunConfig,
    model: nn.Module,
    objective: Objective,
    tasks: Sequence[Task],
    memory: ReplayMemory,
    validation: ReplayMemory,
) -> Gate:
    """The gate for a task's rounds.

    Args:
        settings: the gate's.
        config: the run's.
        model: what is measured, as it is at the time.
        objective: gives its loss and its answers.
        tasks: all of the run's; those in ``memory`` are measured.
        memory: records of the earlier tasks that the outer learner trains on: the loss is measured on them.
        validation: records of the earlier tasks that no learner saw: everything else is measured on them.

    Raises:
        ValueError: a metric of one's own cannot be found.
    """
    known = {task.name: task for task in tasks}
    remembered = [item for items in memory.by_task.values() for item in items[: settings.records]]
    held = [
        replace(known[name], dev=tuple(record for _, record in items))
        for name, items in validation.by_task.items()
    ]

    def criterion(one: CriterionSettings) -> Criterion:
        measure: Callable[[], float]
        if one.metric == MEMORY_LOSS:
            measure, samples = partial(mean_loss, model, objective, remembered, config), len(remembered)
        else:
            own = {} if one.metric == ACCURACY else {one.name: load_metric(one.metric)}

            def measure() -> float:
                values = [evaluate(model, objective, task, config, own)[one.name] for task in held]
                return sum(values) / len(values)

            samples = sum(len(task.dev) for task in held)
        higher = one.metric != MEMORY_LOSS if one.higher_is_better is None else one.higher_is_better
        return Criterion(one.name, measure, higher, one.floor, one.tolerance, samples)

    return Gate(
        [criterion(one) for one in settings.criteria],
        ladder=tuple(settings.ladder),
        otherwise=settings.otherwise,
        every=settings.every,
        budget=settings.budget,
    )


@torch.no_grad()
def mean_loss(model: nn.Module, objective: Objective, items: Sequence[Item], config: RunConfig) -> float:
    """The mean loss over records, without dropout."""
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

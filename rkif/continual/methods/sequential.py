"""Plain fine-tuning, task after task: what every method starts from, and the one that forgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor, nn

from rkif.continual.config import RunConfig
from rkif.continual.models.learner import Learner
from rkif.continual.models.objective import Objective
from rkif.continual.tasks.records import Item, Task
from rkif.continual.tasks.replay_memory import ReplayMemory
from rkif.seeding import derive_seed, shuffled


def _unrecorded(content: Mapping[str, Any]) -> None:
    """For methods outside of a run."""


@dataclass(frozen=True)
class Context:
    """What a method gets to learn one task.

    Attributes:
        config: the run's settings.
        model: to be trained, as the task before left it.
        objective: what the model is to do with records.
        tasks: all of the run's. Those that have been learned may lack their training records.
        index: which of them is to be learned.
        memory: holds records of the earlier tasks, and is empty for the first.
        validation: the same with the records that a gate measures on; empty where none does.
        previous_task_state: what :meth:`Sequential.task_state` returned after the previous task; empty for
            the first.
        initial: trainable parameters by name as they were before the first task.
        record: takes a record for the run's ledger.
    """

    config: RunConfig
    model: nn.Module
    objective: Objective
    tasks: Sequence[Task]
    index: int
    memory: ReplayMemory
    validation: ReplayMemory = field(default_factory=ReplayMemory)
    previous_task_state: Mapping[str, Tensor] = field(default_factory=dict)
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    record: Callable[[Mapping[str, Any]], None] = _unrecorded

    @property
    def task(self) -> Task:
        """The task to be learned."""
        return self.tasks[self.index]

    @property
    def steps(self) -> int:
        """Inner optimizer steps for this task."""
        training = self.config.training
        if training.steps is not None:
            return training.steps
        return math.ceil(Fraction(str(training.epochs)) * len(self.task.train) / training.batch_size)


class Sequential:
    """One inner learner on the new task. Other methods are this one and what they add.

    Attributes:
        task_aware: each task is asked of the model as it was when the task had been learned.
        sequential: the tasks come one after another, so that backward and forward transfer mean something.
        needs_all_tasks: the training records of all tasks are needed for each.
        slices: the adapter has ranks of its own for every task.
        logs_rounds: its rounds are in the run's ledger, and can be returned to.
        samples: records that went through the model in training so far, this task's and the memory's.
    """

    task_aware: ClassVar[bool] = False
    sequential: ClassVar[bool] = True
    needs_all_tasks: ClassVar[bool] = False
    slices: ClassVar[bool] = False
    logs_rounds: ClassVar[bool] = False

    def __init__(self, context: Context) -> None:
        self.context = context
        self.samples = 0
        self.inner = self.learner(context.config.training.learning_rate)

    @staticmethod
    def require(config: RunConfig) -> None:
        """Raise ValueError where the method cannot work with these settings."""

    def learner(self, learning_rate: float) -> Learner:
        """A new learner over the model's trainable parameters."""
        context = self.context
        return Learner(context.model, context.objective, context.config, learning_rate=learning_rate)

    def begin(self) -> None:
        """The task begins; not called where one that was begun goes on."""

    def train_step(self, step: int) -> float:
        """Take inner step ``step``, from 0, and whatever the method does after it; returns the inner loss."""
        items = self.batch(step)
        self.samples += len(items)
        return self.inner.step(
            items,
            lr_fraction=self.lr_fraction(step),
            seed=self.seed("inner", step),
            before_clip=self.before_clip,
            before_step=self.before_step,
        )

    def before_clip(self) -> None:
        """The gradient of an inner step's batch is there: that of a penalty may be added."""

    def before_step(self) -> None:
        """The gradient of an inner step is final, clipped; it may be looked at."""

    def batch(self, step: int) -> list[Item]:
        """The records of an inner step."""
        size = self.context.config.training.batch_size
        return self.records(step * size, (step + 1) * size)

    def records(self, start: int, stop: int) -> list[Item]:
        """A stretch of the walk over the task's training records, which are reshuffled every epoch."""
        instruction, records = self.context.task.instruction, self.context.task.train
        walk = (divmod(position, len(records)) for position in range(start, stop))
        return [
            (instruction, records[shuffled(len(records), self.seed("epoch", epoch))[place]])
            for epoch, place in walk
        ]

    def lr_fraction(self, step: int) -> float:
        """The schedule: linear warm-up, then linear decay that ends one step above zero."""
        warmup = min(self.context.config.training.warmup_steps, self.context.steps - 1)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (self.context.steps - step) / (self.context.steps - warmup)

    def seed(self, *parts: str | int) -> int:
        """A seed of its own for each use, under the run's seed and this task."""
        return derive_seed(self.context.config.seed, self.context.task.name, *parts)

    def tensors(self) -> dict[str, Tensor]:
        """The method's state between two steps, beside the parameters."""
        return {f"inner.{name}": tensor for name, tensor in self.inner.tensors().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the state that :meth:`tensors` gave."""
        self.inner.load_tensors(strip_prefix(tensors, "inner."))

    def finish(self) -> None:
        """What is left to do when the last step of the task has been taken."""

    def task_state(self) -> dict[str, Tensor]:
        """What the method needs to know when it learns the next task, beside parameters and memory."""
        return {}

    def rounds(self) -> dict[str, Tensor]:
        """What the task's rounds did, a :class:`~rkif.continual.evaluation.history.RoundHistory`; or {}."""
        return {}

    def importance(self) -> dict[str, Tensor]:
        """What the method knows about the parameters' importance after the task; empty for most methods."""
        return {}


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name starts with ``prefix``, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

"""Plain fine-tuning, task after task: the base class of every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor, nn

from rkif.continual.config import RunConfig
from rkif.continual.evaluation.harness import Harness
from rkif.continual.models.checkpoint_merge import CheckpointMerge
from rkif.continual.models.distillation import DistillingObjective, tasks_to_ask
from rkif.continual.models.kept_answers import KeptAnswers
from rkif.continual.models.learner import BatchLearner
from rkif.continual.models.objective import Objective
from rkif.continual.tasks.records import Item, Task
from rkif.continual.tasks.replay_memory import ReplayMemory
from rkif.fuser.parameters import trainable_parameters
from rkif.fuser.state_names import flatten, section
from rkif.seeding import derive_seed, shuffled


def _distilling(context: Context) -> DistillingObjective | None:
    """The objective with distillation; None without distillation and for the first task."""
    settings = context.config.distillation
    if not settings.used or context.index == 0:
        return None
    parameters = trainable_parameters(context.model)
    earlier = context.tasks[: context.index]
    asked = tasks_to_ask(earlier, context.task, context.config.text.prompt)
    kept = KeptAnswers(context.kept_answers, context.memory) if settings.keeps_answers else None
    return DistillingObjective(context.objective, settings, parameters, earlier, asked, kept)


def _discard(content: Mapping[str, Any]) -> None:
    """The default of ``Context.record`` and ``Context.track``: no ledger, and no tracker."""


@dataclass(frozen=True)
class Context:
    """The inputs of a method for one task.

    Attributes:
        config: the run's settings.
        model: the model with the parameters after the previous task; it is trained in place.
        objective: computes the loss of a batch.
        tasks: all tasks of the run. A learned task may have no training records.
        index: index of the task to learn.
        memory: records of the earlier tasks; empty for the first task.
        validation: records of the earlier tasks for the gate; empty without a gate.
        harness: measures the tasks of lm-eval that the gate's criteria name.
        previous_task_state: the result of :meth:`Sequential.task_state` after the previous task; empty for
            the first task.
        kept_answers: the result of :meth:`KeptAnswers.tensors` after the previous task; empty unless
            answers are kept.
        initial: name -> trainable parameter before the first task.
        record: appends a record to the run's ledger.
        track: sends the values of a round to an experiment tracker.
    """

    config: RunConfig
    model: nn.Module
    objective: Objective
    tasks: Sequence[Task]
    index: int
    memory: ReplayMemory
    validation: ReplayMemory = field(default_factory=ReplayMemory)
    harness: Harness | None = None
    previous_task_state: Mapping[str, Tensor] = field(default_factory=dict)
    kept_answers: Mapping[str, Tensor] = field(default_factory=dict)
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    record: Callable[[Mapping[str, Any]], None] = _discard
    track: Callable[[Mapping[str, float]], None] = _discard

    @property
    def task(self) -> Task:
        """The task to learn."""
        return self.tasks[self.index]

    @property
    def steps(self) -> int:
        """Number of inner optimizer steps for this task."""
        training = self.config.training
        if training.steps is not None:
            return training.steps
        return math.ceil(Fraction(str(training.epochs)) * len(self.task.train) / training.batch_size)


class Sequential:
    """One learner on the new task. Other methods override the hooks; see docs/adding-a-method.md.

    Attributes:
        task_aware: whether each task is answered by the model after learning that task.
        sequential: whether tasks are learned one after another; otherwise BWT and FWT are not defined.
        needs_all_tasks: whether every task needs the training records of all tasks.
        slices: whether the adapter has ``r`` ranks for each task.
        logs_rounds: whether rounds are recorded in the ledger, and states after them are kept.
        replays: whether it trains on memory records.
        samples: number of records trained on in this task, including memory records.
    """

    task_aware: ClassVar[bool] = False
    sequential: ClassVar[bool] = True
    needs_all_tasks: ClassVar[bool] = False
    slices: ClassVar[bool] = False
    logs_rounds: ClassVar[bool] = False
    replays: ClassVar[bool] = False

    def __init__(self, context: Context) -> None:
        self.context = context
        self.samples = 0
        self.distilling = _distilling(context)
        self.inner = self.learner(context.config.training.learning_rate)
        self.checkpoint_merge = self._checkpoint_merge()

    @staticmethod
    def require(config: RunConfig) -> None:
        """Raise ValueError for settings that the method does not support."""

    def learner(self, learning_rate: float) -> BatchLearner:
        """Make a learner over the model's trainable parameters."""
        context = self.context
        objective = self.distilling or context.objective
        return BatchLearner(context.model, objective, context.config, learning_rate=learning_rate)

    @property
    def period(self) -> int:
        """Steps between parameters that can be merged or averaged, such as those after a fusion."""
        return 1

    def _checkpoint_merge(self) -> CheckpointMerge | None:
        """The merge of the task's last checkpoints; None if the settings have none."""
        settings = self.context.config.merge
        if not settings.window:
            return None
        return CheckpointMerge(settings, self.context.steps, self.period, self.inner.parameters)

    def begin(self) -> None:
        """Hook at the beginning of the task; it is not called when the task is resumed."""

    def train_step(self, step: int) -> float:
        """Take inner step ``step`` (from 0), and outer steps and merge after it; return the inner loss."""
        items = self.batch(step)
        self.samples += len(items)
        return self.inner.step(
            items,
            lr_fraction=self.lr_fraction(step),
            seed=self.seed("inner", step),
            before_clip=self.before_clip,
            before_step=self.before_step,
        )

    def end_step(self, step: int) -> None:
        """Hook after :meth:`train_step`."""
        if self.checkpoint_merge is not None:
            self.checkpoint_merge.add(step + 1)

    def before_clip(self) -> None:
        """Hook after the gradient of an inner step is accumulated; it may add the gradient of a penalty."""

    def before_step(self) -> None:
        """Hook after the gradient of an inner step is clipped; it may read the gradient."""

    def batch(self, step: int) -> list[Item]:
        """The records of an inner step."""
        size = self.context.config.training.batch_size
        return self.records(step * size, (step + 1) * size)

    def records(self, start: int, stop: int) -> list[Item]:
        """Items ``start`` to ``stop`` of the walk over the training records, reshuffled every epoch."""
        instruction, records = self.context.task.instruction, self.context.task.train
        walk = (divmod(position, len(records)) for position in range(start, stop))
        return [
            (instruction, records[shuffled(len(records), self.seed("epoch", epoch))[place]])
            for epoch, place in walk
        ]

    def lr_fraction(self, step: int) -> float:
        """The schedule's factor: linear warm-up, then a linear decay that ends one step above 0, or none."""
        training = self.context.config.training
        warmup = min(training.warmup_steps, self.context.steps - 1)
        if training.schedule == "constant" and (step >= warmup or self.context.index):
            return 1.0
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (self.context.steps - step) / (self.context.steps - warmup)

    def seed(self, *parts: str | int) -> int:
        """A seed derived from the run's seed, the task and ``parts``; each use passes different parts."""
        return derive_seed(self.context.config.seed, self.context.task.name, *parts)

    def tensors(self) -> dict[str, Tensor]:
        """The method's state between two steps, without the parameters."""
        before = {} if self.distilling is None else self.distilling.before
        sums = {} if self.checkpoint_merge is None else self.checkpoint_merge.tensors()
        return flatten({"inner": self.inner.tensors(), "before_task": before, "checkpoint_merge": sums})

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that :meth:`tensors` returned."""
        self.inner.load_tensors(section(tensors, "inner"))
        if self.distilling is not None:
            for name, tensor in section(tensors, "before_task").items():
                self.distilling.before[name].copy_(tensor)
        if self.checkpoint_merge is not None:
            self.checkpoint_merge.load_tensors(section(tensors, "checkpoint_merge"))

    def finish(self) -> None:
        """Hook after the last step of the task; it may change the parameters."""

    def task_state(self) -> dict[str, Tensor]:
        """The method's state for the next task, besides the parameters and the memory."""
        return {}

    def rounds(self) -> dict[str, Tensor]:
        """The tensors of the task's :class:`~rkif.continual.evaluation.history.RoundHistory`, if any."""
        return {}

    def importance(self) -> dict[str, Tensor]:
        """Name -> importance of the parameters after the task; empty for most methods."""
        return {}

"""Plain fine-tuning, task after task: what every method starts from, and the one that forgets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor, nn

from rkif.continual.config import RunConfig
from rkif.continual.learner import Learner
from rkif.continual.tasks import Item, Task
from rkif.continual.text import Encoder
from rkif.memory import ReplayMemory
from rkif.seeding import derive_seed, shuffled


@dataclass(frozen=True)
class Context:
    """What a method gets to learn one task: ``memory`` holds the earlier ones, and is empty for the first."""

    config: RunConfig
    model: nn.Module
    encoder: Encoder
    task: Task
    memory: ReplayMemory

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
        samples: records that went through the model in training so far, this task's and the memory's.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.samples = 0
        self.inner = self.learner(context.config.training.learning_rate)

    def learner(self, learning_rate: float) -> Learner:
        """A new learner over the model's trainable parameters."""
        context = self.context
        return Learner(context.model, context.encoder, context.config, learning_rate=learning_rate)

    def train_step(self, step: int) -> float:
        """Take inner step ``step``, from 0, and whatever the method does after it; returns the inner loss."""
        items = self.batch(step)
        self.samples += len(items)
        return self.inner.step(items, lr_fraction=self.lr_fraction(step), seed=self.seed("inner", step))

    def batch(self, step: int) -> list[Item]:
        """The records of an inner step: the task's training records, reshuffled every epoch."""
        size, records = self.context.config.training.batch_size, self.context.task.train
        walk = (divmod(position, len(records)) for position in range(step * size, (step + 1) * size))
        instruction = self.context.task.instruction
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

    def importance(self) -> dict[str, Tensor]:
        """What the method knows about the parameters' importance after the task; empty for most methods."""
        return {}


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name starts with ``prefix``, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

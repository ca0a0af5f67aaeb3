"""Replay mix: records of earlier tasks in every batch. The baseline that any claim must beat."""

from __future__ import annotations

import math

from rkif.continual.config import fusion_config
from rkif.continual.methods.sequential import Context, Sequential
from rkif.continual.tasks.records import Item


class Replay(Sequential):
    """Every batch of the new task is joined by records from the memory, in one optimizer step.

    There are as many of them in a task as Recurrent-KIF's outer learner sees in the same number of inner
    steps, spread evenly: both methods take the gradient of the same number of samples, from the same memory.
    """

    def batch(self, step: int) -> list[Item]:
        steps = self.context.steps
        return super().batch(step) + self.remembered(
            step * self.share // steps, (step + 1) * self.share // steps
        )

    @property
    def share(self) -> int:
        """Memory records that the task sees."""
        return memory_share(self.context)

    def remembered(self, start: int, stop: int) -> list[Item]:
        """A stretch of the walk over the memory."""
        seed = self.seed("memory")
        return [self.context.memory.batch(position, 1, seed=seed)[0] for position in range(start, stop)]


def memory_share(context: Context) -> int:
    """Memory records that Recurrent-KIF's outer learner sees while a task is learned."""
    if context.index == 0:
        return 0
    fusion = fusion_config(context.config.fusion)
    rounds = math.ceil(context.steps / fusion.inner_steps)
    return rounds * fusion.outer_steps * context.config.outer.batch_size

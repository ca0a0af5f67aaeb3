"""Replay: records of earlier tasks in every batch. The baseline for all other methods."""

from __future__ import annotations

import math

from rkif.continual.config_fusion import fusion_config
from rkif.continual.methods.sequential import Context, Sequential
from rkif.continual.tasks.records import Item


class Replay(Sequential):
    """Each batch has records of the new task and of the memory; both go into one optimizer step.

    The number of memory records per task equals that of Recurrent-KIF's outer learner in the same number of
    inner steps, distributed evenly. So both methods train on equally many samples of the same memory.
    """

    replays = True

    def batch(self, step: int) -> list[Item]:
        steps = self.context.steps
        return super().batch(step) + self.remembered(
            step * self.share // steps, (step + 1) * self.share // steps
        )

    @property
    def share(self) -> int:
        """Number of memory records per task."""
        return memory_share(self.context)

    def remembered(self, start: int, stop: int) -> list[Item]:
        """Items ``start`` to ``stop`` of the walk over the memory."""
        seed = self.seed("memory")
        return [self.context.memory.batch(position, 1, seed=seed)[0] for position in range(start, stop)]


def memory_share(context: Context) -> int:
    """Number of memory records that Recurrent-KIF's outer learner trains on in the context's task."""
    if context.index == 0:
        return 0
    fusion = fusion_config(context.config.fusion)
    rounds = math.ceil(context.steps / fusion.inner_steps)
    return rounds * fusion.outer_steps * context.config.outer.batch_size

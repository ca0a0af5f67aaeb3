"""Replay mix: records of earlier tasks in every batch. The baseline that any claim must beat."""

from __future__ import annotations

from rkif.continual.config import fusion_config
from rkif.continual.methods.sequential import Sequential
from rkif.continual.tasks import Item


class Replay(Sequential):
    """Every batch of the new task is joined by records from the memory, in one optimizer step.

    There are as many of them as Recurrent-KIF's outer learner would see in the same number of inner steps
    (``outer_steps * outer batch / inner_steps`` a step): over whole rounds both methods take the gradient of
    the same number of samples, from the same memory.
    """

    def batch(self, step: int) -> list[Item]:
        items = super().batch(step)
        if len(self.context.memory):
            walk = range(self._replayed(step), self._replayed(step + 1))
            seed = self.seed("memory")
            items += [self.context.memory.batch(position, 1, seed=seed)[0] for position in walk]
        return items

    def _replayed(self, steps: int) -> int:
        """Memory records seen in so many steps."""
        fusion = fusion_config(self.context.config.fusion)
        return steps * fusion.outer_steps * self.context.config.outer.batch_size // fusion.inner_steps

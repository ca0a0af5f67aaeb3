"""Replay with the number of optimizer steps and samples of Recurrent-KIF."""

from __future__ import annotations

from rkif.continual.config import RunConfig
from rkif.continual.config_fusion import fusion_config
from rkif.continual.methods.replay import Replay


class ReplayEqualSteps(Replay):
    """Q + M optimizer steps per round on the records that :class:`Replay` uses in Q steps.

    The batches are smaller, so a difference from Recurrent-KIF is not caused by the number of steps.
    """

    @staticmethod
    def require(config: RunConfig) -> None:
        fusion = fusion_config(config.fusion)
        if config.training.batch_size * fusion.inner_steps < fusion.inner_steps + fusion.outer_steps:
            raise ValueError(
                "method replay_equal_steps divides the records of Q batches among Q + M steps: "
                f"training.batch_size {config.training.batch_size} is too small for that"
            )

    def train_step(self, step: int) -> float:
        if not len(self.context.memory):
            return super().train_step(step)
        outer_batch = self.context.config.outer.batch_size
        inner = self.context.steps
        records = inner * self.context.config.training.batch_size
        total = inner + self.share // outer_batch
        losses = []
        for part in range(step * total // inner, (step + 1) * total // inner):
            items = self.records(part * records // total, (part + 1) * records // total)
            items += self.remembered(part * self.share // total, (part + 1) * self.share // total)
            self.samples += len(items)
            seed = self.seed("inner", part)
            losses.append(self.inner.step(items, lr_fraction=self.lr_fraction(step), seed=seed))
        return sum(losses) / len(losses)

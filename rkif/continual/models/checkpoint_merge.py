"""The merge of a task's last checkpoints, which replaces a decay of the learning rate.

WSM (arXiv 2507.17634, theorem 3.1): a weighted mean of checkpoints is equivalent to weights of the steps'
updates that decrease over the task. The weights are those of ``rkif fuse --method wsm``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rkif.checkpoint.methods.averages import CheckpointAverage
from rkif.continual.config import CheckpointMergeSettings


class CheckpointMerge:
    """The weighted sum of a task's checkpoints, accumulated while the task is learned.

    Args:
        settings: window, number and shape.
        steps: number of steps of the task.
        period: checkpoints are taken after multiples of this number of steps, and at the task's end.
        parameters: name -> trainable parameter. A float32 sum of each is kept.

    Attributes:
        weights: number of steps -> weight of the checkpoint after them. The last checkpoint is at the task's
            end, the first is ``window * steps`` before it, and the others are equally spaced, rounded up to
            a multiple of the period.
    """

    def __init__(
        self,
        settings: CheckpointMergeSettings,
        steps: int,
        period: int,
        parameters: Mapping[str, Tensor],
    ) -> None:
        self._parameters = parameters
        window = min(round(settings.window * steps), steps - 1)
        count = min(settings.checkpoints, window)
        weights = CheckpointAverage(settings.shape, count).weight if count else (1.0,)
        self.weights: dict[int, float] = {}
        for index, weight in enumerate(weights):
            due = steps - window + index * window // max(count, 1)
            taken = min(-(-due // period) * period, steps)
            self.weights[taken] = self.weights.get(taken, 0.0) + weight
        self._sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}

    @torch.no_grad()
    def add(self, taken: int) -> None:
        """Add the checkpoint after ``taken`` steps, if it has a weight."""
        weight = self.weights.get(taken)
        if weight is not None:
            for name, parameter in self._parameters.items():
                self._sums[name].add_(parameter, alpha=weight)

    @torch.no_grad()
    def finish(self) -> None:
        """Set the parameters to the sum."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._sums[name])

    def tensors(self) -> dict[str, Tensor]:
        """Name -> the sum so far; not copies."""
        return self._sums

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned."""
        for name, tensor in tensors.items():
            self._sums[name].copy_(tensor)

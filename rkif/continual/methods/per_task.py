"""One set of trained parameters per task: no forgetting, if the task of each question is known."""

from __future__ import annotations

import torch

from rkif.continual.config import RunConfig
from rkif.continual.methods.sequential import Sequential


class PerTask(Sequential):
    """Each task starts from the untrained parameters, and is answered with the parameters trained on it."""

    task_aware = True
    sequential = False

    @staticmethod
    def require(config: RunConfig) -> None:
        if config.ema.decay:
            raise ValueError("ema.decay: method per_task starts each task anew; an average would mix tasks")

    @torch.no_grad()
    def begin(self) -> None:
        for name, parameter in self.inner.parameters.items():
            parameter.copy_(self.context.initial[name])

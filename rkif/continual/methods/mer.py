"""Meta-experience replay: Reptile steps over replay batches (Riemer et al., ICLR 2019; arXiv 2508.01908)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rkif.continual.methods.replay import Replay
from rkif.continual.methods.sequential import Context
from rkif.fuser.parameters import parameter_copies
from rkif.fuser.state_names import flatten, section


class Mer(Replay):
    """Replay in every batch; after every ``mer.every`` steps ``theta = start + mer.rate * (theta - start)``.

    ``start`` is the parameters after the previous interpolation. The last interpolation of a task may follow
    fewer steps.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._start = parameter_copies(self.inner.parameters)

    @property
    def period(self) -> int:
        return self.context.config.mer.every

    def train_step(self, step: int) -> float:
        loss = super().train_step(step)
        settings = self.context.config.mer
        if (step + 1) % settings.every == 0 or step + 1 == self.context.steps:
            self._interpolate(settings.rate)
        return loss

    @torch.no_grad()
    def _interpolate(self, rate: float) -> None:
        for name, parameter in self.inner.parameters.items():
            start = self._start[name]
            parameter.copy_(start.add_(parameter - start, alpha=rate))

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | flatten({"start": self._start})

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        for name, tensor in section(tensors, "start").items():
            self._start[name].copy_(tensor)

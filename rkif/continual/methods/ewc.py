"""Elastic weight consolidation, online (Kirkpatrick et al., PNAS 2017; Schwarz et al., ICML 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from rkif.continual.methods.sequential import Context, Sequential
from rkif.fuser.parameters import parameter_copies
from rkif.fuser.state_names import flatten, section

RECORDS = 64  # number of training records from which a task's Fisher information is estimated


class Ewc(Sequential):
    """Fine-tuning with a quadratic penalty around the parameters after the previous task; no memory.

    The loss gets ``strength / 2 * sum(F * (theta - anchor)^2)``. F is the empirical Fisher information: the
    mean of the squared gradient over single records, summed over the tasks so far. Each task's F is divided
    by its mean, so that ``ewc.strength`` has a similar effect on any model.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._fisher = section(context.previous_task_state, "fisher")
        self._anchor = section(context.previous_task_state, "anchor")
        device = next(iter(self.inner.parameters.values())).device
        for part in (self._fisher, self._anchor):
            part.update({name: tensor.to(device) for name, tensor in part.items()})

    @torch.no_grad()
    def before_clip(self) -> None:
        for name, fisher in self._fisher.items():
            parameter = self.inner.parameters[name]
            if parameter.grad is not None:  # a parameter without gradient does not move
                pull = fisher * (parameter - self._anchor[name])
                parameter.grad.add_(pull, alpha=self.context.config.ewc.strength)

    def finish(self) -> None:
        if self.context.index + 1 == len(self.context.tasks):
            return  # there is no later task
        squares = {name: torch.zeros_like(p) for name, p in self.inner.parameters.items()}
        for record in range(RECORDS):
            items = self.records(record, record + 1)
            self.samples += len(items)
            self.inner.gradient(items, seed=self.seed("fisher", record))
            for name, parameter in self.inner.parameters.items():
                if parameter.grad is not None:
                    squares[name] += parameter.grad.square()
            self.inner.zero_grad()
        count = sum(square.numel() for square in squares.values())
        mean = sum(float(square.sum()) for square in squares.values()) / count
        for name, square in squares.items():
            earlier = self._fisher.get(name, torch.zeros_like(square))
            self._fisher[name] = earlier + square / (mean or 1.0)
        self._anchor = parameter_copies(self.inner.parameters)

    def task_state(self) -> dict[str, Tensor]:
        return flatten({"fisher": self._fisher, "anchor": self._anchor})

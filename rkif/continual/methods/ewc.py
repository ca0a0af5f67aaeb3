"""Elastic weight consolidation, online (Kirkpatrick et al., PNAS 2017; Schwarz et al., ICML 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from rkif.continual.methods.sequential import Context, Sequential, strip_prefix

RECORDS = 64  # of the task's training records, of which the Fisher information is estimated


class Ewc(Sequential):
    """Plain fine-tuning with a spring to where the task before ended; no memory.

    The spring of a parameter is as stiff as its Fisher information, the mean over single records of the
    square of its gradient (the empirical Fisher), summed over the tasks so far. Each task's is divided by its
    mean, so that ``ewc.strength`` means much the same on any model. The loss gets
    ``strength / 2 * sum(F * (theta - anchor)^2)``.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._fisher = strip_prefix(context.previous_task_state, "fisher.")
        self._anchor = strip_prefix(context.previous_task_state, "anchor.")
        device = next(iter(self.inner.parameters.values())).device
        for part in (self._fisher, self._anchor):
            part.update({name: tensor.to(device) for name, tensor in part.items()})

    @torch.no_grad()
    def before_clip(self) -> None:
        for name, fisher in self._fisher.items():
            parameter = self.inner.parameters[name]
            if parameter.grad is not None:  # or it does not move anyway
                pull = fisher * (parameter - self._anchor[name])
                parameter.grad.add_(pull, alpha=self.context.config.ewc.strength)

    def finish(self) -> None:
        if self.context.index + 1 == len(self.context.tasks):
            return  # nobody will be held
        squares = {name: torch.zeros_like(p) for name, p in self.inner.parameters.items()}
        for number in range(RECORDS):
            items = self.records(number, number + 1)
            self.samples += len(items)
            self.inner.gradient(items, seed=self.seed("fisher", number))
            for name, parameter in self.inner.parameters.items():
                if parameter.grad is not None:
                    squares[name] += parameter.grad.square()
            self.inner.zero_grad()
        count = sum(square.numel() for square in squares.values())
        mean = sum(float(square.sum()) for square in squares.values()) / count
        for name, square in squares.items():
            earlier = self._fisher.get(name, torch.zeros_like(square))
            self._fisher[name] = earlier + square / (mean or 1.0)
        self._anchor = {name: p.detach().clone() for name, p in self.inner.parameters.items()}

    def task_state(self) -> dict[str, Tensor]:
        state = {f"fisher.{name}": tensor for name, tensor in self._fisher.items()}
        return state | {f"anchor.{name}": tensor for name, tensor in self._anchor.items()}

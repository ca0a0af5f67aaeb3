"""FOREVER: replay at intervals that grow with the distance the parameters have moved (arXiv 2601.03938)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rkif.continual.methods.sequential import Context, Sequential
from rkif.fuser.parameters import parameter_copies
from rkif.fuser.state_names import flatten, section
from rkif.lora import factor_pairs

DAYS = (1, 2, 4, 7, 15, 30)  # days of the first replays; each later one has twice the day of the previous


class Forever(Sequential):
    """Plain fine-tuning, interrupted by passes over the memory at growing intervals.

    The time of a task is the sum of the norms ``D`` of its updates. A day is the time of the first
    ``forever.day`` steps. After 1, 2, 4, 7, 15, 30, 60, ... days, ``forever.epochs`` passes over the memory
    follow, with the loss ``cross-entropy + beta * |theta - anchor|^2``. Here ``anchor`` is the parameters
    before the task, ``beta = pull * clip(1 + gamma * (r - 1), 0.5, 3)``, and ``r`` is the mean of ``D`` since
    the last replay, divided by its mean in the first day. The published value of ``gamma`` is not known.
    """

    replays = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._anchor = parameter_copies(self.inner.parameters)
        self._day = 0.0  # the time of the first day; known at its end
        self._time = 0.0
        self._replays = 0
        self._since = (0.0, 0)  # time and steps since the last replay
        self._beta: float | None = None  # None unless the memory is being replayed

    def train_step(self, step: int) -> float:
        before = parameter_copies(self.inner.parameters)
        loss = super().train_step(step)
        moved = update_norm(before, self.inner.parameters)
        self._time += moved
        self._since = (self._since[0] + moved, self._since[1] + 1)
        if step + 1 == self.context.config.forever.day:
            self._day = self._time
        known = step + 1 >= self.context.config.forever.day
        if known and len(self.context.memory) and self._time >= review_day(self._replays) * self._day:
            self._replay(step)
        return loss

    def _replay(self, step: int) -> None:
        settings, memory = self.context.config.forever, self.context.memory
        time, steps = self._since
        ratio = (time / steps) / (self._day / settings.day) if self._day else 1.0
        self._beta = settings.pull * min(max(1 + settings.gamma * (ratio - 1), 0.5), 3.0)
        size = self.context.config.outer.batch_size
        batches = math.ceil(settings.epochs * len(memory) / size)
        for index in range(self._replays * batches, (self._replays + 1) * batches):
            items = memory.batch(index, size, seed=self.seed("memory"))
            self.samples += len(items)
            self.inner.step(
                items,
                lr_fraction=self.lr_fraction(step),
                seed=self.seed("replay", index),
                before_clip=self.before_clip,
            )
        self._beta, self._since = None, (0.0, 0)
        self._replays += 1

    @torch.no_grad()
    def before_clip(self) -> None:
        if self._beta is not None:
            for name, parameter in self.inner.parameters.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - self._anchor[name], alpha=2 * self._beta)

    def tensors(self) -> dict[str, Tensor]:
        clock = torch.tensor([self._day, self._time, *self._since, self._replays], dtype=torch.float64)
        return super().tensors() | flatten({"anchor": self._anchor}) | {"clock": clock}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        for name, tensor in section(tensors, "anchor").items():
            self._anchor[name].copy_(tensor)
        self._day, self._time, time, steps, replays = tensors["clock"].tolist()
        self._since, self._replays = (time, int(steps)), int(replays)


def review_day(replays: int) -> int:
    """The day of the next replay after ``replays`` replays."""
    beyond = replays - len(DAYS) + 1
    return DAYS[replays] if beyond <= 0 else DAYS[-1] * 2**beyond


@torch.no_grad()
def update_norm(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of an update, in which LoRA's factors are replaced by their product.

    The norm of the factors' update would change if A was multiplied and B divided by the same number. For
    rank r, the norm of ``B1 A1 - B0 A0 = [B1, B0] [A1; -A0]`` needs only products of size 2r x 2r.
    """
    pairs = factor_pairs(before)
    squares = 0.0
    for a, b in pairs:
        left = torch.cat([after[b], before[b]], 1).double()
        right = torch.cat([after[a], -before[a]], 0).double()
        squares += float(((left.T @ left) * (right @ right.T)).sum())
    factors = {name for pair in pairs for name in pair}
    for name in before.keys() - factors:
        squares += float((after[name].double() - before[name].double()).square().sum())
    return math.sqrt(max(squares, 0.0))

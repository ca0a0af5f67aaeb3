"""TaSL: skill units are identified once per task, and merged at its end (Feng et al., ACL 2024)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import rkif_kernels
from rkif.config import FusionConfig
from rkif.continual.config import RunConfig
from rkif.continual.methods.sequential import Context, Sequential
from rkif.continual.methods.unit_interval import to_unit_interval
from rkif.fuser.importance import Importance
from rkif.fuser.parameters import parameter_copies
from rkif.fuser.state_names import flatten, section

SHARE = 0.2  # fraction of the units that are important, for the new and for the earlier tasks
NEW = 0.3  # weight of the new task for units important to both, and in the score history


class Tasl(Sequential):
    """Plain fine-tuning; then each tensor is kept, restored, or mixed with its value before the task.

    A unit is a tensor. Its score is the mean of sensitivity times uncertainty, scaled to [0, 1] over the
    units. The top fifth of the units is important. A unit important only to the new task keeps its new value;
    one important only to earlier tasks is restored. A unit important to both becomes 0.3 new + 0.7 old, and
    any other the mean. The constants are those of the published code. There is no memory.
    """

    @staticmethod
    def require(config: RunConfig) -> None:
        if config.ema.decay:
            raise ValueError("ema.decay: method tasl merges at the end of a task; an average undoes that")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._importance = Importance(self.inner.parameters, FusionConfig.release())
        self._before = parameter_copies(self.inner.parameters)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=next(iter(self._before.values())).device)
        self._history = context.previous_task_state.get("history")

    def before_step(self) -> None:
        values = list(self.inner.parameters.values())
        self._importance.update(values, [value.grad for value in values], self._nonfinite)

    @torch.no_grad()
    def finish(self) -> None:
        units = torch.stack([score.mean().cpu() for score in self._importance.score_copies().values()])
        new = to_unit_interval({"units": units})["units"]
        if self._history is None:
            self._history = new
            return
        old = self._history
        for position, (name, parameter) in enumerate(self.inner.parameters.items()):
            weight = {(True, True): NEW, (True, False): 1.0, (False, True): 0.0, (False, False): 0.5}[
                bool(_important(new)[position]), bool(_important(old)[position])
            ]
            parameter.copy_(torch.lerp(self._before[name], parameter, weight))
        self._history = to_unit_interval({"units": NEW * new + (1 - NEW) * old})["units"]

    def task_state(self) -> dict[str, Tensor]:
        return {} if self._history is None else {"history": self._history}

    def tensors(self) -> dict[str, Tensor]:
        state = flatten({"before": self._before, "importance": self._importance.tensors()})
        return super().tensors() | state

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        for name, tensor in section(tensors, "before").items():
            self._before[name].copy_(tensor)
        self._importance.load_tensors(section(tensors, "importance"))


def _important(units: Tensor) -> Tensor:
    k = rkif_kernels.order_statistic_k(len(units), SHARE)
    return units > units.sort().values[k]

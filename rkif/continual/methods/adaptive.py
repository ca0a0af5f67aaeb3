"""Soft weights in place of masks: the "adaptive" ablation of Recurrent-KIF."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rkif.continual.methods.merging import Merging
from rkif.continual.methods.sequential import Context
from rkif.continual.methods.unit_interval import to_unit_interval
from rkif.fuser.importance import Importance
from rkif.fuser.state_names import flatten, section


class Adaptive(Merging):
    """``w * tau_in + (1 - w) * tau_out`` for each element, where ``w`` is the softmax of the two importances.

    Each learner's scores are scaled to [0, 1] over all parameters, because raw scores are so small that every
    weight would be 1/2. They are then divided by ``adaptive.temperature``. Source: the ablation in Feng et
    al. (ACL 2025), section 5, and the published code.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._importance = [Importance(self.parameters, self.fusion) for _ in range(2)]
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=next(iter(self.base.values())).device)
        self._weights: dict[str, Tensor] = {}

    def observe(self) -> None:
        values = list(self.parameters.values())
        side = self._importance[1 if self.stopped else 0]
        side.update(values, [value.grad for value in values], self._nonfinite)

    def end_round(self, steps: range) -> None:
        inner, outer = (to_unit_interval(side.score_copies()) for side in self._importance)
        temperature = self.context.config.adaptive.temperature
        self._weights = {name: ((inner[name] - outer[name]) / temperature).sigmoid() for name in inner}
        super().end_round(steps)
        if self.fusion.clear_inner:
            self._importance[0].clear()
        if self.fusion.clear_outer:
            self._importance[1].clear()

    def merge(self, name: str, inner: Tensor, outer: Tensor) -> Tensor:
        weight = self._weights[name]
        return weight * inner + (1 - weight) * outer

    def tensors(self) -> dict[str, Tensor]:
        state = super().tensors()
        for side, importance in enumerate(self._importance):
            state |= flatten({f"importance{side}": importance.tensors()})
        return state

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        for side, importance in enumerate(self._importance):
            importance.load_tensors(section(tensors, f"importance{side}"))

"""What one learner has found out about the importance of every parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import rkif_kernels
from rkif.config import FusionConfig
from rkif.params import arena
from rkif_kernels import Scores


class Importance:
    """Smoothed sensitivity S, and uncertainty U where the config uses it, of a list of parameters.

    The inner and the outer learner each have one. Both start at zero.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: FusionConfig) -> None:
        self._config = config
        self._names = list(parameters)
        shapes = [parameter.shape for parameter in parameters.values()]
        device = next(iter(parameters.values())).device
        self._flat: dict[str, Tensor] = {}
        self._views: dict[str, list[Tensor]] = {}
        for part in ("sensitivity", "uncertainty") if config.uses_uncertainty else ("sensitivity",):
            self._flat[part], self._views[part] = arena(shapes, config.state_dtype, device)

    def update(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], nonfinite: Tensor
    ) -> None:
        """Take in one step: importance of the weights as they are, under these gradients (None is zero)."""
        rkif_kernels.update_importance_(
            parameters,
            gradients,
            self._views["sensitivity"],
            self._views.get("uncertainty"),
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            order=self._config.order,
            nonfinite=nonfinite,
            names=self._names,
        )

    def clear(self) -> None:
        for flat in self._flat.values():
            flat.zero_()

    @property
    def scores(self) -> Scores:
        """The scores, without a copy."""
        return Scores(self._views["sensitivity"], self._views.get("uncertainty"))

    def score_copies(self) -> dict[str, Tensor]:
        """Name -> float32 scores of the parameter's shape, as copies."""
        copies = [s.to(torch.float32, copy=True) for s in self._views["sensitivity"]]
        if "uncertainty" in self._views:
            for copy, u in zip(copies, self._views["uncertainty"], strict=True):
                copy.mul_(u.float())
        return dict(zip(self._names, copies, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """The key "part.name" -> the state itself, not a copy."""
        return {
            f"{part}.{name}": view
            for part, views in self._views.items()
            for name, view in zip(self._names, views, strict=True)
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the state that :meth:`tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

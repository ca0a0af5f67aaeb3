"""DARE: drop and rescale (Yu et al., "Language Models are Super Mario", ICML 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from rkif.continual.config import RunConfig
from rkif.continual.config_fusion import fusion_config
from rkif.continual.methods.merging import Merging


class Dare(Merging):
    """Keep each element of a task vector with probability ``fusion.density``, divided by the density.

    The two sparse vectors are averaged.
    """

    @staticmethod
    def require(config: RunConfig) -> None:
        if fusion_config(config.fusion).density == 0:
            raise ValueError("method dare divides by fusion.density, which is 0")

    def merge(self, name: str, inner: Tensor, outer: Tensor) -> Tensor:
        kept = [
            torch.where(self._drawn(name, side, vector) < self.fusion.density, vector, 0.0)
            for side, vector in (("inner", inner), ("outer", outer))
        ]
        return (kept[0] + kept[1]) / (2 * self.fusion.density)

    def _drawn(self, name: str, side: str, vector: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed("dare", self.round, name, side))
        return torch.rand(vector.shape, generator=generator).to(vector.device)

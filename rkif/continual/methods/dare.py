"""DARE: drop and rescale (Yu et al., "Language Models are Super Mario", ICML 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from rkif.continual.methods.merging import Merging
from rkif.continual.methods.sequential import Context


class Dare(Merging):
    """Each element of a task vector is kept with probability ``fusion.density`` and divided by it.

    What is left of the two vectors is averaged.

    Raises:
        ValueError: density 0, which leaves nothing to rescale.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        if self.fusion.density == 0:
            raise ValueError("dare needs a density above 0")

    def merge(self, name: str, inner: Tensor, outer: Tensor) -> Tensor:
        kept = [
            torch.where(self._drawn(name, side, vector) < self.fusion.density, vector, 0.0)
            for side, vector in (("inner", inner), ("outer", outer))
        ]
        return (kept[0] + kept[1]) / (2 * self.fusion.density)

    def _drawn(self, name: str, side: str, vector: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed("dare", self.round, name, side))
        return torch.rand(vector.shape, generator=generator).to(vector.device)

"""TIES: trim, elect signs, merge (Yadav et al., "TIES-Merging", NeurIPS 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

import rkif_kernels
from rkif.continual.methods.merging import Merging
from rkif_kernels import Scores, elect_signs


class Ties(Merging):
    """Keep the fraction ``fusion.density`` of each task vector by magnitude, tensor by tensor; then merge.

    If signs differ, the element of greater magnitude is the result; if they agree, the mean.
    """

    def merge(self, name: str, inner: Tensor, outer: Tensor) -> Tensor:
        inner, outer = self._trimmed(inner), self._trimmed(outer)
        return agreeing_mean(inner, outer)

    def _trimmed(self, vector: Tensor) -> Tensor:
        magnitude = vector.abs()
        threshold = rkif_kernels.score_thresholds(Scores([magnitude]), density=self.fusion.density)
        return torch.where(magnitude > threshold, vector, 0.0)


def agreeing_mean(inner: Tensor, outer: Tensor) -> Tensor:
    """The mean, per element, of the values whose sign equals the sign of their sum."""
    first, second = elect_signs(inner, outer)
    total = torch.where(first, inner, 0.0) + torch.where(second, outer, 0.0)
    return total / (first.to(total.dtype) + second).clamp(min=1)

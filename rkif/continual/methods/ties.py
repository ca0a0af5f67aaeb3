"""TIES: trim, elect signs, merge (Yadav et al., "TIES-Merging", NeurIPS 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

import rkif_kernels
from rkif.checkpoint.sign_election import elect_signs
from rkif.continual.methods.merging import Merging
from rkif_kernels import Scores


class Ties(Merging):
    """Each task vector keeps the share ``fusion.density`` of its largest elements, tensor by tensor.

    Where the two disagree about the sign, the larger wins; those that agree are averaged.
    """

    def merge(self, name: str, inner: Tensor, outer: Tensor) -> Tensor:
        inner, outer = self._trimmed(inner), self._trimmed(outer)
        return agreeing_mean(inner, outer)

    def _trimmed(self, vector: Tensor) -> Tensor:
        magnitude = vector.abs()
        threshold = rkif_kernels.score_thresholds(Scores([magnitude]), density=self.fusion.density)
        return torch.where(magnitude > threshold, vector, 0.0)


def agreeing_mean(inner: Tensor, outer: Tensor) -> Tensor:
    """The mean of those elements of two task vectors that have the sign of their sum."""
    first, second = elect_signs(inner, outer)
    total = torch.where(first, inner, 0.0) + torch.where(second, outer, 0.0)
    return total / (first.to(total.dtype) + second).clamp(min=1)

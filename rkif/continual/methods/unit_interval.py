"""Scores scaled to [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def to_unit_interval(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map scores linearly, so that the smallest of all tensors becomes 0 and the largest 1.

    Args:
        scores: name -> finite scores, any shapes; at least one.

    Returns:
        New tensors of the same shapes. If all scores are equal, all become 0.
    """
    low = min(float(score.min()) for score in scores.values())
    high = max(float(score.max()) for score in scores.values())
    width = max(high - low, torch.finfo(torch.float32).tiny)
    return {name: (score - low) / width for name, score in scores.items()}

"""Sign election of TIES (Yadav et al., "TIES-Merging", NeurIPS 2023)."""

from __future__ import annotations

import torch
from torch import Tensor


def elect_signs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Which elements of two task vectors have the sign of their sum; the sign of 0 is positive.

    Args:
        first, second: of one shape and floating dtype.

    Returns:
        Two bool tensors of that shape. An element that is 0 agrees with neither sign.
    """
    positive = first + second >= 0
    agreeing = [torch.where(positive, vector > 0, vector < 0) for vector in (first, second)]
    return agreeing[0], agreeing[1]

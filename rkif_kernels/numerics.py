"""Rounding of constants on the host."""

from __future__ import annotations

import numpy as np

FLOAT32_MAX = float(np.finfo(np.float32).max)


def float32(value: float) -> float:
    """``value`` rounded to float32 once, as all constants of all backends are.

    Negative zero becomes positive zero, so that a weight of zero does not affect a result's sign. Values
    beyond the range of float32 become infinite.
    """
    with np.errstate(over="ignore"):
        return float(np.float32(value)) + 0.0

"""How host-side constants are rounded."""

from __future__ import annotations

import numpy as np


def float32(value: float) -> float:
    """``value`` rounded to float32 once: every constant of the arithmetic, on every backend.

    A negative zero becomes a positive one, so that a weight of zero cannot decide a result's sign. Values
    beyond float32 become infinite.
    """
    with np.errstate(over="ignore"):
        return float(np.float32(value)) + 0.0

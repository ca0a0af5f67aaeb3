"""The one rounding that host-side constants go through."""

from __future__ import annotations

import torch


def float32(value: float) -> float:
    """``value`` rounded to float32 once: every constant of the arithmetic, on every backend."""
    return torch.tensor(value, dtype=torch.float64).to(torch.float32).item()

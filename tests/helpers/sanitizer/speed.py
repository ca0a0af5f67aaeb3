"""Faster versions, with the same results, of the two parts of ttsem that took most of its time."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from ttsem import mlir
from ttsem.ops import OPS


def speed_up() -> None:
    """Parse every kernel once, and compute cumulative sums of integers by numpy."""
    mlir.parse = functools.cache(mlir.parse)
    scan = OPS["tt.scan"]

    def cumulative_sum(interp: Any, op: Any, args: Any) -> Any:
        combine = [inner.name for inner in op.regions[0].blocks[0].ops]
        if combine != ["arith.addi", "tt.scan.return"] or op.attrs["reverse"]:
            return scan(interp, op, args)  # one step for each element
        values = np.asarray(args[0])
        return [np.cumsum(values, axis=op.attrs["axis"], dtype=values.dtype)]

    OPS["tt.scan"] = cumulative_sum

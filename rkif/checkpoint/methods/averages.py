"""Weighted means of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from rkif.checkpoint.methods.interface import ScanResult, case_counts, require_weights
from rkif.checkpoint.tiles import Tile
from rkif_kernels import FuseStats, OuterFrom, Scope, Scores, require_choice

# The learning rate that an average emulates, from 1 at the start of the window to 0 at its end.
SHAPES: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@dataclass(frozen=True)
class _Average:
    """Base class of averages: they have no thresholds, so they need no scan."""

    density: ClassVar[float] = 1.0
    scope: ClassVar[Scope | None] = None
    outer_from: ClassVar[OuterFrom] = "base"
    needs_threshold: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    accepts_importance: ClassVar[bool] = False
    rescales: ClassVar[bool] = False

    def threshold_k(self, numel: int) -> int | None:
        return None

    def threshold_ks(self, tensor: str, numel: int) -> list[int]:
        raise AssertionError("an average has no thresholds")


@dataclass(frozen=True)
class Linear(_Average):
    """The weighted mean, or sum, of the models (Wortsman et al. 2022); BASE only gives the layout."""

    weight: tuple[float, ...] = (1.0, 1.0)
    normalize: bool = True

    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        require_weights(self.weight)
        if self.normalize and sum(self.weight) == 0:
            raise ValueError(f"weight must not sum to zero if it is normalized; got {self.weight}")

    @property
    def models(self) -> int:
        return len(self.weight)

    def fuse(self, tile: Tile, scores: Sequence[Scores], scan_result: ScanResult) -> FuseStats:
        weights = [self._weights(name) for name in tile.names]
        return average_tile(tile, tile.models, weights, normalize=self.normalize)

    def _weights(self, tensor: str) -> Sequence[float]:
        """The weight of each model in one tensor."""
        return self.weight


@dataclass(frozen=True)
class CheckpointAverage(_Average):
    """The average of a run's checkpoints, oldest first, that emulates a decay of the learning rate.

    WSM (arXiv 2507.17634, theorem 3.1): with weights ``c_j`` of the checkpoints, the update between
    checkpoint ``i - 1`` and ``i`` has the weight ``sum of c_j over j >= i``. Here that is
    ``f(i / n)`` for ``n`` checkpoints and the shape ``f``, so ``c_j = f(j / n) - f((j + 1) / n)``. They
    sum to 1; for the shape "linear" they are equal.

    Attributes:
        shape: one of SHAPES.
        models: number of checkpoints after the first.
    """

    shape: str = "1-sqrt"
    models: int = 2

    name: ClassVar[str] = "wsm"

    def __post_init__(self) -> None:
        require_choice("shape", self.shape, list(SHAPES))

    @cached_property
    def weight(self) -> tuple[float, ...]:
        """The weight of each checkpoint, including the first."""
        shape, count = SHAPES[self.shape], self.models + 1
        rates = [1.0, *(shape(index / count) for index in range(1, count)), 0.0]
        return tuple(rates[index] - rates[index + 1] for index in range(count))

    def fuse(self, tile: Tile, scores: Sequence[Scores], scan_result: ScanResult) -> FuseStats:
        weights = [self.weight for _ in tile.base]
        stats = average_tile(tile, (tile.base, *tile.models), weights, normalize=False)
        return stats._replace(counts=stats.counts.sum()[None])  # the only case: all


def average_tile(
    tile: Tile, rows: Sequence[Sequence[Tensor]], weights: Sequence[Sequence[float]], *, normalize: bool
) -> FuseStats:
    """Write the weighted sum of ``rows`` to the tile's ``out``, in float32, from left to right.

    Args:
        tile: the tile.
        rows: the parts of each model that is averaged.
        weights: for each part of the tile, the weights of the rows.
        normalize: divide by the sum of the weights.
    """
    counts = torch.zeros_like(case_counts([torch.ones(0, dtype=torch.bool)] * len(tile.models)))
    # Every model selects every element.
    counts[2 if len(tile.models) == 2 else -1] = sum(part.numel() for part in tile.base)
    squared_norms = torch.zeros(len(tile.models) + 1, dtype=torch.float64)
    for index, (out, base) in enumerate(zip(tile.out, tile.base, strict=True)):
        start = base.float()
        first, *others = weights[index]
        mean = rows[0][index].float().mul(first)
        for row, weight in zip(rows[1:], others, strict=True):
            mean.add_(row[index].float() * weight)
        out.copy_(mean.div_(sum(weights[index]) if normalize else 1.0))
        ends: Iterator[Tensor] = (row[index] for row in (*tile.models, tile.out))
        squares = [(end.float() - start).double().square().sum() for end in ends]
        squared_norms += torch.stack(squares).cpu()
    return FuseStats(counts, squared_norms, (torch.empty(0), torch.empty(0)))

"""Task arithmetic and the methods that sparsify task vectors first: TIES, DARE, magnitude pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

import rkif_kernels
from rkif.checkpoint.methods import merging
from rkif.checkpoint.methods.interface import ScanResult, require_weights
from rkif.checkpoint.tiles import Tile
from rkif_kernels import (
    Draws,
    FuseStats,
    OuterFrom,
    Scope,
    Scores,
    TaskVectorRule,
    require_choice,
    require_float32,
    require_fraction,
    require_whole_number,
)

MIN_DIVISOR = 1e-8  # no division by smaller sums of weights, as in mergekit


@dataclass(frozen=True)
class TaskArithmetic:
    """``base + lambda * sum_i w_i * tau_i`` of sparsified task vectors ``tau_i``; sign election is optional.

    Ilharco et al. 2023 (task arithmetic), Yadav et al. 2023 (TIES), Yu et al. 2024 (DARE). By magnitude,
    ``floor(density * n)`` elements of n are kept, at least one; elements tied with the largest dropped one
    are dropped as well. At random, each element is kept with probability ``density``.

    Attributes:
        name: as on the command line.
        sparsification: the criterion for dropping elements; None keeps all.
        consensus: keep only elements with the elected sign (TIES).
        weight: weight of each task vector.
        density: fraction of the elements that is kept.
        normalize: divide by the sum of the weights; with ``consensus``, of those whose sign was elected.
        lambda_: factor of the merged task vector.
        rescale: restore each tensor's L1 norm after elements were dropped at random.
        seed: seed of the random drops, in [0, 2^63).
        scope: "global" or "tensor" for magnitudes, else None.
    """

    name: str
    sparsification: Literal["magnitude", "random"] | None
    consensus: bool
    weight: tuple[float, ...] = (1.0, 1.0)
    density: float = 1.0
    normalize: bool = False
    lambda_: float = 1.0
    rescale: bool = False
    seed: int = 0
    scope: Scope | None = None

    outer_from: ClassVar[OuterFrom] = "base"
    accepts_importance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_weights(self.weight)
        require_fraction("density", self.density)
        require_float32("lambda", self.lambda_)
        if self.scope is not None:
            require_choice("scope", self.scope, get_args(Scope))
        require_whole_number("seed", self.seed, minimum=0, bits=63)

    @property
    def models(self) -> int:
        return len(self.weight)

    @property
    def streams(self) -> bool:
        """Whether a kernel merges all task vectors in one pass over memory: that of two models."""
        return self.models == 2

    @property
    def needs_threshold(self) -> bool:
        return self.sparsification == "magnitude" and self.density not in (0, 1)

    @property
    def rescales(self) -> bool:
        return self.sparsification == "random" and self.rescale

    def threshold_k(self, numel: int) -> int | None:
        return magnitude_k(numel, self.density) if self.needs_threshold else None

    def threshold_ks(self, tensor: str, numel: int) -> list[int]:
        return [magnitude_k(numel, self.density)] * self.models

    def draws(self, tile: Tile) -> Draws:
        """The randomly kept elements. They depend on the seed and the element, not on chunks or files."""
        return Draws(self.density, self.seed, tile.names, tile.starts)

    def absolute_sums(self, tile: Tile) -> Tensor:
        """L1 norms of the task vectors before and after the random drops: float64 [2, models, parts]."""
        if self.streams:
            return rkif_kernels.absolute_sums(tile.base, tile.inner, tile.outer, self.draws(tile))
        return merging.absolute_sums(tile, [self._drawn(tile, part) for part in range(len(tile.base))])

    def fuse(self, tile: Tile, scores: Sequence[Scores], scan_result: ScanResult) -> FuseStats:
        thresholds, scales = (
            values if values is None or values.shape[1] == 1 else values[:, list(tile.tensors)]
            for values in scan_result
        )
        if not self.streams:
            return self._fuse_any_number(tile, thresholds, scales)
        return rkif_kernels.merge_task_vectors_(
            tile.out,
            tile.base,
            tile.inner,
            tile.outer,
            TaskVectorRule(
                (self.weight[0], self.weight[1]), self._factor(self.weight), self.consensus, self.normalize
            ),
            thresholds=thresholds,
            draws=self.draws(tile) if self.sparsification == "random" and self.density < 1 else None,
            scales=scales,
        )

    def _factor(self, weight: Sequence[float]) -> float:
        """Factor of the merged task vector, including the division by the sum of all weights."""
        total = sum(weight)
        divides = self.normalize and not self.consensus and abs(total) >= MIN_DIVISOR
        return self.lambda_ / total if divides else self.lambda_

    def _weights(self, tensor: str) -> Sequence[float]:
        """The weight of each task vector in one tensor."""
        return self.weight

    def _densities(self, tensor: str) -> Sequence[float]:
        """The density of each task vector in one tensor."""
        return [self.density] * self.models

    def _fuse_any_number(self, tile: Tile, thresholds: Tensor | None, scales: Tensor | None) -> FuseStats:
        weights = map(self._weights, tile.names)
        settings = [
            merging.MergeSettings(weight, self._factor(weight), self.consensus, self.normalize)
            for weight in weights
        ]
        parts = range(len(tile.base))
        masks = [self._kept(tile, part, thresholds) for part in parts]
        if scales is not None:
            scales = scales.expand(self.models, len(parts))
        return merging.merge_tile(tile, settings, masks, scales)

    def _kept(self, tile: Tile, part: int, thresholds: Tensor | None) -> list[Tensor]:
        """The kept elements of one part for each model: bool."""
        if self.sparsification == "random":
            return self._drawn(tile, part)
        if thresholds is None:
            return [torch.ones_like(row[part], dtype=torch.bool) for row in tile.models]
        limits = thresholds[:, part if thresholds.shape[1] > 1 else 0].tolist()
        start = tile.base[part].float()
        return [
            (row[part].float() - start).abs() > limit for row, limit in zip(tile.models, limits, strict=True)
        ]

    def _drawn(self, tile: Tile, part: int) -> list[Tensor]:
        return merging.drawn(tile, part, self._densities(tile.names[part]), self.seed)


def magnitude_k(numel: int, density: float) -> int:
    """The k of the threshold above which ``floor(density * numel)`` magnitudes lie, at least one."""
    return numel - max(1, int(Fraction(str(density)) * numel)) - 1

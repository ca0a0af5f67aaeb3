"""Recurrent-KIF on disk: the same bits as :func:`rkif.fuse`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import rkif_kernels
from rkif.checkpoint.methods.interface import ScanResult
from rkif.checkpoint.tiles import Tile
from rkif.config import MergeWeights, merge_weights
from rkif_kernels import FuseStats, OuterFrom, Scope, Scores, require_choice, require_fraction


@dataclass(frozen=True)
class RecurrentKIFMerge:
    """``base + w_in*(inner - base) + w_out*(outer - inner)``, with the settings of :func:`rkif.fuse`.

    The weights of an element depend on which of the two models select it.
    """

    density: float = 0.2
    rule: str | MergeWeights = "paper"
    scope: Scope = "global"
    outer_from: OuterFrom = "inner"

    name: ClassVar[str] = "recurrent_kif"
    models: ClassVar[int] = 2
    streams: ClassVar[bool] = True
    accepts_importance: ClassVar[bool] = True
    rescales: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_fraction("density", self.density)
        merge_weights(self.rule)
        require_choice("scope", self.scope, get_args(Scope))
        require_choice("outer_from", self.outer_from, get_args(OuterFrom))

    @property
    def needs_threshold(self) -> bool:
        return self.density not in (0, 1)

    def threshold_k(self, numel: int) -> int | None:
        if not self.needs_threshold:
            return None
        return rkif_kernels.order_statistic_k(numel, self.density)

    def threshold_ks(self, tensor: str, numel: int) -> list[int]:
        return [rkif_kernels.order_statistic_k(numel, self.density)] * self.models

    def fuse(self, tile: Tile, scores: Sequence[Scores], scan_result: ScanResult) -> FuseStats:
        assert scan_result.thresholds is not None
        thresholds = scan_result.thresholds
        if thresholds.shape[1] > 1:
            thresholds = thresholds[:, list(tile.tensors)]
        return rkif_kernels.fuse_(
            tile.out,
            tile.base,
            tile.inner,
            tile.outer,
            scores[0],
            scores[1],
            thresholds=(thresholds[0].contiguous(), thresholds[1].contiguous()),
            weights=merge_weights(self.rule).cases,
            outer_from=self.outer_from,
        )

"""The interface of a method for the loop over chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rkif.checkpoint.tiles import Tile
from rkif_kernels import FuseStats, OuterFrom, Scope, Scores

EVERYTHING, NOTHING = -torch.inf, torch.inf  # thresholds that need no search


class ScanResult(NamedTuple):
    """The results of a scan.

    Attributes:
        thresholds: float32 [models, 1] or [models, tensors]; None for a method without thresholds.
        scales: float64 [models, tensors]: factors that restore the L1 norms of task vectors after random
            drops; None for 1.
    """

    thresholds: Tensor | None = None
    scales: Tensor | None = None


class Method(Protocol):
    """A method that merges checkpoints chunk by chunk.

    Attributes:
        name: as on the command line.
        models: number of models that it merges, without BASE.
        density: fraction of the elements that each model selects.
        scope: "global" or "tensor" for a method that selects by threshold, else None.
        outer_from: where the task vector of the last model starts: "base", or "inner", the model before it.
        needs_threshold: whether thresholds must be searched before the fusion.
        streams: whether its kernels make one pass over memory, so that tiles may be as large as a chunk.
        accepts_importance: whether it can select by importance.
        rescales: whether it multiplies task vectors by factors that depend on whole tensors.
    """

    @property
    def name(self) -> str: ...
    @property
    def models(self) -> int: ...
    @property
    def density(self) -> float: ...
    @property
    def scope(self) -> Scope | None: ...
    @property
    def outer_from(self) -> OuterFrom: ...
    @property
    def needs_threshold(self) -> bool: ...
    @property
    def streams(self) -> bool: ...
    @property
    def accepts_importance(self) -> bool: ...
    @property
    def rescales(self) -> bool: ...

    def threshold_k(self, numel: int) -> int | None:
        """The k of the threshold among ``numel`` scores, from 0; None if thresholds are not searched.

        A negative k selects every element.
        """

    def threshold_ks(self, tensor: str, numel: int) -> list[int]:
        """The k of each model's threshold in one tensor, if thresholds are searched.

        A negative k selects every element.
        """

    def fuse(self, tile: Tile, scores: Sequence[Scores], scan_result: ScanResult) -> FuseStats:
        """Write the tile's ``out``. ``scores``, one for each model, are compared with the thresholds.

        Returns:
            Counts as :func:`case_counts` makes them (for wsm one count, of all elements), and the squared
            norms of each task vector and of ``out - base``.
        """


def require_weights(weight: Sequence[float]) -> None:
    """Raise ValueError unless all weights are finite in float32."""
    if not all(math.isfinite(torch.tensor(value, dtype=torch.float32)) for value in weight):
        raise ValueError(f"weight must be finite numbers; got {tuple(weight)}")


def case_counts(masks: Sequence[Tensor]) -> Tensor:
    """Count the elements by the models that select them.

    Args:
        masks: bool, one for each model.

    Returns:
        int64: for two models, the counts of :data:`rkif_kernels.CASES`; for any other number, the counts of
        the elements that 0, 1, 2, ... models select.
    """
    if len(masks) == 2:
        first, second = masks
        cases = (first & ~second, second & ~first, first & second, ~(first | second))
        return torch.stack([case.sum() for case in cases])
    selected = sum((mask.to(torch.int64) for mask in masks[1:]), masks[0].to(torch.int64))
    return torch.bincount(selected.flatten(), minlength=len(masks) + 1)

"""The weighted sum of any number of sparsified task vectors, with or without sign election.

For two task vectors the bits are those of :func:`rkif_kernels.merge_task_vectors_`: the same float32
operations in the same order. Only one task vector is in memory at a time, beside a mask of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from rkif.checkpoint.methods.interface import case_counts
from rkif.checkpoint.tiles import Tile
from rkif_kernels import Draws, FuseStats


class MergeSettings(NamedTuple):
    """How the task vectors of one tensor are merged.

    Attributes:
        weight: weight of each task vector.
        factor: factor of the merged task vector.
        consensus: keep only elements that have the sign of the weighted sum (TIES).
        normalize: with consensus, divide an element by the weights of the task vectors that have that sign.
    """

    weight: Sequence[float]
    factor: float
    consensus: bool
    normalize: bool


def merge_tile(
    tile: Tile,
    settings: Sequence[MergeSettings],
    masks: Sequence[Sequence[Tensor]],
    scales: Tensor | None,
) -> FuseStats:
    """Merge the task vectors of a tile, and write its ``out``.

    Args:
        tile: the tile.
        settings: the settings of each part of the tile.
        masks: for each part and model, bool: the elements that are kept.
        scales: float64 [models, parts]; None for 1.
    """
    models = len(tile.models)
    counts = None
    squared_norms = torch.zeros(models + 1, dtype=torch.float64)
    for index, (out, base) in enumerate(zip(tile.out, tile.base, strict=True)):
        start = base.float()
        ends = [row[index] for row in tile.models]
        kept = _Weighted(start, ends, masks[index], settings[index].weight, scales, index)
        fused = start + _merged(kept, settings[index])
        update = fused.to(out.dtype).float() - start  # as stored
        out.copy_(fused)
        part = case_counts(masks[index])
        counts = part if counts is None else counts + part
        squares = [vector.double().square().sum() for vector in (*kept.vectors(), update)]
        squared_norms += torch.stack(squares).cpu()
    assert counts is not None
    return FuseStats(counts, squared_norms, (torch.empty(0), torch.empty(0)))


def absolute_sums(tile: Tile, masks: Sequence[Sequence[Tensor]]) -> Tensor:
    """L1 norms of the task vectors: float64 [2 (all, kept), models, parts]."""
    sums = torch.zeros(2, len(tile.models), len(tile.base), dtype=torch.float64)
    for index, base in enumerate(tile.base):
        for side, row in enumerate(tile.models):
            distance = (row[index].float() - base.float()).abs_()
            sums[0, side, index] = distance.double().sum()
            sums[1, side, index] = (distance * masks[index][side]).double().sum()
    return sums


def drawn(tile: Tile, part: int, densities: Sequence[float], seed: int) -> list[Tensor]:
    """The randomly kept elements of one part, for each model: bool.

    They depend only on the seed, the tensor's name, the element and the model's position. The first two
    models have the same draws as in a merge of two; each further pair has another random stream.
    """
    name, start, numel = tile.names[part], tile.starts[part], tile.base[part].numel()
    masks = []
    for side, density in enumerate(densities):
        pair, inside = divmod(side, 2)
        stream = f"{name}\0{pair}" if pair else name
        mask = (
            torch.ones(numel, dtype=torch.bool)
            if density == 1
            else Draws(density, seed, [stream], [start]).keeps(inside, 0, 0, numel)
        )
        masks.append(mask.to(tile.base[part].device))
    return masks


class _Weighted:
    """The kept, scaled and weighted task vectors of one part; each is computed during iteration."""

    def __init__(
        self,
        start: Tensor,
        ends: Sequence[Tensor],
        masks: Sequence[Tensor],
        weight: Sequence[float],
        scales: Tensor | None,
        part: int,
    ) -> None:
        self._start, self._ends, self._masks, self._weight = start, ends, masks, weight
        self._scales = [1.0] * len(ends) if scales is None else scales[:, part].float().tolist()

    def vectors(self) -> Iterator[Tensor]:
        """The complete task vectors, without masks, scales and weights."""
        for end in self._ends:
            yield end.float() - self._start

    def __iter__(self) -> Iterator[Tensor]:
        parts = zip(self.vectors(), self._masks, self._scales, self._weight, strict=True)
        for vector, mask, scale, weight in parts:
            yield torch.where(mask, vector, 0.0).mul_(scale).mul_(weight)


def _merged(weighted: _Weighted, settings: MergeSettings) -> Tensor:
    total = reduce(torch.add, weighted)
    if not settings.consensus:
        return total.mul_(settings.factor)
    positive = total >= 0
    merged = divisor = None
    for vector, weight in zip(weighted, settings.weight, strict=True):
        agrees = torch.where(positive, vector > 0, vector < 0)
        part, share = torch.where(agrees, vector, 0.0), agrees * weight
        merged = part if merged is None else merged + part
        divisor = share if divisor is None else divisor + share
    assert merged is not None
    assert divisor is not None
    if settings.normalize:
        merged /= torch.where(divisor == 0, 1.0, divisor)
    return merged.mul_(settings.factor)

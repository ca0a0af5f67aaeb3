"""A fusion in groups of tensors: inputs may be in host memory, and the base may be a float32 master."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

import rkif_kernels
from rkif.fuser.importance import Importance
from rkif.fuser.snapshot import Snapshot, iter_groups
from rkif_kernels import CASES, CaseWeights, FuseStats


@torch.no_grad()
def grouped_fusion(
    fused: Snapshot,
    base: Snapshot,
    inner: Snapshot,
    outer: Sequence[Tensor],
    importance: tuple[Importance, Importance],
    *,
    thresholds: tuple[Tensor, Tensor],
    weights: CaseWeights,
    owned: Collection[int],
    missing: Collection[int],
    names: Sequence[str],
) -> FuseStats:
    """Write the fusion of this process's parts into ``fused``.

    Where ``base`` is wider than the parameters (a float32 master of 16-bit ones), the learners have started
    from its rounded value: with ``start = round(base)``, the result is

        ``base + (w_in*(inner - start) + w_out*(outer - inner))``

    computed as ``((start + w_in*(inner - start)) + w_out*(outer - inner)) + (base - start)`` in float32. So
    an element that neither learner changes keeps its master, and rounding errors do not accumulate over
    rounds.

    Args:
        fused: mutated, of base's shapes and dtypes.
        base, inner, outer: the parameters at the round's start, and both learners' results.
        importance, thresholds: of the inner and the outer learner.
        weights: of the four cases, see :func:`rkif_kernels.fuse_`.
        owned: indices of the tensors that this process counts.
        missing: indices of the tensors that take no part; they keep their values in ``outer``.
        names: of all parameters, for errors.

    Returns:
        Counts and squared norms of the tensors that this process counts, and the thresholds.
    """
    device = thresholds[0].device
    counts = torch.zeros(len(CASES), dtype=torch.int64, device=device)
    squared_norms = torch.zeros(3, dtype=torch.float64, device=device)
    for indices, (masters, middles) in iter_groups([base, inner]):
        ends = [outer[index] for index in indices]
        starts = [master.to(end.dtype) for master, end in zip(masters, ends, strict=True)]
        out = fused.scratch(indices)
        for counted in (True, False):
            places = [
                place
                for place, index in enumerate(indices)
                if (index in owned) == counted and index not in missing
            ]
            if not places:
                continue
            together = [indices[place] for place in places]
            sides = [
                side.selection(threshold, together)
                for side, threshold in zip(importance, thresholds, strict=True)
            ]
            rows = [[row[place] for place in places] for row in (out, starts, middles, ends)]
            stats = rkif_kernels.fuse_(
                rows[0],
                rows[1],
                rows[2],
                rows[3],
                sides[0][0],
                sides[1][0],
                thresholds=(sides[0][1], sides[1][1]),
                weights=weights,
                names=[names[index] for index in together],
            )
            if counted:
                counts += stats.counts
                squared_norms += stats.squared_norms
        for place, index in enumerate(indices):
            if index in missing:
                out[place].copy_(ends[place])
        for result, master, start in zip(out, masters, starts, strict=True):
            if master.dtype != start.dtype:
                result.add_(master - start)  # in float32, to which the 16-bit start is promoted
        fused.copy_from(indices, out)
    return FuseStats(counts, squared_norms, thresholds)


def squared_distance(one: Snapshot, other: Snapshot, owned: Collection[int]) -> Tensor:
    """Squared L2 distance of the tensors that this process counts; float64."""
    total = torch.zeros((), dtype=torch.float64)
    for indices, (ends, starts) in iter_groups([one, other]):
        for index, end, start in zip(indices, ends, starts, strict=True):
            if index in owned:
                total += (end.float() - start.float()).double().square().sum().cpu()
    return total

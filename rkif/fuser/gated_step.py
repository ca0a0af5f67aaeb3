"""The gate's part of a fusion: fractions of its step are tried until one is accepted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rkif.distributed.shards import ShardedParameters
from rkif.fuser.snapshot import Snapshot, iter_groups
from rkif.gate import Gatekeeper, GateReport


def take_gated_step(
    gatekeeper: Gatekeeper, shards: ShardedParameters, *, base: Snapshot, fused: Snapshot, outer: Snapshot
) -> GateReport:
    """Let the gate decide which fraction of the step from ``base`` to ``fused`` is taken.

    If a criterion raises, the parameters and the gatekeeper are as before the call.

    Args:
        gatekeeper: tries fractions, and measures the criteria at each.
        shards: the parameters; mutated: they end as ``base + factor * (fused - base)``, computed in float32.
        base: the parameters at the round's start.
        fused: the fusion's result; mutated if the factor is neither 0 nor 1: it is the damped result then.
        outer: the outer learner's result.
    """
    parts = [part.detach() for part in shards.parts()]

    def share(factor: float) -> Iterator[tuple[int, Tensor]]:
        for indices, (starts, ends) in iter_groups([base, fused]):
            for index, start, end in zip(indices, starts, ends, strict=True):
                yield index, start.float() + factor * (end.float() - start.float())

    @torch.no_grad()
    def take(factor: float) -> None:
        if factor in (0.0, 1.0):
            restore(shards, fused if factor else base)
            return
        for index, value in share(factor):
            parts[index].copy_(value)
        shards.invalidate_gathered()

    state = gatekeeper.tensors()
    outer.wait_stream()  # take() writes to the parameters that are being copied
    try:
        with shards.processes.propagate_failure():
            verdict = gatekeeper.judge(take)
    except BaseException:
        restore(shards, outer)
        gatekeeper.load_tensors(state)
        raise
    if verdict.factor not in (0, 1):
        for index, value in share(verdict.factor):
            fused.copy_from([index], [value.to(fused.tensors[index].dtype)])
    return verdict


@torch.no_grad()
def restore(shards: ShardedParameters, snapshot: Snapshot) -> None:
    """Copy a snapshot into the parameters."""
    snapshot.copy_to(shards.parts())
    shards.invalidate_gathered()

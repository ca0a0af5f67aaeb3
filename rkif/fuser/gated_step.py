"""The gate's part of a round: fractions of the fusion's step are tried until one is accepted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rkif.config import FusionConfig
from rkif.distributed.shards import ShardedParameters
from rkif.fuser.grouped_fusion import squared_distance
from rkif.fuser.importance import Importance
from rkif.fuser.observed_steps import Learner
from rkif.fuser.snapshot import Snapshot, iter_groups
from rkif.fuser.state_names import flatten
from rkif.fusion import FusionReport
from rkif.gate import Gatekeeper


class KeptImportance:
    """The importance that is kept from round to round, and with a gate, its copy from the round's start.

    Args:
        importance: learner -> its importance.
        config: the settings.
        gated: whether a gate may undo a round.

    Attributes:
        start: the copy; empty without a gate.
    """

    def __init__(
        self, importance: Mapping[Learner, Importance], config: FusionConfig, *, gated: bool
    ) -> None:
        cleared = {"inner": config.clear_inner, "outer": config.clear_outer}
        self._kept = {
            f"{learner}_importance": one
            for learner, one in importance.items()
            if gated and not cleared[learner]
        }
        self.start = {name: tensor.clone() for name, tensor in self._tensors().items()}

    def store(self) -> None:
        """Copy the importance, at the start of a round."""
        for name, tensor in self._tensors().items():
            self.start[name].copy_(tensor)

    def restore(self) -> None:
        """Return the importance to that of the start of the round."""
        for name, tensor in self._tensors().items():
            tensor.copy_(self.start[name])

    def _tensors(self) -> dict[str, Tensor]:
        return flatten({name: one.tensors() for name, one in self._kept.items()})


def take_gated_step(
    gatekeeper: Gatekeeper,
    shards: ShardedParameters,
    report: FusionReport,
    *,
    base: Snapshot,
    fused: Snapshot,
    outer: Snapshot,
) -> FusionReport:
    """Let the gate decide which fraction of the step from ``base`` to ``fused`` is taken.

    If a criterion raises, the parameters and the gatekeeper are as before the call.

    Args:
        gatekeeper: tries fractions, and measures the criteria at each.
        shards: the parameters; mutated: they end as ``base + factor * (fused - base)``, computed in float32.
        report: the report of the fusion.
        base: the parameters at the round's start.
        fused: the fusion's result; mutated if the factor is neither 0 nor 1: it is the damped result then.
        outer: the outer learner's result.

    Returns:
        The report of the step that was taken.
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
    if verdict.factor == 0:
        return replace(report, norms=report.norms | {"update": 0.0}, applied=False, gate=verdict)
    if verdict.factor != 1:
        for index, value in share(verdict.factor):
            fused.copy_from([index], [value.to(fused.tensors[index].dtype)])
    update = shards.all_reduce_sum(squared_distance(fused, base, shards.owned))
    return replace(report, norms=report.norms | {"update": math.sqrt(float(update))}, gate=verdict)


@torch.no_grad()
def restore(shards: ShardedParameters, snapshot: Snapshot) -> None:
    """Copy a snapshot into the parameters."""
    snapshot.copy_to(shards.parts())
    shards.invalidate_gathered()

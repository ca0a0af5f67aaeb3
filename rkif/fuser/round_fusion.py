"""The fusion of a round: thresholds, merge and report, on one device or over many processes."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rkif.config import FusionConfig, merge_weights
from rkif.fuser.gated_step import restore
from rkif.fuser.grouped_fusion import grouped_fusion
from rkif.fuser.snapshot import Snapshot
from rkif.fusion import FusionReport, report_of, skipped_report
from rkif_kernels import FusionInputs, FusionPlan, MergeRule, capturing

if TYPE_CHECKING:
    from rkif.fuser.fuser import Fuser
    from rkif.fuser.observed_steps import Learner


def fusion_plan(config: FusionConfig, names: list[str]) -> FusionPlan:
    """The plan of all fusions whose parameters are on one device, in one dtype and not sharded."""
    return FusionPlan(
        density=config.density,
        scope=config.scope,
        rule=MergeRule(merge_weights(config.rule).cases),
        names=names,
    )


def require_inner_phase(fuser: Fuser) -> None:
    """Check that the outer phase of the round may begin.

    Raises:
        RuntimeError, ValueError: see :meth:`rkif.Fuser.begin_outer`.
    """
    with fuser._shards.processes.raise_on_any_failure():
        require_no_capture(fuser, "begin_outer")
        if fuser.phase == "outer":
            raise RuntimeError(
                "the outer phase of this round has begun already, by begin_outer() or outer(); end the round "
                "with fuse() or rollback(), or by leaving the block of outer()"
            )
        fuser._watch.require_unchanged(fuser._shards.parts())
        fuser._watch.require_same_trainable()
    if fuser._ledger is not None:
        fuser._ledger.require_position()


def require_complete(fuser: Fuser) -> int:
    """Check that the current round can be fused.

    Returns:
        The number of elements whose importance was not finite in some step.

    Raises:
        RuntimeError, ValueError: see :meth:`rkif.Fuser.fuse`.
    """
    shards = fuser._shards
    with shards.processes.raise_on_any_failure():
        require_no_capture(fuser, "fuse")
        if fuser.phase != "outer":
            raise RuntimeError(
                "fuse() was called in the inner phase; call begin_outer() first, or use `with outer()`"
            )
        fuser._watch.require_unchanged(fuser._shards.parts())
        fuser._steps.add_replayed()
        for learner, observed in fuser._steps.counts.items():
            if observed == 0:
                raise RuntimeError(f"observe() was never called for the {learner} learner in this round")
    seen = fuser._steps.with_gradient
    seen |= {name for name, count in shards.seen_anywhere(seen) if count}
    missing = [name for name in fuser.parameters if name not in seen]
    if missing and fuser.config.missing != "zero":
        others = f" ({len(missing)} parameters had none)" if len(missing) > 1 else ""
        raise ValueError(
            f"parameter {missing[0]!r} had no gradient in any observe() of this round{others}: freeze what "
            "the loss does not use (requires_grad_(False)), or leave it out of such rounds with "
            "FusionConfig(missing='zero')"
        )
    nonfinite = int(shards.max_over_replicas(fuser._nonfinite)[0])
    if nonfinite and fuser.config.nonfinite == "raise":
        raise RuntimeError(
            f"{nonfinite} elements had a non-finite importance |w*g| in this round (NaN or infinite "
            "gradients or weights); nothing was fused. rollback() returns to the round's start"
        )
    return nonfinite


def require_no_capture(fuser: Fuser, method: str) -> None:
    """Raise RuntimeError, which names the method, if a CUDA graph is being captured."""
    if capturing(fuser._nonfinite.device):
        raise RuntimeError(
            f"{method}() was called while a CUDA graph is captured: it changes the fuser's phase, and a "
            "replay runs no Python; capture the steps with observe(), and call it between their replays"
        )


def fuse_round(fuser: Fuser, fused: Snapshot) -> FusionReport:
    """Write the fusion of the current round into ``fused``; parameters and importance are unchanged.

    Without shards, offloading, masks, float32 masters and missing gradients, one pass over memory is enough.
    Otherwise the thresholds over all processes are found first, and then the tensors are fused in groups.
    """
    assert fuser._inner is not None
    shards = fuser._shards
    inner, outer = fuser._importance["inner"], fuser._importance["outer"]
    names = list(fuser.parameters)
    missing = {index for index, name in enumerate(names) if name not in fuser._steps.with_gradient}
    plain = fuser._base_dtypes == fuser._dtypes and not (fuser.config.offload or fuser.config.pack_inner)
    if plain and not shards.sharded and not missing:
        with shards.processes.raise_on_any_failure():
            snapshots = fused.tensors, fuser._base.tensors, fuser._inner.tensors
            inputs = FusionInputs(*snapshots, shards.parts(), inner.scores, outer.scores)
            stats = fuser._plan.fuse(inputs)
        return report_of(names, stats, numel=sum(shards.sizes), scope=fuser.config.scope)
    inner_thresholds = inner.thresholds
    if inner_thresholds is None:
        inner_thresholds = learner_thresholds(fuser, "inner", missing)
    outer_thresholds = learner_thresholds(fuser, "outer", missing)
    with shards.processes.raise_on_any_failure():
        stats = grouped_fusion(
            fused,
            fuser._base,
            fuser._inner,
            [part.detach() for part in shards.parts()],
            (inner, outer),
            thresholds=(inner_thresholds, outer_thresholds),
            weights=merge_weights(fuser.config.rule).cases,
            owned=shards.owned,
            missing=missing,
            names=names,
        )
    # Counts below 2^53 are exact in double.
    summed = shards.all_reduce_sum(torch.cat([stats.counts.double(), stats.squared_norms]))
    stats = stats._replace(counts=summed[:4].long(), squared_norms=summed[4:])
    numel = sum(size for index, size in enumerate(shards.sizes) if index not in missing)
    absent = tuple(names[index] for index in sorted(missing))
    return report_of(names, stats, numel=numel, scope=fuser.config.scope, missing=absent)


def skip_round(fuser: Fuser, nonfinite: int) -> FusionReport:
    """Return the parameters to ``base`` because of non-finite importance; the result is the report."""
    restore(fuser._shards, fuser._base)
    numel = sum(fuser._shards.sizes)
    return skipped_report(list(fuser.parameters), numel, nonfinite, fuser.config.scope)


def learner_thresholds(fuser: Fuser, learner: Learner, missing: Collection[int] = ()) -> Tensor:
    """The exact thresholds of a learner's scores over all processes: float32 [1], or one per parameter.

    The scores of ``missing`` parameters do not count. Under scope="tensor" their thresholds are infinite.
    """
    scores = fuser._importance[learner].scores
    settings: dict[str, Any] = {"density": fuser.config.density, "scope": fuser.config.scope}
    if not missing:
        return fuser._shards.thresholds(scores, **settings)
    present = [index for index in range(len(fuser.parameters)) if index not in missing]
    thresholds = fuser._shards.thresholds(scores, indices=present, **settings)
    if fuser.config.scope == "global":
        return thresholds
    every = torch.full((len(fuser.parameters),), math.inf, device=thresholds.device)
    every[present] = thresholds
    return every

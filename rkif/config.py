"""Settings of a fusion: frozen, validated when they are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from rkif_kernels import (
    STATE_DTYPES,
    CaseWeights,
    Order,
    Scope,
    require_choice,
    require_fraction,
    require_weights,
    require_whole_number,
)

Importance = Literal["sensitivity", "sensitivity_uncertainty"]
Nonfinite = Literal["raise", "skip"]
Missing = Literal["raise", "zero"]


@dataclass(frozen=True)
class MergeWeights:
    """Weights of the inner and the outer task vector, for each set of learners that can select an element.

    Attributes:
        inner_only, outer_only: (inner, outer) weights of an element that one learner selects.
        both, neither: (inner, outer) weights of an element that both learners select, or none.

    Raises:
        ValueError: an entry is not a pair of finite numbers.
    """

    inner_only: tuple[float, float]
    outer_only: tuple[float, float]
    both: tuple[float, float]
    neither: tuple[float, float]

    def __post_init__(self) -> None:
        for field in fields(self):
            pair = getattr(self, field.name)
            require_weights(field.name, pair)
            object.__setattr__(self, field.name, tuple(pair))

    @property
    def cases(self) -> CaseWeights:
        """The four pairs in the order of :data:`rkif_kernels.CASES`."""
        return (self.inner_only, self.outer_only, self.both, self.neither)


# "paper": Recurrent-KIF (Feng et al., ACL 2025). The task vector of the learner that selects, the sum of both
# if both select, nothing elsewhere. "release": its published code, which prunes nothing. "sum": the sum of
# both, without the vector of a learner that does not select where the other does.
RULES = {
    "paper": MergeWeights(inner_only=(1, 0), outer_only=(0, 1), both=(1, 1), neither=(0, 0)),
    "release": MergeWeights(inner_only=(1, 0), outer_only=(0, 1), both=(0.4, 0.6), neither=(0.5, 0.5)),
    "sum": MergeWeights(inner_only=(1, 0), outer_only=(0, 1), both=(1, 1), neither=(1, 1)),
}


def merge_weights(rule: str | MergeWeights) -> MergeWeights:
    """The weights of a rule, by its name; a :class:`MergeWeights` is returned unchanged.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(rule, MergeWeights):
        return rule
    require_choice("rule", rule, list(RULES))
    return RULES[rule]


_SWITCHES = ("clear_inner", "clear_outer", "refresh_outer", "pack_inner", "offload", "fp32_master")


@dataclass(frozen=True)
class FusionConfig:
    """Settings of a round: the measure of importance, the selection, the merge, and the use of memory.

    The defaults are the preset :meth:`release`. On the dev split of the long benchmark (15 tasks, three
    orders, an encoder of 22.7 M parameters with LoRA, 32 steps per task), its final accuracy and its backward
    transfer were higher than those of :meth:`paper` in two of three orders and in the mean. On the short
    benchmark the accuracies differ by less than their deviation. The rows are in
    bench/results/continual.jsonl, the tables in docs/results/continual.md.

    Attributes:
        density: fraction of the elements that each learner selects, in [0, 1].
        rule: "paper", "release", "sum" or a :class:`MergeWeights`.
        scope: one threshold over all parameters ("global") or one for each tensor ("tensor").
        importance: the score of an element: its smoothed sensitivity S ("sensitivity"), or S times its
            uncertainty U ("sensitivity_uncertainty").
        order: sensitivity of first order |w*g|, second order (w*g)^2, or mixed |w*g - (w*g)^2/2|.
        beta1, beta2: factors of exponential smoothing of S and of U, in [0, 1].
        inner_steps, outer_steps: Q and M, numbers of optimizer steps of the two learners in a round.
        clear_inner, clear_outer: whether a learner's importance starts from zero in the next round.
        refresh_outer: whether every round updates the outer importance. False: it is updated until the
            fuser's first fusion and constant after it (an ablation: static importance; not together with
            clear_outer).
        nonfinite: what a fusion does if an importance of the round was not finite. "raise": an error.
            "skip": nothing is fused, and the parameters return to the round's base.
        missing: what a fusion does if a parameter had no gradient in the whole round. "raise": an error.
            "zero": the parameter takes no part, as if it was frozen in this round (not together with
            pack_inner). None: "zero" in a Trainer, "raise" elsewhere.
        state_dtype: storage of S and U, torch.float32 or torch.bfloat16 (or its name).
        pack_inner: when the inner phase ends, replace the inner S and U by a mask of one bit per element
            until the next round: the same results with less memory.
        offload: keep the copies of the parameters (base, the inner learner's result, the fusion's result) in
            host memory: the same results with less GPU memory, but with copies between host and GPU.
        fp32_master: keep the base of bfloat16 and float16 parameters in float32, so that the rounding errors
            of the fusions do not accumulate over rounds.

    Raises:
        ValueError, TypeError: a setting is outside its range; the message names it.
    """

    density: float = 0.2
    rule: str | MergeWeights = "release"
    scope: Scope = "global"
    importance: Importance = "sensitivity_uncertainty"
    order: Order = "first"
    beta1: float = 0.85
    beta2: float = 0.85
    inner_steps: int = 8
    outer_steps: int = 4
    clear_inner: bool = True
    clear_outer: bool = False
    refresh_outer: bool = True
    nonfinite: Nonfinite = "raise"
    missing: Missing | None = None
    state_dtype: torch.dtype = torch.float32
    pack_inner: bool = False
    offload: bool = False
    fp32_master: bool = True

    def __post_init__(self) -> None:
        for name in ("density", "beta1", "beta2"):
            require_fraction(name, getattr(self, name))
        merge_weights(self.rule)
        require_choice("scope", self.scope, get_args(Scope))
        require_choice("importance", self.importance, get_args(Importance))
        require_choice("order", self.order, get_args(Order))
        require_choice("nonfinite", self.nonfinite, get_args(Nonfinite))
        if self.missing is not None:
            require_choice("missing", self.missing, get_args(Missing))
        for name in ("inner_steps", "outer_steps"):
            require_whole_number(name, getattr(self, name), minimum=1)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if self.pack_inner and not self.clear_inner:
            raise ValueError("pack_inner=True discards the inner importance: it needs clear_inner=True")
        if self.pack_inner and self.missing == "zero":
            raise ValueError(
                "pack_inner=True selects before the outer learner's gradients are known: "
                "it needs missing='raise'"
            )
        if self.clear_outer and not self.refresh_outer:
            raise ValueError("refresh_outer=False keeps the outer importance: it needs clear_outer=False")
        if isinstance(self.state_dtype, str):
            object.__setattr__(self, "state_dtype", getattr(torch, self.state_dtype, self.state_dtype))
        if self.state_dtype not in STATE_DTYPES:
            allowed = ", ".join(str(dtype) for dtype in STATE_DTYPES)
            raise ValueError(f"state_dtype must be one of {allowed}; got {self.state_dtype!r}")

    @property
    def uses_uncertainty(self) -> bool:
        return self.importance == "sensitivity_uncertainty"

    @staticmethod
    def paper(**changes: Any) -> FusionConfig:
        """The paper's method: sensitivity, betas 0.55, rule "paper". ``changes`` override settings."""
        return _preset(changes, importance="sensitivity", beta=0.55, rule="paper")

    @staticmethod
    def release(**changes: Any) -> FusionConfig:
        """The released code's method: sensitivity times uncertainty, betas 0.85, rule "release"."""
        return _preset(changes, importance="sensitivity_uncertainty", beta=0.85, rule="release")

    @staticmethod
    def rkif(**changes: Any) -> FusionConfig:
        """The released code's measure with rule "sum", for training with distillation from earlier answers.

        The rounds of "release" average both task vectors where no learner selects, which lowers the
        effective learning rate. Those of "sum" add them, and distillation preserves the earlier answers. In
        a config of ``rkif run``, ``fusion: {preset: rkif}`` also turns both terms of the distillation on.
        """
        return _preset(changes, importance="sensitivity_uncertainty", beta=0.85, rule="sum")


def stored_settings(config: FusionConfig) -> dict[str, Any]:
    """The settings as runs and ledgers store them: without ``missing`` if it is None, as in older files."""
    settings = asdict(config)
    return {name: value for name, value in settings.items() if (name, value) != ("missing", None)}


def _preset(changes: dict[str, Any], *, importance: Importance, beta: float, rule: str) -> FusionConfig:
    settings: dict[str, Any] = {"importance": importance, "beta1": beta, "beta2": beta, "rule": rule}
    return FusionConfig(**settings | changes)

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
)

Importance = Literal["sensitivity", "sensitivity_uncertainty"]
Nonfinite = Literal["raise", "skip"]
Missing = Literal["raise", "zero"]


@dataclass(frozen=True)
class MergeWeights:
    """(inner, outer) weights of the two task vectors, by which learners selected an element.

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
        """The four pairs in the order the kernels take them."""
        return (self.inner_only, self.outer_only, self.both, self.neither)


# "paper": Recurrent-KIF (Feng et al., ACL 2025): one side's update where one side selects, the sum where both
# do, nothing elsewhere. "release": what its published code does, where nothing is pruned.
RULES = {
    "paper": MergeWeights(inner_only=(1, 0), outer_only=(0, 1), both=(1, 1), neither=(0, 0)),
    "release": MergeWeights(inner_only=(1, 0), outer_only=(0, 1), both=(0.4, 0.6), neither=(0.5, 0.5)),
}


def merge_weights(rule: str | MergeWeights) -> MergeWeights:
    """The weights that a rule's name stands for; weights given as numbers are returned unchanged.

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
    """How importance is measured, what is kept, and how the two task vectors are merged.

    The defaults are the release's measure and rule. On the dev split of the long benchmark (15 tasks, three
    orders, a 22.7 M encoder with LoRA, 32 steps a task) they ended above the paper's in two orders of three
    and in the mean, and forgot less; on the short one the two are level. The rows are in
    bench/results/continual.jsonl, the tables in docs/results/continual.md.

    Attributes:
        density: fraction of the parameters each learner selects, in [0, 1].
        rule: "paper", "release" or a :class:`MergeWeights`.
        scope: one threshold over all parameters ("global") or one for each tensor ("tensor").
        importance: score by S ("sensitivity") or S*U ("sensitivity_uncertainty").
        order: sensitivity of first order |w*g|, second order (w*g)^2, or mixed |w*g - (w*g)^2/2|.
        beta1, beta2: smoothing of S and of U, in [0, 1].
        inner_steps, outer_steps: Q and M, optimizer steps of the two learners in a round.
        clear_inner, clear_outer: whether a learner's importance starts from zero in the next round.
        refresh_outer: whether every round re-estimates the outer importance, or a fuser's rounds only do
            until the first fusion, and the others go by what the old tasks needed at that point (an
            ablation: static importance; not together with clear_outer).
        nonfinite: a round that saw a non-finite importance is an error at its fusion ("raise"), or its
            fusion is refused and the parameters return to the round's start ("skip").
        missing: a parameter without a gradient in a whole round is an error at its fusion ("raise"), or it
            has no importance and no part in the fusion, as if it was frozen in this round ("zero"; not
            together with pack_inner). None: "zero" in a Trainer, "raise" elsewhere.
        state_dtype: storage of S and U, torch.float32 or torch.bfloat16 (or its name).
        pack_inner: when the inner phase ends, keep of the inner learner's importance one bit an element,
            whether it is selected, and free S and U until the next round: the same results in less memory.
        offload: keep the copies of the parameters (the round's base, the inner learner's end, the fusion's
            result) in the host's memory: the same results in less of a GPU's, for copies over its bus.
        fp32_master: where parameters are bfloat16 or float16, keep the round's base in float32, so that what
            a fusion's rounding takes away is there again in the next; without it, rounding adds up.

    Raises:
        ValueError, TypeError: a setting outside its range, naming it.
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
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
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
        """The paper's method: smoothed sensitivity, beta 0.55, rule "paper"; with ``changes`` to it."""
        return _preset(changes, importance="sensitivity", beta=0.55, rule="paper")

    @staticmethod
    def release(**changes: Any) -> FusionConfig:
        """The released code's measure: sensitivity times uncertainty, betas 0.85, rule "release"."""
        return _preset(changes, importance="sensitivity_uncertainty", beta=0.85, rule="release")


def stored_settings(config: FusionConfig) -> dict[str, Any]:
    """The settings as runs and ledgers store them: `missing`, which is newer, only if it is given."""
    settings = asdict(config)
    return {name: value for name, value in settings.items() if (name, value) != ("missing", None)}


def _preset(changes: dict[str, Any], *, importance: Importance, beta: float, rule: str) -> FusionConfig:
    settings: dict[str, Any] = {"importance": importance, "beta1": beta, "beta2": beta, "rule": rule}
    return FusionConfig(**settings | changes)

"""Methods that merge three checkpoints: Recurrent-KIF, and the methods it is compared with.

The others have mergekit's names, parameters and defaults. For them INNER and OUTER are two models fine-tuned
from BASE, so both task vectors start from BASE.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

import rkif_kernels
from rkif.checkpoint.tiles import Tile
from rkif.config import MergeWeights, merge_weights
from rkif_kernels import (
    Draws,
    FuseStats,
    OuterFrom,
    Scope,
    Scores,
    TaskVectorRule,
    require_choice,
    require_fraction,
    require_weights,
)

EVERYTHING, NOTHING = -torch.inf, torch.inf  # thresholds that need no search
MIN_DIVISOR = 1e-8  # smaller sums of weights do not divide, as in mergekit


class Method(Protocol):
    """The interface of a method for the loop over chunks.

    Attributes:
        name: as on the command line.
        density: fraction of the elements that each side selects.
        scope: "global" or "tensor" for a method that selects by threshold, else None.
        outer_from: where the outer task vector starts.
        needs_threshold: whether thresholds must be searched before the fusion.
        streams: whether its kernels go over memory once, so that tiles may be as large as a chunk.
        accepts_importance: whether it can select by importance.
        rescales: whether it multiplies task vectors by factors that depend on whole tensors.
    """

    @property
    def name(self) -> str: ...
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
        """The k of the threshold among ``numel`` scores, from 0; None for no search.

        It is negative where every element is selected.
        """

    def fuse(self, tile: Tile, scores: tuple[Scores, Scores], scan_result: ScanResult) -> FuseStats:
        """Write the tile's ``out``; a method that selects by threshold compares ``scores`` with it."""


class ScanResult(NamedTuple):
    """The results of a scan.

    Attributes:
        thresholds: float32 [2, 1] or [2, tensors], of inner and outer; None for a method without.
        scales: float64 [2, tensors], factors of the task vectors after a part was dropped; None for 1.
    """

    thresholds: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True)
class RecurrentKIFMerge:
    """``base + w_in*(inner - base) + w_out*(outer - inner)``, as :func:`rkif.fuse`.

    The weights of an element depend on which sides select it.
    """

    density: float = 0.2
    rule: str | MergeWeights = "paper"
    scope: Scope = "global"
    outer_from: OuterFrom = "inner"

    name: ClassVar[str] = "recurrent_kif"
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

    def fuse(self, tile: Tile, scores: tuple[Scores, Scores], scan_result: ScanResult) -> FuseStats:
        assert scan_result.thresholds is not None
        thresholds = scan_result.thresholds
        if thresholds.shape[1] > 1:
            thresholds = thresholds[:, list(tile.tensors)]
        return rkif_kernels.fuse_(
            tile.out,
            tile.base,
            tile.inner,
            tile.outer,
            *scores,
            thresholds=(thresholds[0].contiguous(), thresholds[1].contiguous()),
            weights=merge_weights(self.rule).cases,
            outer_from=self.outer_from,
        )


@dataclass(frozen=True)
class TaskArithmetic:
    """``base + lambda * sum_i w_i * tau_i`` of sparsified task vectors ``tau_i``; sign election is optional.

    Ilharco et al. 2023 (task arithmetic), Yadav et al. 2023 (TIES), Yu et al. 2024 (DARE). By magnitude
    ``floor(density * n)`` elements of each tensor are kept, at least one; elements tied with the largest
    dropped one are dropped, too. At random each element is kept with probability ``density``.

    Attributes:
        name: as on the command line.
        sparsification: the criterion for dropping elements; None keeps all.
        consensus: keep only elements with the elected sign (TIES).
        weight: of the inner and of the outer task vector.
        density: fraction of the elements that is kept.
        normalize: divide by the sum of the weights; with ``consensus``, of those whose sign was elected.
        lambda_: factor of the merged task vector.
        rescale: restore each tensor's L1 norm after elements were dropped at random.
        seed: of the random choice.
        scope: "global" or "tensor" for magnitudes, else None.
    """

    name: str
    sparsification: Literal["magnitude", "random"] | None
    consensus: bool
    weight: tuple[float, float] = (1.0, 1.0)
    density: float = 1.0
    normalize: bool = False
    lambda_: float = 1.0
    rescale: bool = False
    seed: int = 0
    scope: Scope | None = None

    outer_from: ClassVar[OuterFrom] = "base"
    streams: ClassVar[bool] = True
    accepts_importance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_weights("weight", self.weight)
        require_fraction("density", self.density)
        if not math.isfinite(self.lambda_):
            raise ValueError(f"lambda must be a finite number; got {self.lambda_!r}")
        if self.scope is not None:
            require_choice("scope", self.scope, get_args(Scope))
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64); got {self.seed}")

    @property
    def needs_threshold(self) -> bool:
        return self.sparsification == "magnitude" and self.density not in (0, 1)

    @property
    def rescales(self) -> bool:
        return self.sparsification == "random" and self.rescale

    def threshold_k(self, numel: int) -> int | None:
        if not self.needs_threshold:
            return None
        return numel - max(1, int(Fraction(str(self.density)) * numel)) - 1

    def draws(self, tile: Tile) -> Draws:
        """The randomly kept elements. They depend on the seed and the element, not on chunks or files."""
        return Draws(self.density, self.seed, tile.names, tile.starts)

    def fuse(self, tile: Tile, scores: tuple[Scores, Scores], scan_result: ScanResult) -> FuseStats:
        factor = self.lambda_
        if self.normalize and not self.consensus and abs(sum(self.weight)) >= MIN_DIVISOR:
            factor /= sum(self.weight)
        thresholds, scales = (
            values if values is None or values.shape[1] == 1 else values[:, list(tile.tensors)]
            for values in scan_result
        )
        return rkif_kernels.merge_task_vectors_(
            tile.out,
            tile.base,
            tile.inner,
            tile.outer,
            TaskVectorRule(self.weight, factor, self.consensus, self.normalize),
            thresholds=thresholds,
            draws=self.draws(tile) if self.sparsification == "random" and self.density < 1 else None,
            scales=scales,
        )


@dataclass(frozen=True)
class Linear:
    """The weighted mean, or sum, of inner and outer (Wortsman et al. 2022); BASE only gives the layout."""

    weight: tuple[float, float] = (1.0, 1.0)
    normalize: bool = True

    name: ClassVar[str] = "linear"
    density: ClassVar[float] = 1.0
    scope: ClassVar[Scope | None] = None
    outer_from: ClassVar[OuterFrom] = "base"
    needs_threshold: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    accepts_importance: ClassVar[bool] = False
    rescales: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_weights("weight", self.weight)
        if self.normalize and sum(self.weight) == 0:
            raise ValueError(f"weight must not sum to zero if it is normalized; got {self.weight}")

    def threshold_k(self, numel: int) -> int | None:
        return None

    def fuse(self, tile: Tile, scores: tuple[Scores, Scores], scan_result: ScanResult) -> FuseStats:
        counts = torch.tensor([0, 0, sum(part.numel() for part in tile.base), 0])
        norms = torch.zeros(3, dtype=torch.float64)
        total = sum(self.weight) if self.normalize else 1.0
        for out, base, inner, outer in zip(tile.out, tile.base, tile.inner, tile.outer, strict=True):
            b, i, o = base.float(), inner.float(), outer.float()
            out.copy_(i.mul(self.weight[0]).add_(o * self.weight[1]).div_(total))
            norms += torch.stack([(part.float() - b).double().square().sum() for part in (i, o, out)]).cpu()
        return FuseStats(counts, norms, (torch.empty(0), torch.empty(0)))


_MERGE = ("weight", "normalize", "lambda")
_SPARSIFIED: dict[str, dict[str, Any]] = {
    "ties": {"sparsification": "magnitude", "consensus": True, "normalize": True, "scope": "tensor"},
    "magnitude_prune": {"sparsification": "magnitude", "consensus": False, "scope": "tensor"},
    "dare_linear": {"sparsification": "random", "consensus": False, "rescale": True},
    "dare_ties": {"sparsification": "random", "consensus": True, "rescale": True},
}
SETTINGS: dict[str, tuple[str, ...]] = {
    "recurrent_kif": ("density", "rule", "scope", "outer_from"),
    "linear": ("weight", "normalize"),
    "task_arithmetic": _MERGE,
    "ties": (*_MERGE, "density", "scope"),
    "magnitude_prune": (*_MERGE, "density", "scope"),
    "dare_linear": (*_MERGE, "density", "rescale", "seed"),
    "dare_ties": (*_MERGE, "density", "rescale", "seed"),
}


def make_method(name: str, settings: Mapping[str, Any]) -> Method:
    """The method of that name, with its defaults for settings that are not given.

    Raises:
        TypeError, ValueError: the name is unknown, or the method lacks a setting or rejects its value.
    """
    require_choice("method", name, list(SETTINGS))
    for setting in settings:
        if setting not in SETTINGS[name]:
            raise ValueError(f"{setting} is not a setting of {name}, which has {', '.join(SETTINGS[name])}")
    given = {"lambda_" if setting == "lambda" else setting: value for setting, value in settings.items()}
    if name == "recurrent_kif":
        return RecurrentKIFMerge(**given)
    if name == "linear":
        return Linear(**given)
    if name == "task_arithmetic":
        return TaskArithmetic(name, None, consensus=False, **given)
    return TaskArithmetic(name, **{"density": 0.2, **_SPARSIFIED[name], **given})


def settings_of(method: Method) -> dict[str, Any]:
    """The values of the method's settings, ready for JSON."""
    values = dataclasses.asdict(method)  # type: ignore[call-overload]
    names = SETTINGS[method.name]
    return {name: values["lambda_" if name == "lambda" else name] for name in names}

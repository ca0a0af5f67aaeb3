"""LoRA adapters fused as weight updates B·A, instead of factor by factor.

A fusion of the factors is not a fusion of the updates: the product of two fused factors has cross terms of
both learners, and the average of two products is not the product of two averages. Here the update of each
module is computed, fused element by element, and factorised again. This is slower, discards what exceeds the
rank, and can select only by the magnitude of changes, because gradients are those of the factors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rkif_kernels
from rkif.config import MergeWeights, merge_weights
from rkif.fusion import FusionReport, common_names, report_of, require_finite
from rkif_kernels import (
    CASES,
    Arguments,
    CountingSearch,
    CountingSearches,
    FuseStats,
    OuterFrom,
    Scope,
    Scores,
    magnitudes,
    order_statistic_k,
    require_choice,
    require_fraction,
    require_number,
    require_whole_number,
)

_A = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?A(?P<rest>(\..+)?)$")
_POWER_ITERATIONS = 2


@dataclass(frozen=True)
class DeltaResult:
    """The result of :func:`fuse_delta`.

    Attributes:
        params: name -> fused tensor, in the shapes and dtypes of ``base``.
        report: report of the fusion, whose elements are those of the updates. Under scope="tensor",
            thresholds are by module.
        truncation: module -> error of the factorised update, as a fraction of the fused update's Frobenius
            norm.
    """

    params: dict[str, Tensor]
    report: FusionReport
    truncation: dict[str, float]


@dataclass(frozen=True)
class LoraModule:
    """A weight with the update ``scaling * B @ A``, or a tensor without factors.

    Attributes:
        name: of the module, or of the tensor.
        a: name of the factor A, or of the tensor.
        b: name of the factor B; None for a tensor without factors.
        scaling: the factor of the product.
    """

    name: str
    a: str
    b: str | None
    scaling: float

    def update(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The update, float32 [out, in]; or the tensor without factors itself."""
        if self.b is None:
            return tensors[self.a].detach()
        return (tensors[self.b].detach().float() @ tensors[self.a].detach().float()).mul_(self.scaling)


def fuse_delta(
    base: Mapping[str, Tensor],
    inner: Mapping[str, Tensor],
    outer: Mapping[str, Tensor],
    *,
    scaling: float | Mapping[str, float],
    density: float = 0.2,
    rule: str | MergeWeights = "paper",
    scope: Scope = "global",
    outer_from: OuterFrom = "inner",
) -> DeltaResult:
    """Fuse adapters in delta-weight space: fuse ``scaling * B @ A`` element by element, then factorise it.

    A task vector is the difference of two updates. A learner selects the elements where its magnitude is
    above an exact threshold, over all modules or in each. Tensors without factors (modules_to_save) are fused
    as they are.

    A fused update has full rank, so it is approximated with the adapter's rank. A subspace iteration with QR
    at each step (Halko, Martinsson and Tropp, 2011, algorithm 4.4) starts from the span of the three B. In
    the subspace that it finds, a singular value decomposition gives B and A; each gets the square roots of
    the singular values.

    Memory: the four updates of one module at a time. The last bits of the factors depend on the linear
    algebra library.

    Args:
        base, inner, outer: name -> tensor, as peft names them: "....lora_A.weight" [r, in] and
            "....lora_B.weight" [out, r], also "....lora_A.default.weight"; float32, bfloat16 or float16.
        scaling: the factor of the product, for all modules or by module name; see :func:`lora_scaling`.
        density, rule, scope, outer_from: see :func:`rkif.fuse`.

    Raises:
        TypeError, ValueError: names, shapes, dtypes or devices do not fit together; a value is not a tensor;
            a factor is not a matrix (convolutions); a DoRA magnitude; no module with factors, or one without
            scaling; NaN or infinity in a tensor or in a fused update.
    """
    names = common_names({"base": base, "inner": inner, "outer": outer})
    require_fraction("density", density)
    require_choice("scope", scope, ["global", "tensor"])
    require_choice("outer_from", outer_from, ["inner", "base"])
    weights = merge_weights(rule).cases
    sets = {"base": base, "inner": inner, "outer": outer}
    arguments = Arguments(names)
    for argument, tensors in sets.items():
        arguments.add(argument, [tensors[name] for name in names])
    modules = lora_modules(names, base, scaling)
    for argument, tensors in sets.items():
        require_finite(argument, names, [tensors[name] for name in names])
    triples = _Triples(modules, base, inner, outer, outer_from)
    device = arguments.device
    thresholds = _thresholds(triples, density=density, scope=scope, device=device)
    counts = torch.zeros(len(CASES), dtype=torch.int64, device=device)
    squared_norms = torch.zeros(3, dtype=torch.float64, device=device)
    params: dict[str, Tensor] = {}
    truncation: dict[str, float] = {}
    for index, (module, (start, middle, end)) in enumerate(zip(modules, triples, strict=True)):
        out = torch.empty_like(start)
        limits = [side if scope == "global" else side[index : index + 1] for side in thresholds]
        stats = rkif_kernels.fuse_(
            [out],
            [start],
            [middle],
            [end],
            *triples.scores(start, middle, end),
            thresholds=(limits[0], limits[1]),
            weights=weights,
            outer_from=outer_from,
            names=[module.name],
        )
        counts += stats.counts
        squared_norms += stats.squared_norms
        if module.b is None:
            params[module.a] = out
            continue
        basis = torch.cat([tensors[module.b].detach().float() for tensors in sets.values()], dim=1)
        rank = base[module.a].shape[0]
        if not bool(out.isfinite().all()):
            raise ValueError(f"the fused update of {module.name!r} overflows float32")
        b, a, truncation[module.name] = factorised(out, basis, rank, module.scaling)
        params[module.a], params[module.b] = a.to(base[module.a].dtype), b.to(base[module.b].dtype)
    stats = FuseStats(counts, squared_norms, (thresholds[0], thresholds[1]))
    labels = [module.name for module in modules]
    report = report_of(labels, stats, numel=sum(triples.sizes), scope=scope)
    return DeltaResult({name: params[name] for name in names}, report, truncation)


def lora_scaling(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Module -> factor of B·A in peft: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023).

    Args:
        config: the content of an adapter_config.json, or ``LoraConfig(...).to_dict()``: lora_alpha, r,
            use_rslora, alpha_pattern and rank_pattern. The keys of both patterns are regular expressions for
            modules' names in the adapted model, or for the ends of these names.
        names: names of the adapter's tensors.

    Raises:
        ValueError: a DoRA adapter: its updates depend on the weights to which they are added.
        TypeError, ValueError: lora_alpha or r of a module is missing or out of range.
    """
    if config.get("use_dora"):
        raise ValueError(_NO_DORA)
    scaling = {}
    for match in filter(None, map(_A.match, names)):
        module = match["module"]
        inside = module.removeprefix("base_model.model.")  # the name that peft matches patterns with
        alpha = _of_pattern(config.get("alpha_pattern"), inside, config.get("lora_alpha"))
        rank = _of_pattern(config.get("rank_pattern"), inside, config.get("r"))
        require_number(f"config: lora_alpha of {module!r}", alpha)
        require_whole_number(f"config: r of {module!r}", rank, minimum=1)
        scaling[module] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return scaling


_NO_DORA = (
    "DoRA's update depends on the weights that it is added to (their norms), so it is not a sum of adapters: "
    "fuse it in factor space (rkif.fuse), where magnitudes are parameters like any others"
)


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def lora_modules(
    names: Sequence[str], base: Mapping[str, Tensor], scaling: float | Mapping[str, float]
) -> list[LoraModule]:
    """The modules with factors, then the tensors without.

    Args:
        names: names of the tensors.
        base: name -> tensor; only shapes are read.
        scaling: see :func:`fuse_delta`.

    Raises:
        ValueError: a factor without its partner, or that is no matrix; DoRA; no factors; no scaling.
    """
    modules, taken = [], set()
    for name in names:
        if "lora_magnitude_vector" in name:
            raise ValueError(f"{name!r}: {_NO_DORA}")
        match = _A.match(name)
        if match is None:
            continue
        module = match["module"]
        partner = _partner(match)
        if partner not in base:
            raise ValueError(f"base has {name!r}, but not {partner!r}")
        for factor in (name, partner):
            if base[factor].dim() != 2:
                shape = tuple(base[factor].shape)
                raise ValueError(f"base[{factor!r}] has shape {shape}; factors are matrices")
        if not isinstance(scaling, Mapping):
            factor_scale = float(scaling)
        elif module in scaling:
            factor_scale = float(scaling[module])
        else:
            raise ValueError(f"scaling lacks {module!r}")
        modules.append(LoraModule(module, name, partner, factor_scale))
        taken |= {name, partner}
    if not modules:
        raise ValueError("base has no LoRA factors (....lora_A.weight and ....lora_B.weight)")
    return modules + [LoraModule(name, name, None, 1.0) for name in names if name not in taken]


def factor_pairs(names: Collection[str]) -> list[tuple[str, str]]:
    """The names of the factors A and B of each module with both; DoRA's other tensors are ignored."""
    pairs = ((match.string, _partner(match)) for match in map(_A.match, names) if match)
    return [(a, b) for a, b in pairs if b in names]


def _partner(match: re.Match[str]) -> str:
    """The name of the factor B of a match of a factor A."""
    return f"{match['module']}.lora_{match['kind'] or ''}B{match['rest']}"


class _Triples:
    """The three updates of each module, formed on access."""

    def __init__(
        self,
        modules: Sequence[LoraModule],
        base: Mapping[str, Tensor],
        inner: Mapping[str, Tensor],
        outer: Mapping[str, Tensor],
        outer_from: OuterFrom,
    ) -> None:
        self._modules, self._sets, self._outer_from = modules, (base, inner, outer), outer_from
        self.sizes = [
            base[one.a].numel() if one.b is None else base[one.b].shape[0] * base[one.a].shape[1]
            for one in modules
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for module in self._modules:
            start, middle, end = (module.update(tensors) for tensors in self._sets)
            yield start, middle, end

    def scores(self, start: Tensor, middle: Tensor, end: Tensor) -> tuple[Scores, Scores]:
        origin = middle if self._outer_from == "inner" else start
        return magnitudes([middle], [start]), magnitudes([end], [origin])


def _thresholds(triples: _Triples, *, density: float, scope: Scope, device: torch.device) -> list[Tensor]:
    """The thresholds of both learners: each float32 [1], or one for each module under scope="tensor"."""
    if scope == "tensor" or density in (0, 1):
        thresholds: list[list[Tensor]] = [[], []]
        for size, triple in zip(triples.sizes, triples, strict=True):
            for side, scores in zip(thresholds, triples.scores(*triple), strict=True):
                side.append(
                    rkif_kernels.score_thresholds(scores, density=density)
                    if size
                    else torch.full((1,), torch.inf, device=device)
                )
        # Under scope="global" all thresholds are equal, but for the infinite ones of empty modules.
        return [torch.cat(side) if scope == "tensor" else min(side) for side in thresholds]
    k = order_statistic_k(sum(triples.sizes), density)
    searches = CountingSearches(CountingSearch(k) for _ in range(2))
    while not searches.done:
        for triple in triples:
            for index, scores in enumerate(triples.scores(*triple)):
                searches.count(index, scores)
        searches.narrow()
    return [torch.tensor([value], dtype=torch.float32, device=device) for value in searches.values]


def factorised(update: Tensor, basis: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor, float]:
    """Factors B [out, rank] and A [rank, in] with ``scaling * B @ A`` close to ``update``.

    Args:
        update: float32 [out, in].
        basis: float32 [out, any]; its span starts the subspace iteration.

    Returns:
        B, A, and the Frobenius norm of the error as a fraction of that of ``update``.
    """
    size = update.norm()
    if size == 0 or scaling == 0:
        return update.new_zeros(update.shape[0], rank), update.new_zeros(rank, update.shape[1]), 0.0
    q = torch.linalg.qr(torch.cat([update @ (update.T @ basis), basis], dim=1)).Q
    for _ in range(_POWER_ITERATIONS):
        q = torch.linalg.qr(update.T @ q).Q
        q = torch.linalg.qr(update @ q).Q
    u, s, vh = torch.linalg.svd(q.T @ update, full_matrices=False)
    kept = min(rank, s.numel())
    roots = (s[:kept] / abs(scaling)).sqrt()
    b = update.new_zeros(update.shape[0], rank)
    a = update.new_zeros(rank, update.shape[1])
    b[:, :kept] = (q @ u[:, :kept]) * roots * (1 if scaling > 0 else -1)
    a[:kept] = roots[:, None] * vh[:kept]
    return b, a, float((update - scaling * (b @ a)).norm() / size)

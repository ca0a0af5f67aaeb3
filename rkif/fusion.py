"""One fusion: two task vectors, pruned and merged by importance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rkif_kernels
from rkif.config import MergeWeights, merge_weights
from rkif.gate import GateReport
from rkif_kernels import CASES, Arguments, Backend, FuseStats, OuterFrom, Scope, Scores, magnitudes

Thresholds = float | dict[str, float]
_FIGURES = ("thresholds", "counts", "norms")  # what a fusion computes on the device


@dataclass(frozen=True)
class FusionReport:
    """The report of a fusion.

    The first use of thresholds, counts or norms reads all of them from the device, which waits for the
    fusion. Later fusions do not change them.

    Attributes:
        numel: number of elements that took part.
        thresholds: (inner, outer); each a float, or a dict by parameter name under scope="tensor".
            An element is selected if its score is greater.
        counts: number of elements selected by "inner_only", "outer_only", "both" and "neither".
        norms: L2 norms of the "inner" and "outer" task vectors and of the "update", result - base.
        nonfinite: number of elements whose importance was not finite in some step of the round.
        missing: names of parameters that took no part, because they had no gradient in the round.
        applied: False if the fusion was skipped: thresholds and the task vectors' norms are NaN then, counts
            and update zero. Also False if the gate undid it.
        gate: the gate's report; None without a gate. The update norm is that of the accepted fraction.
    """

    numel: int
    thresholds: tuple[Thresholds, Thresholds]
    counts: dict[str, int]
    norms: dict[str, float]
    nonfinite: int = 0
    applied: bool = True
    gate: GateReport | None = None
    missing: tuple[str, ...] = ()

    if not TYPE_CHECKING:  # otherwise mypy would accept every attribute

        def __getattr__(self, name: str) -> Any:
            if name in _FIGURES and (read := self.__dict__.get("_read")) is not None:
                self.__dict__.update(read())
                self.__dict__.pop("_read", None)
            if name in self.__dict__:
                return self.__dict__[name]
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        """The values for copies and pickles; reads those that are still on the device."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        """One line: what was selected, and how far the parameters moved."""
        total = max(sum(self.counts.values()), 1)
        cases = ", ".join(f"{case.replace('_', ' ')} {n / total:.1%}" for case, n in self.counts.items())
        verdict = f"gate: {self.gate.verdict}" if self.gate is not None else "" if self.applied else "skipped"
        facts = [f"{self.numel:,} parameters: {cases}", f"update {self.norms['update']:.4g}", verdict]
        return "; ".join(fact for fact in facts if fact)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        missing = {"missing": list(self.missing)} if self.missing else {}
        return {
            "numel": self.numel,
            "thresholds": list(self.thresholds),
            "counts": dict(self.counts),
            "norms": dict(self.norms),
            "nonfinite": self.nonfinite,
            "applied": self.applied,
            "gate": None if self.gate is None else self.gate.to_dict(),
            **missing,
        }


@dataclass(frozen=True)
class FusionResult:
    """``params``, name -> fused tensor, and the ``report``."""

    params: dict[str, Tensor]
    report: FusionReport


def fuse(
    base: Mapping[str, Tensor],
    inner: Mapping[str, Tensor],
    outer: Mapping[str, Tensor],
    inner_importance: Mapping[str, Tensor] | None = None,
    outer_importance: Mapping[str, Tensor] | None = None,
    *,
    density: float = 0.2,
    rule: str | MergeWeights = "paper",
    scope: Scope = "global",
    outer_from: OuterFrom = "inner",
    out: Mapping[str, Tensor] | None = None,
    backend: Backend = "auto",
) -> FusionResult:
    """Fuse the task vectors of two learners (Feng et al., ACL 2025, section 3).

    Each learner selects the parameters whose importance is above the threshold of ``density``
    (the k-th smallest score, k = ``floor((1-density)*(n-1))``: docs/reference/semantics.md). Then

        ``result = base + w_in*(inner - base) + w_out*(outer - inner)``

    with the weights of ``rule`` for the four cases: an element is selected by the inner learner only, by the
    outer learner only, by both, or by neither. Each named parameter is fused separately, so LoRA's A and B
    are fused in factor space.

    Args:
        base: name -> parameter before the round; any shapes; float32, bfloat16 or float16.
        inner: name -> parameter after the inner learner.
        outer: name -> parameter after the outer learner, which started from the inner learner's result.
        inner_importance, outer_importance: name -> non-negative scores of the parameter's shape; both or
            neither. Without them the scores are the magnitudes of the task vectors, ``|inner - base|`` and
            ``|outer - inner|`` (``|outer - base|`` with ``outer_from="base"``), as in ``rkif fuse``.
        density: fraction of the elements that each learner selects, in [0, 1].
        rule: "paper", "release", "sum" or a :class:`rkif.MergeWeights`.
        scope: one threshold over all parameters ("global") or one for each ("tensor").
        outer_from: "base" if the outer learner started from ``base`` too: its task vector is then
            ``outer - base``.
        out: name -> tensor that the result is written to, in place; may be ``base``, ``inner`` or ``outer``.
            Without it, new tensors with the dtypes of ``base`` are allocated.
        backend: "auto", "triton", "native" or "torch"; all give the same bits.

    Returns:
        The fused parameters (the tensors of ``out`` where given) and the report. The host waits for a GPU
        when thresholds, counts or norms of the report are first used.

    Raises:
        TypeError, ValueError: arguments are not mappings, or differ in names, shapes or devices; unsupported
            dtypes; no parameters; density outside [0, 1]; unknown rule or scope; one importance alone;
            negative or NaN importance; parameters that are not finite, without importance; outputs that
            share memory. The message names argument, parameter and value. Nothing has been written then.
    """
    weights = merge_weights(rule)
    arguments: dict[str, Mapping[str, Tensor]] = {"base": base, "inner": inner, "outer": outer}
    if inner_importance is not None and outer_importance is not None:
        arguments |= {"inner_importance": inner_importance, "outer_importance": outer_importance}
    elif inner_importance is not None or outer_importance is not None:
        raise ValueError("inner_importance and outer_importance belong together: give both or neither")
    by_magnitude = inner_importance is None
    if out is not None:
        arguments["out"] = out
    names = common_names(arguments)
    rows = {argument: [mapping[name] for name in names] for argument, mapping in arguments.items()}
    if out is None:
        rows["out"] = [torch.empty_like(t) if isinstance(t, Tensor) else t for t in rows["base"]]

    check = Arguments(names)
    for argument, tensors in rows.items():
        check.add(argument, tensors)
    if sum(tensor.numel() for tensor in rows["base"]) == 0:
        raise ValueError("base is empty: its parameters have no elements")
    if by_magnitude:
        for argument in ("base", "inner", "outer"):
            why = "; without importance the parameters must be finite"
            require_finite(argument, names, rows[argument], why)
        start = rows["base"] if outer_from == "base" else rows["inner"]
        inner_scores = magnitudes(rows["inner"], rows["base"])
        outer_scores = magnitudes(rows["outer"], start)
    else:
        for argument in ("inner_importance", "outer_importance"):
            _require_scores(argument, names, rows[argument], backend)
        inner_scores, outer_scores = Scores(rows["inner_importance"]), Scores(rows["outer_importance"])

    return FusionResult(
        dict(zip(names, rows["out"], strict=True)),
        fuse_lists(
            names,
            rows["base"],
            rows["inner"],
            rows["outer"],
            inner_scores,
            outer_scores,
            out=rows["out"],
            density=density,
            weights=weights,
            scope=scope,
            outer_from=outer_from,
            backend=backend,
        ),
    )


def fuse_lists(
    names: Sequence[str],
    base: Sequence[Tensor],
    inner: Sequence[Tensor],
    outer: Sequence[Tensor],
    inner_scores: Scores,
    outer_scores: Scores,
    *,
    out: Sequence[Tensor],
    density: float,
    weights: MergeWeights,
    scope: Scope,
    outer_from: OuterFrom = "inner",
    backend: Backend = "auto",
) -> FusionReport:
    """:func:`fuse` on lists, for scores that are stored as S and U; negative scores are not refused."""
    stats = rkif_kernels.select_and_fuse_(
        out,
        base,
        inner,
        outer,
        inner_scores,
        outer_scores,
        density=density,
        scope=scope,
        weights=weights.cases,
        outer_from=outer_from,
        names=names,
        backend=backend,
    )
    return report_of(names, stats, numel=sum(tensor.numel() for tensor in out), scope=scope)


def skipped_report(names: Sequence[str], numel: int, nonfinite: int, scope: Scope) -> FusionReport:
    """The report of a round that was not fused: thresholds and norms are unknown."""
    unknown: Thresholds = dict.fromkeys(names, math.nan) if scope == "tensor" else math.nan
    return FusionReport(
        numel=numel,
        thresholds=(unknown, unknown),
        counts=dict.fromkeys(CASES, 0),
        norms={"inner": math.nan, "outer": math.nan, "update": 0.0},
        nonfinite=nonfinite,
        applied=False,
    )


def report_of(
    names: Sequence[str], stats: FuseStats, *, numel: int, scope: Scope, missing: tuple[str, ...] = ()
) -> FusionReport:
    """A report of the kernels' statistics.

    They are read from the device, in one copy, when one of them is first used.

    Args:
        names: names of the parameters; keys of the thresholds under scope="tensor".
        numel: parameters that took part.
        missing: see :class:`FusionReport`.
    """
    parts = (stats.counts, stats.squared_norms, *stats.thresholds)
    sizes = [part.numel() for part in parts]
    packed = torch.cat([part.double() for part in parts])  # counts below 2^53 are exact in float64
    ready: Any = torch.cuda.Event() if packed.is_cuda else None  # type: ignore[no-untyped-call]
    if ready is not None:
        ready.record(torch.cuda.current_stream(packed.device))

    def read() -> dict[str, Any]:
        if ready is not None:  # the stream of the reader may be another one
            torch.cuda.current_stream(packed.device).wait_event(ready)
        values = iter(packed.tolist())
        counts, squared_norms, *thresholds = (list(islice(values, size)) for size in sizes)
        norms = map(math.sqrt, squared_norms)
        return {
            "thresholds": tuple(
                dict(zip(names, threshold, strict=True)) if scope == "tensor" else threshold[0]
                for threshold in thresholds
            ),
            "counts": dict(zip(CASES, map(int, counts), strict=True)),
            "norms": dict(zip(("inner", "outer", "update"), norms, strict=True)),
        }

    return _unread_report(read, numel=numel, missing=missing)


def _unread_report(read: Callable[[], dict[str, Any]], **known: Any) -> FusionReport:
    """A report whose thresholds, counts and norms are read by ``read`` when one of them is first used."""
    report = object.__new__(FusionReport)
    defaults = {field.name: field.default for field in fields(FusionReport) if field.default is not MISSING}
    report.__dict__.update(defaults | known, _read=read)
    return report


def common_names(arguments: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """The parameter names in the order of ``base``.

    Raises:
        TypeError: an argument is not a mapping.
        ValueError: ``base`` is empty, or another mapping has other names.
    """
    for argument, mapping in arguments.items():
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{argument} must map names to tensors; got {type(mapping).__name__}")
    names = list(arguments["base"])
    if not names:
        raise ValueError("base is empty: there is nothing to fuse")
    for argument, mapping in arguments.items():
        missing = [name for name in names if name not in mapping]
        extra = [name for name in mapping if name not in arguments["base"]]
        if missing or extra:
            parts = [f"lacks {missing[0]!r}"] if missing else []
            parts += [f"has {extra[0]!r}, which base lacks"] if extra else []
            count = len(missing) + len(extra)
            more = f" ({count} names differ in total)" if count > 1 else ""
            raise ValueError(f"{argument} {' and '.join(parts)}{more}")
    return names


def require_finite(argument: str, names: Sequence[str], tensors: Sequence[Tensor], why: str = "") -> None:
    """Raise ValueError for a tensor with NaN or infinite elements; the message ends with ``why``."""
    for name, tensor in zip(names, tensors, strict=True):
        if not bool(tensor.detach().isfinite().all()):
            raise ValueError(f"{argument}[{name!r}] has NaN or infinite elements{why}")


def _require_scores(argument: str, names: Sequence[str], tensors: Sequence[Tensor], backend: Backend) -> None:
    """Refuse negative and NaN scores."""
    if rkif_kernels.all_valid_scores(tensors, names=names, backend=backend):
        return
    for name, tensor in zip(names, tensors, strict=True):
        low = tensor.detach().min().item() if tensor.numel() else 0.0
        if not low >= 0:  # a NaN anywhere makes the minimum NaN
            raise ValueError(f"{argument}[{name!r}] must not be negative or NaN; its minimum is {low}")

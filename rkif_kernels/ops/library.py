"""The operations registered with PyTorch, because torch.compile cannot trace them.

While a function is being compiled, an operation calls the operation of the same name in ``torch.ops.rkif``.
At run time, the latter calls the former. Scores and weights are passed as lists, and None as an empty list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rkif_kernels.ops.fuse import select_and_fuse_
from rkif_kernels.ops.importance import update_importance_
from rkif_kernels.ops.select import score_thresholds
from rkif_kernels.types import Backend, CaseWeights, Order, OuterFrom, Scope, Scores

_library = torch.library.Library("rkif", "DEF")  # type: ignore[no-untyped-call]


def _register(schema: str, operation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operation, and the function that gives the shapes of its results."""
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, operation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"rkif::{name}", fake, lib=_library)


def _update_importance_(
    params: list[Tensor],
    grads: list[Tensor | None],
    sensitivity: list[Tensor],
    uncertainty: list[Tensor],
    beta1: float,
    beta2: float,
    order: Order,
    nonfinite: Tensor,
    backend: Backend,
) -> None:
    update_importance_(
        params,
        grads,
        sensitivity,
        uncertainty or None,
        beta1=beta1,
        beta2=beta2,
        order=order,
        nonfinite=nonfinite,
        backend=backend,
    )


def _nothing_new(*_: object) -> None:
    """For an operation that writes to its arguments and returns nothing."""


def _score_thresholds(
    sensitivity: list[Tensor],
    uncertainty: list[Tensor],
    distance: bool,
    density: float,
    scope: Scope,
    backend: Backend,
) -> Tensor:
    scores = Scores(sensitivity, uncertainty or None, distance)
    return score_thresholds(scores, density=density, scope=scope, backend=backend)


def _fake_thresholds(sensitivity: Sequence[Tensor], scope: Scope) -> Tensor:
    groups = len(sensitivity) if scope == "tensor" else 1
    return torch.empty(groups, dtype=torch.float32, device=Scores(sensitivity).device)


def _select_and_fuse_(
    out: list[Tensor],
    base: list[Tensor],
    inner: list[Tensor],
    outer: list[Tensor],
    inner_sensitivity: list[Tensor],
    inner_uncertainty: list[Tensor],
    inner_distance: bool,
    outer_sensitivity: list[Tensor],
    outer_uncertainty: list[Tensor],
    outer_distance: bool,
    density: float,
    scope: Scope,
    weights: list[float],
    outer_from: OuterFrom,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs: Any = tuple(zip(weights[::2], weights[1::2], strict=True))
    cases: CaseWeights = pairs
    counts, squared_norms, thresholds = select_and_fuse_(
        out,
        base,
        inner,
        outer,
        Scores(inner_sensitivity, inner_uncertainty or None, inner_distance),
        Scores(outer_sensitivity, outer_uncertainty or None, outer_distance),
        density=density,
        scope=scope,
        weights=cases,
        outer_from=outer_from,
        backend=backend,
    )
    # The results of a registered operation must not share memory; the thresholds may be views of one tensor.
    return counts, squared_norms, thresholds[0].clone(), thresholds[1].clone()


def _fake_fusion(out: Sequence[Tensor], scope: Scope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device = Scores(out).device
    return (
        torch.empty(4, dtype=torch.int64, device=device),
        torch.empty(3, dtype=torch.float64, device=device),
        _fake_thresholds(out, scope),
        _fake_thresholds(out, scope),
    )


_register(
    "update_importance_(Tensor[] params, Tensor?[] grads, Tensor(a!)[] sensitivity, "
    "Tensor(b!)[] uncertainty, float beta1, float beta2, str order, Tensor(c!) nonfinite, str backend) -> ()",
    _update_importance_,
    _nothing_new,
)
_register(
    "score_thresholds(Tensor[] sensitivity, Tensor[] uncertainty, bool distance, float density, str scope, "
    "str backend) -> Tensor",
    _score_thresholds,
    lambda sensitivity, uncertainty, distance, density, scope, backend: _fake_thresholds(sensitivity, scope),
)
_register(
    "select_and_fuse_(Tensor(a!)[] out, Tensor[] base, Tensor[] inner, Tensor[] outer, "
    "Tensor[] inner_sensitivity, Tensor[] inner_uncertainty, bool inner_distance, "
    "Tensor[] outer_sensitivity, Tensor[] outer_uncertainty, bool outer_distance, "
    "float density, str scope, float[] weights, str outer_from, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _select_and_fuse_,
    lambda out, *arguments: _fake_fusion(out, arguments[10]),
)

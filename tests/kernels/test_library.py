"""The operations registered with PyTorch pass its checks, and compiled functions can call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernel_cases import assert_same_bits, normal, positive
from torch import Tensor

import rkif_kernels
from rkif_kernels import Scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5))
LISTS = [pytest.param([65], id="one tensor"), pytest.param([64, 0, 3], id="several, one empty")]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def on_device(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def parameters(sizes: Sequence[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    return on_device(normal(sizes, dtype, seed))


def scores_of(sizes: Sequence[int], uncertainty: bool, seed: int) -> Scores:
    s = on_device(positive(sizes, torch.float32, seed))
    return Scores(s, on_device(positive(sizes, torch.float32, seed + 1)) if uncertainty else None)


def fusion(sizes: Sequence[int], dtype: torch.dtype, uncertainty: bool) -> tuple[Any, ...]:
    """Outputs, base, inner and outer parameters, and the scores of both learners."""
    out = [torch.full((size,), 7.0, dtype=dtype, device=DEVICE) for size in sizes]
    lists = (parameters(sizes, dtype, seed) for seed in range(3))
    return out, *lists, scores_of(sizes, uncertainty, 3), scores_of(sizes, uncertainty, 5)


def check(operation: str, arguments: tuple[Any, ...]) -> None:
    """Compare schema, fake results and compiler traces with the operation (opcheck)."""
    torch.library.opcheck(getattr(torch.ops.rkif, operation).default, arguments)


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_importance_passes_opcheck(dtype: torch.dtype, uncertainty: bool, sizes: list[int]) -> None:
    scores = scores_of(sizes, uncertainty, 2)
    grads = [*parameters(sizes, dtype, 1)[:-1], None] if len(sizes) > 1 else parameters(sizes, dtype, 1)
    nonfinite = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    states = scores.sensitivity, scores.uncertainty or []
    check(
        "update_importance_",
        (parameters(sizes, dtype, 0), grads, *states, 0.5, 0.5, "first", nonfinite, "auto"),
    )


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_score_thresholds_passes_opcheck(
    density: float, scope: str, uncertainty: bool, sizes: list[int]
) -> None:
    scores = scores_of(sizes, uncertainty, 0)
    check("score_thresholds", (scores.sensitivity, scores.uncertainty or [], False, density, scope, "auto"))


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_and_fuse_passes_opcheck(
    dtype: torch.dtype, scope: str, uncertainty: bool, sizes: list[int]
) -> None:
    *lists, inner, outer = fusion(sizes, dtype, uncertainty)
    sides = [(scores.sensitivity, scores.uncertainty or [], False) for scores in (inner, outer)]
    weights = [weight for pair in WEIGHTS for weight in pair]
    check("select_and_fuse_", (*lists, *sides[0], *sides[1], 0.3, scope, weights, "inner", "auto"))


def thresholds_step(sensitivity: list[Tensor], uncertainty: list[Tensor] | None, scope: Any) -> list[Tensor]:
    grown = [tensor * 3 for tensor in sensitivity]
    return [rkif_kernels.score_thresholds(Scores(grown, uncertainty), density=0.3, scope=scope) * 2]


def fusion_step(lists: list[list[Tensor]], inner: Scores, outer: Scores, scope: Any) -> list[Tensor]:
    out = lists[0]
    stats = rkif_kernels.select_and_fuse_(
        *lists, inner, outer, density=0.3, scope=scope, weights=WEIGHTS, outer_from="base"
    )
    return [*(tensor * 2 for tensor in out), *stats.thresholds, stats.counts, stats.squared_norms]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_thresholds_are_one_operation_of_a_graph(scope: str, uncertainty: bool, backend: str) -> None:
    """With fullgraph=True a graph break would be an error."""
    scores = scores_of([64, 0, 3], uncertainty, 0)
    compiled = torch.compile(thresholds_step, fullgraph=True, backend=backend)
    expected = thresholds_step(scores.sensitivity, scores.uncertainty, scope)  # type: ignore[arg-type]
    assert_same_bits(
        compiled(scores.sensitivity, scores.uncertainty, scope), [tensor.cpu() for tensor in expected]
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("over", ["new memory", "base", "parameters that require gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fusion_is_one_operation_of_a_graph(dtype: torch.dtype, over: str, backend: str) -> None:
    """Later operations and the caller see the writes."""
    results = []
    for function in (fusion_step, torch.compile(fusion_step, fullgraph=True, backend=backend)):
        out, base, *rest, inner, outer = fusion([64, 3], dtype, True)
        if over == "base":
            out = base
        elif over != "new memory":
            out = [tensor.requires_grad_() for tensor in out]
        with torch.no_grad():
            *found, counts, squared_norms = function([out, base, *rest], inner, outer, "global")
        results.append((*found, *out))
        assert (counts.dtype, squared_norms.dtype) == (torch.int64, torch.float64)
        assert counts.sum() == 67
        assert (squared_norms > 0).all()
        results[-1] += (counts.int().view(torch.float32), squared_norms.float())
    assert_same_bits(results[1], [tensor.detach().cpu() for tensor in results[0]])


def test_a_wrong_argument_of_a_compiled_call_is_named() -> None:
    scores = scores_of([5], False, 0)
    compiled = torch.compile(
        lambda s: rkif_kernels.score_thresholds(Scores(s), density=1.5), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\]; got 1.5"):
        compiled(scores.sensitivity)

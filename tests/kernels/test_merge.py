"""The masked merge: every implementation has the bits of the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    CHUNK,
    PARAMETER_DTYPES,
    SIZES,
    Guarded,
    assert_same_bits,
    check_thresholds,
    normal,
    on,
    positive,
    scores_on,
)
from torch import Tensor

from rkif_kernels import FusionInputs, MergeRule, Scores, magnitudes
from rkif_kernels.backends import reference

pytestmark = pytest.mark.usefixtures("poisoned")
sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
PAPER = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0))
RELEASE = ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5))


def test_tensors_of_mixed_dtypes_keep_their_own_threshold(implementation: Any) -> None:
    """A launch has the tensors of one dtype; each tensor still uses its own k and its own threshold."""
    sizes = [CHUNK + 5, 30, CHUNK, 7, 60]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]
    scores = Scores([positive([n], d, i)[0] for i, (n, d) in enumerate(zip(sizes, dtypes, strict=True))])
    ks = [int(0.1 * (i + 1) * (n - 1)) for i, n in enumerate(sizes)]
    limits = check_thresholds(implementation, scores, ks, per_tensor=True)
    assert len(set(limits.tolist())) == 5
    arguments = fuse_arguments(sizes)
    for index, dtype in enumerate(dtypes):
        arguments["base"][index] = arguments["base"][index].to(dtype)
    arguments |= {"inner_scores": scores, "thresholds": (limits, limits.flip(0))}
    check_fuse(implementation, **arguments)


def check_fuse(
    implementation: Any,
    base: list[Tensor],
    inner: list[Tensor],
    outer: list[Tensor],
    inner_scores: Scores,
    outer_scores: Scores,
    thresholds: tuple[Tensor, Tensor],
    weights: Any = RELEASE,
    outer_from: str = "inner",
    out_dtype: torch.dtype | None = None,
) -> list[int]:
    device = implementation.device
    fresh = [torch.full_like(b, torch.nan, dtype=out_dtype or b.dtype) for b in base]
    expected = on("cpu", fresh)
    rule = MergeRule(weights, outer_from)
    wanted = reference.fuse_(
        FusionInputs(expected, base, inner, outer, inner_scores, outer_scores),
        thresholds,
        rule,
    )
    got = Guarded(fresh, device)
    stats = implementation.fuse_(
        FusionInputs(
            got.tensors,
            on(device, base),
            on(device, inner),
            on(device, outer),
            scores_on(device, inner_scores),
            scores_on(device, outer_scores),
        ),
        tuple(t.to(device) for t in thresholds),
        rule,
    )
    assert_same_bits(got.tensors, expected)
    got.assert_edges_untouched()
    assert torch.equal(stats.counts.cpu(), wanted.counts)
    torch.testing.assert_close(stats.squared_norms.cpu(), wanted.squared_norms, rtol=1e-12, atol=0)
    return wanted.counts.tolist()


def fuse_arguments(sizes: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    return {
        "base": normal(sizes, dtype, seed),
        "inner": normal(sizes, dtype, seed + 1),
        "outer": normal(sizes, dtype, seed + 2),
        "inner_scores": Scores(positive(sizes, torch.float32, seed + 3), positive(sizes, torch.float32, 4)),
        "outer_scores": Scores(positive(sizes, torch.bfloat16, seed + 5)),
        "thresholds": (torch.tensor([0.4]), torch.tensor([0.6])),
    }


@sizes
@pytest.mark.parametrize("weights", [PAPER, RELEASE], ids=["paper", "release"])
def test_fuse(implementation: Any, sizes: list[int], weights: Any) -> None:
    check_fuse(implementation, **fuse_arguments(sizes), weights=weights)


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("both", [True, False], ids=["both sides", "outer side"])
def test_fuse_by_magnitudes(implementation: Any, dtype: torch.dtype, both: bool) -> None:
    arguments = fuse_arguments([CHUNK + 7, 3], dtype)
    arguments["outer_scores"] = magnitudes(arguments["outer"], arguments["inner"])
    if both:
        arguments["inner_scores"] = magnitudes(arguments["inner"], arguments["base"])
    assert min(check_fuse(implementation, **arguments)) > 0


@sizes
def test_fuse_where_everything_is_selected(implementation: Any, sizes: list[int]) -> None:
    """Scores beyond a tensor's end are loaded as zero, which is above -inf; they must not be counted."""
    arguments = fuse_arguments(sizes)
    arguments["thresholds"] = (torch.tensor([-torch.inf]), torch.tensor([-torch.inf]))
    assert check_fuse(implementation, **arguments) == [0, 0, sum(sizes), 0]


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", PARAMETER_DTYPES, ids=str)
def test_fuse_dtypes(implementation: Any, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    counts = check_fuse(implementation, **fuse_arguments([CHUNK + 7, 3], dtype), out_dtype=out_dtype)
    assert all(counts), "a case that never comes up is not checked"


def test_fuse_of_mixed_dtypes(implementation: Any) -> None:
    arguments = fuse_arguments([CHUNK + i for i in range(4)])
    for index, dtype in enumerate([torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]):
        arguments["base"][index] = arguments["base"][index].to(dtype)
        arguments["outer"][index] = arguments["outer"][index].to(torch.bfloat16)
    check_fuse(implementation, **arguments)


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=str)
def test_fuse_by_sensitivity_only(implementation: Any, dtype: torch.dtype) -> None:
    arguments = fuse_arguments([CHUNK + 1, 7])
    arguments["inner_scores"] = Scores(positive([CHUNK + 1, 7], dtype, 7))
    arguments["outer_scores"] = Scores(positive([CHUNK + 1, 7], dtype, 8))
    assert all(check_fuse(implementation, **arguments)), "a case that never comes up is not checked"


def test_fuse_with_a_threshold_for_each_tensor_and_outer_from_base(implementation: Any) -> None:
    arguments = fuse_arguments([CHUNK, 5, CHUNK + 1])
    arguments["thresholds"] = (torch.tensor([0.1, 0.5, torch.inf]), torch.tensor([-torch.inf, 0.2, 0.3]))
    check_fuse(implementation, **arguments, outer_from="base")


def test_fuse_leaves_out_scores_at_the_threshold(implementation: Any) -> None:
    arguments = fuse_arguments([CHUNK + 3])
    arguments["inner_scores"] = Scores([torch.full((CHUNK + 3,), 0.25)])
    arguments["thresholds"] = (torch.tensor([0.25]), torch.tensor([0.5]))
    in_only, _, both, _ = check_fuse(implementation, **arguments)
    assert in_only == both == 0


def test_fuse_with_custom_weights(implementation: Any) -> None:
    weights = ((0.3, -0.1), (1.5, 0.7), (-2.0, 1 / 3), (0.1, 0.9))
    check_fuse(implementation, **fuse_arguments([CHUNK + 9]), weights=weights)


def test_fuse_of_nonfinite_values(implementation: Any) -> None:
    arguments = fuse_arguments([CHUNK + 9])
    special = [torch.inf, -torch.inf, torch.nan, -0.0, 1e-42, 3e38]
    for position, (a, b) in enumerate(itertools.product(special, special)):
        arguments["base"][0][position], arguments["inner"][0][position] = a, b
    device = implementation.device
    out, expected = [torch.zeros(CHUNK + 9, device=device)], [torch.zeros(CHUNK + 9)]
    rule = MergeRule(PAPER, "inner")
    thresholds = arguments.pop("thresholds")
    reference.fuse_(FusionInputs(expected, *arguments.values()), thresholds, rule)
    moved = [
        Scores(on(device, a.sensitivity), on(device, a.uncertainty))
        if isinstance(a, Scores)
        else on(device, a)
        for a in arguments.values()
    ]
    implementation.fuse_(FusionInputs(out, *moved), tuple(t.to(device) for t in thresholds), rule)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("target", ["base", "inner", "outer"])
def test_fuse_over_one_of_its_inputs(implementation: Any, target: str) -> None:
    arguments = fuse_arguments([CHUNK + 9, 4], torch.bfloat16)
    expected = on("cpu", arguments["base"])
    rule = MergeRule(RELEASE, "inner")
    thresholds = arguments.pop("thresholds")
    reference.fuse_(FusionInputs(expected, *arguments.values()), thresholds, rule)
    device = implementation.device
    moved = {
        name: Scores(on(device, a.sensitivity), on(device, a.uncertainty))
        if isinstance(a, Scores)
        else on(device, a)
        for name, a in arguments.items()
    }
    implementation.fuse_(
        FusionInputs(moved[target], *moved.values()),
        tuple(t.to(device) for t in thresholds),
        rule,
    )
    assert_same_bits(moved[target], expected)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 2 * CHUNK), min_size=1, max_size=4), st.integers(0, 10**6), st.data())
def test_splitting_tensors_changes_nothing(
    implementation: Any,
    sizes: list[int],
    seed: int,
    data: st.DataObject,
) -> None:
    """Thresholds, counts and results do not depend on the splitting into tensors."""
    numel = sum(sizes) + 1
    whole = {name: torch.cat(normal([numel], torch.float32, seed + i)) for i, name in enumerate("bio")}
    s = torch.rand(numel, generator=torch.Generator().manual_seed(seed))
    k = data.draw(st.integers(0, numel - 1))
    device = implementation.device
    results = []
    for cut in ([numel], [*sizes, 1]):
        parts = {name: on(device, tensor.split(cut)) for name, tensor in whole.items()}
        scores = Scores(list(on(device, s.split(cut))))
        kept = Scores([part for part in scores.sensitivity if part.numel()])
        threshold = implementation.score_thresholds(kept, ks=[k], per_tensor=False)
        out = [torch.empty_like(part) for part in parts["b"]]
        stats = implementation.fuse_(
            FusionInputs(out, *parts.values(), scores, scores),
            (threshold, threshold),
            MergeRule(RELEASE, "inner"),
        )
        results.append((threshold, torch.cat(out), stats.counts))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)

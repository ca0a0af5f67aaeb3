"""Every implementation against the reference, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    CHUNK,
    PARAMETER_DTYPES,
    SIZES,
    STATE_DTYPES,
    Guarded,
    assert_same_bits,
    hostile,
    normal,
    on,
    positive,
    scores_on,
)
from torch import Tensor

from rkif_kernels import FusionInputs, ImportanceInputs, MergeRule, Scores, Smoothing, magnitudes
from rkif_kernels.backends import reference
from rkif_kernels.backends import torch as torch_backend
from rkif_kernels.backends.triton.table import aligned, tables

pytestmark = pytest.mark.usefixtures("poisoned")
sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
PAPER = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0))
RELEASE = ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5))


def check_update(implementation: Any, params, grads, s, u, order="first", beta1=0.85, beta2=0.55) -> int:
    """Run one update by the implementation and by the reference; returns the non-finite count."""
    smoothing = Smoothing(beta1, beta2, order)
    expected_s, expected_u = on("cpu", s), on("cpu", u)
    expected_bad = torch.zeros((), dtype=torch.int64)
    reference.update_importance_(
        ImportanceInputs(params, grads, expected_s, expected_u), smoothing, expected_bad
    )

    device = implementation.device
    got_s, got_u = Guarded(s, device), Guarded(u or [], device)
    bad = torch.zeros((), dtype=torch.int64, device=device)
    implementation.update_importance_(
        ImportanceInputs(
            on(device, params), on(device, grads), got_s.tensors, got_u.tensors if u is not None else None
        ),
        smoothing,
        bad,
    )
    assert_same_bits(got_s.tensors, expected_s)
    assert_same_bits(got_u.tensors, expected_u or [])
    got_s.assert_edges_untouched()
    got_u.assert_edges_untouched()
    assert bad.item() == expected_bad.item()
    return int(bad)


@sizes
@pytest.mark.parametrize("order", ["first", "second", "mixed"])
@pytest.mark.parametrize("with_uncertainty", [True, False], ids=["S and U", "S"])
def test_update_importance(implementation: Any, sizes: list[int], order: str, with_uncertainty: bool) -> None:
    params, grads = normal(sizes, torch.float32, 0), normal(sizes, torch.float32, 1)
    s = positive(sizes, torch.float32, 2)
    u = positive(sizes, torch.float32, 3) if with_uncertainty else None
    assert check_update(implementation, params, grads, s, u, order) == 0


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_update_importance_dtypes(implementation: Any, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    sizes = [CHUNK + 7, 3]
    params, grads = normal(sizes, dtype, 0), normal(sizes, torch.float32, 1)
    check_update(
        implementation, params, grads, positive(sizes, state_dtype, 2), positive(sizes, state_dtype, 3)
    )


def test_update_importance_of_mixed_dtypes_and_missing_gradients(implementation: Any) -> None:
    dtypes = [*PARAMETER_DTYPES, torch.float32, torch.bfloat16]
    params = [normal([CHUNK + i], dtype, i)[0] for i, dtype in enumerate(dtypes)]
    grads: list[Tensor | None] = [normal([CHUNK + i], torch.float32, 9 + i)[0] for i in range(len(dtypes))]
    grads[1] = grads[3] = None
    s = [positive([p.numel()], torch.float32, 20)[0] for p in params]
    check_update(implementation, params, grads, s, [t.clone() for t in s])


@pytest.mark.parametrize("beta1", [0.0, 0.55, 1.0])
def test_update_importance_keeps_what_is_not_finite(implementation: Any, beta1: float) -> None:
    sizes = [CHUNK + 5, 2]
    params, grads = normal(sizes, torch.float32, 0), normal(sizes, torch.float32, 1)
    grads[0][0], grads[0][CHUNK] = float("nan"), float("inf")
    params[0][7], grads[0][9] = float("-inf"), -float("inf")
    params[1][1], grads[1][1] = 1e30, 1e30  # overflows in the product
    s, u = positive(sizes, torch.float32, 2), positive(sizes, torch.float32, 3)
    assert check_update(implementation, params, grads, s, u, beta1=beta1) == 5


def test_update_importance_keeps_denormals(implementation: Any) -> None:
    tiny = torch.full((CHUNK + 1,), 1e-41)
    ones = torch.ones(CHUNK + 1)
    s = [torch.full((CHUNK + 1,), 3e-42)]
    check_update(implementation, [tiny], [ones], s, [s[0].clone()])
    assert (reference.select.score_values(Scores(s))[0] > 0).all()


@settings(max_examples=15)
@example(sizes=[CHUNK, 1], beta1=1.0, beta2=1.2e-38, order="mixed", seed=0)  # U is denormal
@given(
    sizes=st.lists(st.integers(0, 2 * CHUNK), min_size=1, max_size=4),
    beta1=st.floats(0, 1),
    beta2=st.floats(0, 1),
    order=st.sampled_from(["first", "second", "mixed"]),
    seed=st.integers(0, 10**6),
)
def test_update_importance_anywhere(
    implementation: Any,
    sizes: list[int],
    beta1: float,
    beta2: float,
    order: str,
    seed: int,
) -> None:
    params, grads = normal(sizes, torch.float32, seed), normal(sizes, torch.bfloat16, seed + 1)
    s, u = positive(sizes, torch.float32, seed + 2), positive(sizes, torch.bfloat16, seed + 3)
    if implementation.interpreted:
        assume(not leaves_bfloat16_denormals(params, grads, s, u, order, beta1, beta2))
    check_update(implementation, params, grads, s, u, order, beta1, beta2)


def leaves_bfloat16_denormals(params, grads, s, u, order, beta1, beta2) -> bool:
    """Whether the new bfloat16 U has denormal numbers, which the interpreter does not convert rightly."""
    u = on("cpu", u)
    reference.update_importance_(
        ImportanceInputs(params, grads, on("cpu", s), u),
        Smoothing(beta1, beta2, order),
        torch.zeros((), dtype=torch.int64),
    )
    return any(((tensor != 0) & (tensor.abs() < torch.finfo(tensor.dtype).tiny)).any() for tensor in u)


def check_thresholds(implementation: Any, scores: Scores, ks: list[int], per_tensor: bool) -> Tensor:
    expected = reference.score_thresholds(scores, ks=ks, per_tensor=per_tensor)
    device = implementation.device
    got = implementation.score_thresholds(scores_on(device, scores), ks=ks, per_tensor=per_tensor)
    assert got.dtype == torch.float32
    assert torch.equal(got.cpu(), expected)
    return expected


def ks_of_interest(numel: int) -> set[int]:
    return {0, min(1, numel - 1), numel // 2, int(0.8 * (numel - 1)), max(numel - 2, 0), numel - 1}


@sizes
@pytest.mark.parametrize("with_uncertainty", [True, False], ids=["S*U", "S"])
def test_global_threshold(implementation: Any, sizes: list[int], with_uncertainty: bool) -> None:
    sizes = [size for size in sizes if size]
    u = positive(sizes, torch.float32, 1) if with_uncertainty else None
    scores = Scores(positive(sizes, torch.float32, 0), u)
    for k in ks_of_interest(sum(sizes)):
        check_thresholds(implementation, scores, [k], per_tensor=False)


@pytest.mark.parametrize("dtypes", list(itertools.product(PARAMETER_DTYPES, repeat=2)), ids=str)
def test_threshold_of_magnitudes(implementation: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sizes = [CHUNK + 3, 1, 40]
    scores = magnitudes(normal(sizes, dtypes[0], 0), normal(sizes, dtypes[1], 1))
    for k in ks_of_interest(sum(sizes)):
        found = check_thresholds(implementation, scores, [k], per_tensor=False)
        distances = [
            (a.float() - b.float()).abs() for a, b in zip(scores.sensitivity, scores.uncertainty, strict=True)
        ]
        assert found.item() == torch.cat(distances).sort().values[k].item()
    check_thresholds(implementation, scores, [CHUNK // 2, 0, 30], per_tensor=True)


def test_thresholds_of_each_tensor(implementation: Any) -> None:
    sizes = [1, 40, CHUNK + 1, 2 * CHUNK]
    scores = Scores(positive(sizes, torch.float32, 0), positive(sizes, torch.bfloat16, 1))
    for pick in (min, max, lambda ks: sorted(ks)[len(ks) // 2]):
        check_thresholds(implementation, scores, [pick(ks_of_interest(n)) for n in sizes], per_tensor=True)


def test_tensors_of_other_dtypes_keep_their_own_threshold(implementation: Any) -> None:
    """Tensors are grouped by dtype for a launch; each must still find its own k and its own threshold."""
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


@pytest.mark.parametrize("name", hostile(4).keys())
def test_threshold_of_hostile_scores(implementation: Any, name: str) -> None:
    scores = hostile(2 * CHUNK + 9)[name]
    for k in ks_of_interest(scores.numel()):
        check_thresholds(implementation, Scores([scores]), [k], per_tensor=False)


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=str)
def test_threshold_of_other_dtypes(implementation: Any, dtype: torch.dtype) -> None:
    scores = Scores(positive([CHUNK + 3, 10], dtype, 0), positive([CHUNK + 3, 10], torch.float32, 1))
    check_thresholds(implementation, scores, [100], per_tensor=False)


@pytest.mark.parametrize("name", hostile(4).keys())
def test_threshold_without_any_luck_in_the_sample(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is left of the blocked search when its samples are worthless: bisection, which must end."""
    for setting, value in {"SHORT": 4, "SMALL": 4, "SAMPLED_PASSES": 0}.items():
        monkeypatch.setattr(f"rkif_kernels.selection.sampled.{setting}", value)
    passes = []
    reader = torch_backend.select._BlockReader
    split = reader.split
    monkeypatch.setattr(reader, "split", lambda *a: passes.append(a) or split(*a))
    scores = hostile(300)[name]
    for k in ks_of_interest(300):
        passes.clear()
        found = torch_backend.score_thresholds(Scores([scores]), ks=[k], per_tensor=False)
        assert found.item() == scores.sort().values[k].item()
        assert len(passes) <= 32


def test_addresses_are_aligned() -> None:
    memory = torch.arange(100.0)
    rows = aligned(([memory[1:40], memory[44:80]], [memory[:39], None]))
    found = tables(rows, chunk=16)
    assert sorted(table.indices.tolist() for table in found) == [[0], [1]]
    for table in found:
        for row, tensors in zip(table.pointers.tolist(), rows, strict=True):
            for address, index in zip(row, table.indices.tolist(), strict=True):
                tensor = tensors[index]
                assert address % 16 == 0
                assert address == (0 if tensor is None else tensor.data_ptr())
        assert table.layout.chunk_starts.tolist() == [0, 16, 32]


def test_tables_are_made_once_and_anew_for_memory_that_moved() -> None:
    tensors = [torch.rand(40), torch.rand(9)]
    (first,) = tables(aligned((tensors,)), chunk=16)
    assert tables(aligned((tensors,)), chunk=16)[0] is first
    tensors[1] = tensors[1].clone()
    (moved,) = tables(aligned((tensors,)), chunk=16)
    assert moved.pointers.tolist() == [[tensor.data_ptr() for tensor in tensors]]
    assert moved.pointers.tolist() != first.pointers.tolist()
    assert moved.layout is first.layout
    tensors[1] = tensors[1].resize_(20)
    assert tables(aligned((tensors,)), chunk=16)[0].layout.numels.tolist() == [40, 20]


def test_a_product_that_is_not_a_number_counts_as_zero(implementation: Any) -> None:
    s = torch.ones(CHUNK)
    u = torch.ones(CHUNK)
    s[: CHUNK // 2], u[: CHUNK // 2] = torch.inf, 0.0
    for k, value in ((CHUNK // 2 - 1, 0.0), (CHUNK // 2, 1.0)):
        assert check_thresholds(implementation, Scores([s], [u]), [k], per_tensor=False).item() == value


@settings(max_examples=30)
@given(
    st.lists(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.0, 1.0000001, 2.0, 1e-45, 3e38, float("inf")])
            | st.floats(0, 2, width=32),
            min_size=1,
            max_size=80,
        ),
        min_size=1,
        max_size=3,
    ),
    st.floats(0, 1),
)
def test_threshold_anywhere(implementation: Any, groups: list[list[float]], fraction: float) -> None:
    scores = Scores([torch.tensor(group) for group in groups])
    numel = sum(map(len, groups))
    check_thresholds(implementation, scores, [int(fraction * (numel - 1))], per_tensor=False)
    ks = [int(fraction * (len(group) - 1)) for group in groups]
    check_thresholds(implementation, scores, ks, per_tensor=True)


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
    """Beyond a tensor's end scores are loaded as zero, which is above -inf: the tail must not count them."""
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
def test_fuse_by_sensitivities_alone(implementation: Any, dtype: torch.dtype) -> None:
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


def test_fuse_with_weights_of_ones_own(implementation: Any) -> None:
    weights = ((0.3, -0.1), (1.5, 0.7), (-2.0, 1 / 3), (0.1, 0.9))
    check_fuse(implementation, **fuse_arguments([CHUNK + 9]), weights=weights)


def test_fuse_of_values_that_are_not_finite(implementation: Any) -> None:
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
    """Thresholds, counts and results do not depend on how the parameters are cut into tensors."""
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

"""The single pass has the bits of the reference, with brackets that hold and with brackets that miss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BLOCK,
    CHUNK,
    CONFIG,
    SIZES,
    Guarded,
    adversarial,
    assert_same_bits,
    normal,
    on,
    positive,
    scores_on,
)
from torch import Tensor

import rkif_kernels
from rkif_kernels import FusionInputs, MergeRule, Scores
from rkif_kernels.backends import reference
from rkif_kernels.backends.triton import select_and_fuse_, single_pass, thresholds
from rkif_kernels.backends.triton.launch import Bracketing
from rkif_kernels.backends.triton.launches import default_bracketing
from rkif_kernels.backends.triton.windows import FAILED

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Half of a few hundred elements is sampled, and brackets are narrow, so that most elements are decided.
SMALL = Bracketing(min_numel=1, sample_stride=2, max_samples=1 << 20, sigmas=2.5, list_slack=1.5)
RELEASE = ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5))


@pytest.fixture
def fell_back(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """For each single pass, the flag for failed brackets."""
    flags: list[Tensor] = []
    make = single_pass.workspace

    def spy(*args: Any) -> dict[str, Tensor]:
        memory = make(*args)
        flags.append(memory["fields_ptr"][0, FAILED.value])
        return memory

    monkeypatch.setattr(single_pass, "workspace", spy)
    return flags


def check(
    tensors: dict[str, list[Tensor]],
    inner_scores: Scores,
    outer_scores: Scores,
    k: int,
    bracketing: Bracketing = SMALL,
    outer_from: str = "inner",
    out_dtype: torch.dtype | None = None,
) -> list[int]:
    """Compare one pass with the thresholds and the fusion of the reference; returns the four counts."""
    fresh = [torch.full_like(b, torch.nan, dtype=out_dtype or b.dtype) for b in tensors["base"]]
    filled = [
        Scores(
            [t for t in scores.sensitivity if t.numel()],
            None if scores.uncertainty is None else [t for t in scores.uncertainty if t.numel()],
        )
        for scores in (inner_scores, outer_scores)
    ]
    limits = tuple(reference.score_thresholds(side, ks=[k], per_tensor=False) for side in filled)
    expected = on("cpu", fresh)
    rule = MergeRule(RELEASE, outer_from)
    wanted = reference.fuse_(
        FusionInputs(expected, *tensors.values(), inner_scores, outer_scores), limits, rule
    )
    got = Guarded(fresh, DEVICE)
    stats = select_and_fuse_(
        FusionInputs(
            got.tensors,
            *(on(DEVICE, part) for part in tensors.values()),
            *(
                Scores(on(DEVICE, side.sensitivity), on(DEVICE, side.uncertainty))
                for side in (inner_scores, outer_scores)
            ),
        ),
        k,
        rule,
        config=CONFIG,
        bracketing=bracketing,
    )
    assert [limit.item() for limit in stats.thresholds] == [limit.item() for limit in limits]
    assert_same_bits(got.tensors, expected)
    got.assert_edges_untouched()
    assert stats.counts.tolist() == wanted.counts.tolist()
    torch.testing.assert_close(stats.squared_norms.cpu(), wanted.squared_norms, rtol=1e-12, atol=1e-12)
    return wanted.counts.tolist()


def models(sizes: list[int], dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    return {name: normal(sizes, dtype, seed) for seed, name in enumerate(("base", "inner", "outer"))}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_single_pass(sizes: list[int], fraction: float) -> None:
    inner = Scores(positive(sizes, torch.float32, 3), positive(sizes, torch.float32, 4))
    check(models(sizes), inner, Scores(positive(sizes, torch.float32, 5)), int(fraction * (sum(sizes) - 1)))


def test_good_brackets_need_no_second_fusion(fell_back: list[Tensor]) -> None:
    sizes = [5 * CHUNK + 3, 77, 9 * CHUNK]
    inner, outer = (Scores(positive(sizes, torch.float32, seed)) for seed in (3, 5))
    counts = check(models(sizes), inner, outer, int(0.8 * (sum(sizes) - 1)))
    assert all(counts), "a case that never comes up is not checked"
    assert [int(flag) for flag in fell_back] == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_single_pass_over_mixed_dtypes(dtype: torch.dtype, fell_back: list[Tensor]) -> None:
    """Three tables: the list has positions in all of them, and each table fuses its own again."""
    sizes = [2 * CHUNK + 1, CHUNK, 3 * CHUNK, 40]
    tensors = models(sizes)
    tensors["base"][1] = tensors["base"][1].to(dtype)
    tensors["outer"][2] = tensors["outer"][2].to(dtype)
    inner = Scores(positive(sizes, torch.bfloat16, 3), positive(sizes, torch.float32, 4))
    outer = Scores(positive(sizes, torch.float32, 5))
    check(tensors, inner, outer, int(0.7 * (sum(sizes) - 1)), outer_from="base")
    check(tensors, inner, outer, int(0.7 * (sum(sizes) - 1)), out_dtype=dtype)
    assert [int(flag) for flag in fell_back] == [0, 0]


@pytest.mark.parametrize(
    ("name", "bracketing"),
    [
        ("no width", replace(SMALL, sigmas=-0.5)),
        ("a sample of one", replace(SMALL, max_samples=1, sigmas=0.0)),
        ("no room", replace(SMALL, list_slack=0.0)),
        ("room for almost all", replace(SMALL, sigmas=10.0, list_slack=0.5)),
        ("everything undecided", replace(SMALL, sigmas=1e9)),
    ],
)
@pytest.mark.parametrize("fraction", [0.0, 0.31, 0.8, 1.0])
def test_missed_brackets_cost_only_time(name: str, bracketing: Bracketing, fraction: float) -> None:
    sizes = [CHUNK + 9, 200]
    inner = Scores(positive(sizes, torch.float32, 3), positive(sizes, torch.float32, 4))
    outer = Scores(positive(sizes, torch.float32, 5))
    check(models(sizes), inner, outer, int(fraction * (sum(sizes) - 1)), bracketing)


@pytest.mark.parametrize(
    ("bracketing", "failed"),
    [
        (replace(SMALL, list_slack=0.0), 1),
        (replace(SMALL, sigmas=1e9), 0),
        (replace(SMALL, sigmas=1e9, list_slack=3e-10), 1),
    ],
    ids=["no room", "everything listed", "room for half"],
)
def test_a_list_that_is_too_short_causes_the_fallback(
    bracketing: Bracketing, failed: int, fell_back: list[Tensor]
) -> None:
    sizes = [CHUNK + 9, 200]
    scores = Scores(positive(sizes, torch.float32, 3))
    check(models(sizes), scores, scores, 150, bracketing)
    assert [int(flag) for flag in fell_back] == [failed]


@pytest.mark.parametrize("inner_name", adversarial(4).keys())
def test_single_pass_of_adversarial_scores(inner_name: str) -> None:
    n = 2 * CHUNK + 9
    cases = adversarial(n)
    names = list(cases)
    other = cases[names[(names.index(inner_name) + 5) % len(names)]]
    for k in (0, n // 3, int(0.8 * (n - 1)), n - 1):
        check(models([n]), Scores([cases[inner_name]]), Scores([other]), k)


@pytest.mark.parametrize("bracketing", [replace(SMALL, sigmas=1e9), replace(SMALL, sample_stride=3)])
def test_a_listed_element_is_written_in_its_own_tensor(bracketing: Bracketing) -> None:
    """All elements are listed, including the first and the last of every table; tables alternate."""
    sizes = [2 * CHUNK + 1, CHUNK, 1, 3 * CHUNK, 3, 17]
    tensors = models(sizes)
    for index in (1, 2):
        tensors["base"][index] = tensors["base"][index].bfloat16()
    tensors["outer"][3] = tensors["outer"][3].half()
    inner = Scores(positive(sizes, torch.bfloat16, 3), positive(sizes, torch.float32, 4))
    outer = Scores(positive(sizes, torch.float32, 5))
    check(tensors, inner, outer, int(0.7 * (sum(sizes) - 1)), bracketing, outer_from="base")


@pytest.mark.parametrize("bracketing", [SMALL, replace(SMALL, list_slack=0.0)], ids=["listed", "failed"])
def test_a_repeated_report_has_the_same_bits(bracketing: Bracketing) -> None:
    sizes = [5 * CHUNK + 3, 77]
    scores = Scores(on(DEVICE, positive(sizes, torch.float32, 3)))
    parts = [on(DEVICE, part) for part in models(sizes).values()]
    reports = []
    for _ in range(2):
        out = [torch.full_like(b, torch.nan) for b in parts[0]]
        stats = select_and_fuse_(
            FusionInputs(out, *parts, scores, scores),
            500,
            MergeRule(RELEASE, "inner"),
            config=CONFIG,
            bracketing=bracketing,
        )
        reports.append((stats.counts.tolist(), stats.squared_norms.tolist()))
    assert reports[0] == reports[1]


@pytest.mark.parametrize("run", [1, 8])
@pytest.mark.parametrize("distance", [False, True], ids=["S*U", "distance"])
@pytest.mark.parametrize("slack", [1.5, 0.0], ids=["listed", "failed"])
def test_thresholds_without_fusion_in_one_pass(
    run: int, distance: bool, slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [3 * CHUNK + 5, 40, CHUNK]
    scores = Scores(positive(sizes, torch.float32, 3), positive(sizes, torch.float32, 4), distance)
    scores.sensitivity[1] = scores.sensitivity[1].bfloat16()
    bracketing = replace(SMALL, run=run, sample_stride=2 * run, list_slack=slack)
    radix = thresholds.radix_threshold
    monkeypatch.setattr(thresholds, "radix_threshold", None)  # is not called
    for k in (0, 1, 300, sum(sizes) - 1):
        (expected,) = reference.score_thresholds(scores, ks=[k], per_tensor=False)
        moved = scores_on(DEVICE, scores)
        (found,) = thresholds.score_thresholds(
            moved, ks=[k], per_tensor=False, config=CONFIG, bracketing=bracketing
        )
        assert found.item() == expected.item()
        (other,) = radix(moved, k, CONFIG)
        assert other.item() == expected.item()


@pytest.mark.parametrize("name", adversarial(4).keys())
def test_thresholds_without_fusion_of_adversarial_scores(name: str) -> None:
    n = 2 * CHUNK + 9
    scores = Scores([adversarial(n)[name]])
    for k in (0, n // 3, int(0.8 * (n - 1)), n - 1):
        (expected,) = reference.score_thresholds(scores, ks=[k], per_tensor=False)
        (found,) = thresholds.score_thresholds(
            scores_on(DEVICE, scores), ks=[k], per_tensor=False, config=CONFIG, bracketing=SMALL
        )
        assert found.item() == expected.item()


def test_ties_at_the_lower_end_need_no_list(fell_back: list[Tensor]) -> None:
    """With 95 % zeros, the threshold is zero. A zero is not above it, so no element is undecided."""
    n = 4 * CHUNK
    zeros = torch.where(torch.arange(n) % 20 == 0, torch.rand(n), 0.0)
    check(models([n]), Scores([zeros]), Scores([torch.full((n,), 0.3)]), int(0.8 * (n - 1)))
    assert [int(flag) for flag in fell_back] == [0]


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 2 * CHUNK), min_size=1, max_size=4).filter(sum),
    st.floats(0, 1),
    st.floats(0, 5),
    st.floats(0, 2),
    st.integers(0, 10**6),
)
def test_single_pass_on_random_inputs(
    sizes: list[int], fraction: float, sigmas: float, room: float, seed: int
) -> None:
    bracketing = replace(SMALL, sigmas=sigmas, list_slack=room)
    few = [t.mul(3).floor() for t in positive(sizes, torch.float32, seed)]
    inner, outer = Scores(positive(sizes, torch.bfloat16, seed + 1)), Scores(few)
    check(models(sizes), inner, outer, int(fraction * (sum(sizes) - 1)), bracketing)


def test_few_scores_use_radix_selection(fell_back: list[Tensor]) -> None:
    sizes = [CHUNK + 9, 5]
    scores = Scores(positive(sizes, torch.float32, 3))
    check(models(sizes), scores, scores, 99, default_bracketing())
    assert fell_back == []


@pytest.mark.parametrize("backend", rkif_kernels.backends.choose.available(torch.device(DEVICE)))
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [0, 0.2, 1])
@pytest.mark.parametrize("target", ["memory of its own", "outer"])
def test_select_and_fuse_equals_selection_and_fusion(
    backend: str, scope: str, density: float, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        single_pass.select_and_fuse_, "__kwdefaults__", {"config": CONFIG, "bracketing": SMALL}
    )
    sizes = [CHUNK + 1, 0, BLOCK]
    base, inner, outer = (on(DEVICE, part) for part in models(sizes).values())
    s_in, s_out = (Scores(on(DEVICE, positive(sizes, torch.float32, seed))) for seed in (3, 4))
    limits = [
        rkif_kernels.score_thresholds(s, density=density, scope=scope, backend="torch") for s in (s_in, s_out)
    ]
    rule = {"weights": RELEASE, "outer_from": "inner"}
    expected = [torch.empty_like(b) for b in base]
    wanted = rkif_kernels.fuse_(
        expected, base, inner, outer, s_in, s_out, thresholds=limits, backend="torch", **rule
    )
    out = outer if target == "outer" else [torch.full_like(b, torch.nan) for b in base]
    stats = rkif_kernels.select_and_fuse_(
        out, base, inner, outer, s_in, s_out, density=density, scope=scope, backend=backend, **rule
    )
    assert_same_bits(out, on("cpu", expected))
    assert stats.counts.tolist() == wanted.counts.tolist()
    assert [t.tolist() for t in stats.thresholds] == [t.tolist() for t in limits]


def test_an_output_over_an_input_uses_two_steps(fell_back: list[Tensor]) -> None:
    """A repeated single pass would read an overwritten input."""
    sizes = [CHUNK]
    tensors = {name: on(DEVICE, part) for name, part in models(sizes).items()}
    scores = Scores(on(DEVICE, positive(sizes, torch.float32, 3)))
    for name in tensors:
        rkif_kernels.select_and_fuse_(
            tensors[name], *tensors.values(), scores, scores, density=0.2, weights=RELEASE, backend="triton"
        )
    assert fell_back == []


def test_a_bracket_has_the_hand_computed_width() -> None:
    """By hand: 25 of 98 scores are counted, margin 1 * sqrt(.8 * .2 * 25) + 1 = 3 of them.

    Of a first sample of 100 that is 12; its own margin is 4, so the window has 4 + 2 * 12 + 1 on either side.
    """
    one = replace(SMALL, sigmas=1.0, sample_stride=4)
    assert one.sample_ks(0.8, 100, 98) == (50, 100)
    assert one.sample_ks(0.0, 25, 98) == (-1, 3)
    assert one.sample_ks(1.0, 25, 98) == (21, 25)
    assert default_bracketing().stride(64 << 20) == 128
    assert default_bracketing().stride(64 << 22) == 256
    # Of 98 elements 25 are sampled; 4 * 3 / 25 of them lie in the brackets: 47.04, and half as many again.
    assert one.capacity(0.8, 98, sides=2) == 71
    # 4 runs of 8: a design effect of 4 doubles the standard deviation, 2 * sqrt(.16 * 32) + 1 = 5.53 scores.
    runs = replace(one, run=8, design_effect=4.0, sample_stride=32, list_slack=1.0)
    assert runs.capacity(0.8, 128, sides=1) == 45

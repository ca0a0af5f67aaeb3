"""A threshold for each tensor, in one bracketed pass over all tensors: the bits of the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CHUNK, CONFIG, adversarial, assert_same_bits, normal, on, positive, scores_on
from torch import Tensor

import rkif_kernels
from rkif_kernels import Scores, magnitudes
from rkif_kernels.backends import reference
from rkif_kernels.backends.triton import both_thresholds, score_thresholds, thresholds
from rkif_kernels.backends.triton.launch import Bracketing, LaunchConfig
from rkif_kernels.backends.triton.windows import FAILED

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Half of a few hundred scores is sampled; tensors above 32 scores are bracketed.
SMALL = Bracketing(
    min_numel=1, sample_stride=2, max_samples=1 << 20, sigmas=2.5, list_slack=1.5, first_samples=32
)
WHOLE = LaunchConfig(block=32, tiles=1, num_warps=4)
LAUNCHED: dict[str, Any] = {"config": CONFIG, "bracketing": SMALL, "whole": WHOLE}


@pytest.fixture
def fell_back(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """For each search, the flags for failed brackets of its groups, as they were at the end."""
    memories: list[Tensor] = []
    flags: list[list[int]] = []
    make, search = thresholds.workspace, thresholds._thresholds

    def spy(*args: Any) -> dict[str, Tensor]:
        memory = make(*args)
        memories.append(memory["fields_ptr"])
        return memory

    def searched(*args: Any) -> list[Tensor]:
        found = search(*args)
        flags.append(memories.pop()[:, FAILED.value].tolist())
        return found

    monkeypatch.setattr(thresholds, "workspace", spy)
    monkeypatch.setattr(thresholds, "_thresholds", searched)
    return flags


def ks_of(sizes: list[int], fraction: float) -> list[int]:
    return [int(fraction * (size - 1)) for size in sizes]


def check(sides: list[Scores], ks: list[int], **settings: Any) -> None:
    """Compare the search of one side, or of both, with sorted scores and with the reference."""
    launched = LAUNCHED | settings
    moved = [scores_on(DEVICE, scores) for scores in sides]
    if len(sides) == 1:
        found = [score_thresholds(moved[0], ks=ks, per_tensor=True, **launched)]
    else:
        found = both_thresholds(*moved, ks=ks, per_tensor=True, **launched)
    for got, scores in zip(found, sides, strict=True):
        assert torch.equal(got.cpu(), reference.score_thresholds(scores, ks=ks, per_tensor=True))
        for index, k in enumerate(ks):
            values = scores.values(index).flatten()
            assert got[index].item() == torch.where(values > 0, values, 0.0).sort().values[k].item()


def test_good_brackets_are_searched_only_in_the_list(fell_back: list[list[int]]) -> None:
    sizes = [3 * CHUNK + 5, 7, 40, CHUNK, 5 * CHUNK]
    sides = [
        Scores(positive(sizes, torch.float32, seed), positive(sizes, torch.float32, seed + 1))
        for seed in (3, 5)
    ]
    check(sides[:1], ks_of(sizes, 0.8))
    check(sides, ks_of(sizes, 0.8))
    assert fell_back == [[0] * 5] * 2


@pytest.mark.parametrize("shift", range(4))
def test_adversarial_tensors_in_one_call(shift: int) -> None:
    """One call has all kinds of scores, so its groups use every branch of the search."""
    n = CHUNK + 9
    kinds = list(adversarial(n).values())
    ks = [(0, n // 3, int(0.8 * (n - 1)), n - 1)[(shift + index) % 4] for index in range(len(kinds))]
    check([Scores(kinds)], ks)


@pytest.mark.parametrize("size", [1, 2, 7, 31, 32, 33, 64, CHUNK, CHUNK + 1])
def test_a_tensor_of_one_program_or_of_several(size: int) -> None:
    scores = [Scores(positive([size, 3], torch.float32, 3), positive([size, 3], torch.float32, 4))]
    for k in {0, size // 2, size - 1}:
        check(scores, [k, 1])


def test_only_the_tensor_whose_list_is_full_is_searched_again(fell_back: list[list[int]]) -> None:
    """Half the scores of the middle tensor equal its threshold, which is not the lowest of the bracket."""
    n = 3 * CHUNK
    ties = torch.where(torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.5, 0.5, 0.25)
    first, last = positive([n, n], torch.float32, 3)
    check([Scores([first, ties, last])], ks_of([n] * 3, 0.6))
    assert fell_back == [[0, 1, 0]]


@pytest.mark.parametrize(
    "bracketing",
    [
        replace(SMALL, sigmas=-0.5),
        replace(SMALL, max_samples=1, sigmas=0.0),
        replace(SMALL, list_slack=0.0),
        replace(SMALL, sigmas=1e9),
    ],
    ids=["no width", "a sample of one", "no room", "everything undecided"],
)
def test_missed_brackets_cost_only_time(bracketing: Bracketing) -> None:
    sizes = [CHUNK + 9, 5, 200]
    sides = [Scores(positive(sizes, torch.float32, seed)) for seed in (3, 5)]
    for fraction in (0.0, 0.7, 1.0):
        check(sides, ks_of(sizes, fraction), bracketing=bracketing)


@pytest.mark.parametrize("distance", [False, True], ids=["S*U", "distance"])
def test_tables_of_several_dtypes(distance: bool) -> None:
    """Indices of groups are those of the caller's list, in which the tensors of the tables alternate."""
    sizes = [CHUNK + 1, 3, 2 * CHUNK, 50, 40, 20]
    sides = []
    for seed in (3, 5):
        scores = Scores(
            positive(sizes, torch.float32, seed), positive(sizes, torch.float32, seed + 1), distance
        )
        for index in (1, 2):
            scores.sensitivity[index] = scores.sensitivity[index].bfloat16()
        scores.uncertainty[4] = scores.uncertainty[4].half()
        sides.append(scores)
    runs = replace(SMALL, run=8, sample_stride=16, design_effect=2.5)
    check(sides, ks_of(sizes, 0.7), bracketing=runs)


def test_hundreds_of_small_tensors_and_a_large_one() -> None:
    sizes = [1 + index % 9 for index in range(200)] + [4 * CHUNK + 3]
    check([Scores(positive(sizes, torch.float32, 3))], ks_of(sizes, 0.8))


def test_sides_of_different_forms_are_searched_one_after_the_other(fell_back: list[list[int]]) -> None:
    sizes = [CHUNK, 5]
    parts = [positive(sizes, torch.float32, seed) for seed in range(3)]
    check([Scores(parts[0]), magnitudes(parts[1], parts[2])], ks_of(sizes, 0.5))
    assert len(fell_back) == 2


@settings(max_examples=12)
@given(
    st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 5),
    st.floats(0, 2),
    st.sampled_from([1, 8]),
    st.integers(0, 10**6),
)
def test_random_inputs(
    sizes: list[int], fraction: float, sigmas: float, room: float, run: int, seed: int
) -> None:
    few = [t.mul(3).floor() for t in positive(sizes, torch.float32, seed)]
    bracketing = replace(SMALL, sigmas=sigmas, list_slack=room, run=run)
    sides = [Scores(positive(sizes, torch.bfloat16, seed + 1)), Scores(few)]
    check(sides, ks_of(sizes, fraction), bracketing=bracketing)


@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("form", ["S", "magnitudes"])
def test_both_thresholds_of_a_fusion_over_its_input(
    scope: str, form: str, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty tensors have the threshold inf."""
    monkeypatch.setattr(both_thresholds, "__kwdefaults__", LAUNCHED)
    sizes = [CHUNK + 1, 0, 40, 3]
    models = [normal(sizes, torch.float32, seed) for seed in range(3)]
    settings: dict[str, Any] = {
        "weights": ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5)),
        "density": density,
    }

    def run(device: str, backend: Any) -> tuple[list[Tensor], Any]:
        base, inner, outer = (on(device, part) for part in models)
        sides = [magnitudes(inner, base), magnitudes(outer, base)]
        if form == "S":
            sides = [Scores(on(device, positive(sizes, torch.float32, seed))) for seed in (5, 6)]
        stats = rkif_kernels.select_and_fuse_(
            outer, base, inner, outer, *sides, scope=scope, backend=backend, **settings
        )
        return outer, stats

    expected, wanted = run("cpu", "torch")
    got, stats = run(DEVICE, "triton")
    assert_same_bits(got, expected)
    assert stats.counts.tolist() == wanted.counts.tolist()
    assert [t.tolist() for t in stats.thresholds] == [t.tolist() for t in wanted.thresholds]

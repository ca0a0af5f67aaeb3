"""Order statistics from counts: the search, and the counting operation on every implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CHUNK, SIZES, adversarial, implementations, on, positive, scores_on

import rkif_kernels
from rkif_kernels import Scores
from rkif_kernels.backends import reference
from rkif_kernels.selection.counting import BINS, KEYS, CountingSearch


def search(scores: list[torch.Tensor], k: int, guess: tuple[float, float] | None) -> tuple[float, int]:
    """The order statistic, and the number of passes over the tensors."""
    found, passes = CountingSearch(k, guess), 0
    while not found.done:
        low, shift, bins = found.window
        assert bins <= BINS
        counts = torch.zeros(bins + 3, dtype=torch.int64)
        for part in scores:
            rkif_kernels.count_scores_(counts, Scores([part]), low=low, shift=shift)
        assert counts[:-1].sum() == sum(part.numel() for part in scores)
        found = CountingSearch.restored(found.state())  # at any point
        found.narrow(counts.numpy())
        passes += 1
    return found.value, passes


@pytest.mark.parametrize("name", adversarial(4).keys())
@pytest.mark.parametrize(
    "guess", [None, (0.2, 0.3), (0.0, 0.0), (1e30, torch.inf), (0.0, torch.inf)], ids=str
)
def test_search_is_exact_for_any_guess(name: str, guess: tuple[float, float] | None) -> None:
    scores = adversarial(700)[name]
    ordered = scores.sort().values
    for k in (0, 1, 350, 559, 698, 699):
        value, passes = search([scores[:300], scores[300:]], k, guess)
        assert value == ordered[k].item()
        assert passes <= 3


def test_a_good_guess_needs_one_pass() -> None:
    scores = torch.rand(5000)
    value = scores.sort().values[4000].item()
    assert search([scores], 4000, (value * 0.99, value * 1.01)) == (value, 1)
    assert search([scores], 4000, (value, value)) == (value, 1)
    assert search([scores], 4000, (value * 0.8, value * 1.2)) == (value, 2)


@settings(max_examples=60)
@given(
    st.lists(st.floats(0, width=32, allow_nan=False), min_size=1, max_size=40),
    st.floats(0, 1),
    st.tuples(st.floats(0, width=32, allow_nan=False), st.floats(0, width=32, allow_nan=False)).map(sorted),
)
def test_search_is_exact_on_random_scores(values: list[float], fraction: float, guess: list[float]) -> None:
    k = int(fraction * (len(values) - 1))
    value, passes = search([torch.tensor(values)], k, (guess[0], guess[1]))
    assert value == sorted(values)[k]
    assert passes <= 3


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("bins", [1, 64])
@pytest.mark.parametrize("distance", [False, True], ids=["S*U", "distance"])
def test_counts_are_those_of_the_reference(
    implementation: object, sizes: list[int], bins: int, distance: bool
) -> None:
    device = implementation.device
    scores = Scores(positive(sizes, torch.float32, 0), positive(sizes, torch.bfloat16, 1), distance)
    key = int(np.float32(0.4).view(np.int32))
    for low, shift in ((0, 0), (0, 30), (key, 0), (key, 17), (key, 24), (KEYS - 1, 5), (2**31 - 1, 30)):
        expected, got = torch.ones(2, bins + 3, dtype=torch.int64)
        reference.count_scores_(expected, scores, low=low, shift=shift)
        got = got.to(device)
        implementation.count_scores_(got, scores_on(device, scores), low=low, shift=shift)
        assert torch.equal(got.cpu(), expected)
        assert expected.sum() == sum(sizes) + bins + 3


@pytest.mark.parametrize("implementation", implementations())
def test_invalid_scores_and_ties_are_counted(implementation: object) -> None:
    values = torch.tensor([torch.nan, -1.0, -0.0, 0.0, 1e-45, 1.0, torch.inf, *[0.25] * (2 * CHUNK)])
    for low, shift, expected in (
        (0, 0, [0, 4, 1, 2 * CHUNK + 2, 3]),
        (1, 0, [4, 1, 0, 2 * CHUNK + 2, 3]),
        (0x3E800000, 0, [5, 2 * CHUNK, 0, 2, 3]),
        (0x3E800000, 23, [5, 2 * CHUNK, 0, 2, 3]),
        (0x3E800000, 24, [5, 2 * CHUNK, 1, 1, 3]),
    ):
        counts = torch.zeros(5, dtype=torch.int64, device=implementation.device)
        implementation.count_scores_(counts, Scores(on(counts.device, [values])), low=low, shift=shift)
        assert counts.tolist() == expected


def test_inconsistent_arguments_are_refused() -> None:
    scores = Scores([torch.rand(3)])
    for counts in (
        torch.zeros(5),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(10, dtype=torch.int64)[::2],
    ):
        with pytest.raises(ValueError, match="counts must be contiguous int64"):
            rkif_kernels.count_scores_(counts, scores, low=0, shift=0)
    for low, shift in ((-1, 0), (2**31, 0), (0, -1), (0, 31)):
        with pytest.raises(ValueError, match="low must be in"):
            rkif_kernels.count_scores_(torch.zeros(5, dtype=torch.int64), scores, low=low, shift=shift)


@given(
    st.lists(st.floats(0, width=32, allow_nan=False), min_size=1, max_size=60),
    st.integers(0, 59),
    st.sampled_from([1 << 11, 1 << 15]),
)
def test_few_bins_find_the_same_in_three_passes(values: list[float], k: int, bins: int) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    k %= len(values)
    search, passes = CountingSearch(k, bins=bins), 0
    while not search.done:
        counts = torch.zeros(search.window.bins + 3, dtype=torch.int64)
        assert search.window.bins <= bins
        rkif_kernels.count_scores_(counts, Scores([scores]), low=search.window.low, shift=search.window.shift)
        search.narrow(counts.numpy())
        passes += 1
    assert search.value == scores.sort().values[k]
    assert passes <= 3


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("product", [False, True])
def test_a_sample_takes_every_nth_score_over_all_tensors(step: int, product: bool) -> None:
    s = [
        torch.arange(5.0),
        torch.zeros(0),
        torch.arange(5.0, 8.0).bfloat16(),
        torch.arange(8.0, 20.0).view(3, 4),
    ]
    u = [torch.full_like(t, 2) for t in s] if product else None
    whole = torch.arange(20.0) * (2 if product else 1)
    assert torch.equal(rkif_kernels.sample_scores(Scores(s, u), step), whole[::step])
    with pytest.raises(ValueError, match="step must be a whole number of at least 1; got 0"):
        rkif_kernels.sample_scores(Scores(s, u), 0)


def test_a_sample_of_no_tensors_is_empty() -> None:
    sample = rkif_kernels.sample_scores(Scores([]), 1)
    assert sample.dtype == torch.float32
    assert sample.tolist() == []


@pytest.mark.parametrize("uncertain", [False, True])
@pytest.mark.parametrize("distance", [False, True])
def test_a_subset_of_scores_keeps_their_form(uncertain: bool, distance: bool) -> None:
    """A subset keeps every form of a score."""
    if distance and not uncertain:
        pytest.skip("a distance is one between two lists")
    s, u = positive([4, 1, 6], torch.bfloat16, 0), positive([4, 1, 6], torch.float32, 1)
    scores = Scores(s, u if uncertain else None, distance)
    subset = scores.subset([2, 0])
    assert (scores.numel, subset.numel, scores.device) == (11, 10, s[0].device)
    for place, index in enumerate([2, 0]):
        a, b = s[index].float(), u[index].float()
        expected = (a - b).abs() if distance else a * b if uncertain else a
        assert torch.equal(subset.values(place), expected)
        assert torch.equal(scores.values(index, slice(1, None, 2)), expected[1::2])

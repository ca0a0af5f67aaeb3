"""The reference, compared with values computed by hand and with brute force."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rkif_kernels import FusionInputs, ImportanceInputs, MergeRule, Scores, Smoothing, order_statistic_k
from rkif_kernels.backends import reference

finite = st.floats(-1e4, 1e4, width=32)
score = st.floats(0, 1e4, width=32) | st.sampled_from([0.0, 1.0, 2.0, 2.0**-140, float("inf")])


def update(w: float, g: float, s: float, u: float, order: str, beta1: float = 0.75, beta2: float = 0.5):
    state, uncertainty = torch.tensor([s]), torch.tensor([u])
    nonfinite = torch.zeros(1, dtype=torch.int64)
    reference.update_importance_(
        ImportanceInputs([torch.tensor([w])], [torch.tensor([g])], [state], [uncertainty]),
        Smoothing(beta1, beta2, order),
        nonfinite,
    )
    return state.item(), uncertainty.item(), nonfinite.item()


@pytest.mark.parametrize(
    ("order", "importance"),
    # w = 3, g = -2: w*g = -6, (w*g)^2 = 36, -6 - 18 = -24
    [("first", 6.0), ("second", 36.0), ("mixed", 24.0)],
)
def test_importance_is_that_computed_by_hand(order: str, importance: float) -> None:
    s, u, nonfinite = update(3.0, -2.0, 2.0, 1.0, order)
    # S = 0.75*2 + 0.25*I, and U = 0.5*1 + 0.5*|I - S| with the new S
    assert s == 1.5 + 0.25 * importance
    assert u == 0.5 + 0.5 * abs(importance - s)
    assert nonfinite == 0


@given(finite, finite, st.floats(0, 1e4, width=32), st.floats(0, 1e4, width=32), st.floats(0, 1))
def test_importance_is_float32_arithmetic_in_the_written_order(
    w: float, g: float, s: float, u: float, beta: float
) -> None:
    f = np.float32
    with np.errstate(over="ignore", under="ignore"):
        importance = abs(f(w) * f(g))
        new_s = f(beta) * f(s) + f(1 - beta) * importance
        new_u = f(beta) * f(u) + f(1 - beta) * abs(importance - new_s)
    assert update(w, g, s, u, "first", beta, beta)[:2] == (new_s, new_u)


@pytest.mark.parametrize(
    ("w", "g"), [(float("nan"), 1.0), (1.0, float("inf")), (1e30, 1e30), (0.0, float("inf"))]
)
def test_a_nonfinite_importance_leaves_the_state_and_is_counted(w: float, g: float) -> None:
    assert update(w, g, 2.0, 1.0, "first") == (2.0, 1.0, 1)


def test_a_missing_gradient_is_a_zero_gradient() -> None:
    state = torch.tensor([8.0])
    nonfinite = torch.zeros(1, dtype=torch.int64)
    inputs = ImportanceInputs([torch.tensor([3.0])], [None], [state], None)
    reference.update_importance_(inputs, Smoothing(0.75), nonfinite)
    assert state.item() == 6.0


def test_bfloat16_state_is_rounded_once_and_uncertainty_sees_the_unrounded_sensitivity() -> None:
    s, u = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([0.0], dtype=torch.bfloat16)
    reference.update_importance_(
        ImportanceInputs(
            [torch.tensor([1.0])],
            [torch.tensor([1.0078125])],  # 1 + 2^-7, the next bfloat16 after 1
            [s],
            [u],
        ),
        Smoothing(0.5),
        torch.zeros(1, dtype=torch.int64),
    )
    assert s.item() == 1.0  # 1.00390625 lies half way, and rounds to even
    assert u.item() == 0.00390625  # |1.0078125 - 1.00390625|, not |1.0078125 - 1|


@pytest.mark.parametrize(
    ("density", "numel", "k"),
    [
        (0.2, 11, 8),  # (1-0.2)*10 is 8, where float arithmetic may say 7.999...
        (0.2, 1, 0),
        (0.9, 11, 1),
        (0.7, 11, 3),
        (0.1, 2**31 + 1, 1932735283),
        (0.05, 13_015_864_320, 12_365_071_103),
        (1, 10, 0),
        (0, 10, 9),
        (Fraction(1, 3), 4, 2),
    ],
)
def test_k_is_exact_on_the_decimal_density(density: float, numel: int, k: int) -> None:
    assert order_statistic_k(numel, density) == k


@given(st.lists(st.lists(score, min_size=1, max_size=9), min_size=1, max_size=4), st.integers(0, 20))
def test_the_threshold_is_that_of_sorted_python_floats(groups: list[list[float]], twentieths: int) -> None:
    density = Fraction(twentieths, 20)
    scores = Scores([torch.tensor(group) for group in groups])
    flat = sorted(value for group in groups for value in group)
    k = int((1 - density) * (len(flat) - 1))
    found = reference.score_thresholds(scores, ks=[k], per_tensor=False)
    assert found.tolist() == [flat[k]]
    ks = [int((1 - density) * (len(group) - 1)) for group in groups]
    each = reference.score_thresholds(scores, ks=ks, per_tensor=True)
    assert each.tolist() == [sorted(group)[k] for group, k in zip(groups, ks, strict=True)]


WEIGHTS = ((1.0, 0.0), (0.0, 1.0), (0.25, 0.5), (2.0, -1.0))


@pytest.mark.parametrize(
    ("inner_score", "outer_score", "expected"),
    # base 10, inner 14, outer 22: tau_in 4, tau_out 8
    [
        (2.0, 0.0, 14.0),  # inner only: 10 + 4
        (0.0, 2.0, 18.0),  # outer only: 10 + 8
        (2.0, 2.0, 15.0),  # both: 10 + 0.25*4 + 0.5*8
        (0.0, 0.0, 10.0),  # neither: 10 + 2*4 - 8
        (1.0, 1.0, 10.0),  # a score equal to the threshold is not above it
    ],
)
def test_the_fusion_of_one_element_is_that_computed_by_hand(
    inner_score: float, outer_score: float, expected: float
) -> None:
    out = torch.tensor([float("nan")])
    stats = reference.fuse_(
        FusionInputs(
            [out],
            [torch.tensor([10.0])],
            [torch.tensor([14.0])],
            [torch.tensor([22.0])],
            Scores([torch.tensor([inner_score])]),
            Scores([torch.tensor([outer_score])]),
        ),
        (torch.tensor([1.0]), torch.tensor([1.0])),
        MergeRule(WEIGHTS, "inner"),
    )
    assert out.item() == expected
    case = (inner_score > 1, outer_score > 1)
    assert stats.counts.tolist() == [case == c for c in ((1, 0), (0, 1), (1, 1), (0, 0))]
    assert stats.squared_norms.tolist() == [16.0, 64.0, (expected - 10) ** 2]


def test_outer_from_base_measures_the_outer_task_vector_from_the_base() -> None:
    out = torch.empty(1)
    stats = reference.fuse_(
        FusionInputs(
            [out],
            [torch.tensor([10.0])],
            [torch.tensor([14.0])],
            [torch.tensor([22.0])],
            Scores([torch.tensor([0.0])]),
            Scores([torch.tensor([2.0])]),
        ),
        (torch.tensor([1.0]), torch.tensor([1.0])),
        MergeRule(WEIGHTS, "base"),
    )
    assert out.item() == 22.0
    assert stats.squared_norms.tolist() == [16.0, 144.0, 144.0]


@given(finite, finite, finite, finite, finite)
def test_fusion_is_float32_arithmetic_from_left_to_right(
    base: float, inner: float, outer: float, w_in: float, w_out: float
) -> None:
    f = np.float32
    expected = (f(base) + f(w_in) * (f(inner) - f(base))) + f(w_out) * (f(outer) - f(inner))
    out = torch.empty(1)
    reference.fuse_(
        FusionInputs(
            [out],
            [torch.tensor([base])],
            [torch.tensor([inner])],
            [torch.tensor([outer])],
            Scores([torch.zeros(1)]),
            Scores([torch.zeros(1)]),
        ),
        (torch.zeros(1), torch.zeros(1)),
        MergeRule(((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (w_in, w_out)), "inner"),
    )
    assert out.item() == expected

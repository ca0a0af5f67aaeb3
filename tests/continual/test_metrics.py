"""OP, BWT and FWT, compared with values computed by hand and with exact fractions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkif.continual.evaluation.metrics import backward_transfer, forward_transfer, overall_performance

NAN = float("nan")

# Rows are tasks, columns the task just learned.
MATRIX = [
    [90.0, 70.0, 60.0],
    [20.0, 80.0, 76.0],
    [10.0, 34.0, 95.0],
]
INITIAL = [5.0, 8.0, 30.0]


def test_metrics_are_those_computed_by_hand() -> None:
    assert overall_performance(MATRIX) == pytest.approx((60 + 76 + 95) / 3)
    assert backward_transfer(MATRIX) == pytest.approx(((60 - 90) + (76 - 80)) / 2)
    assert forward_transfer(MATRIX, INITIAL) == pytest.approx(((20 - 8) + (34 - 30)) / 2)


def test_a_single_task_has_no_transfer() -> None:
    assert overall_performance([[42.0]]) == 42.0
    assert backward_transfer([[42.0]]) is None
    assert forward_transfer([[42.0]], [1.0]) is None


def test_only_the_needed_entries_need_be_measured() -> None:
    assert overall_performance([[None, 50.0], [None, 70.0]]) == 60.0
    assert backward_transfer([[80.0, 50.0], [None, None]]) == -30.0
    assert forward_transfer([[None, None], [30.0, None]], [None, 10.0]) == 20.0


def test_numpy_and_integers_count_as_numbers() -> None:
    assert overall_performance(np.array(MATRIX, np.float32)) == pytest.approx(77.0)  # type: ignore[arg-type]
    assert backward_transfer([[100, 0], [0, 100]]) == -100


percent = st.floats(0, 100)
runs = st.integers(2, 6).flatmap(
    lambda k: st.tuples(
        st.lists(st.lists(percent, min_size=k, max_size=k), min_size=k, max_size=k),
        st.lists(percent, min_size=k, max_size=k),
    )
)


@given(runs)
def test_metrics_equal_exact_fractions(run: tuple[list[list[float]], list[float]]) -> None:
    rows, initial = run
    a, first, k = [[Fraction(x) for x in row] for row in rows], [Fraction(x) for x in initial], len(rows)
    op, bwt, fwt = Fraction(0), Fraction(0), Fraction(0)
    for i in range(k):
        op += a[i][-1] / k
        bwt += (a[i][-1] - a[i][i]) / (k - 1)
        if i > 0:
            fwt += (a[i][i - 1] - first[i]) / (k - 1)
    assert overall_performance(rows) == pytest.approx(float(op), abs=1e-10)
    assert backward_transfer(rows) == pytest.approx(float(bwt), abs=1e-10)
    assert forward_transfer(rows, initial) == pytest.approx(float(fwt), abs=1e-10)


@pytest.mark.parametrize(
    "metric", [overall_performance, backward_transfer, lambda a: forward_transfer(a, [1.0] * len(a))]
)
@pytest.mark.parametrize(
    ("a", "kind", "message"),
    [
        ([], ValueError, "the accuracy matrix is empty"),
        ([[1.0, 2.0]], ValueError, "not square: row 0 has 2 entries for 1 tasks"),
        ([[1.0, 2.0], [1.0]], ValueError, "not square: row 1 has 1 entries for 2 tasks"),
        ([[1.0, 2.0], [NAN, 2.0]], ValueError, r"a\[1\]\[0\] must be a percentage in \[0, 100\], got nan"),
        (
            [[1.0, 100.5], [1.0, 2.0]],
            ValueError,
            r"a\[0\]\[1\] must be a percentage in \[0, 100\], got 100.5",
        ),
        ([[-1.0]], ValueError, r"a\[0\]\[0\] must be a percentage in \[0, 100\], got -1.0"),
        ([["1"]], TypeError, r"a\[0\]\[0\] must be a number or None, got '1'"),
    ],
)
def test_invalid_matrices_are_refused(
    metric: Callable[[Any], Any], a: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        metric(a)


def test_missing_entries_are_named() -> None:
    with pytest.raises(ValueError, match=r"a\[0\]\[1\] is needed but was not measured"):
        overall_performance([[1.0, None], [1.0, 1.0]])
    with pytest.raises(ValueError, match=r"a\[0\]\[0\] is needed but was not measured"):
        backward_transfer([[None, 1.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match=r"a\[1\]\[0\] is needed but was not measured"):
        forward_transfer([[1.0, 1.0], [None, 1.0]], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"initial\[1\] is needed but was not measured"):
        forward_transfer([[1.0, 1.0], [1.0, 1.0]], [1.0, None])


def test_invalid_initial_accuracies_are_refused() -> None:
    with pytest.raises(ValueError, match="initial has 1 entries for 3 tasks"):
        forward_transfer(MATRIX, [1.0])
    with pytest.raises(ValueError, match=r"initial\[0\] must be a percentage in \[0, 100\], got nan"):
        forward_transfer(MATRIX, [NAN, 1.0, 1.0])

"""OP, BWT and FWT of a task sequence, computed from one accuracy matrix.

`a[i][j]` is the accuracy in percent on task i after training on task j, both from 0, in a list of K rows of K
entries; None stands for an accuracy that was not measured. `initial[i]` is the accuracy on task i before any
training. Definitions: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning" (NeurIPS
2017), section 2, where the matrix is written transposed (R[j][i]).

Other code bases use the same names for other formulas. Some divide backward transfer by K instead of K - 1.
Some define forward transfer as the mean accuracy right after learning, minus a constant or the accuracy of a
separately trained model. Only values of the same formula can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

Matrix = Sequence[Sequence[float | None]]


def overall_performance(a: Matrix) -> float:
    """OP = 1/K * sum over i of a[i][K-1]: the mean accuracy after the last task ("average accuracy" in GEM).

    Args:
        a: the accuracy matrix, [K, K], percent; the last column is needed.

    Returns:
        Percent.

    Raises:
        ValueError: the matrix is empty or not square, a value is NaN or outside [0, 100], or a needed value
            is None.
        TypeError: a value is not a number.
    """
    k = _checked_size(a)
    return math.fsum(_entry(a, i, k - 1) for i in range(k)) / k


def backward_transfer(a: Matrix) -> float | None:
    """BWT = 1/(K-1) * sum over i < K-1 of (a[i][K-1] - a[i][i]): the effect of later tasks on earlier ones.

    Negative values are forgetting.

    Args:
        a: the accuracy matrix, [K, K], percent; the diagonal and the last column are needed.

    Returns:
        Percentage points; None for a single task, where it is undefined.

    Raises:
        ValueError, TypeError: as `overall_performance`.
    """
    k = _checked_size(a)
    if k == 1:
        return None
    return math.fsum(_entry(a, i, k - 1) - _entry(a, i, i) for i in range(k - 1)) / (k - 1)


def forward_transfer(a: Matrix, initial: Sequence[float | None]) -> float | None:
    """FWT = 1/(K-1) * sum over i >= 1 of (a[i][i-1] - initial[i]): effect of earlier tasks on unseen ones.

    Args:
        a: the accuracy matrix, [K, K], percent; the entries just before each task's own training are needed.
        initial: the accuracies before any training, [K], percent; `initial[0]` is not needed.

    Returns:
        Percentage points; None for a single task, where it is undefined.

    Raises:
        ValueError, TypeError: as `overall_performance`; or `initial` has another length than `a`.
    """
    k = _checked_size(a)
    if len(initial) != k:
        raise ValueError(f"initial has {len(initial)} entries for {k} tasks")
    for i, value in enumerate(initial):
        _check_value(value, f"initial[{i}]")
    if k == 1:
        return None
    gains = []
    for i in range(1, k):
        before = initial[i]
        if before is None:
            raise ValueError(f"initial[{i}] is needed but was not measured")
        gains.append(_entry(a, i, i - 1) - before)
    return math.fsum(gains) / (k - 1)


def _checked_size(a: Matrix) -> int:
    if not len(a):
        raise ValueError("the accuracy matrix is empty")
    for i, row in enumerate(a):
        if len(row) != len(a):
            raise ValueError(
                f"the accuracy matrix is not square: row {i} has {len(row)} entries for {len(a)} tasks"
            )
        for j, value in enumerate(row):
            _check_value(value, f"a[{i}][{j}]")
    return len(a)


def _check_value(value: object, name: str) -> None:
    if value is None:
        return
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or None, got {value!r}")
    if not 0 <= float(value) <= 100:
        raise ValueError(f"{name} must be a percentage in [0, 100], got {value}")


def _entry(a: Matrix, i: int, j: int) -> float:
    value = a[i][j]
    if value is None:
        raise ValueError(f"a[{i}][{j}] is needed but was not measured")
    return value

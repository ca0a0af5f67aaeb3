"""Exact match and accuracy."""

from __future__ import annotations

import pytest

from rkif.continual.models.scoring import accuracy, exact_match
from rkif.continual.tasks.records import Record


@pytest.mark.parametrize(
    ("prediction", "output", "same"),
    [
        ("World", "World", True),
        (" world\n", "WORLD ", True),
        ("wor ld", "world", False),
        ("", "world", False),
        ("1 + 1", "2", False),
    ],
)
def test_an_exact_match_is_correct(prediction: str, output: str, same: bool) -> None:
    assert exact_match(prediction, output) is same


def test_accuracy_is_in_percent() -> None:
    records = [Record("t", str(i), "", output) for i, output in enumerate(["a", "b", "C", "d"])]
    assert accuracy(["a", "x", "c ", "d"], records) == 75.0
    assert accuracy(["x"] * 4, records) == 0.0
    with pytest.raises(ValueError, match="3 predictions for 4 records"):
        accuracy(["a"] * 3, records)
    with pytest.raises(ValueError, match="records are empty"):
        accuracy([], [])

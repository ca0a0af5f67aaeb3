"""Seeds: the same in every process, different for every purpose."""

from __future__ import annotations

from typing import Any

import pytest

from rkif.seeding import derive_seed


def test_seed_is_the_first_63_bits_of_the_parts_digest() -> None:
    assert (
        derive_seed(0, "memory", "agnews") == 4908575833615023308
    )  # by sha256sum of [0, "memory", "agnews"]


def test_different_parts_give_different_seeds() -> None:
    parts: list[tuple[str | int, ...]] = [(1,), ("1",), ("a", "b"), ("ab",), ("a", "b", ""), ("b", "a"), ()]
    assert len({derive_seed(*p) for p in parts}) == len(parts)


@pytest.mark.parametrize("part", [1.0, True, None])
def test_seed_parts_are_strings_and_integers(part: Any) -> None:
    with pytest.raises(TypeError, match=f"got {part}"):
        derive_seed(0, part)

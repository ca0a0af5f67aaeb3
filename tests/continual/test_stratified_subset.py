"""Subsets of records that are balanced over the labels."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rkif.continual.tasks.records import Record, stratified_subset


def records(outputs: str) -> list[Record]:
    return [Record("t", str(i), "", output) for i, output in enumerate(outputs)]


def test_all_records_of_a_rare_label_are_chosen() -> None:
    chosen = Counter(r.output for r in stratified_subset(records("a" * 50 + "b" * 2 + "c" * 50), 12, seed=0))
    assert chosen == {"a": 5, "b": 2, "c": 5}


@given(st.text("abcdef", min_size=1, max_size=40), st.integers(1, 45), st.integers(0, 9))
def test_subset_is_even_ordered_and_nested(outputs: str, n: int, seed: int) -> None:
    pool = records(outputs)
    chosen = stratified_subset(pool, n, seed)
    places = [int(record.id) for record in chosen]
    assert places == sorted(set(places))
    assert len(chosen) == min(n, len(pool))
    assert set(chosen) <= set(stratified_subset(pool, n + 1, seed))
    have, there = Counter(r.output for r in chosen), Counter(outputs)
    for label in there:
        if have[label] < there[label]:  # this label had more records, so no other label has two more
            assert max(have.values()) <= have[label] + 1


def test_every_record_can_be_chosen() -> None:
    pool = records("aaabbb")
    seen = {record.id for seed in range(60) for record in stratified_subset(pool, 2, seed)}
    assert seen == set("012345")
    assert {stratified_subset(pool, 1, seed)[0].output for seed in range(20)} == {"a", "b"}

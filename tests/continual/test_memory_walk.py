"""The order of the items that a replay memory returns."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rkif.continual.tasks.records import Record
from rkif.continual.tasks.replay_memory import ReplayMemory


def questions(task: str, count: int) -> list[Record]:
    return [Record(task, f"{task}-{i}", f"question {i}", "ab"[i % 2]) for i in range(count)]


def filled(sizes: list[int]) -> ReplayMemory:
    memory = ReplayMemory()
    for i, size in enumerate(sizes):
        task = f"task{i}"
        memory.add(task, f"instruction {i}", questions(task, size), fraction=1, seed=0)
    return memory


def walk(memory: ReplayMemory, count: int, *, seed: int = 0) -> list[Record]:
    return [record for _, record in memory.batch(0, count, seed=seed)]


sizes_strategy = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@given(sizes=sizes_strategy, seed=st.integers(0, 3))
def test_each_epoch_is_one_pass(sizes: list[int], seed: int) -> None:
    memory = filled(sizes)
    total = len(memory)
    seen = walk(memory, 3 * total, seed=seed)
    everything = Counter(record for _, record in memory.items)
    for epoch in range(3):
        assert Counter(seen[epoch * total : (epoch + 1) * total]) == everything


@given(sizes=sizes_strategy, seed=st.integers(0, 3))
def test_tasks_are_interleaved_as_evenly_as_can_be(sizes: list[int], seed: int) -> None:
    memory = filled(sizes)
    total = len(memory)
    seen = walk(memory, 2 * total, seed=seed)
    for epoch in (seen[:total], seen[total:]):
        counts: Counter[str] = Counter()
        for p, record in enumerate(epoch, start=1):
            counts[record.task] += 1
            for task, kept in memory.ids.items():
                assert abs(counts[task] - Fraction(p * len(kept), total)) < 1


@given(sizes=sizes_strategy, size=st.integers(1, 40), step=st.integers(0, 20), seed=st.integers(0, 3))
def test_a_batch_is_a_window_of_the_walk(sizes: list[int], size: int, step: int, seed: int) -> None:
    memory = filled(sizes)
    expected = memory.batch(0, (step + 1) * size, seed=seed)[step * size :]
    assert memory.batch(step, size, seed=seed) == expected
    assert filled(sizes).batch(step, size, seed=seed) == expected


def test_each_epoch_and_seed_has_its_own_order() -> None:
    memory = filled([10, 10])
    seen = walk(memory, 40)
    assert seen[:20] != seen[20:]
    assert seen[:20] != walk(memory, 20, seed=1)
    assert seen[:20] != [record for _, record in memory.items]


def test_a_walk_over_equal_tasks_alternates() -> None:
    names = [record.task for record in walk(filled([4, 4, 4]), 12)]
    assert names == names[:3] * 4
    assert set(names[:3]) == {"task0", "task1", "task2"}


def test_no_task_always_comes_first() -> None:
    seen = walk(filled([2, 2, 2]), 6 * 20)
    assert {record.task for record in seen[::6]} == {"task0", "task1", "task2"}


def test_items_carry_their_own_instruction() -> None:
    for instruction, record in filled([2, 3]).batch(1, 4, seed=0):
        assert instruction == f"instruction {record.task.removeprefix('task')}"


def test_adding_a_task_changes_the_next_batch_only_through_the_contents() -> None:
    grown = filled([5])
    grown.batch(3, 4, seed=0)
    grown.add("task1", "instruction 1", questions("task1", 5), fraction=1, seed=0)
    assert grown == filled([5, 5])
    assert grown.batch(4, 4, seed=0) == filled([5, 5]).batch(4, 4, seed=0)


def test_no_global_generator_is_touched() -> None:
    before = random.getstate(), torch.get_rng_state()
    filled([5, 7]).batch(2, 8, seed=3)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("sizes", "step", "size", "message"),
    [
        ([], 0, 1, "the memory is empty"),
        ([2], -1, 1, "step must not be negative, got -1"),
        ([2], 0, 0, "size must be at least 1, got 0"),
    ],
)
def test_batch_refuses_invalid_arguments(sizes: list[int], step: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filled(sizes).batch(step, size, seed=0)

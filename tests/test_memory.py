"""The replay memory: what it keeps, the order in which it gives it back, and its file."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rkif.continual.tasks import Record
from rkif.memory import ReplayMemory
from rkif.seeding import derive_seed


def records(task: str, outputs: str) -> list[Record]:
    return [Record(task, f"{task}{i}", f"question {i}", output) for i, output in enumerate(outputs)]


def filled(sizes: list[int]) -> ReplayMemory:
    memory = ReplayMemory()
    for i, size in enumerate(sizes):
        memory.add(
            f"task{i}", f"instruction {i}", records(f"task{i}", "ab" * size)[:size], fraction=1, seed=0
        )
    return memory


def walk(memory: ReplayMemory, count: int, *, seed: int = 0) -> list[Record]:
    return [record for _, record in memory.batch(0, count, seed=seed)]


# -- seeds


def test_seed_is_the_first_63_bits_of_the_parts_digest() -> None:
    assert (
        derive_seed(0, "memory", "agnews") == 4908575833615023308
    )  # by sha256sum of [0, "memory", "agnews"]


def test_seeds_differ_where_the_parts_do() -> None:
    parts: list[tuple[str | int, ...]] = [(1,), ("1",), ("a", "b"), ("ab",), ("a", "b", ""), ("b", "a"), ()]
    assert len({derive_seed(*p) for p in parts}) == len(parts)


@pytest.mark.parametrize("part", [1.0, True, None])
def test_seed_parts_are_strings_and_integers(part: Any) -> None:
    with pytest.raises(TypeError, match=f"got {part}"):
        derive_seed(0, part)


# -- what is kept


@given(
    outputs=st.text("abcdefgh", min_size=1, max_size=60),
    percent=st.integers(1, 100),
    cap=st.none() | st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_sample_size_and_labels(outputs: str, percent: int, cap: int | None, seed: int) -> None:
    memory = ReplayMemory()
    memory.add("t", "?", records("t", outputs), fraction=percent / 100, cap=cap, seed=seed)
    n = min(max(1, percent * len(outputs) // 100), cap or 99)
    kept, there = Counter(record.output for _, record in memory.items), Counter(outputs)
    assert len(memory) == n == len(set(memory.ids["t"]))
    if n <= len(there):
        assert set(kept.values()) == {1}
    for label, count in there.items():
        assert kept[label] >= min(count, n // len(there))


def test_the_share_is_taken_in_decimal() -> None:
    memory = ReplayMemory()
    memory.add("t", "?", records("t", "ab" * 50), fraction=0.29, seed=0)
    assert int(0.29 * 100) == 28
    assert len(memory) == 29


def test_free_text_does_not_fill_the_memory() -> None:
    task = [Record("t", str(i), "", f"answer {i}") for i in range(150)]
    memory = ReplayMemory()
    memory.add("t", "?", task, seed=0)
    assert len(memory) == 3


def test_sample_depends_on_seed_and_task_only() -> None:
    def kept(task: str, seed: int, *, after: int = 0) -> list[str]:
        memory = filled([3] * after)
        memory.add(task, "?", records(task, "ab" * 100), seed=seed)
        return [name.removeprefix(task) for name in memory.ids[task]]

    assert kept("t", 0) == kept("t", 0, after=2)
    assert kept("t", 0) != kept("t", 1)
    assert kept("t", 0) != kept("u", 0)


def test_contents() -> None:
    memory = ReplayMemory()
    assert (len(memory), memory.tasks, memory.ids, memory.items) == (0, (), {}, ())
    b, a = records("b", "xy"), records("a", "z")
    memory.add("b", "B?", b, fraction=1, seed=0)
    memory.add("a", "A?", a, fraction=1, seed=0)
    assert len(memory) == 3
    assert memory.tasks == ("b", "a")
    assert memory.ids == {"b": ("b0", "b1"), "a": ("a0",)}
    assert memory.items == (("B?", b[0]), ("B?", b[1]), ("A?", a[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "old"}, "task 'old' is in the memory already"),
        ({"records": []}, "task 't' has no records to remember"),
        ({"records": records("u", "a")}, "record 'u0' belongs to task 'u', not to 't'"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0.0"),
        ({"fraction": 1.01}, r"fraction must be in \(0, 1\], got 1.01"),
        ({"fraction": float("nan")}, r"fraction must be in \(0, 1\], got nan"),
        ({"cap": 0}, "cap must be at least 1, got 0"),
    ],
)
def test_add_refuses(arguments: dict[str, Any], message: str) -> None:
    memory = ReplayMemory()
    memory.add("old", "?", records("old", "a"), seed=0)
    with pytest.raises(ValueError, match=message):
        memory.add(**{"task": "t", "instruction": "?", "records": records("t", "ab"), "seed": 0, **arguments})
    assert memory.tasks == ("old",)


# -- the walk


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


def test_epochs_and_seeds_are_shuffled_apart() -> None:
    memory = filled([10, 10])
    seen = walk(memory, 40)
    assert seen[:20] != seen[20:]
    assert seen[:20] != walk(memory, 20, seed=1)
    assert seen[:20] != [record for _, record in memory.items]


def test_a_known_walk_over_equal_tasks_takes_turns() -> None:
    names = [record.task for record in walk(filled([4, 4, 4]), 12)]
    assert names == names[:3] * 4
    assert set(names[:3]) == {"task0", "task1", "task2"}


def test_items_carry_their_own_instruction() -> None:
    for instruction, record in filled([2, 3]).batch(1, 4, seed=0):
        assert instruction == f"instruction {record.task.removeprefix('task')}"


def test_adding_a_task_changes_the_next_batch_only_through_the_contents() -> None:
    grown = filled([5])
    grown.batch(3, 4, seed=0)
    grown.add("task1", "instruction 1", records("task1", "ab" * 3)[:5], fraction=1, seed=0)
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
def test_batch_refuses(sizes: list[int], step: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filled(sizes).batch(step, size, seed=0)


# -- the file


@given(
    st.lists(
        st.tuples(
            st.text(max_size=5), st.lists(st.text(st.characters(), max_size=5), min_size=1, max_size=4)
        ),
        max_size=3,
        unique_by=lambda pair: pair[0],
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, contents: list[tuple[str, list[str]]]) -> None:
    memory = ReplayMemory()
    for task, texts in contents:
        memory.add(task, texts[0], [Record(task, t, t + "\n", t) for t in texts], fraction=1, seed=0)
    path = tmp_path_factory.mktemp("memory") / "memory.jsonl"
    memory.save(path)
    again = ReplayMemory.load(path)
    assert again == memory
    assert (again.tasks, again.ids) == (memory.tasks, memory.ids)
    assert os.listdir(path.parent) == ["memory.jsonl"]


def test_equality_sees_contents_and_order() -> None:
    def memory(*tasks: str, instruction: str = "?") -> ReplayMemory:
        made = ReplayMemory()
        for task in tasks:
            made.add(task, instruction, records(task, "ab"), fraction=1, seed=0)
        return made

    assert memory("a", "b") == memory("a", "b")
    assert memory("a", "b") != memory("b", "a")
    assert memory("a") != memory("a", instruction="!")
    assert memory("a") != memory("a").items


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.jsonl"
    filled([2]).save(path)

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        filled([9]).save(path)
    assert ReplayMemory.load(path) == filled([2])


LINE = {"task": "t", "instruction": "?", "id": "1", "input": "q", "output": "a"}
HEAD = {"rkif_memory": 1, "records": 1}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"m\.jsonl:1: not a replay memory"),
        ([LINE], r"m\.jsonl:1: not a replay memory"),
        ([{**HEAD, "rkif_memory": 2}, LINE], r"m\.jsonl:1: not a replay memory"),
        ([HEAD, "{"], r"m\.jsonl:2: not valid JSON"),
        ([HEAD, {**LINE, "id": 1}], r"m\.jsonl:2: 'id' must be a string, got 1"),
        (
            [HEAD, {k: v for k, v in LINE.items() if k != "instruction"}],
            r"m\.jsonl:2: key 'instruction' is missing",
        ),
        ([HEAD], r"m\.jsonl:1: 0 records, where the first line announces 1"),
        ([HEAD, LINE, {**LINE, "id": "2"}], r"m\.jsonl:3: 2 records, where the first line announces 1"),
    ],
)
def test_load_refuses(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        ReplayMemory.load(path)


def test_load_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        ReplayMemory.load(tmp_path / "absent.jsonl")

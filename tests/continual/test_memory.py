"""The replay memory: its sample and its file."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkif.continual.tasks.records import Record
from rkif.continual.tasks.replay_memory import ReplayMemory


def records(task: str, outputs: str) -> list[Record]:
    return [Record(task, f"{task}{i}", f"question {i}", output) for i, output in enumerate(outputs)]


def memory_of(*tasks: str, instruction: str = "?") -> ReplayMemory:
    memory = ReplayMemory()
    for task in tasks:
        memory.add(task, instruction, records(task, "ab"), fraction=1, seed=0)
    return memory


@given(
    outputs=st.text("abcdefgh", min_size=1, max_size=60),
    percent=st.integers(1, 100),
    cap=st.none() | st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_the_sample_has_the_requested_size_and_balanced_labels(
    outputs: str, percent: int, cap: int | None, seed: int
) -> None:
    memory = ReplayMemory()
    memory.add("t", "?", records("t", outputs), fraction=percent / 100, cap=cap, seed=seed)
    n = min(max(1, percent * len(outputs) // 100), cap or 99)
    kept, there = Counter(record.output for _, record in memory.items), Counter(outputs)
    assert len(memory) == n == len(set(memory.ids["t"]))
    if n <= len(there):
        assert set(kept.values()) == {1}
    for label, count in there.items():
        assert kept[label] >= min(count, n // len(there))


def test_the_fraction_is_exact_in_decimal() -> None:
    memory = ReplayMemory()
    memory.add("t", "?", records("t", "ab" * 50), fraction=0.29, seed=0)
    assert int(0.29 * 100) == 28
    assert len(memory) == 29


def test_free_text_outputs_do_not_exceed_the_memory_size() -> None:
    task = [Record("t", str(i), "", f"answer {i}") for i in range(150)]
    memory = ReplayMemory()
    memory.add("t", "?", task, seed=0)
    assert len(memory) == 3


def test_sample_depends_on_seed_and_task_only() -> None:
    def kept(task: str, seed: int, *, after: tuple[str, ...] = ()) -> list[str]:
        memory = memory_of(*after)
        memory.add(task, "?", records(task, "ab" * 100), seed=seed)
        return [name.removeprefix(task) for name in memory.ids[task]]

    assert kept("t", 0) == kept("t", 0, after=("a", "b"))
    assert kept("t", 0) != kept("t", 1)
    assert kept("t", 0) != kept("u", 0)


def test_the_memory_has_the_added_records() -> None:
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
        ({"records": []}, "task 't' has no records to store"),
        ({"records": records("u", "a")}, "record 'u0' belongs to task 'u', not to 't'"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0.0"),
        ({"fraction": 1.01}, r"fraction must be in \(0, 1\], got 1.01"),
        ({"fraction": float("nan")}, r"fraction must be in \(0, 1\], got nan"),
        ({"cap": 0}, "cap must be at least 1, got 0"),
    ],
)
def test_add_refuses_invalid_arguments(arguments: dict[str, Any], message: str) -> None:
    memory = ReplayMemory()
    memory.add("old", "?", records("old", "a"), seed=0)
    with pytest.raises(ValueError, match=message):
        memory.add(**{"task": "t", "instruction": "?", "records": records("t", "ab"), "seed": 0, **arguments})
    assert memory.tasks == ("old",)


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
def test_a_saved_memory_loads_unchanged(
    tmp_path_factory: pytest.TempPathFactory, contents: list[tuple[str, list[str]]]
) -> None:
    memory = ReplayMemory()
    for task, texts in contents:
        memory.add(task, texts[0], [Record(task, t, t + "\n", t) for t in texts], fraction=1, seed=0)
    path = tmp_path_factory.mktemp("memory") / "memory.jsonl"
    memory.save(path)
    again = ReplayMemory.load(path)
    assert again == memory
    assert (again.tasks, again.ids) == (memory.tasks, memory.ids)
    assert os.listdir(path.parent) == ["memory.jsonl"]


def test_equality_compares_contents_and_order() -> None:
    assert memory_of("a", "b") == memory_of("a", "b")
    assert memory_of("a", "b") != memory_of("b", "a")
    assert memory_of("a") != memory_of("a", instruction="!")
    assert memory_of("a") != memory_of("a").items


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.jsonl"
    memory_of("a").save(path)

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        memory_of("a", "b").save(path)
    assert ReplayMemory.load(path) == memory_of("a")


LINE = {"task": "t", "instruction": "?", "id": "1", "input": "q", "output": "a"}
HEAD = {"rkif_memory": 1, "records": 1}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"m\.jsonl:1: not a replay memory"),
        ([LINE], r"m\.jsonl:1: not a replay memory"),
        ([{**HEAD, "rkif_memory": 2}, LINE], r"m\.jsonl:1: not a replay memory"),
        ([HEAD, "{"], r"m\.jsonl:2: not valid JSON"),
        ([HEAD, {**LINE, "id": 1}], r"m\.jsonl:2 is damaged: id: Input should be a valid string"),
        (
            [HEAD, {k: v for k, v in LINE.items() if k != "instruction"}],
            r"m\.jsonl:2 is damaged, or of another version of rkif: it lacks 'instruction'",
        ),
        ([HEAD], r"m\.jsonl:1: 0 records; the first line has 1"),
        ([HEAD, LINE, {**LINE, "id": "2"}], r"m\.jsonl:3: 2 records; the first line has 1"),
    ],
)
def test_load_refuses_damaged_files(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        ReplayMemory.load(path)


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        ReplayMemory.load(tmp_path / "absent.jsonl")

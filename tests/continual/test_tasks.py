"""Task folders: layout, limits, and a clear message for each error."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rkif.continual.tasks.load import load_tasks
from rkif.continual.tasks.records import Record, Task

TABLE: dict[str, Any] = {
    "tasks": {
        "news": {"instruction": "Topic?\n", "labels": ["world", "sport"], "train": 99},
        "free": {"instruction": "Continue:\n"},
    },
    "orders": {"both": ["free", "news"]},
}
TRAIN = [
    {"task": "news", "id": "n0", "input": "a", "output": "world"},
    {"task": "free", "id": "f0", "input": "b", "output": "anything"},
    {"task": "news", "id": "n1", "input": "c", "output": "sport"},
]
DEV = [
    {"task": "free", "id": "f0", "input": "d", "output": "else"},
    {"task": "news", "id": "n0", "input": "e", "output": "sport"},
]


def write(folder: Path, *, table: Any = TABLE, train: Any = TRAIN, dev: Any = DEV) -> Path:
    (folder / "tasks.json").write_text(json.dumps(table))
    for split, rows in (("train", train), ("dev", dev)):
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def test_tasks_have_the_requested_order(tmp_path: Path) -> None:
    folder = write(tmp_path)
    news = Task(
        "news",
        "Topic?\n",
        ("world", "sport"),
        train=(Record("news", "n0", "a", "world"), Record("news", "n1", "c", "sport")),
        dev=(Record("news", "n0", "e", "sport"),),
    )
    free = Task(
        "free",
        "Continue:\n",
        (),
        train=(Record("free", "f0", "b", "anything"),),
        dev=(Record("free", "f0", "d", "else"),),
    )
    assert load_tasks(folder, "both") == [free, news]
    assert load_tasks(str(folder), ("news", "free")) == [news, free]
    assert load_tasks(folder, ["news"]) == [news]


def test_compressed_files_and_blank_lines_read_the_same(tmp_path: Path) -> None:
    expected = load_tasks(write(tmp_path), "both")
    for split in ("train", "dev"):
        plain = tmp_path / f"{split}.jsonl"
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(b"\n" + plain.read_bytes() + b"\r\n"))
        plain.unlink()
    assert load_tasks(tmp_path, "both") == expected


def test_records_of_other_tasks_are_not_validated(tmp_path: Path) -> None:
    folder = write(tmp_path, train=[*TRAIN, {"task": "free", "id": 3}, {"task": "free"}])
    assert [task.name for task in load_tasks(folder, ["news"])] == ["news"]


ROW = {"task": "news", "id": "n9", "input": "z", "output": "world"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": ['{"task": "news"', *TRAIN]}, r"train\.jsonl:1: not valid JSON"),
        ({"train": ["[" * 100_000, *TRAIN]}, r"train\.jsonl:1: not valid JSON: it is nested too deeply"),
        ({"dev": [*DEV, "[1]"]}, r"dev\.jsonl:3: expected a JSON object, got list"),
        ({"train": [*TRAIN, {"id": "x"}]}, r"train\.jsonl:4: it lacks 'task'"),
        ({"train": [*TRAIN, {**ROW, "id": 9}]}, r"train\.jsonl:4: id: Input should be a valid string, got 9"),
        (
            {"train": [*TRAIN, {**ROW, "input": None}]},
            r"train\.jsonl:4: input: Input should be a valid string, got None",
        ),
        (
            {"train": [*TRAIN, {k: v for k, v in ROW.items() if k != "output"}]},
            r"train\.jsonl:4: it lacks 'output'",
        ),
        (
            {"dev": [*DEV, {**ROW, "output": "World"}]},
            r"dev\.jsonl:3: output 'World' is not a label of 'news'; labels: \['world', 'sport'\]",
        ),
        ({"train": [*TRAIN, {**ROW, "id": "n0"}]}, r"train\.jsonl:4: id 'n0' appears twice in task 'news'"),
        (
            {"dev": [{**ROW, "input": "c"}, *DEV]},
            r"dev\.jsonl:1: same input as training record 'n1' of 'news'",
        ),
        ({"train": TRAIN[:1]}, r"task 'free' has no train records in .*train\.jsonl"),
        ({"dev": DEV[:1]}, r"task 'news' has no dev records in .*dev\.jsonl"),
        ({"table": []}, r"tasks\.json: expected a JSON object, got list"),
        ({"table": {"tasks": [1]}}, r"tasks\.json: tasks: Input should be a valid dictionary, got \[1\]"),
        (
            {"table": {**TABLE, "orders": [1]}},
            r"tasks\.json: orders: Input should be a valid dictionary, got \[1\]",
        ),
        (
            {"table": {**TABLE, "orders": {"both": "news"}}},
            r"tasks\.json: orders\.both: Input should be a valid list, got 'news'",
        ),
        (
            {"table": {**TABLE, "orders": {"both": [["news"]]}}},
            r"tasks\.json: orders\.both\.0: Input should be a valid string, got \['news'\]",
        ),
        (
            {"table": {"tasks": {"a/b": {"instruction": ""}}, "orders": {"both": ["a/b"]}}},
            "task 'a/b' cannot be used as the name of a folder",
        ),
        (
            {"table": {"tasks": {"..": {"instruction": ""}}, "orders": {"both": [".."]}}},
            r"task '\.\.' cannot be used as the name",
        ),
        ({"table": {**TABLE, "orders": {"both": ["news", "free", "news"]}}}, r"order has task 'news' twice"),
        ({"table": {**TABLE, "orders": {"long": ["news"], "x": []}}}, r"order 'both' is not in .*: long, x$"),
        ({"table": {"tasks": TABLE["tasks"]}}, r"order 'both' is not in .*; known orders: none"),
        (
            {"table": {**TABLE, "tasks": {"free": {"instruction": ""}}}},
            r"task 'news' is not in .* tasks: free$",
        ),
        (
            {"table": {**TABLE, "tasks": {"news": 1, "free": 2}}},
            r"tasks\.json: tasks\.news: Input should be a valid dictionary or instance of _Task, got 1",
        ),
        (
            {"table": {**TABLE, "tasks": {"news": {}, "free": {}}}},
            r"tasks\.json: it lacks 'tasks\.news\.instruction'",
        ),
        (
            {"table": {**TABLE, "tasks": {"free": {"instruction": "", "labels": "ab"}}}},
            r"tasks\.json: tasks\.free\.labels: Input should be a valid list, got 'ab'",
        ),
        (
            {"table": {**TABLE, "tasks": {"free": {"instruction": "", "labels": ["a", "a"]}}}},
            r"tasks\.json: tasks\.free\.labels: a label is listed twice, got \['a', 'a'\]",
        ),
    ],
)
def test_invalid_files_are_named_with_line(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_tasks(write(tmp_path, **files), "both")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": []}, "order has no tasks"),
        ({"order": ["news", "news"]}, "order has task 'news' twice"),
        ({"order": "news"}, "order 'news' is not in"),
        ({"order": "both", "train_limit": 0}, "train_limit must be at least 1, got 0"),
        ({"order": "both", "dev_limit": -1}, "dev_limit must be at least 1, got -1"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tasks(write(tmp_path), **arguments)


def test_missing_and_duplicate_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*absent"):
        load_tasks(tmp_path / "absent", "both")
    with pytest.raises(FileNotFoundError, match=r"tasks\.json"):
        load_tasks(tmp_path, "both")
    write(tmp_path)
    (tmp_path / "dev.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"both .*dev\.jsonl and dev\.jsonl\.gz exist"):
        load_tasks(tmp_path, "both")
    (tmp_path / "dev.jsonl.gz").unlink()
    (tmp_path / "dev.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"dev\.jsonl or dev\.jsonl\.gz"):
        load_tasks(tmp_path, "both")


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-9], lambda raw: b"plain text", lambda raw: raw[:10] + b"\xff" + raw[11:]]
)
def test_a_damaged_compressed_file_is_named(tmp_path: Path, damage: Any) -> None:
    raw = (write(tmp_path) / "dev.jsonl").read_bytes()
    (tmp_path / "dev.jsonl").unlink()
    (tmp_path / "dev.jsonl.gz").write_bytes(damage(gzip.compress(raw)))
    with pytest.raises(ValueError, match=r"dev\.jsonl\.gz: an incomplete gzip file"):
        load_tasks(tmp_path, "both")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with (write(tmp_path) / "train.jsonl").open("ab") as file:
        file.write(b'{"task": "\xff"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:4: not valid JSON"):
        load_tasks(tmp_path, "both")


def numbered(outputs: str, split: str = "") -> list[dict[str, str]]:
    return [
        {"task": "news", "id": str(i), "input": f"{split}{i}", "output": o} for i, o in enumerate(outputs)
    ]


def test_limits_depend_only_on_seed_task_and_split(tmp_path: Path) -> None:
    train, dev = numbered("ab" * 20, "train"), numbered("ab" * 20, "dev")
    other = [{**row, "task": "other"} for row in train]
    tasks = {name: {"instruction": ""} for name in ("news", "other")}
    write(tmp_path, table={"tasks": tasks}, train=[*other, *train], dev=[*dev, {**dev[0], "task": "other"}])

    def ids(order: list[str], **limits: int) -> tuple[list[str], list[str]]:
        task = next(task for task in load_tasks(tmp_path, order, **limits) if task.name == "news")
        return [r.id for r in task.train], [r.id for r in task.dev]

    few_train, few_dev = ids(["news"], train_limit=6, dev_limit=6)
    assert len(few_train) == len(few_dev) == 6
    assert few_train == sorted(few_train, key=int)
    assert few_train != few_dev
    assert ids(["other", "news"], train_limit=6, dev_limit=8)[0] == few_train
    assert ids(["news"], train_limit=6, seed=1)[0] != few_train
    assert ids(["news"], train_limit=99) == ids(["news"])
    chosen_other = load_tasks(tmp_path, ["other"], train_limit=6)[0].train
    assert [r.id for r in chosen_other] != few_train


def test_a_leak_is_found_before_limits_apply(tmp_path: Path) -> None:
    train = numbered("ab" * 20)
    write(tmp_path, train=train, dev=train[:1], table={"tasks": {"news": {"instruction": ""}}})
    with pytest.raises(ValueError, match="same input as training record '0'"):
        load_tasks(tmp_path, ["news"], train_limit=1)


def test_the_public_benchmark_can_be_read() -> None:
    folder = os.environ.get("RKIF_CL15")
    if folder is None or not Path(folder).is_dir():
        pytest.skip("RKIF_CL15 does not name a folder with the 15 benchmark tasks")
    tasks = load_tasks(folder, "long-1")
    assert [task.name for task in tasks[:3]] == ["mnli", "cb", "wic"]
    assert sum(len(task.train) for task in tasks) == 13270
    assert sum(len(task.dev) for task in tasks) == 3175
    for task in load_tasks(folder, "standard-1", train_limit=28, dev_limit=28):
        for split in (task.train, task.dev):
            counts = Counter(record.output for record in split)
            assert set(counts) == set(task.labels)
            assert max(counts.values()) - min(counts.values()) <= 1

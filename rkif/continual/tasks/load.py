"""Reads a sequence of tasks from a folder of JSON lines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from rkif.continual.spelling import did_you_mean
from rkif.continual.tasks.json_lines import DataContent, RecordLine, TaskLine, json_lines
from rkif.continual.tasks.records import Record, Task, require_task_name, stratified_subset
from rkif.files import parse_json, validated
from rkif.seeding import derive_seed


def load_tasks(
    folder: str | os.PathLike[str],
    order: str | Sequence[str],
    *,
    train_limit: int | None = None,
    dev_limit: int | None = None,
    seed: int = 0,
    finished: int = 0,
) -> list[Task]:
    """Read the tasks of one order.

    The folder has `tasks.json`, `{"tasks": {name: {"instruction": str, "labels": [str, ...]}}, "orders":
    {name: [task, ...]}}` (labels and orders are optional, other keys are ignored), and `train.jsonl` and
    `dev.jsonl`, or `.jsonl.gz`, with one `{"task", "id", "input", "output"}` per line. Records of other tasks
    are ignored.

    Args:
        folder: the folder of the files.
        order: the name of an order, or the names of the tasks in the order in which they are learned.
        train_limit: maximum number of training records per task; None for all. The subset is balanced over
            the labels, keeps the file's order, and depends only on the seed, the task and the split.
        dev_limit: maximum number of dev records per task; None for all.
        seed: the seed of the two subsets.
        finished: number of tasks at the start of the order that were learned already. Their training records
            are not read, and need not exist.

    Returns:
        The tasks, in order.

    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        ValueError: an argument or a file is invalid; the message names the file and the line.
    """
    for split, limit in (("train", train_limit), ("dev", dev_limit)):
        if limit is not None and limit < 1:
            raise ValueError(f"{split}_limit must be at least 1, got {limit}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"tasks.folder: no such folder: {folder}")
    table = _read_table(folder / "tasks.json")
    known = table.tasks
    names = _resolve_order(order, table, folder / "tasks.json")
    tasks = {name: (known[name].instruction, tuple(known[name].labels)) for name in names}
    to_learn = {name: tasks[name] for name in names[finished:]}
    train = _read_records(_find(folder, "train"), known, to_learn, {}) if to_learn else {}
    dev = _read_records(_find(folder, "dev"), known, tasks, train)

    def limited(records: tuple[Record, ...], limit: int | None, name: str, split: str) -> tuple[Record, ...]:
        if limit is None:
            return records
        return stratified_subset(records, limit, derive_seed(seed, "limit", name, split))

    return [
        Task(
            name,
            *tasks[name],
            train=limited(train.get(name, ()), train_limit, name, "train"),
            dev=limited(dev[name], dev_limit, name, "dev"),
        )
        for name in names
    ]


class _Task(DataContent):
    instruction: str
    labels: list[str] = Field(default_factory=list)

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str]) -> list[str]:
        if len(set(labels)) < len(labels):
            raise ValueError("a label is listed twice")
        return labels


class _Table(DataContent):
    """``tasks.json``."""

    tasks: dict[str, _Task] = Field(default_factory=dict)
    orders: dict[str, list[str]] = Field(default_factory=dict)


def _read_table(path: Path) -> _Table:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return validated(_Table, parse_json(path.read_bytes(), path, own=False), path, own=False)


def _resolve_order(order: str | Sequence[str], table: _Table, path: Path) -> list[str]:
    orders, known = table.orders, table.tasks
    if isinstance(order, str):
        if order not in orders:
            raise ValueError(
                f"tasks.order: order {order!r} is not in {path}; known orders: {', '.join(orders) or 'none'}"
                f"{did_you_mean(order, orders)}"
            )
        names = orders[order]
    else:
        names = list(order)
    if not names:
        raise ValueError("tasks.order: order has no tasks")
    for place, name in enumerate(names):
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"tasks.order: task {name!r} is not in {path}; known tasks: {', '.join(known) or 'none'}"
                f"{did_you_mean(str(name), known)}"
            )
        require_task_name(name)
        if name in names[:place]:
            raise ValueError(f"tasks.order: order has task {name!r} twice")
    return names


def _find(folder: Path, split: str) -> Path:
    files = [path for path in (folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz") if path.is_file()]
    if not files:
        raise FileNotFoundError(f"no such file: {folder / split}.jsonl or {split}.jsonl.gz")
    if len(files) > 1:
        raise ValueError(f"both {files[0]} and {files[1].name} exist: keep one of them")
    return files[0]


def _read_records(
    path: Path,
    known: Mapping[str, Any],
    tasks: Mapping[str, tuple[str, tuple[str, ...]]],
    train: Mapping[str, Sequence[Record]],
) -> dict[str, tuple[Record, ...]]:
    """Read the records of `tasks`; raise if one has the same input as a training record in `train`."""
    trained = {(record.task, record.input): record.id for records in train.values() for record in records}
    records_by_id: dict[str, dict[str, Record]] = {name: {} for name in tasks}
    for where, row in json_lines(path):
        task = validated(TaskLine, row, where, own=False).task
        if task not in known:
            raise ValueError(f"{where}: task {task!r} is not in tasks.json; known tasks: {', '.join(known)}")
        if task not in tasks:
            continue
        record = Record(**validated(RecordLine, row, where, own=False).model_dump())
        _, labels = tasks[task]
        if labels and record.output not in labels:
            raise ValueError(
                f"{where}: output {record.output!r} is not a label of {task!r}; labels: {list(labels)}"
            )
        if record.id in records_by_id[task]:
            raise ValueError(f"{where}: id {record.id!r} appears twice in task {task!r}")
        # Texts are compared, not ids, because published files number the records of each split from 0.
        if (task, record.input) in trained:
            raise ValueError(
                f"{where}: same input as training record {trained[task, record.input]!r} of {task!r}"
            )
        records_by_id[task][record.id] = record
    for name, records in records_by_id.items():
        if not records:
            raise ValueError(f"task {name!r} has no {path.name.split('.')[0]} records in {path}")
    return {name: tuple(records.values()) for name, records in records_by_id.items()}

"""A sequence of tasks, read from a folder of JSON lines."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkif.seeding import derive_seed


@dataclass(frozen=True)
class Record:
    """One example: the text that is asked about and the answer to give."""

    task: str
    id: str
    input: str
    output: str


Item = tuple[str, Record]
"""A task's instruction and one of its records: what a prompt is made of."""


@dataclass(frozen=True)
class Task:
    """One task of a sequence. `labels` is empty where the answers are free text."""

    name: str
    instruction: str
    labels: tuple[str, ...]
    train: tuple[Record, ...]
    dev: tuple[Record, ...]


def load_tasks(
    folder: str | os.PathLike[str],
    order: str | Sequence[str],
    *,
    train_limit: int | None = None,
    dev_limit: int | None = None,
    seed: int = 0,
    finished: int = 0,
) -> list[Task]:
    """Reads the tasks of one order.

    The folder holds `tasks.json`, `{"tasks": {name: {"instruction": str, "labels": [str, ...]}}, "orders":
    {name: [task, ...]}}` (labels and orders may be left out, other keys are ignored), and
    `train.jsonl` and `dev.jsonl`, either of them also as `.jsonl.gz`, with one
    `{"task", "id", "input", "output"}` a line. Records of tasks that are not asked for are passed over.

    Args:
        folder: where the files lie.
        order: the name of an order, or the names of the tasks in the order in which they are learned.
        train_limit: at most so many training records a task. The subset is as even over the labels as can
            be, keeps the file's order, and depends on nothing but the seed, the task and the split.
        dev_limit: the same for the dev records.
        seed: the seed of the two subsets.
        finished: so many tasks at the start of the order have been learned: their training records, which
            need not be there any more, are not read.

    Returns:
        The tasks, in order.

    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        ValueError: anything else that is wrong with the arguments or the files, named with file and line.
    """
    for split, limit in (("train", train_limit), ("dev", dev_limit)):
        if limit is not None and limit < 1:
            raise ValueError(f"{split}_limit must be at least 1, got {limit}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    known, orders = _read_table(folder / "tasks.json")
    names = _resolve_order(order, orders, known, folder / "tasks.json")
    tasks = {name: _describe_task(name, known[name], folder / "tasks.json") for name in names}
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


def stratified_subset(records: Sequence[Record], n: int, seed: int) -> tuple[Record, ...]:
    """Chooses n records, as evenly over their outputs as can be.

    The outputs, in random order, take turns to give one record each until there are n. So every output with
    enough records gives `n // classes` or one more; where a rare one runs out the others fill its place;
    where there are more outputs than n, n random ones give one record each. A larger n gives a superset.

    Args:
        records: the records to choose from.
        n: how many; all of them where there are no more than that.
        seed: decides which, together with the outputs and their order of appearance. No global state is used.

    Returns:
        The chosen records in the order they had in `records`.
    """
    rng = random.Random(seed)
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.output, []).append(index)
    queues = list(groups.values())
    rng.shuffle(queues)
    for queue in queues:
        rng.shuffle(queue)
    turns = sorted((turn, place, i) for place, queue in enumerate(queues) for turn, i in enumerate(queue))
    return tuple(records[i] for i in sorted(i for _, _, i in turns[:n]))


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("PATH:LINE", object) for each line of a `.jsonl` or `.jsonl.gz` file; blank lines are skipped.

    Raises:
        ValueError: a line is not a JSON object in UTF-8, or the compressed file is damaged.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _json_object(line, f"{path}:{number}")
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from error


def string_field(row: Mapping[str, Any], key: str, where: str) -> str:
    """Returns `row[key]`; raises ValueError, naming `where`, if it is missing or not a string."""
    if key not in row:
        raise ValueError(f"{where}: key {key!r} is missing")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be a string, got {value!r}")
    return value


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_table(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    table = _json_object(path.read_bytes(), str(path))
    for key in ("tasks", "orders"):
        if not isinstance(table.setdefault(key, {}), dict):
            raise ValueError(f"{path}: {key!r} must be an object, got {table[key]!r}")
    return table["tasks"], table["orders"]


def _resolve_order(
    order: str | Sequence[str], orders: Mapping[str, Any], known: Mapping[str, Any], path: Path
) -> list[str]:
    if isinstance(order, str):
        if order not in orders:
            raise ValueError(f"order {order!r} is not in {path}; known orders: {', '.join(orders) or 'none'}")
        names = orders[order]
        if not isinstance(names, list):
            raise ValueError(f"{path}: order {order!r} must be a list of task names, got {names!r}")
    else:
        names = list(order)
    if not names:
        raise ValueError("order has no tasks")
    for place, name in enumerate(names):
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"task {name!r} is not in {path}; known tasks: {', '.join(known) or 'none'}")
        if not re.fullmatch(r"[^/\\.][^/\\]*", name):
            raise ValueError(
                f"task {name!r} cannot be the name of a folder, which it becomes: it has a slash or begins "
                "with a dot"
            )
        if name in names[:place]:
            raise ValueError(f"order has task {name!r} twice")
    return names


def _describe_task(name: str, entry: Any, path: Path) -> tuple[str, tuple[str, ...]]:
    where = f"{path}: task {name!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, got {entry!r}")
    labels = entry.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{where}: 'labels' must be a list of strings, got {labels!r}")
    if len(set(labels)) < len(labels):
        raise ValueError(f"{where}: 'labels' has a label twice: {labels!r}")
    return string_field(entry, "instruction", where), tuple(labels)


def _find(folder: Path, split: str) -> Path:
    found = [path for path in (folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz") if path.is_file()]
    if not found:
        raise FileNotFoundError(f"no such file: {folder / split}.jsonl or {split}.jsonl.gz")
    if len(found) > 1:
        raise ValueError(f"both {found[0]} and {found[1].name} exist: keep one of them")
    return found[0]


def _read_records(
    path: Path,
    known: Mapping[str, Any],
    tasks: Mapping[str, tuple[str, tuple[str, ...]]],
    train: Mapping[str, Sequence[Record]],
) -> dict[str, tuple[Record, ...]]:
    """Reads the records of `tasks`, none of which may have the input of a record of `train`."""
    trained = {(record.task, record.input): record.id for records in train.values() for record in records}
    found: dict[str, dict[str, Record]] = {name: {} for name in tasks}
    for where, row in json_lines(path):
        task = string_field(row, "task", where)
        if task not in known:
            raise ValueError(f"{where}: task {task!r} is not in tasks.json; known tasks: {', '.join(known)}")
        if task not in tasks:
            continue
        record = Record(task, *(string_field(row, key, where) for key in ("id", "input", "output")))
        _, labels = tasks[task]
        if labels and record.output not in labels:
            raise ValueError(
                f"{where}: output {record.output!r} is no label of {task!r}; labels: {list(labels)}"
            )
        if record.id in found[task]:
            raise ValueError(f"{where}: id {record.id!r} appears twice in task {task!r}")
        # By text, not by id: published files number the records of each split from 0.
        if (task, record.input) in trained:
            raise ValueError(
                f"{where}: same input as training record {trained[task, record.input]!r} of {task!r}"
            )
        found[task][record.id] = record
    for name, records in found.items():
        if not records:
            raise ValueError(f"task {name!r} has no {path.name.split('.')[0]} records in {path}")
    return {name: tuple(records.values()) for name, records in found.items()}

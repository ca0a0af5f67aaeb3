"""The replay memory: a few records of every earlier task, which are kept instead of all its data."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from rkif.continual.tasks.json_lines import RecordLine, json_lines
from rkif.continual.tasks.records import Item, Record, stratified_subset
from rkif.files import validated, write_text
from rkif.seeding import derive_seed


class _MemoryLine(RecordLine):
    instruction: str


def memory_size(records: int, fraction: float, cap: int | None = None) -> int:
    """The number of records to keep of a task: at most `cap`, and `max(1, floor(fraction * records))`.

    The product uses the decimal value of `fraction`: 0.29 of 100 records is 29; with floats it would be 28.
    """
    size = max(1, int(Fraction(str(fraction)) * records))
    return size if cap is None else min(size, cap)


class ReplayMemory:
    """A small sample of each earlier task, and an endless walk over it that can start at any step.

    Two memories are equal if they have the same items in the same order.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[Item, ...]] = {}

    def add(
        self,
        task: str,
        instruction: str,
        records: Sequence[Record],
        *,
        fraction: float = 0.02,
        cap: int | None = None,
        seed: int,
    ) -> None:
        """Keep :func:`memory_size` records of a task.

        The sample is balanced over the outputs, see `stratified_subset`. It depends only on the records,
        their number, the seed and the task's name.

        Args:
            task: the task's name.
            instruction: the start of its prompts; stored with the records.
            records: the task's training records.
            fraction: fraction of the records to keep, in (0, 1]. The paper uses 2 %.
            cap: maximum number of records to keep; None for no maximum.
            seed: the run's seed.

        Raises:
            ValueError: the task was added before, there are no records, or one belongs to another task;
                `fraction` is outside (0, 1] or `cap` below 1.
        """
        if task in self._tasks:
            raise ValueError(f"task {task!r} is in the memory already")
        if not records:
            raise ValueError(f"task {task!r} has no records to store")
        for record in records:
            if record.task != task:
                raise ValueError(f"record {record.id!r} belongs to task {record.task!r}, not to {task!r}")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        if cap is not None and cap < 1:
            raise ValueError(f"cap must be at least 1, got {cap}")
        size = memory_size(len(records), fraction, cap)
        kept = stratified_subset(records, size, derive_seed(seed, "memory", task))
        self._tasks[task] = tuple((instruction, record) for record in kept)

    def __len__(self) -> int:
        return sum(map(len, self._tasks.values()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReplayMemory) and self.items == other.items

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in order of addition."""
        return tuple(self._tasks)

    @property
    def by_task(self) -> dict[str, tuple[Item, ...]]:
        """Task -> its (instruction, record) pairs; tasks in order of addition."""
        return dict(self._tasks)

    @property
    def ids(self) -> dict[str, tuple[str, ...]]:
        """Task -> ids of its records."""
        return {task: tuple(record.id for _, record in items) for task, items in self._tasks.items()}

    @property
    def items(self) -> tuple[Item, ...]:
        """All (instruction, record) pairs, task by task in order of addition."""
        return tuple(item for items in self._tasks.values() for item in items)

    def batch(self, step: int, size: int, *, seed: int) -> list[Item]:
        """The batch of one step of the walk over the memory.

        The walk is an endless sequence of epochs. Each epoch passes once over the memory, reshuffled, with
        the tasks interleaved evenly: among its first p items, a task with the fraction w of the memory has
        floor(p * w) or ceil(p * w). Batch `step` has the items [step * size, (step + 1) * size) of the walk.
        It is a function of the memory's content and of the arguments, so a run resumes from its step counter
        alone. With W processes, process r uses the batch of ``step * W + r``.

        Args:
            step: the batch's index, from 0.
            size: number of items; may exceed that of the memory.
            seed: the run's seed.

        Returns:
            `size` items.

        Raises:
            ValueError: the memory is empty, `step` is negative or `size` below 1.
        """
        if not self._tasks:
            raise ValueError("the memory is empty: add a task before drawing a batch")
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        items = self.items
        sizes = tuple(len(kept) for kept in self._tasks.values())
        walk = (divmod(position, len(items)) for position in range(step * size, (step + 1) * size))
        return [items[_epoch_order(sizes, epoch, seed)[place]] for epoch, place in walk]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory as JSON lines, under a temporary name first."""
        rows: list[dict[str, str | int]] = [{"rkif_memory": 1, "records": len(self)}]
        for instruction, record in self.items:
            rows.append({"instruction": instruction, **asdict(record)})
        write_text(Path(path), "".join(json.dumps(row) + "\n" for row in rows))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReplayMemory:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a complete memory; the message names the file and the line.
        """
        path = Path(path)
        lines = json_lines(path)
        where, head = next(lines, (f"{path}:1", {}))
        if head.get("rkif_memory") != 1:
            raise ValueError(f"{where}: not a replay memory: the first line must hold 'rkif_memory': 1")
        items_of_task: dict[str, list[Item]] = {}
        for where, row in lines:
            line = validated(_MemoryLine, row, where)
            record = Record(**line.model_dump(exclude={"instruction"}))
            items_of_task.setdefault(record.task, []).append((line.instruction, record))
        memory = cls()
        memory._tasks = {task: tuple(items) for task, items in items_of_task.items()}
        if len(memory) != head.get("records"):
            raise ValueError(f"{where}: {len(memory)} records; the first line has {head.get('records')}")
        return memory


@lru_cache(maxsize=4)
def _epoch_order(sizes: tuple[int, ...], epoch: int, seed: int) -> tuple[int, ...]:
    """The order of one epoch over tasks of the given sizes, as indices of the memory's items.

    Each task's items are shuffled. Of the first p items of the epoch, p * m / N should be from a task with m
    of the N items. So item j (from 0) of the task has an earliest position p, the first with p * m / N > j,
    and a deadline p = ceil((j + 1) * N / m). Each position takes, among the items that may be there, the one
    with the earliest deadline. This meets all deadlines (Tijdeman, The chairman assignment problem, 1980).
    """
    rng = random.Random(derive_seed(seed, "replay", epoch))
    total, start = sum(sizes), 0
    queues: list[list[int]] = []
    for size in sizes:
        queues.append(rng.sample(range(start, start + size), size))
        start += size
    rng.shuffle(queues)

    order: list[int] = []
    taken = [0] * len(queues)
    for position in range(1, total + 1):
        due = [
            (-(-(taken[i] + 1) * total // len(queue)), i)
            for i, queue in enumerate(queues)
            if taken[i] * total < position * len(queue) and taken[i] < len(queue)
        ]
        _, chosen = min(due)
        order.append(queues[chosen][taken[chosen]])
        taken[chosen] += 1
    return tuple(order)

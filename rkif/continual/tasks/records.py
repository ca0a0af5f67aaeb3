"""What a task is made of: records, and a subset of them that is even over the answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


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

"""Records and tasks, and subsets of records that are balanced over the outputs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One example: an input text and the expected answer."""

    task: str
    id: str
    input: str
    output: str


def require_task_name(name: str) -> str:
    """Return ``name``; raise ValueError unless it can be the name of a folder."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if size > 200:
        problem = "it has more than 200 bytes"
    elif not size:
        problem = "it is empty, or not valid Unicode"
    elif name.startswith(".") or "/" in name or "\\" in name:
        problem = "it has a slash or begins with a dot"
    elif any(ord(character) < 32 or ord(character) == 127 for character in name):
        problem = "it has control characters"
    else:
        return name
    short = name if len(name) <= 60 else f"{name[:60]}..."
    raise ValueError(f"task {short!r} cannot be used as the name of a folder: {problem}")


Item = tuple[str, Record]
"""A task's instruction and one of its records: the content of a prompt."""


@dataclass(frozen=True)
class Task:
    """One task of a sequence. `labels` is empty if the answers are free text."""

    name: str
    instruction: str
    labels: tuple[str, ...]
    train: tuple[Record, ...]
    dev: tuple[Record, ...]


def stratified_subset(records: Sequence[Record], n: int, seed: int) -> tuple[Record, ...]:
    """Choose n records, balanced over their outputs as far as possible.

    Records are drawn round-robin over the outputs, in random order, until there are n. So an output with
    enough records gives `n // classes` or one more; if an output has too few, the others give more. With more
    outputs than n, n random outputs give one record each. A larger n gives a superset.

    Args:
        records: the records to choose from.
        n: number of records to choose; all records if there are fewer.
        seed: seed of the choice, which also depends on the outputs and their order. No global state is used.

    Returns:
        The chosen records in their order in `records`.
    """
    rng = random.Random(seed)
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.output, []).append(index)
    queues = list(groups.values())
    rng.shuffle(queues)
    for queue in queues:
        rng.shuffle(queue)
    choice = sorted((turn, place, i) for place, queue in enumerate(queues) for turn, i in enumerate(queue))
    return tuple(records[i] for i in sorted(i for _, _, i in choice[:n]))

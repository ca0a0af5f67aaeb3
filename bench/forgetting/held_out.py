"""Tasks with more dev records: a fraction of the training records is set aside for evaluation."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

from rkif.continual.tasks.load import load_tasks
from rkif.continual.tasks.records import Record


def hold_out(folder: Path, out: Path, share: float) -> dict[str, tuple[int, int]]:
    """Write the tasks of ``folder`` to ``out`` with the last training records of each task as dev records.

    The standard error of an accuracy falls with the square root of the number of records. The set-aside
    records are evaluated, never trained on, and are the same for every order and seed.

    Args:
        folder: tasks in the layout of docs/guide/experiments.md.
        out: a folder that does not exist.
        share: fraction of each task's training records, between 0 and 1; their number is rounded down.

    Returns:
        Task -> its numbers of training and dev records.

    Raises:
        FileExistsError: ``out`` exists.
        ValueError: ``share`` is out of range; the tasks are invalid; or a record that is set aside has the
            same input as a training record that is not.
    """
    if not 0 < share < 1:
        raise ValueError(f"--share must be between 0 and 1, got {share}")
    table = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    tasks = load_tasks(folder, list(table["tasks"]))
    out.mkdir(parents=True)
    shutil.copyfile(folder / "tasks.json", out / "tasks.json")
    kept = {task.name: len(task.train) - int(len(task.train) * Fraction(str(share))) for task in tasks}
    _write(out / "train.jsonl.gz", [record for task in tasks for record in task.train[: kept[task.name]]])
    evaluated = {task.name: (*task.dev, *task.train[kept[task.name] :]) for task in tasks}
    _write(out / "dev.jsonl.gz", [record for records in evaluated.values() for record in records])
    try:
        load_tasks(out, list(table["tasks"]))
    except ValueError:
        shutil.rmtree(out)
        raise
    return {name: (kept[name], len(evaluated[name])) for name in kept}


def _write(path: Path, records: list[Record]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")

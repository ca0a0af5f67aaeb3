"""``rkif run``: bad, missing and changed records of tasks are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import Rkif
from config_files import changed, write


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"output": "superb"}, "output 'superb' is not a label of 'review'; labels: ['good', 'bad']"),
        ({"output": None}, "output: Input should be a valid string, got None"),
        ({"id": "review-0"}, "id 'review-0' appears twice in task 'review'"),
        (
            {"task": "reviewy"},
            "task 'reviewy' is not in tasks.json; known tasks: review, topic, tense, place",
        ),
    ],
)
def test_bad_records_are_named_with_file_and_line(
    rkif: Rkif, settings: dict[str, Any], inputs: Path, tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("tasks.json", "dev.jsonl"):
        (data / name).write_text((inputs / "tasks" / name).read_text())
    record = {"task": "review", "id": "new", "input": "a new one", "output": "good"}
    train = (inputs / "tasks" / "train.jsonl").read_text() + json.dumps(record | line) + "\n"
    (data / "train.jsonl").write_text(train)
    config = write(tmp_path / "config.yaml", changed(settings, "tasks.folder", str(data)))
    status, _, errors = rkif("run", config, "--out", tmp_path / "out")
    assert (status, errors.count("\n")) == (1, 1)
    assert f"{data / 'train.jsonl'}:{len(train.splitlines())}: {message}" in errors


def test_an_empty_task_is_named(rkif: Rkif, settings: dict[str, Any], inputs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("tasks.json", "dev.jsonl", "train.jsonl"):
        lines = (inputs / "tasks" / name).read_text().splitlines(keepends=True)
        keep = lines if name != "train.jsonl" else [line for line in lines if '"tense"' not in line]
        (data / name).write_text("".join(keep))
    config = write(tmp_path / "config.yaml", changed(settings, "tasks.folder", str(data)))
    status, _, errors = rkif("run", config, "--out", tmp_path / "out")
    assert status == 1
    assert "task 'tense' has no train records in" in errors
    assert not (tmp_path / "out").exists()


def test_free_text_tasks_need_generation(
    rkif: Rkif, settings: dict[str, Any], inputs: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("dev.jsonl", "train.jsonl"):
        (data / name).write_text((inputs / "tasks" / name).read_text())
    table = json.loads((inputs / "tasks" / "tasks.json").read_text())
    del table["tasks"]["tense"]["labels"]
    (data / "tasks.json").write_text(json.dumps(table))
    settings = changed(settings, "tasks.folder", str(data))
    status, _, errors = rkif("run", write(tmp_path / "config.yaml", settings), "--out", tmp_path / "out")
    assert status == 1
    assert "task 'tense' has no labels; its evaluation needs scoring: generation" in errors
    settings = changed(settings, "evaluation", {"scoring": "generation", "max_new_tokens": 2})
    assert rkif("run", write(tmp_path / "config.yaml", settings), "--out", tmp_path / "out")[0] == 0


def test_resume_refuses_changed_data(
    rkif: Rkif, settings: dict[str, Any], inputs: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(inputs / "tasks", data)
    config = write(tmp_path / "config.yaml", changed(settings, "tasks.folder", str(data)))
    assert rkif("run", config, "--out", tmp_path / "out")[0] == 0
    dev = (data / "dev.jsonl").read_text()
    (data / "dev.jsonl").write_text(dev.replace("Answer:", "answer:"))
    status, _, errors = rkif("run", config, "--out", tmp_path / "out", "--resume")
    assert status == 1
    assert "the dev records of task 'review' have changed since this run began" in errors


def test_labels_with_equal_tokens_are_refused(rkif: Rkif, settings: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    table = {"tasks": {"parity": {"instruction": "Even?\n", "labels": ["quux", "zork"]}}}
    (data / "tasks.json").write_text(json.dumps(table))
    for split in ("train", "dev"):
        row = {"task": "parity", "id": "1", "input": f"{split}\nAnswer:", "output": "quux"}
        (data / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    settings["tasks"] = {"folder": str(data), "order": ["parity"]}
    status, _, errors = rkif("run", write(tmp_path / "config.yaml", settings), "--out", tmp_path / "out")
    assert (status, errors.count("\n")) == (1, 1)
    assert "label 'quux' has the same tokens as another label: [1]" in errors

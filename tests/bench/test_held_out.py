"""Training records that are set aside become dev records; nothing is lost or in both splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.forgetting.held_out import hold_out
from rkif.continual.tasks.load import load_tasks
from rkif.demo import write_inputs

TASKS = ["review", "tense", "place"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_inputs(tmp_path, train=41, dev=8, seed=1)
    return tmp_path / "tasks"


def test_the_last_training_records_become_dev_records(folder: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(
        app, ["held-out", "--tasks", str(folder), "--out", str(tmp_path / "out"), "--share", "0.1"]
    )
    assert shown.exit_code == 0, shown.output
    assert "review: 37 training records, 12 dev records" in shown.stdout
    for before, after in zip(load_tasks(folder, TASKS), load_tasks(tmp_path / "out", TASKS), strict=True):
        assert after.train == before.train[:37]
        assert after.dev == before.dev + before.train[37:]
        assert (after.instruction, after.labels) == (before.instruction, before.labels)


def test_records_with_equal_inputs_are_not_separated(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    of_task = [index for index, line in enumerate(lines) if json.loads(line)["task"] == "review"]
    first, last = (json.loads(lines[index]) for index in (of_task[0], of_task[-1]))
    lines[of_task[-1]] = json.dumps(last | {"input": first["input"]})
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="same input as training record"):
        hold_out(folder, tmp_path / "out", 0.1)
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_and_a_wrong_share_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        hold_out(folder, folder, 0.1)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="--share must be between 0 and 1, got"):
            hold_out(folder, tmp_path / "out", share)
    assert not (tmp_path / "out").exists()

"""A repeated round agrees with the ledger, or its differences are named."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_inputs import files, go, make_config, rewrite_ledger
from typer.testing import CliRunner

from rkif.cli import app
from rkif.continual.config import RunConfig
from rkif.continual.display.progress import RunProgress
from rkif.continual.replay_round import reproduce
from rkif.continual.rundir.rollback import rollback
from rkif.ledger.chain import read_ledger


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    loss = {"metric": "memory_loss", "higher_is_better": True}  # refuses some rounds
    go(make_config(inputs, gate={"criteria": [loss], "every": 2}), folder)
    return folder


def quiet() -> RunProgress:
    return RunProgress(Console(file=io.StringIO()))


@pytest.mark.parametrize("number", range(1, 7))
def test_every_round_is_reproduced_and_nothing_is_written(whole: Path, number: int) -> None:
    before = files(whole)
    found = reproduce(whole, number, quiet())
    assert found.differences == {}
    assert found.record["round"] == number
    assert found.start == number - 1
    assert files(whole) == before


def test_a_round_is_reproduced_from_an_earlier_state(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/snapshots/000004.safetensors").unlink()
    found = reproduce(tmp_path / "run", 5, quiet())
    assert (found.start, found.differences) == (3, {})
    (tmp_path / "run/snapshots/000003.safetensors").unlink()
    with pytest.raises(
        ValueError, match="no state of the task was kept from before round 5; kept states: 0, 1"
    ):
        reproduce(tmp_path / "run", 5, quiet())
    failed = CliRunner().invoke(app, ["reproduce", str(tmp_path / "run"), "--round", "99"])
    assert "no round 99: " in str(failed.exception)


def test_a_round_is_reproduced_without_metrics(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()
    assert reproduce(tmp_path / "run", 2, quiet()).differences == {}


def test_a_round_repeated_after_a_rollback_is_reproduced(whole: Path, tmp_path: Path, inputs: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    rollback(tmp_path / "run", 4)
    failed = CliRunner().invoke(app, ["reproduce", str(tmp_path / "run"), "--round", "5"])
    assert "no round 5" in str(failed.exception)
    done = CliRunner().invoke(app, ["reproduce", str(tmp_path / "run"), "--round", "4"])
    assert done.exit_code == 0, done.exception
    assert "round 4 of task place, from the state after round 3: the same data" in done.output
    printed = CliRunner().invoke(app, ["reproduce", str(tmp_path / "run"), "--round", "4", "--json"]).stdout
    assert json.loads(printed) == {"round": 4, "start": 3, "differences": {}}


def test_differences_are_named(whole: Path, tmp_path: Path) -> None:
    """A ledger that was rewritten as a whole has a valid chain, but other values than the training."""
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run/ledger.jsonl"

    def edit(content: dict[str, Any]) -> None:
        if content["event"] == "round" and content["round"] == 2:
            content["counts"] = {**content["counts"], "both": 123456}
            content["parameters"] = {**content["parameters"], "after": "0" * 64}

    rewrite_ledger(path, edit)
    assert list(read_ledger(path))
    found = reproduce(tmp_path / "run", 2, quiet())
    assert sorted(found.differences) == ["counts", "parameters"]
    assert found.differences["counts"][0]["both"] == 123456
    failed = CliRunner().invoke(app, ["reproduce", str(tmp_path / "run"), "--round", "2"])
    assert failed.exit_code == 1
    assert "round 2 was not reproduced: counts, parameters differ" in str(failed.exception)


def test_changed_data_is_refused(config: Callable[..., RunConfig], inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "tasks", tmp_path / "tasks")
    settings = config(tasks=config().tasks.model_dump() | {"folder": str(tmp_path / "tasks")})
    go(settings, tmp_path / "run")
    path = tmp_path / "tasks/train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["task"] == "tense":
            row["input"] += " !"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="the train records of task 'tense' have changed"):
        reproduce(tmp_path / "run", 2, quiet())

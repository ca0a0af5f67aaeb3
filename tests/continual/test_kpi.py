"""User metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_inputs import TASKS, go
from typer.testing import CliRunner

from rkif.cli import app
from rkif.continual.config import RunConfig, load_config
from rkif.continual.tasks.records import Record
from rkif.continual.user_metrics import evaluate_metric, load_metric

CHAIN_KEYS = """
def share_of_first(predictions, records):
    '''How often the answer is that of the first record.'''
    assert len(predictions) == len(records)
    return sum(answer == records[0].output for answer in predictions) / len(records)

def wrong(predictions, records):
    return float("nan")

def broken(predictions, records):
    return 1 / (len(records) - len(predictions))

def word(predictions, records):
    return "many"

constant = 3
"""


def written(config: Callable[..., RunConfig], folder: Path, metrics: Any) -> Path:
    (folder / "own.py").write_text(CHAIN_KEYS)
    settings = config().model_dump(mode="json") | {"metrics": metrics}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def test_a_metric_next_to_the_config_is_computed_stored_and_shown(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = written(config, tmp_path, "own:share_of_first")
    done = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.exception
    assert "recurrent_kif: share_of_first" in done.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    own = metrics["metrics"]["share_of_first"]
    assert len(own["initial"]) == len(TASKS)
    assert [len(row) for row in own["matrix"]] == [3, 3, 3]
    assert all(0 <= value <= 1 for row in own["matrix"] for value in row)
    # The run's config has the absolute path, so the run can be resumed from any folder.
    assert load_config(tmp_path / "run" / "config.yaml").metrics == [f"{tmp_path / 'own.py'}:share_of_first"]
    assert go(load_config(tmp_path / "run" / "config.yaml"), tmp_path / "run", resume=True) == metrics


def test_a_metric_of_an_importable_module_is_computed(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    metrics = go(config(metrics=["kpi_of_the_tests:words"], method="sequential"), tmp_path)
    assert metrics["metrics"]["words"]["initial"] == [8.0, 8.0, 8.0]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("own:wrong", "metric 'wrong' must return a finite number; got nan for task 'review'"),
        ("own:broken", "metric 'broken' failed on task 'review': ZeroDivisionError: division by zero"),
        ("own:word", "metric 'word' must return a finite number; got 'many' for task 'review'"),
        ("own:missing", "has no function 'missing'"),
        ("own:constant", "has no function 'constant'"),
        ("nowhere:f", "'nowhere:f' cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("own", "expected module:function, got 'own'"),
        (["own:wrong", "other:wrong"], "two metrics are named 'wrong'"),
        ("own:accuracy", "two metrics are named 'accuracy'"),
    ],
)
def test_an_invalid_metric_is_one_clear_line(
    config: Callable[..., RunConfig], tmp_path: Path, metrics: Any, message: str
) -> None:
    path = written(config, tmp_path, metrics)
    failed = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "run")])
    assert failed.exit_code == 1
    assert isinstance(failed.exception, ValueError)
    assert message in str(failed.exception)


def test_a_module_that_fails_is_refused_before_anything_is_written(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = written(config, tmp_path, "own:share_of_first")
    (tmp_path / "own.py").write_text("nothing.of_that_name\n")
    failed = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "run")])
    assert "own.py:share_of_first' cannot be imported: NameError: name 'nothing'" in str(failed.exception)
    assert not (tmp_path / "run").exists()


def test_a_metric_may_use_dataclasses_and_return_numpy_numbers(tmp_path: Path) -> None:
    (tmp_path / "numbers_of_my_own.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import numpy as np\n"
        "@dataclass\n"
        "class Sum:\n"
        "    value: int\n"
        "def single(predictions, records):\n"
        "    return np.float32(Sum(len(records)).value / 2)\n"
        "def whole(predictions, records):\n"
        "    return np.int64(len(records))\n"
        "def several(predictions, records):\n"
        "    return np.zeros(2)\n"
    )
    record = Record("t", "1", "question", "answer")
    values = {}
    for name in ("single", "whole"):
        metric = load_metric(f"{tmp_path / 'numbers_of_my_own.py'}:{name}")
        values[name] = evaluate_metric(name, metric, ["a"], [record])
    assert values == {"single": 0.5, "whole": 1.0}
    metric = load_metric(f"{tmp_path / 'numbers_of_my_own.py'}:several")
    with pytest.raises(ValueError, match="must return a finite number"):
        evaluate_metric("several", metric, ["a"], [record])

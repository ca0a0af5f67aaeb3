"""``rkif demo``: its comparison, its claim and its inputs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console
from run_inputs import go

import rkif.demo
from rkif.continual.config import RunConfig, load_config
from rkif.continual.display.progress import comparison_table
from rkif.continual.tasks.load import load_tasks
from rkif.demo import COMPARED, demo, write_inputs
from rkif.demo.sentences import TASKS


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rkif.demo, "CONFIG", rkif.demo.CONFIG.replace("steps: 160", "steps: 4"))


@pytest.mark.usefixtures("short")
def test_demo_compares_the_methods_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), width=120)
    out = tmp_path / "out"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rkif.demo, "write_model", killed)
        with pytest.raises(KeyboardInterrupt):
            demo(out, resume=False, console=console)
    with pytest.raises(ValueError, match="holds a demo; continue with --resume"):
        demo(out, resume=False, console=console)
    runs = demo(out, resume=True, console=console)
    assert {path.name for path in out.iterdir()} == {"config.yaml", "tasks", "model", *COMPARED}
    assert [metrics["method"] for metrics in runs] == ["sequential", "replay", "recurrent_kif"]
    _, _, shown = console.file.getvalue().partition("accuracy in % at the end")
    assert "\x1b" not in shown
    for metrics in runs:
        assert json.loads((out / metrics["method"] / "metrics.json").read_text()) == metrics
        row = next(line for line in shown.splitlines() if line.split()[:1] == [metrics["method"]])
        assert f"{metrics['op']:.1f}" in row
    compared = " ".join(str(out / metrics["method"]) for metrics in runs)
    assert f"\n  rkif report {compared}\n" in shown
    others = sum(
        path.stat().st_size for path in out.rglob("*") if path.is_file() and path.parent.name != "snapshots"
    )
    assert others + load_config(out / "config.yaml").snapshots.budget < 60e6
    with pytest.raises(ValueError, match="holds a demo; continue with --resume"):
        demo(out, resume=False, console=console)
    assert demo(out, resume=True, console=console) == runs
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    with pytest.raises(ValueError, match="is not empty and is not a demo"):
        demo(tmp_path / "foreign", resume=False, console=console)


def test_libraries_write_nothing_during_the_demo(tmp_path: Path) -> None:
    """In a separate process, because libraries also write warnings to its standard error."""
    program = (
        "import rkif.demo; from rkif.cli import main; write = rkif.demo.write_inputs; "
        "rkif.demo.write_inputs = lambda out, **_: write(out, train=60, dev=10, seed=0); "
        "rkif.demo.CONFIG = rkif.demo.CONFIG.replace('steps: 160', 'steps: 2'); main()"
    )
    command = [sys.executable, "-c", program, "demo", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_table_marks_the_best_of_each_column() -> None:
    def metrics(method: str, accuracy: list[float], bwt: float) -> dict[str, Any]:
        return {
            "method": method,
            "tasks": ["first", "second"],
            "split": "dev",
            "accuracy": [[0.0, value] for value in accuracy],
            "op": fmean(accuracy),
            "bwt": bwt,
            "fwt": None,
            "samples": 1000,
        }

    table = comparison_table([metrics("a", [90.0, 50.0], -1.0), metrics("b", [70.0, 50.0], 0.5)])
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["a", "90.0*", "50.0", "70.0*", "-1.0", "-", "1,000"] in rows
    assert ["b", "70.0", "50.0", "60.0", "+0.5*", "-", "1,000"] in rows


def test_fine_tuning_forgets_and_recurrent_kif_does_not(tmp_path: Path) -> None:
    """The demo's claim on its first two tasks, for three seeds, because forgetting depends on the seed.

    Measured: BWT of -50 for each seed of fine-tuning, and of -16, -16 and -10 for Recurrent-KIF.
    """
    write_inputs(tmp_path, train=600, dev=50, seed=0)
    (tmp_path / "config.yaml").write_text(rkif.demo.CONFIG)
    settings = load_config(tmp_path / "config.yaml").model_dump()
    settings |= {"tasks": settings["tasks"] | {"order": list(TASKS)[:2]}, "snapshots": {"budget": 0}}
    ops: dict[str, list[float]] = {"sequential": [], "recurrent_kif": []}
    bwts: dict[str, list[float]] = {"sequential": [], "recurrent_kif": []}
    for method in ops:
        for seed in (1, 2, 3):
            config = RunConfig.model_validate(settings | {"method": method, "seed": seed})
            metrics = go(config, tmp_path / f"{method}-{seed}")
            ops[method].append(metrics["op"])
            bwts[method].append(metrics["bwt"])
    for sequential, recurrent in zip(bwts["sequential"], bwts["recurrent_kif"], strict=True):
        assert sequential < -20
        assert recurrent > sequential + 20
    assert fmean(ops["recurrent_kif"]) > fmean(ops["sequential"]) + 5


def test_inputs_are_complete_and_deterministic(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_inputs(tmp_path / name, train=60, dev=20, seed=0)
    tasks = load_tasks(tmp_path / "a" / "tasks", "demo")
    assert [task.name for task in tasks] == list(TASKS)
    for task in tasks:
        assert (len(task.train), len(task.dev)) == (60, 20)
        assert {record.output for record in task.dev} == set(task.labels)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()

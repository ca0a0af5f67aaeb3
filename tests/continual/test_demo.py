"""``rkif demo``: its comparison, its claim and its inputs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import fmean

import pytest
from rich.console import Console
from run_inputs import go

import rkif.demo
from rkif.continual.config import RunConfig, load_config
from rkif.continual.tasks.load import load_tasks
from rkif.demo import demo, write_inputs
from rkif.demo.sentences import TASKS


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rkif.demo, "CONFIG", rkif.demo.CONFIG.replace("steps: 160", "steps: 4"))


@pytest.mark.usefixtures("short")
def test_demo_compares_the_methods_and_can_be_resumed(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    out = tmp_path / "out"
    runs = demo(out, resume=False, console=console)
    assert [metrics["method"] for metrics in runs] == ["sequential", "replay", "recurrent_kif"]
    _, _, shown = console.file.getvalue().partition("accuracy in % at the end")
    for metrics in runs:
        assert json.loads((out / metrics["method"] / "metrics.json").read_text()) == metrics
        row = next(line for line in shown.splitlines() if line.split()[:1] == [metrics["method"]])
        assert f"{metrics['op']:.1f}" in row
    compared = " ".join(str(out / metrics["method"]) for metrics in runs)
    assert f"`rkif report {compared}` compares" in " ".join(shown.split())
    with pytest.raises(ValueError, match="holds a demo; continue with --resume"):
        demo(out, resume=False, console=console)
    assert demo(out, resume=True, console=console) == runs
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    with pytest.raises(ValueError, match="is not empty and is not a demo"):
        demo(tmp_path / "foreign", resume=False, console=console)


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

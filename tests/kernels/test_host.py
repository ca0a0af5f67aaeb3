"""Launches and compilations of a call are counted with a stub driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.kernels.host import LAUNCHES, Row, missed_goals, problems
from bench.kernels.prediction import fuse, tensor_thresholds
from bench.kernels.shapes import LORA_R8


def test_a_warm_observe_is_one_launch_and_nothing_is_compiled_again(tmp_path: Path) -> None:
    code = (
        "import json, sys; from bench.kernels.host import measure;"
        "json.dump([row._asdict() for row in measure(rounds=1)], open(sys.argv[1], 'w'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path / "rows.json"
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, env=environment)
    rows = json.loads(file.read_text())
    assert {(row["call"], row["tensors"]) for row in rows} == {
        (call, tensors) for call in LAUNCHES for tensors in (1, 160, 640)
    }
    for row in rows:
        assert row["microseconds"] > 0
        assert row["compilations"] == 0, row
        if row["call"].startswith("observe") or row["call"] == "adamw":
            assert row["launches"] == 1, row
        if row["call"] == "fuse":  # as in the prediction, which also counts the fill of the workspace
            assert row["launches"] == len(fuse(LORA_R8, {"bracketed fuse": 1.0})) - 1
        if row["call"].startswith("tensor"):
            searched = len(tensor_thresholds(LORA_R8, {"bracketed scores": 1.0})) - 1
            assert row["launches"] == searched + (row["call"] == "tensor_fuse")


def test_extra_launches_and_recompilations_are_problems() -> None:
    good = [Row(call, 160, 9e9, launches, 0) for call, launches in LAUNCHES.items()]
    assert problems(good) == []
    assert problems([good[0]._replace(launches=2), good[4]._replace(compilations=1)]) == [
        "observe, 160 tensors: 2 launches; at most 1 are needed",
        "fuse, 160 tensors: compiled 1 kernels again",
    ]


def test_a_goal_is_missed_only_by_time() -> None:
    slow, quick, free = Row("fuse", 160, 400.1, 7, 0), Row("fuse", 160, 400, 7, 0), Row("fuse", 1, 9e9, 7, 0)
    assert missed_goals([slow, quick, free]) == ["fuse of 160 tensors takes 400.1 us; the goal is 400"]

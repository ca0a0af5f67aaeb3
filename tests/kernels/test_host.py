"""What a call costs the host is counted on a driver that launches nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


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
        (call, tensors)
        for call in ("observe", "observe_moved", "threshold", "fuse")
        for tensors in (1, 160, 640)
    }
    for row in rows:
        assert row["microseconds"] > 0
        assert row["compilations"] == 0, row
        if row["call"].startswith("observe"):
            assert row["launches"] == 1, row

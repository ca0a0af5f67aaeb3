"""The sweep of random inputs, and bench/gpu.sh, which runs the sweep and all else that needs a GPU."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import rkif_kernels
from bench.__main__ import app
from bench.common import rows
from bench.kernels import sweep

CPU = torch.device("cpu")


def test_a_case_of_the_sweep_depends_only_on_its_seed() -> None:
    one, other = sweep.make_case(7, 5000), sweep.make_case(7, 5000)
    assert one.text == other.text
    assert all(
        torch.equal(a, b) for a, b in zip(one.params[0], other.params[0], strict=True) if a.isfinite().all()
    )


def test_the_sweep_passes_on_correct_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sweep.LARGEST, "cpu", 3000)
    backends = [name for name in sweep.available(CPU) if name != "triton"]
    assert sweep.sweep(CPU, backends, 60, 40, seed=0) == (40, "")


def test_the_sweep_of_graphs_passes_and_finds_a_missing_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, a second call replaces the replay."""
    monkeypatch.setitem(sweep.LARGEST, "cpu", 3000)

    def called_before(run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run

    monkeypatch.setattr(sweep, "captured", called_before)
    assert sweep.sweep(CPU, ["torch"], 60, 40, seed=0, graphs=True) == (40, "")
    monkeypatch.setattr(sweep, "captured", lambda run: run() or (lambda: None))
    done, wrong = sweep.sweep(CPU, ["torch"], 60, 5, seed=0, graphs=True)
    assert (done, "replayed" in wrong) == (0, True)
    monkeypatch.setattr(sweep, "captured", lambda run: None)
    assert sweep.sweep(CPU, ["torch"], 60, 5, 0, graphs=True)[1].endswith("no CUDA graph could be captured")


BUGGY = ["update_importance_", "score_thresholds", "fuse_", "select_and_fuse_"]


@pytest.mark.parametrize(
    ("name", "graphs"), [*product(BUGGY, [False]), ("update_importance_", True), ("select_and_fuse_", True)]
)
def test_the_sweep_finds_a_bug(name: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed last bit of one element of the largest tensor is found, in each operation."""
    monkeypatch.setattr(sweep, "captured", lambda run: run)
    operation = getattr(rkif_kernels, name)

    def buggy(*arguments: Any, **settings: Any) -> Any:
        found = operation(*arguments, **settings)
        written = {"update_importance_": 2, "fuse_": 0, "select_and_fuse_": 0}
        tensors = [found] if name == "score_thresholds" else arguments[written[name]]
        largest = max(tensors, key=torch.Tensor.numel).view(-1)
        if largest.numel():
            integers = largest.view({4: torch.int32, 2: torch.int16}[largest.itemsize])
            integers[-1] ^= 1
        return found

    monkeypatch.setitem(sweep.LARGEST, "cpu", 3000)
    monkeypatch.setattr(sweep, name, buggy)
    done, wrong = sweep.sweep(CPU, ["torch"], 60, 5, 0, graphs)
    assert done < 5
    assert f"seed {done}, torch" in wrong
    assert ("replayed" if graphs else name) in wrong


STUB = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
[[ "$*" != *"$FAILS"* ]]
"""


def run_gpu_script(
    folder: Path, *parts: str, fails: str, stub: str = STUB, **variables: str
) -> tuple[int, list[str], str]:
    """Run bench/gpu.sh with stub programs that record their arguments; returns exit status, calls, output."""
    for name in ("bench/results", "models/smollm2", "models/minilm", "data/cl15", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "bench" / "results" / "gpu.jsonl").touch()
    script = shutil.copy(Path(rows.__file__).parents[1] / "gpu.sh", folder / "bench")
    for name in ("python3", "compute-sanitizer", "ncu", "nvidia-smi"):
        (folder / "bin" / name).write_text(stub)
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "CALLS": str(folder / "calls"), "FAILS": fails}
    environment = {name: value for name, value in environment.items() if name not in ("DEVICE", "OUT")}
    environment |= variables
    done = subprocess.run(
        ["bash", script, *parts], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, (folder / "calls").read_text().splitlines(), done.stdout


def test_every_command_of_the_gpu_script_exists(tmp_path: Path) -> None:
    code, calls, said = run_gpu_script(tmp_path, fails="nothing at all")
    assert code == 0, said
    assert "skipped" not in said
    group = get_command(app)
    seen = set()
    for call in calls:
        _, is_bench, rest = call.partition("-m bench ")
        if is_bench:
            name, *arguments = shlex.split(rest)
            seen.add(name)
            group.commands[name].make_context(name, arguments)  # click refuses arguments that it cannot parse
        elif "-m pytest" in call:
            files = [word for word in call.split() if word.startswith("tests/")]
            files += [word.removeprefix("--ignore=") for word in call.split() if word.startswith("--ignore=")]
            assert files
            assert all((Path(__file__).parents[2] / file).exists() for file in files)
    assert seen >= {
        "sweep",
        "run",
        "goals",
        "profile-13b",
        "launches",
        "checkpoints",
        "overhead",
        "continual",
    }
    configs = {word for call in calls for word in call.split() if word.endswith(".yaml")}
    assert len(configs) == 2
    assert all((Path(__file__).parents[2] / config).exists() for config in configs)


@pytest.mark.parametrize(
    ("part", "fails", "code"),
    [
        ("tests", "-m pytest -x", 1),
        ("tests", "racecheck", 1),
        ("tests", "initcheck", 1),
        ("tests", "--graphs", 1),
        ("speed", "profile-13b", 0),
        ("testing", "nothing at all", 2),
    ],
)
def test_the_gpu_script_fails_if_a_check_fails(tmp_path: Path, part: str, fails: str, code: int) -> None:
    found, _, said = run_gpu_script(tmp_path, part, fails=fails)
    assert found == code, said


def test_a_trial_run_leaves_the_committed_rows(tmp_path: Path) -> None:
    """Every call of bench writes a row, at the place that ``bench.common.rows`` chooses."""
    writes = 'echo row >> "${RKIF_BENCH_RESULTS:-bench/results}/$3.jsonl"\n'
    calls = STUB.replace("[[", writes + "[[")
    for device in ("cpu", "cuda"):
        folder, out = tmp_path / device, tmp_path / f"rows of {device}"
        run_gpu_script(folder, "speed", fails="none", stub=calls, DEVICE=device, OUT=str(out))
        committed = {path.name for path in (folder / "bench" / "results").iterdir()}
        assert (committed == {"gpu.jsonl"}) == (device == "cpu")
        assert (out / "overhead.jsonl").exists()


def test_rows_go_to_the_folder_of_the_environment(tmp_path: Path) -> None:
    program = "from bench.common import rows; print(rows.results_file('cpu'))"
    for variables, folder in (({}, rows.RESULTS), ({"RKIF_BENCH_RESULTS": str(tmp_path)}, tmp_path)):
        environment = {**os.environ, **variables}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == str(folder / "cpu.jsonl")


def test_the_gpu_script_names_missing_packages_first(tmp_path: Path) -> None:
    """A Python without packages gives one line with their names, and no stage starts."""
    script = Path(rows.__file__).parents[1] / "gpu.sh"
    python = tmp_path / "bare"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", script, "tests"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "has no torch, triton, numpy" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "==" not in done.stdout

"""The examples run as their docstrings say, and the notebook runs as its script does."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torchrun import start_program

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PRINTED = {
    "accelerate_loop": r"round 2, [12] processes: {'inner_only'",
    "fsdp2": r"round 2, 2 ranks: {'inner_only'",
    "fuse_checkpoints": r"fused: 4 files and 21 tensors are unchanged",
    "fuse_tensors": r"1348 parameters, selected: {'inner_only'",
    "gate_kpi": r"after the new task: \d+ euro; last verdict: (keep|damp|undo)",
    "lora_loop": r"loss on capitals: 0\.[01]\d, on colours: 0\.[01]\d",  # 5.5 before training
    "serving": r'{"lora_name": "my-tasks", "lora_path": "/.+/run/tasks/02-.+"}',
    "sft_trainer": r"2 fusions, the last one: {'inner_only'",
    "trainer": r"8 fusions, the last one: (?s:.+)loss on capitals: 0\.",
}
# These are started as a user starts them. The others run in forks of a process with the examples' imports.
SEPARATE = ("fuse_tensors", "fsdp2")
EXAMPLE_PROGRAM = Path(__file__).parents[1] / "helpers" / "example_program.py"
PROGRAMS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
    "rkif": [sys.executable, "-m", "rkif"],
}


def commands(script: Path) -> list[str]:
    """The lines of a script's docstring that start a program."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    lines = [line.strip() for line in docstring.splitlines()]
    return [line for line in lines if line.split(" ")[0] in PROGRAMS]


COMMANDS = [(script.stem, line) for script in sorted(EXAMPLES.glob("*.py")) for line in commands(script)]


@pytest.mark.parametrize(("name", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_an_example_runs_as_it_says(name: str, line: str, tmp_path: Path) -> None:
    printed = ""
    for command in line.split(" && "):
        program, *words = shlex.split(command.replace("docs/examples", str(EXAMPLES)))
        if program == "rkif" or name in SEPARATE:
            done = start([*PROGRAMS[program], *words], tmp_path)
        else:
            *options, script = words
            ranks = int(options[options.index("--nproc-per-node") + 1]) if program == "torchrun" else 1
            done = start_program(str(EXAMPLE_PROGRAM), ranks, tmp_path, script)
        assert not done.returncode, done.stderr[-4000:]
        printed += done.stdout
    assert re.search(PRINTED[name], printed), printed[-2000:]


def start(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(EXAMPLES.parents[1]), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_every_example_is_short_listed_and_has_a_command() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert {name for name, _ in COMMANDS} == {script.stem for script in scripts} == PRINTED.keys()
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in scripts:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 60, script.name
        assert f"| [{script.name}]({script.name})" in listed, script.name


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    content = nbformat.read(EXAMPLES / "lora_loop.ipynb", as_version=4)
    nbformat.validate(content)
    nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in content.cells for output in cell.get("outputs", ()))
    assert re.search(PRINTED["lora_loop"], printed), printed

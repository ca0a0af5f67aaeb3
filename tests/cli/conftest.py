"""Fixtures: a run with a gate, an output of rkif fuse, and a pair of keys."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from attestations import write_keys
from checkpoint_files import Triple
from run_inputs import TASKS, go, make_config


@pytest.fixture(scope="session")
def original(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first round is unchecked, and whose second is undone by the gate."""
    run = tmp_path_factory.mktemp("original") / "run"
    loss = {"metric": "memory_loss", "floor": -1, "tolerance": None}
    tasks = {"folder": str(inputs / "tasks"), "order": TASKS[:2]}
    training = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2}
    go(make_config(inputs, tasks=tasks, training=training, gate={"criteria": [loss], "every": 2}), run)
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output of rkif fuse, with a file in a folder and a hidden file."""
    triple = Triple(tmp_path)
    triple.fuse()
    for name in (".hidden", ".git/HEAD"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("content")
    return tmp_path / "out"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path)

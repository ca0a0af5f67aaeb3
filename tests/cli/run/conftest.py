"""Fixtures: small tasks with a small model, and settings of a short run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rkif.demo import write_inputs


@pytest.fixture(scope="package")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, train=20, dev=4, seed=1)
    return folder


@pytest.fixture
def settings(inputs: Path) -> dict[str, Any]:
    return {
        "model": str(inputs / "model"),
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "tasks": {"folder": str(inputs / "tasks"), "order": ["review", "tense"]},
        "text": {"max_length": 64},
        "training": {"steps": 2, "batch_size": 2},
        "outer": {"batch_size": 2},
        "threads": 1,
    }

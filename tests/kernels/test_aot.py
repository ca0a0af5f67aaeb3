"""The ahead-of-time check refuses what it is there to refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def problems() -> dict[tuple[str, str], str]:
    """(kernel, target) -> what was found wrong. In a process of its own: here Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, root / "tests" / "helpers" / "bad_kernels.py"],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (line.split(" | ", 2) for line in done.stdout.splitlines())
    return {(name, target): "".join(found) for name, target, *found in lines}


@pytest.mark.parametrize(
    ("kernel", "target", "complaint"),
    [
        ("narrow", "sm_90", "0 loads of 128 bits where a block needs 2 | 0 stores of 128 bits"),
        ("narrow", "gfx942", "0 loads of 128 bits where a block needs 1 | 0 stores of 128 bits"),
        ("spills", "sm_90", "registers spill"),
        ("narrow", "sm_90", "is compiled anew for every kind of numel"),
        ("contracted", "sm_90", "FFMA in the machine code: not the arithmetic that was written"),
        ("contracted, divides", "sm_90", "fma.rn.f32 in the PTX: not the arithmetic that was written"),
        ("contracted", "gfx942", "fma_f32 in the machine code: not the arithmetic that was written"),
    ],
)
def test_a_bad_kernel_is_refused(
    problems: dict[tuple[str, str], str], kernel: str, target: str, complaint: str
) -> None:
    assert complaint in problems[kernel, target]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_good_kernel_is_not(problems: dict[tuple[str, str], str], target: str) -> None:
    assert problems["good", target] == ""

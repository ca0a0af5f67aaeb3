"""Starts the suite: pytest in a separate process, with an environment for measurements."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.common import rows
from bench.common.options import resolved_device
from bench.kernels.operations import DTYPES, OPERATIONS
from bench.kernels.shapes import SHAPES
from rkif_kernels.checks import require_choice

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Selection:
    """The measurements to make; an empty field means the default of the device."""

    device: str = "auto"
    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    implementation: str = ""
    quick: bool = False
    threads: int | None = None
    memory: float | None = None

    def arguments(self, out: Path) -> list[str]:
        """The arguments of pytest, relative to the root of a checkout.

        Raises:
            ValueError: an operation, a shape or a dtype is unknown.
        """
        choices = (("--only", self.ops, OPERATIONS), ("--shape", self.shapes, SHAPES))
        for option, names, known in (*choices, ("--dtype", self.dtypes, DTYPES)):
            for name in names:
                require_choice(option, name, list(known))
        device = resolved_device(self.device).type
        arguments = [f"bench/kernels/suite/bench_{op}.py" for op in self.ops or OPERATIONS]
        arguments += [
            "-o",
            "python_files=bench_*.py",
            "-o",
            "python_functions=bench_*",
            "-p",
            "no:cacheprovider",
        ]
        arguments += ["-v", "-rs", "--benchmark-disable-gc", "--benchmark-columns=median,rounds"]
        arguments += [f"--device={device}", f"--rows={out.resolve()}"]
        if device == "cuda":
            arguments.append("--benchmark-timer=bench.common.timing.synchronised")
        arguments += [f"--shape={name}" for name in self.shapes] + [f"--dtype={name}" for name in self.dtypes]
        if self.implementation:
            arguments.append(f"--implementation={self.implementation}")
        if self.quick:
            arguments.append("--quick")
        if self.threads is not None:
            arguments.append(f"--threads={self.threads}")
        if self.memory is not None:
            arguments.append(f"--memory={self.memory}")
        return arguments


def run(selection: Selection, out: Path | None, root: Path = ROOT) -> Path:
    """Measure in the checkout at ``root``; rows replace those with the same keys in the results file.

    Args:
        selection: what to measure.
        out: the results file; by default that of the device.
        root: the checkout that is measured.

    Returns:
        The results file.

    Raises:
        RuntimeError: a result was wrong, or nothing could be measured.
    """
    out = out or rows.results_file(resolved_device(selection.device).type)
    command = [sys.executable, "-m", "pytest", *selection.arguments(out)]
    if subprocess.run(command, cwd=root, env=_environment(os.environ, selection), check=False).returncode:
        raise RuntimeError("the suite failed, see above: failed benchmarks have no new row")
    return out


def _environment(inherited: Mapping[str, str], selection: Selection) -> dict[str, str]:
    """The environment with the number of threads, and without Triton's interpreter.

    Variables of a pytest process that has started this one are left out, because the new one would read them.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_")
    }
    if selection.threads is not None:
        kept["OMP_NUM_THREADS"] = str(selection.threads)
    return kept

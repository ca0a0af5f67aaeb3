"""Starts the suite: pytest in a process of its own, with the environment the figures need."""

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
    """What to measure; empty choices mean everything that is measured on the device by default."""

    device: str = "auto"
    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    implementation: str = ""
    quick: bool = False
    threads: int | None = None
    memory: float | None = None

    def arguments(self, out: Path) -> list[str]:
        """Of the pytest process, relative to the root of a checkout.

        Raises:
            ValueError: an operation, a shape or dtypes that do not exist.
        """
        choices = (("--only", self.ops, OPERATIONS), ("--shape", self.shapes, SHAPES))
        for option, names, known in (*choices, ("--dtype", self.dtypes, DTYPES)):
            for name in names:
                require_choice(option, name, list(known))
        device = resolved_device(self.device).type
        found = [f"bench/kernels/suite/bench_{op}.py" for op in self.ops or OPERATIONS]
        found += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-p", "no:cacheprovider"]
        found += ["-v", "-rs", "--benchmark-disable-gc", "--benchmark-columns=median,rounds"]
        found += [f"--device={device}", f"--rows={out.resolve()}"]
        if device == "cuda":
            found.append("--benchmark-timer=bench.common.timing.synchronised")
        found += [f"--shape={name}" for name in self.shapes] + [f"--dtype={name}" for name in self.dtypes]
        if self.implementation:
            found.append(f"--implementation={self.implementation}")
        if self.quick:
            found.append("--quick")
        if self.threads is not None:
            found.append(f"--threads={self.threads}")
        if self.memory is not None:
            found.append(f"--memory={self.memory}")
        return found


def run(selection: Selection, out: Path | None, root: Path = ROOT) -> Path:
    """Measure in the checkout at ``root``; rows replace those of the same keys in the results file.

    Args:
        selection: what to measure.
        out: the results file; by default that of the device.
        root: whose code is measured.

    Returns:
        The results file.

    Raises:
        RuntimeError: a result was wrong, or nothing could be measured.
    """
    out = out or rows.results_file(resolved_device(selection.device).type)
    command = [sys.executable, "-m", "pytest", *selection.arguments(out)]
    if subprocess.run(command, cwd=root, env=_environment(os.environ, selection), check=False).returncode:
        raise RuntimeError("the suite failed, see above: what failed has no new row")
    return out


def _environment(inherited: Mapping[str, str], selection: Selection) -> dict[str, str]:
    """Without Triton's interpreter, whose time means nothing, and with the number of threads.

    And without what a pytest around this one says of itself: it would be taken for its own.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_")
    }
    if selection.threads is not None:
        kept["OMP_NUM_THREADS"] = str(selection.threads)
    return kept

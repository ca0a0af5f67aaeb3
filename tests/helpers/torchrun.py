"""Starts the programs of the tests on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def quiet_environment() -> dict[str, str]:
    """One thread a process: there are more of them than cores."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def start_program(
    program: str, ranks: int, scenario: str, folder: Path, *, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a scenario of a program; what hangs is a failure, too.

    Where ranks are to fail, those that outlive another have three seconds to say why before they are killed.
    """
    patience = ["--monitor-interval", "3"] if fails else []
    launcher = [sys.executable] if ranks == 1 else [*TORCHRUN, *patience, "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*launcher, program, scenario, str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        env=quiet_environment(),
        check=False,
    )

"""Commands of rkif in forked processes, in which the imports are already made."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

PATIENCE = 60.0  # seconds; a command takes less than a tenth of it


@dataclass(frozen=True)
class Ended:
    """How a command ended. ``status`` is None if it had to be killed after :data:`PATIENCE`."""

    status: int | None
    output: str
    errors: str
    seconds: float

    @property
    def complaint(self) -> str | None:
        """The defect of this end (a traceback, an unknown status, not one line of errors), or None."""
        if self.status is None:
            return f"it did not end within {PATIENCE:.0f} s"
        if "Traceback" in self.errors or "Traceback" in self.output:
            return f"a traceback: {self.errors.strip().splitlines()[-1][:200]}"
        if self.status not in (0, 1, 2, 130):
            return f"status {self.status}: {self.errors[-200:]}"
        lines = [line for line in self.errors.splitlines() if line.startswith("rkif: error: ")]
        if self.status in (1, 2) and len(lines) != 1:
            return f"{len(lines)} lines of errors: {self.errors[-200:]!r}"
        return None


def start(arguments: list[str], output: Path, errors: Path) -> int:
    """Fork a process that runs a command line; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        for path, descriptor in ((output, 1), (errors, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["rkif", *arguments]
        from rkif.cli import main

        main()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def command(*arguments: object, kill_after: float | None = None) -> Ended:
    """Run a command to its end, or kill it after ``kill_after`` seconds; the status of a killed one is -9."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "out", Path(folder) / "err"
        began = time.monotonic()
        child = start([str(argument) for argument in arguments], output, errors)
        deadline = began + (PATIENCE if kill_after is None else kill_after)
        ended, status = os.waitpid(child, os.WNOHANG)
        while not ended and time.monotonic() < deadline:
            time.sleep(0.002)
            ended, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - began
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        code = None if not ended and kill_after is None else os.waitstatus_to_exitcode(status)
        said, wrong = (p.read_text(errors="replace") if p.exists() else "" for p in (output, errors))
        return Ended(code, said, wrong, seconds)


def import_everything() -> None:
    """Import what the commands import, and limit PyTorch to one thread, because a fork has no others."""
    import importlib

    torch.set_num_threads(1)
    for module in (
        "rkif.cli",
        "rkif.continual.run",
        "rkif.continual.replay_round",
        "rkif.continual.rundir.rollback",
        "rkif.continual.display.log",
        "rkif.continual.display.report",
        "rkif.checkpoint.fuse",
        "rkif.checkpoint.display",
        "rkif.checkpoint.preflight",
        "transformers.models.llama",
        "peft",
    ):
        importlib.import_module(module)

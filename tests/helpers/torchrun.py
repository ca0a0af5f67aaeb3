"""Starts the programs of the tests on several processes."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import fork_server

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SECONDS = 240  # a longer run counts as hanging


def start_program(
    program: str, ranks: int, *arguments: object, fails: bool = False, torchrun: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a program; a program that hangs fails.

    If a rank is meant to fail, the other ranks have three seconds to report the cause before they are killed.
    The processes are forks of one process with the program's imports. With `torchrun` they are separate
    interpreters, which order sets differently.
    """
    words = [str(argument) for argument in arguments]
    if torchrun:
        patience = ["--monitor-interval", "3"] if fails else []
        command = [*TORCHRUN, *patience, "--nproc-per-node", str(ranks), program, *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=_environment(), check=False
        )
    server = _server(program)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        run = {"ranks": ranks, "arguments": words, "out": out.name, "err": err.name}
        server.stdin.write(json.dumps(run | {"patience": 3.0 if fails else 0.1}) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], SECONDS)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
            raise TimeoutError(f"{words} on {ranks} ranks hangs: {err.read()[-4000:]}")
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, status, out.read(), err.read())


def _environment() -> dict[str, str]:
    """One thread per process, because there are more processes than cores."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


@functools.cache
def _server(program: str) -> subprocess.Popen[str]:
    """Start a server; it ends with this process, because its standard input is then closed."""
    return subprocess.Popen(
        [sys.executable, fork_server.__file__, str(Path(program))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
    )

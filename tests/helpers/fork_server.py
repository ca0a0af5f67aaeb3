"""Runs a test program on several processes, repeatedly: `fork_server.py PROGRAM`.

It replaces torchrun. Every process is a fork of this one, in which the program's imports are already made,
because imports take longer than most test programs. A fork ends as a process of multiprocessing
does: its threads are joined and its output is written, but the interpreter is not cleared, which would take a
second.

A line of standard input is a run, in JSON: the number of "ranks", "arguments", "out" and "err", files for the
output, and "patience", the seconds that the others have to end by themselves when a rank has failed. The
answer is a line with the exit status.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import runpy
import socket
import sys
import time
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

from torch.distributed import TCPStore

ADDRESS = "127.0.0.1"
Fork = multiprocessing.get_context("fork").Process


def launch(run: dict[str, Any]) -> int:
    """Run the ranks to their end; returns the first status that is not zero."""
    # The socket listens before the first rank starts. The store has threads, so it starts after all forks.
    listener = socket.create_server((ADDRESS, 0))
    forks = [Fork(target=become, args=(run, rank, listener)) for rank in range(run["ranks"])]
    for fork in forks:
        fork.start()
    running = {fork.sentinel: fork for fork in forks}
    port, descriptor = listener.getsockname()[1], listener.detach()
    store = TCPStore(
        ADDRESS, port, None, True, timedelta(60), wait_for_workers=False, master_listen_fd=descriptor
    )
    assert store.port == port  # the store lives until the ranks have ended
    failed, deadline = 0, math.inf
    while running:
        ended = wait(running, None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
        for sentinel in ended:
            fork = running.pop(sentinel)
            fork.join()
            if fork.exitcode and not failed:
                failed, deadline = fork.exitcode, time.monotonic() + run["patience"]
        if not ended:
            for survivor in running.values():
                survivor.kill()
            deadline = math.inf
    return failed


def become(run: dict[str, Any], rank: int, listener: socket.socket) -> None:
    """Make this process a rank, and run the program in it; an exception ends the process as usual."""
    port = listener.getsockname()[1]
    listener.close()
    for descriptor, path in ((0, os.devnull), (1, run["out"]), (2, run["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), descriptor)
    if run["ranks"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(run["ranks"]),
            "LOCAL_WORLD_SIZE": str(run["ranks"]),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": ADDRESS,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    sys.argv = [sys.argv[1], *run["arguments"]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # torch.distributed's, which names the rank
        sys.exit(1)


if __name__ == "__main__":
    runpy.run_path(sys.argv[1])  # not as __main__: it only imports
    for line in sys.stdin:
        launcher = os.fork()
        if launcher == 0:
            os._exit(launch(json.loads(line)) & 0xFF)
        print(os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1]), flush=True)

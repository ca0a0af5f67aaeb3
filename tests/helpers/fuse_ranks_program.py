"""`rkif fuse` in small chunks, for the tests of several processes: `fuse_ranks_program.py SETTINGS ...`.

SETTINGS are JSON: "slot", bytes of a chunk; "dies", [rank, number]: killed when that rank writes its record
of that number; "full", [rank, number]: the disk is full then.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from typing import Any

from rkif import cli
from rkif.checkpoint import preflight
from rkif.checkpoint.workdir import Workdir


def main(settings: dict[str, Any]) -> None:
    preflight.MAX_SLOT = settings["slot"]
    rank, records = int(os.environ.get("RANK", "0")), 0
    record = Workdir.record

    def watched(self: Workdir, content: dict[str, Any]) -> None:
        nonlocal records
        records += 1
        if settings.get("dies") == [rank, records]:
            os.kill(os.getpid(), signal.SIGKILL)
        if settings.get("full") == [rank, records]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        record(self, content)

    Workdir.record = watched
    cli.main()


if __name__ == "__main__":
    main(json.loads(sys.argv.pop(1)))

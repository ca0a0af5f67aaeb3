"""Entry point of the command ``rkif`` and of ``python -m rkif``."""

from __future__ import annotations

import os
import signal
from types import FrameType


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; exit at once during an import, because a module could catch the exception."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"rkif: interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line. Ctrl-C ends it at any time, also during its imports."""
    signal.signal(signal.SIGINT, interrupt)
    from rkif.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()

"""``python -m rkif`` is ``rkif``."""

from __future__ import annotations

import os
import signal
from types import FrameType


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; exit at once in an import, where a module could swallow it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"rkif: interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of ``rkif``; Ctrl-C ends it from its first import on."""
    signal.signal(signal.SIGINT, interrupt)
    from rkif.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()

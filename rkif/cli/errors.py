"""How a command fails: one line that names the cause, and exit status 1; 130 where it was interrupted."""

from __future__ import annotations

import sys

import typer
from safetensors import SafetensorError

INTERRUPTED = 130  # as shells count: 128 and the signal's number


def exit_in_one_line(commands: typer.Typer) -> None:
    """Run commands; an error becomes one line on stderr and exit status 1."""
    try:
        commands()
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != INTERRUPTED:  # typer makes one of the other
            raise
        print("rkif: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, SafetensorError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            message = f"{error.strerror}: {error.filename}"
        print(f"rkif: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(1) from None

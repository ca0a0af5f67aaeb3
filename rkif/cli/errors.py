"""How a command fails: one line that names the cause, and exit status 1."""

from __future__ import annotations

import sys

import typer
from safetensors import SafetensorError


def exit_in_one_line(commands: typer.Typer) -> None:
    """Run commands; what is wrong with the input is said in one line, and the exit status is 1."""
    try:
        commands()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, SafetensorError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            message = f"{error.strerror}: {error.filename}"
        print(f"rkif: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(1) from None

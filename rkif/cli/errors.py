"""The end of a command: exit status, and an error as one line that names the cause.

The exit status is 0 for success, 1 for an error, 2 for wrong options or arguments, and 130 after an
interrupt.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
from safetensors import SafetensorError

from rkif.files import problem_in_words

USAGE = 2
INTERRUPTED = 130  # as in shells: 128 + the signal's number
DEBUG = "--debug"


def exit_in_one_line(commands: typer.Typer) -> None:
    """Run commands, and end the process; with --debug anywhere in the arguments, print tracebacks."""
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    try:
        status = commands(args=arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        # The exceptions of wrong arguments are typer's or click's, depending on the version. Both have this.
        usage = hasattr(error, "format_message")
        expected = (ValueError, TypeError, RuntimeError, OSError, ImportError, SafetensorError)
        if not usage and not isinstance(error, expected):
            raise
        if DEBUG in sys.argv:
            traceback.print_exc()
        message = _usage_message(error) if usage else _message(error)
        print(f"rkif: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(USAGE if usage else 1) from None
    if status == INTERRUPTED:
        print("rkif: interrupted", file=sys.stderr)
    raise SystemExit(status)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def _usage_message(error: Any) -> str:
    """The error in the arguments, and the command that shows the options."""
    message = error.format_message().strip().removesuffix(".")
    parameter, cause = getattr(error, "param", None), error.__cause__
    if parameter is not None:
        longest = max(parameter.opts, key=len)
        name = longest if longest.startswith("-") else parameter.metavar or longest.upper()
        if message.startswith("Missing "):
            message = f"{name} is missing"
        elif hasattr(cause, "errors"):  # pydantic's error of a value
            message = f"{name} {problem_in_words(cause.errors()[0])}"
    if not message.startswith("-") and not message[:2].isupper():
        message = message[:1].lower() + message[1:]
    return message if error.ctx is None else f"{message}; see {error.ctx.command_path} --help"

"""Shared by the groups of commands: options, sizes in bytes, slow imports and the line before them."""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue interrupted work in the folder, if any.")]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; progress goes to stderr.")]

_SIZE = re.compile(r"\s*(\d*\.?\d+)\s*([kmgtpe]?)(i?)(b?)\s*", re.IGNORECASE)
_POWERS = " kmgtpe"  # of 1000, or of 1024 with an i


def parse_size(option: str, text: str) -> int:
    """The number of bytes in "500MB", "2GiB" or "4096B".

    Raises:
        ValueError: the text is not a size, has no unit, or is less than a byte or not less than 8 EiB; it
            names the option.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{option} must be a size such as 2GiB or 500MB; got {text!r}")
    if not match[2] and not match[4]:
        raise ValueError(f"{option} needs a unit, such as 2GiB or 500MB; got {text!r}")
    size = float(match[1]) * (1024 if match[3] else 1000) ** _POWERS.index(match[2].lower() or " ")
    if size < 1:
        raise ValueError(f"{option} must be at least one byte; got {text!r}")
    if size >= 2**63:  # the first size that PyTorch cannot count
        raise ValueError(f"{option} must be less than 8EiB; got {text!r}")
    return int(size)


def announce(line: str, *, quiet: bool = False) -> None:
    """Print the first line of a command on a terminal, before slow imports. Logs and pipes do not get it.

    Under torchrun, only the first process prints it.
    """
    if not quiet and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


@contextmanager
def importing() -> Iterator[None]:
    """Import in the block without garbage collection, whose passes slow the import of PyTorch.

    ``gc.freeze`` excludes the imported objects from later passes.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # at exit, C++ libraries report objects that were not collected as leaks
        gc.enable()

"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Number of CPU threads.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Number of rounds.")]
Rows = Annotated[Path | None, typer.Option("--out", help="File for the rows.", show_default="by device")]


def resolved_device(requested: str) -> torch.device:
    """The device that ``--device`` names; "auto" is a GPU if there is one, else the CPU.

    Raises:
        ValueError: ``requested`` is not auto, cpu or cuda.
        RuntimeError: ``requested`` is "cuda", and PyTorch finds no CUDA device.
    """
    if requested not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda; got {requested!r}")
    there = torch.cuda.is_available()
    if requested == "cuda" and not there:
        raise RuntimeError("--device cuda: PyTorch finds no CUDA device")
    return torch.device(("cuda" if there else "cpu") if requested == "auto" else requested)

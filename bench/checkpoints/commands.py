"""``python -m bench``: the command that measures fusions on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.common.options import Rounds, resolved_device

app = typer.Typer()


@app.command("checkpoints")
def checkpoints_command(
    folder: Annotated[Path, typer.Option("--folder", help="For the checkpoints and an output.")] = Path(
        "data/checkpoints"
    ),
    layers: Annotated[int, typer.Option("--layers", min=1, help="12 take 440 MB, 96 take 2.6 GB.")] = 12,
    peers: Annotated[
        Path | None,
        typer.Option("--peers", help="Python of an environment with mergekit and peft.", show_default="none"),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Device of rkif: auto, cpu or cuda.")] = "auto",
    rounds: Rounds = 3,
) -> None:
    """Compare `rkif fuse` with mergekit and peft."""
    from bench.checkpoints.peers import compare

    chosen = resolved_device(device)
    compare(folder, layers, peers, chosen, rounds, Console())

